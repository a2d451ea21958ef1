"""Runs in pfl-research's own environment: `python pfl_rounds.py ROUNDS THREADS TASK OUTPUT.npz`, or under torchrun.

Writes each round's seconds and this process's processor seconds, and the parameters after one round without noise,
which shows that both sides compute the same. Imports nothing of fedsim but the task, which lies beside this file.
"""

import json
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
from small_task import Task, make_model, make_users, padded


class Clock(TrainingProcessCallback):
    """Notes when each round ends."""

    def __init__(self) -> None:
        self.ends = [(time.perf_counter(), time.process_time())]

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        self.ends.append((time.perf_counter(), time.process_time()))
        return False, Metrics()


def train(task: Task, users: list[torch.Tensor], rounds: int, noise_multiplier: float) -> tuple[np.ndarray, dict]:
    """Each round's seconds and processor seconds [rounds, 2], and the final parameters.

    Users come in order, cohort by cohort.
    """
    model = make_model(task)
    adam = torch.optim.Adam(model.parameters(), task.learning_rate, betas=task.betas, eps=task.epsilon)
    pfl_model = PyTorchModel(model, local_optimizer_create=torch.optim.SGD, central_optimizer=adam)
    order = iter(range(10**9))
    data = FederatedDataset(
        lambda user: Dataset(raw_data=[users[user]], user_id=str(user)),
        lambda: next(order) % task.users,
        user_id_to_weight={user: len(rows) for user, rows in enumerate(users)},
    )
    mechanism = CentrallyAppliedPrivacyMechanism(GaussianMechanism(task.clip_norm, noise_multiplier))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=10**6,
            train_cohort_size=task.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(training_data=data, val_data=data, postprocessors=[mechanism]),
        model=pfl_model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=task.local_learning_rate, local_batch_size=task.most_sentences
        ),
        callbacks=[clock],
        send_metrics_to_platform=False,
    )
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    return np.diff(clock.ends, axis=0), parameters


def main() -> None:
    rounds, threads, task, output = int(sys.argv[1]), int(sys.argv[2]), Task(**json.loads(sys.argv[3])), sys.argv[4]
    torch.set_num_threads(threads)
    users = [torch.from_numpy(padded(sentences, task)) for sentences in make_users(task)]
    _, after_one = train(task, users, 1, 0.0)
    seconds, _ = train(task, users, rounds, task.noise_multiplier)
    if pytorch_ops.distributed.global_rank == 0:
        np.savez(output, seconds=seconds, **after_one)


if __name__ == "__main__":
    main()
