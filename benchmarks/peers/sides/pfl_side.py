"""pfl-research as its language-model benchmarks train: federated averaging, a Gaussian applied centrally, Adam.

Users are drawn by its own sampler `random`, noise is found by its own accountant; local steps and Adam's ε are those
of its benchmark with Hugging Face models.
"""

import types

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam.base import NNTrainHyperParams
from pfl.model.pytorch import PyTorchModel
from pfl.privacy import CentrallyAppliedPrivacyMechanism, GaussianMechanism, PLDPrivacyAccountant
from side import Clock, leave, load_model, load_rows, opened, row_losses, versions

LOCAL_LEARNING_RATE, ADAPTIVITY = 0.1, 1e-4


class Users:
    """Each user's data set, at most so many rows of it, drawn anew each time; counts the rows that were asked for."""

    def __init__(self, rows, users, group_size, seed):
        self.rows, self.group_size = rows, group_size
        self.bounds = np.searchsorted(users, np.arange(users.max() + 2))
        self.draws = np.random.default_rng(seed)
        self.asked = 0

    def dataset(self, user):
        own = np.arange(self.bounds[user], self.bounds[user + 1])
        taken = self.draws.permutation(own)[: self.group_size]
        self.asked += len(taken)
        return Dataset(raw_data=[torch.from_numpy(self.rows[taken])], user_id=str(user))


def main():
    folder, task = opened()
    torch.manual_seed(task.seed)
    np.random.seed(task.seed)
    rows, owners = load_rows(folder)
    users, population = Users(rows, owners, task.group_size, task.seed), int(owners.max()) + 1
    model = load_model(folder)
    model.loss = types.MethodType(lambda self, batch: row_losses(self.train(), batch).mean(), model)
    model.metrics = types.MethodType(lambda self, batch: {}, model)
    adam = torch.optim.Adam(model.parameters(), task.learning_rate, eps=ADAPTIVITY)
    accountant = PLDPrivacyAccountant(
        num_compositions=task.steps,
        sampling_probability=task.cohort / population,
        mechanism="gaussian",
        epsilon=task.epsilon,
        delta=task.delta,
    )
    mechanism = GaussianMechanism.from_privacy_accountant(
        accountant=accountant, clipping_bound=task.clip_norm * LOCAL_LEARNING_RATE
    )
    data = FederatedDataset(users.dataset, get_user_sampler("random", list(range(population))))
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=task.steps,
            evaluation_frequency=10**6,
            train_cohort_size=task.cohort,
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(
            training_data=data, val_data=data, postprocessors=[CentrallyAppliedPrivacyMechanism(mechanism)]
        ),
        model=PyTorchModel(model, local_optimizer_create=torch.optim.SGD, central_optimizer=adam),
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=LOCAL_LEARNING_RATE, local_batch_size=task.group_size
        ),
        callbacks=[],
        send_metrics_to_platform=False,
    )
    leave(
        folder,
        model,
        **clock.read(),
        gradients=users.asked,
        stated_epsilon=task.epsilon,
        mechanism={
            "kind": "cohort-with-replacement",
            "cohort": task.cohort,
            "population": population,
            "noise_multiplier": mechanism.relative_noise_stddev,
            "steps": task.steps,
        },
        versions=versions("pfl", "dp-accounting"),
    )


if __name__ == "__main__":
    main()
