"""MLflow: a store in the run's folder, or the server that MLFLOW_TRACKING_URI names."""

import os
import time
from collections.abc import Mapping

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when the library is imported
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from server.callbacks.trackers.flat import Scalar
from server.callbacks.trackers.tracker import PROJECT, Opening, Tracked

STORE = "mlflow.db"
MOST_AT_ONCE = 100
"""Options in a call, as MLflow's servers take them."""


class _Run:
    """A run in an MLflow store. Its client, unlike MLflow's fluent calls, adds nothing of the machine by itself."""

    def __init__(self, run: Opening) -> None:
        local = f"sqlite:///{(run.folder / STORE).absolute()}"
        self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))
        self._rounds = run.first_round
        if run.known:
            self.key = run.known
            self._client.update_run(self.key, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if known is None else known.experiment_id
        self.key = str(self._client.create_run(experiment, run_name=run.name).info.run_id)
        options = [Param(option, str(value)) for option, value in run.options.items()]
        for first in range(0, len(options), MOST_AT_ONCE):
            self._client.log_batch(self.key, params=options[first : first + MOST_AT_ONCE])

    def log(self, round: int, numbers: Mapping[str, float]) -> None:
        self._rounds, now = round, int(1000 * time.time())
        self._client.log_batch(self.key, metrics=[Metric(name, value, now, round) for name, value in numbers.items()])

    def summarise(self, outcome: Mapping[str, Scalar]) -> None:
        numbers = {name: float(value) for name, value in outcome.items() if not isinstance(value, str)}
        self.log(self._rounds, {f"summary/{name}": value for name, value in numbers.items()})
        words = [RunTag(f"summary/{name}", value) for name, value in outcome.items() if isinstance(value, str)]
        self._client.log_batch(self.key, tags=words)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self.key, "FINISHED" if finished else "KILLED")


def begin(run: Opening) -> Tracked:
    """Begin, or go on with the run of the same id."""
    return _Run(run)
