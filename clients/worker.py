"""What stays in a client process between messages: the model, the store, and the micro-batch that fits."""

import functools
import json
import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.config import RunConfig, from_flat
from fedsim.engine.evaluation_messages import EvaluateReply, EvaluateRequest
from fedsim.engine.exact import quantise
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.gradients import (
    ClippedSum,
    LocalSteps,
    ParameterLayout,
    clipped_sum,
    clipped_units,
)
from fedsim.models.evaluate import evaluate_rows
from fedsim.plan import Plan, UlsPlan, plan_from_json
from fedsim.resources import open_resources
from fedsim.rows import TokenRows

logger = logging.getLogger(__name__)

Fetched = tuple[TokenRows, np.ndarray]
"""Rows, and the position of each row's unit among the units asked for."""


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
        self.vocabulary = len(resources.loaded.tokenizer)
        self.max_tokens = config.engine.max_tokens or None
        if config.engine.exact:
            # Sums inside a matrix product depend on the number of threads, so exact runs fix it on every engine.
            torch.set_num_threads(config.engine.cpus_per_worker)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[tuple[str, int, bytes], Future[Fetched] | None] = (("", -1, b""), None)

    def train(self, request: TrainRequest) -> TrainReply:
        """The clipped sum over the request's units."""
        started = time.perf_counter()
        plan = plan_from_json(request.plan)
        rows, unit_ids = self._fetched(plan, request)
        self._fetch_ahead(plan, request)
        self.layout.load(self.model, request.parameters["flat"].numpy())
        compute = self._exact if request.resolution else self._clipped
        result = self._with_memory_left(lambda tokens: compute(plan, request, rows, unit_ids, tokens))
        finite = result.finite.cpu().numpy()
        return TrainReply(
            round=request.round,
            units=request.units,
            total=result.total.cpu().numpy(),
            statistics={
                "loss_sum": float(result.losses.cpu().numpy()[finite].sum()),
                "clipped_units": float((result.norms.cpu().numpy()[finite] > request.clip_norm).sum()),
                "nonfinite_units": float((~finite).sum()),
                "empty_units": float((result.norms.cpu().numpy()[finite] == 0).sum()),
                "rows": float(len(rows)),
                "tokens": float(len(rows.tokens)),
                "seconds": time.perf_counter() - started,
            },
        )

    def evaluate(self, request: EvaluateRequest) -> EvaluateReply:
        """Loss, predicted tokens and correct predictions of each row."""
        rows = self.store.split(request.split).take(request.rows)
        self.layout.load(self.model, request.parameters["flat"].numpy())
        losses = evaluate_rows(self.model, rows, self.objective, device=self.device)
        return EvaluateReply(
            rows=request.rows,
            loss_sum=losses.loss_sum,
            label_count=losses.label_count,
            correct=losses.correct,
        )

    def work(self, max_tokens: int) -> int:
        """One clipped sum over a full micro-batch of random tokens, for measuring; returns its tokens."""
        length = self.config.data.sequence_length
        count = max(1, max_tokens // length)
        tokens = np.random.default_rng(0).integers(0, self.vocabulary, count * length)
        classes = np.zeros(count, np.int64) if self.config.model.task == "sequence-classification" else None
        rows = TokenRows(tokens=tokens, offsets=np.arange(count + 1, dtype=np.int64) * length, classes=classes)
        clipped_sum(
            self.model,
            rows,
            np.arange(count),
            Clip(norm=1.0),
            objective=self.objective,
            max_tokens=max(max_tokens, length),
        ).total.cpu()
        return len(tokens)

    def _fetched(self, plan: Plan, request: TrainRequest) -> Fetched:
        """The rows of the request's units and each row's unit: fetched ahead, or now."""
        place, ahead = self._ahead
        if ahead is not None and place == (request.plan, request.round, request.units.tobytes()):
            return ahead.result()
        return self._fetch(plan, request.units, request.round, request.sampling_seed)

    def _fetch_ahead(self, plan: Plan, request: TrainRequest) -> None:
        """Bring the next round's probable rows into memory while this round computes."""
        following = request.round + 1
        self._ahead = (
            (request.plan, following, request.next_units.tobytes()),
            self._pool.submit(self._fetch, plan, request.next_units, following, request.sampling_seed)
            if len(request.next_units)
            else None,
        )

    def _fetch(self, plan: Plan, units: np.ndarray, round: int, sampling_seed: int) -> Fetched:
        train = self.store.split("train")
        row_indices, unit_ids = plan.rows_of(train, units, round, sampling_seed)
        return train.take(row_indices), unit_ids

    def _clipped(
        self, plan: Plan, request: TrainRequest, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        """Many units in one pass, or one after the other where each takes local steps."""
        common = self._common(plan, request, max_tokens)
        return clipped_sum(self.model, rows, unit_ids, _clip(plan, request), method=self.config.gradients, **common)

    def _exact(
        self, plan: Plan, request: TrainRequest, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        """One unit after the other, each put on the public fixed-point grid, summed as integers."""
        common = self._common(plan, request, max_tokens)
        clip = _clip(plan, request)
        updates = clipped_units(self.model, rows, unit_ids, clip, **common)
        total = np.zeros(self.layout.size, dtype=np.int64)
        norms, losses = [], []
        for _, update, norm, loss in updates:
            total += quantise(update.cpu().numpy(), clip.bound, request.resolution)
            norms.append(norm)
            losses.append(loss)
        before = torch.tensor(norms, dtype=torch.float64)
        return ClippedSum(
            total=torch.from_numpy(total),
            norms=before,
            losses=torch.tensor(losses, dtype=torch.float64),
            finite=torch.isfinite(before),
        )

    def _common(self, plan: Plan, request: TrainRequest, max_tokens: int | None) -> dict[str, Any]:
        return {
            "objective": self.objective,
            "weighting": plan.weighting,
            "max_tokens": max_tokens,
            "local_steps": _local_steps(plan),
            "autocast": torch.bfloat16 if self.config.engine.precision == "bfloat16" else None,
        }

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


def _clip(plan: Plan, request: TrainRequest) -> Clip:
    return Clip(norm=request.clip_norm, order=plan.norm_order, scales=request.settings)


def _local_steps(plan: Plan) -> LocalSteps | None:
    """The local steps of a unit, where it takes several."""
    if isinstance(plan, UlsPlan) and plan.local_steps > 1:
        return LocalSteps(steps=plan.local_steps, learning_rate=plan.local_learning_rate)
    return None


def resident_worker(run_config: Mapping[str, Any]) -> Worker:
    """The worker of this process for a run; built at its first message."""
    return _worker(json.dumps(dict(run_config), sort_keys=True))


@functools.lru_cache(maxsize=1)
def _worker(run_config: str) -> Worker:
    return Worker(from_flat(RunConfig, json.loads(run_config)))
