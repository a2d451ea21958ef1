"""Runs in pfl-research's own environment: `python pfl_rounds.py ROUNDS THREADS OUTPUT.npz`, or under torchrun.

Writes the seconds of each round, and the parameters after the first round without noise, which shows that both sides
compute the same. Imports nothing of fedsim but the task, which lies beside this file.
"""

import sys
import time

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.internal.ops import pytorch_ops
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from pfl.privacy.gaussian_mechanism import GaussianMechanism
from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism
from small_task import CLIP_NORM, LEARNING_RATE, NOISE_MULTIPLIER, Task, make_model, make_users


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ends.append(time.perf_counter())
        return False, Metrics()


def train(task: Task, users: list[torch.Tensor], rounds: int, noise_multiplier: float) -> tuple[list[float], dict]:
    """Seconds of each round, and the final parameters. Users come in order, cohort by cohort."""
    model = make_model(task)
    pfl_model = PyTorchModel(
        model,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(model.parameters(), LEARNING_RATE),
    )
    order = iter(range(10**9))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=[users[user]], user_id=str(user)),
        lambda: next(order) % task.users,
        user_id_to_weight={user: len(rows) for user, rows in enumerate(users)},
    )
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(CLIP_NORM, noise_multiplier))
    clock = Clock()
    began = time.perf_counter()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=task.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[mechanism]),
        model=pfl_model,
        model_train_params=NNTrainHyperParams(local_num_epochs=1, local_learning_rate=1.0, local_batch_size=None),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return np.diff([began, *clock.ends]).tolist(), parameters


def main() -> None:
    rounds, threads, output = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(threads)
    task = Task()
    users = [torch.from_numpy(rows) for rows in make_users(task)]
    _, after_one = train(task, users, 1, 0.0)
    seconds, _ = train(task, users, rounds, NOISE_MULTIPLIER)
    if pytorch_ops.distributed.global_rank == 0:
        np.savez(output, seconds=seconds, **after_one)


if __name__ == "__main__":
    main()
