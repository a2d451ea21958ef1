"""Flower's FedAvg inside its strategy with clipping on the server, on its own simulation engine; a client is a user.

Clients take one step of gradient descent on some of their rows. The learning rate is that step's, and updates are
clipped to it times the clip norm. All clients weigh the same, which its accountant asks for.
"""

import json
import time

import psutil
import side
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, NeighboringRelation, PrivacyConfig, RdpAccountant, SamplingMethod, ServerApp
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg
from flwr.simulation import run_simulation
from side import Clock, leave, load_model, load_rows, opened, row_losses, versions


def arrays_of(model):
    """The model's parameters, each once: tied ones would be clipped and noised twice in its state."""
    return ArrayRecord({name: value.detach() for name, value in model.named_parameters()})


def load(model, arrays):
    model.load_state_dict(arrays.to_torch_state_dict(), strict=False)


def client_app(folder, task):
    """A ClientApp of all users: the node's partition says which one it is."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import numpy as np

        if not side.HELD:
            rows, owners = load_rows(folder)
            bounds = np.searchsorted(owners, np.arange(owners.max() + 2))
            side.HELD.update(model=load_model(folder).train(), rows=rows, bounds=bounds)
        model, user = side.HELD["model"], int(context.node_config["partition-id"])
        round_number = int(message.content["config"]["server-round"])
        draws = np.random.default_rng([task.seed, round_number, user])
        own = np.arange(side.HELD["bounds"][user], side.HELD["bounds"][user + 1])
        rows = side.HELD["rows"][draws.permutation(own)[: task.group_size]]
        load(model, message.content["arrays"])
        descent = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
        descent.zero_grad()
        row_losses(model, torch.from_numpy(rows)).mean().backward()
        descent.step()
        content = {
            "arrays": arrays_of(model),
            "metrics": MetricRecord({"num-examples": 1, "rows": len(rows)}),
        }
        return Message(content=RecordDict(content), reply_to=message)

    return app


def server_app(folder, task, users):
    """A ServerApp that waits for all users' nodes, trains, and leaves what came of it."""
    app = ServerApp()

    @app.main()
    def serve(grid: Grid, context: Context) -> None:
        while len(list(grid.get_node_ids())) < users:
            time.sleep(0.1)  # virtual nodes register one by one
        model = load_model(folder)
        accountant = RdpAccountant(
            PrivacyConfig(
                target_delta=task.delta,
                population_size=users,
                neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE,
                sampling_method=SamplingMethod.NO_AMPLIFICATION,  # the only one that the strategy takes
            )
        )
        strategy = DifferentialPrivacyServerSideFixedClipping(
            FedAvg(fraction_train=(task.cohort + 0.5) / users, fraction_evaluate=0.0),
            noise_multiplier=task.noise_multiplier,
            clipping_norm=task.clip_norm * task.learning_rate,
            num_sampled_clients=task.cohort,
            accountant=accountant,
        )
        clock, before = Clock(), processors()
        result = strategy.start(
            grid=grid,
            initial_arrays=arrays_of(model),
            num_rounds=task.steps,
            train_config=ConfigRecord({}),
        )
        times = clock.read() | {"processor_seconds": processors() - before}
        rows = sum(round_metrics["rows"] for round_metrics in result.train_metrics_clientapp.values())
        load(model, result.arrays)
        leave(
            folder,
            model,
            **times,
            gradients=rows * task.cohort,
            stated_epsilon=strategy.privacy_spent().epsilon,
            mechanism={
                "kind": "fixed-cohort",
                "cohort": task.cohort,
                "population": users,
                "noise_multiplier": task.noise_multiplier,
                "steps": task.steps,
            },
            versions=versions("flwr", "ray"),
        )

    return app


def processors():
    """Processor seconds so far of this process and those that it began, Flower's actors among them."""
    found = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.Error:
            continue
        found += times.user + times.system
    return found


def main():
    folder, task = opened()
    users = int(load_rows(folder)[1].max()) + 1
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app(folder, task, users), client_app(folder, task), users, backend_config=resources)
    json.loads((folder / "report.json").read_text(encoding="utf-8"))  # it says so where the server left none


if __name__ == "__main__":
    main()
