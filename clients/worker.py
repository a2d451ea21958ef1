"""What stays in a client process between messages: the model, the store, and the micro-batch that fits."""

import functools
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord

from fedsim.config import RunConfig, from_flat
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.gradients import ClippedSum, ParameterLayout, clipped_local_updates, clipped_sum
from fedsim.models.evaluate import row_measurements
from fedsim.plan import Plan, UlsPlan, plan_from_json
from fedsim.resources import open_resources
from fedsim.rows import TokenRows

logger = logging.getLogger(__name__)


class Worker:
    """Computes updates and evaluations with one resident model.

    Args:
        config: The run's configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        resources = open_resources(config)
        self.config = config
        self.store = resources.store
        self.objective = resources.loaded.objective
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = resources.loaded.model.to(self.device)
        self.layout = ParameterLayout.of(self.model)
        self.max_tokens = config.engine.max_tokens or None

    def train(self, request: TrainRequest) -> TrainReply:
        """The clipped sum over the request's units."""
        started = time.perf_counter()
        plan = plan_from_json(request.plan)
        train = self.store.split("train")
        row_indices, unit_ids = plan.rows_of(train, request.units, request.round, request.sampling_seed)
        rows = train.take(row_indices)
        self._load(request.parameters)
        result = self._with_memory_left(lambda max_tokens: self._clipped(plan, request, rows, unit_ids, max_tokens))
        finite = result.finite.cpu().numpy()
        norms = result.norms.cpu().numpy()
        losses = result.losses.cpu().numpy()
        return TrainReply(
            round=request.round,
            units=request.units,
            total=result.total.cpu().numpy(),
            statistics={
                "loss_sum": float(losses[finite].sum()),
                "clipped_units": float((norms[finite] > request.clip_norm).sum()),
                "nonfinite_units": float((~finite).sum()),
                "rows": float(len(rows)),
                "tokens": float(len(rows.tokens)),
                "seconds": time.perf_counter() - started,
            },
        )

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Loss, predicted tokens and correct predictions of each row."""
        rows = self.store.split(request.split).take(request.rows)
        self._load(request.parameters)
        measured = row_measurements(self.model, rows, self.objective, device=self.device)
        return EvaluateReply(
            rows=request.rows,
            loss_sum=measured.loss_sum,
            label_count=measured.label_count,
            correct=measured.correct,
        )

    def _load(self, parameters: ArrayRecord) -> None:
        self.layout.load(self.model, torch.from_numpy(parameters["flat"].numpy()))

    def _clipped(
        self, plan: Plan, request: TrainRequest, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        common: dict[str, Any] = {
            "objective": self.objective,
            "weighting": plan.weighting,
            "max_tokens": max_tokens,
            "num_units": len(request.units),
        }
        if isinstance(plan, UlsPlan) and plan.local_steps > 1:
            return clipped_local_updates(
                self.model,
                rows,
                unit_ids,
                request.clip_norm,
                local_steps=plan.local_steps,
                local_learning_rate=plan.local_learning_rate,
                **common,
            )
        return clipped_sum(self.model, rows, unit_ids, request.clip_norm, method=self.config.gradients, **common)

    def _with_memory_left(self, compute: Any) -> ClippedSum:
        """compute(max_tokens), with the micro-batch halved for good each time the device runs out of memory."""
        while True:
            try:
                return compute(self.max_tokens)
            except torch.OutOfMemoryError:
                smaller = (self.max_tokens or self.config.data.sequence_length * 64) // 2
                if smaller < self.config.data.sequence_length:
                    raise
                logger.warning("out of memory: micro-batches shrink to %d tokens", smaller)
                self.max_tokens = smaller
                torch.cuda.empty_cache()


def resident_worker(run_config: Mapping[str, Any]) -> Worker:
    """The worker of this process for a run; built at its first message."""
    return _worker(json.dumps(dict(run_config), sort_keys=True))


@functools.lru_cache(maxsize=1)
def _worker(run_config: str) -> Worker:
    return Worker(from_flat(RunConfig, json.loads(run_config)))
