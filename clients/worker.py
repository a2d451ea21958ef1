"""What stays in a client process between messages: the model, the store, and the micro-batch that fits."""

import logging
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

import numpy as np
import torch

from clients.computing import Computing
from clients.repeatable import compute_repeatably
from fedsim.clip import Clip
from fedsim.config import RunConfig
from fedsim.engine.exact import quantise
from fedsim.engine.same_inputs import Inputs, require_same_inputs
from fedsim.engine.work import Done, HeldOutDone, HeldOutWork, Vector, Work
from fedsim.errors import Failure
from fedsim.gradients import (
    ClippedSum,
    LocalSteps,
    Objective,
    ParameterLayout,
    clipped_sum,
    clipped_units,
    gradient_paths,
    note_reference,
    random_rows,
)
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.memory import peak_resident_bytes
from fedsim.models.evaluate import EvaluationByUnit, evaluate_rows
from fedsim.models.load import embedded_tokens
from fedsim.plan import Plan, plan_from_json
from fedsim.resources import computing_device, open_resources
from fedsim.rows import Splits, TokenRows

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

Fetched = tuple[TokenRows, np.ndarray]
"""Rows, and the position of each row's unit among the units asked for."""


class Worker:
    """Computes updates and evaluations with one resident model.

    Args:
        model: The model; the worker writes parameters into it.
        objective: What is minimised.
        store: The users' rows.
        computing: How.
        vocabulary: Tokens that trial work is made of.
        inputs: What data and base model these are; None where they are the server's own objects.
        device: Where to compute; None: on this process's GPU, if it has one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        objective: Objective,
        store: Splits,
        computing: Computing,
        vocabulary: int = 1,
        inputs: Inputs | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.device = device or computing_device()
        if computing.exact:
            compute_repeatably(self.device, computing.threads)
        self.objective = objective
        self.store = store
        self.computing = computing
        self.layout = ParameterLayout.of(model)
        self.model = self._placed(model)
        self.sizes = self.layout.sizes
        self.vocabulary = vocabulary
        self.inputs = inputs
        self.max_tokens = computing.micro_batch
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._ahead: tuple[tuple[str, int, int, bytes], Future[Fetched] | None] = (("", -1, 0, b""), None)

    @classmethod
    def of(cls, config: RunConfig, device: torch.device | None = None) -> Self:
        """The worker of a run, with the configured model and store opened; on a device of the caller's choice."""
        resources = open_resources(config)
        loaded, inputs = resources.loaded, resources.inputs
        computing, vocabulary = Computing.of(config, resources.row_tokens), embedded_tokens(loaded)
        return cls(loaded.model, loaded.objective, resources.store, computing, vocabulary, inputs, device)

    def train(self, request: Work) -> Done:
        """The clipped sum over the request's units: a tensor where the parameters are one, on their device.

        Raises:
            InputsDiffer: The units or the parameters are of other data or another model than this worker holds.
            Failure: Sums are exact and a micro-batch does not fit into the device's memory.
        """
        started = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        require_same_inputs(request.inputs, self.inputs)
        plan = plan_from_json(request.plan)
        fetching = time.perf_counter()
        rows, unit_ids = self._fetched(plan, request)
        self._fetch_ahead(plan, request)
        loaded = time.perf_counter()
        self._load(request.parameters)
        compute = self._exact if request.resolution else self._clipped
        computing = time.perf_counter()
        if len(rows):
            result = self._with_memory_left(lambda tokens: compute(plan, request, rows, unit_ids, tokens))
        else:
            result = self._nothing(request)
        statistics, norms = _statistics(result, request, rows)  # waits for the device, so that its time is known
        computed = time.perf_counter()
        total = self._delivered(result, request)
        costs = {
            "memory_bytes": float(self._memory_bytes),
            "load_seconds": loaded - fetching,
            "compute_seconds": computed - computing,
            "seconds": time.perf_counter() - started,
        }
        paths = gradient_paths(self.model)
        return Done(
            round=request.round,
            units=request.units,
            total=total,
            statistics=statistics | costs,
            norms=norms,
            paths="" if paths is None else paths.to_json(),
        )

    def evaluate(self, request: HeldOutWork) -> HeldOutDone:
        """Loss, predicted tokens and correct predictions of each row, in the precision that gradients are computed in.

        Raises:
            InputsDiffer: As for train.
            Failure: As for train.
        """
        require_same_inputs(request.inputs, self.inputs)
        rows = self.store.split(request.split).take(request.rows)
        self._load(request.parameters)
        losses = self._with_memory_left(lambda tokens: self._evaluated(rows, tokens))
        return HeldOutDone(
            rows=request.rows,
            loss_sum=losses.loss_sum,
            label_count=losses.label_count,
            correct=losses.correct,
        )

    def _placed(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model where it computes."""
        return model.to(self.device)

    def _load(self, parameters: Vector) -> None:
        """Give the model a request's parameters."""
        self.layout.load(self.model, as_tensor(parameters))

    def _delivered(self, result: ClippedSum, request: Work) -> Vector:
        """The sum as it is answered: a tensor where the parameters are one, on their device."""
        given = request.parameters
        return result.total.to(given.device) if isinstance(given, torch.Tensor) else result.total.cpu().numpy()

    def _evaluated(self, rows: TokenRows, tokens: int | None) -> EvaluationByUnit:
        """Losses of rows, each on its own."""
        return evaluate_rows(
            self.model, rows, self.objective, max_tokens=tokens, device=self.device, autocast=self._autocast
        )

    def work(self, max_tokens: int) -> int:
        """Clipped gradients over a full micro-batch of random tokens, for measuring; returns its tokens."""
        length = self.computing.row_tokens
        count = max(1, max_tokens // length)
        rows = random_rows(self.objective, count, length, self.vocabulary)
        common: dict[str, Any] = {
            "objective": self.objective,
            "max_tokens": max(max_tokens, length),
            "autocast": self._autocast,
        }
        if self.computing.exact:
            updates = clipped_units(self.model, rows, np.zeros(count, np.int64), Clip(norm=1.0), **common)
            finite = max(norm for _, _, norm, _ in updates) <= LARGEST_NORM
        else:
            # A trial is over sooner than a compilation.
            common |= {"method": self.computing.gradients, "compiled": bool(self.computing.compiled)}
            finite = bool(clipped_sum(self.model, rows, np.arange(count), Clip(norm=1.0), **common).finite.any())
        if not finite:
            raise Failure("no gradient of random tokens is finite: look at the model's weights and --engine.precision")
        return len(rows.tokens)

    def _fetched(self, plan: Plan, request: Work) -> Fetched:
        """The rows of the request's units and each row's unit: fetched ahead, or now."""
        place, ahead = self._ahead
        if ahead is not None and place == _place(request, request.round, request.units):
            return ahead.result()
        return self._fetch(plan, request.units, request.round, request.sampling_seed)

    def _fetch_ahead(self, plan: Plan, request: Work) -> None:
        """Bring the next round's probable rows into memory while this round computes."""
        following = request.round + 1
        self._ahead = (
            _place(request, following, request.next_units),
            self._pool.submit(self._fetch, plan, request.next_units, following, request.sampling_seed)
            if len(request.next_units)
            else None,
        )

    def _fetch(self, plan: Plan, units: np.ndarray, round: int, sampling_seed: int) -> Fetched:
        train = self.store.split("train")
        row_indices, unit_ids = plan.rows_of(train, units, round, sampling_seed)
        return train.take(row_indices), unit_ids

    def _clipped(
        self, plan: Plan, request: Work, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        """Many units in one pass, or one after the other where each takes local steps."""
        common = self._common(plan, max_tokens)
        return clipped_sum(
            self.model,
            rows,
            unit_ids,
            request.clip,
            method=self.computing.gradients,
            compiled=self.computing.compiled,
            **common,
        )

    def _exact(
        self, plan: Plan, request: Work, rows: TokenRows, unit_ids: np.ndarray, max_tokens: int | None
    ) -> ClippedSum:
        """One unit after the other, each put on the public fixed-point grid, summed as integers."""
        note_reference(self.model, "exact sums take each unit's update by itself")
        updates = clipped_units(self.model, rows, unit_ids, request.clip, **self._common(plan, max_tokens))
        total = torch.zeros(self.layout.size, dtype=torch.int64)
        norms, losses = [], []
        for _, update, norm, loss in updates:
            total = total.to(update.device)
            total += quantise(update, request.clip, self.sizes, request.resolution)
            norms.append(norm)
            losses.append(loss)
        before = torch.tensor(norms, dtype=torch.float64)
        return ClippedSum(
            total=total,
            norms=before,
            losses=torch.tensor(losses, dtype=torch.float64),
            finite=before <= LARGEST_NORM,
        )

    def _nothing(self, request: Work) -> ClippedSum:
        """The sum of units that own no rows: they count, and add exactly zero."""
        total = torch.zeros(self.layout.size, dtype=torch.int64 if request.resolution else torch.float32)
        zeros = torch.zeros(len(request.units), dtype=torch.float64)
        return ClippedSum(total=total, norms=zeros, losses=zeros, finite=torch.ones(len(zeros), dtype=torch.bool))

    def _common(self, plan: Plan, max_tokens: int | None) -> dict[str, Any]:
        descent = plan.local_descent
        return {
            "objective": self.objective,
            "weighting": plan.weighting,
            "max_tokens": max_tokens,
            "local_steps": None if descent is None else LocalSteps(steps=descent[0], learning_rate=descent[1]),
            "autocast": self._autocast,
        }

    @property
    def _memory_bytes(self) -> int:
        """The most that this work held of the GPU, or without one the most that the process ever held."""
        on_gpu = self.device.type == "cuda"
        return int(torch.cuda.max_memory_allocated(self.device)) if on_gpu else peak_resident_bytes()

    @property
    def _autocast(self) -> torch.dtype | None:
        on = self.device.type == "cuda" if self.computing.autocast is None else self.computing.autocast
        return torch.bfloat16 if on else None

    def _with_memory_left(self, compute: Callable[[int | None], Result]) -> Result:
        """compute(max_tokens), with the micro-batch halved for good each time the device runs out of memory.

        Where sums are exact it is not: another micro-batch rounds otherwise.
        """
        while True:
            try:
                return compute(self.max_tokens)
            except torch.OutOfMemoryError as error:
                if self.computing.exact:
                    raise Failure(
                        f"A micro-batch of {self.max_tokens} tokens does not fit into the memory of {self.device}; "
                        "exact sums keep theirs, so that they are the same bits on every worker. Set "
                        "--engine.max-tokens to fewer, or run fewer workers on a device."
                    ) from error
                smaller = (self.max_tokens or self.computing.row_tokens * 64) // 2
                if smaller < self.computing.row_tokens:
                    raise
                logger.warning("out of memory: micro-batches shrink to %d tokens", smaller)
                self.max_tokens = smaller
                torch.cuda.empty_cache()


def as_tensor(flat: Vector) -> torch.Tensor:
    """The same memory as a tensor, to be read alone: what a shared object store owns is not copied on its way."""
    if isinstance(flat, torch.Tensor):
        return flat
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it must not be written to
        return torch.from_numpy(flat)


def _place(request: Work, round: int, units: np.ndarray) -> tuple[str, int, int, bytes]:
    """What rows depend on: those fetched ahead are used where all of it is the same."""
    return request.plan, request.sampling_seed, round, units.tobytes()


def _statistics(result: ClippedSum, request: Work, rows: TokenRows) -> tuple[dict[str, float], np.ndarray]:
    """Sums over units, and their norms, private unless noised."""
    finite = result.finite.cpu().numpy()
    norms = result.norms.cpu().numpy()[finite]
    sums = {
        "loss_sum": float(result.losses.cpu().numpy()[finite].sum()),
        "clipped_units": float((norms > request.clip.norm).sum()),
        "nonfinite_units": float((~finite).sum()),
        "empty_units": float((norms == 0).sum()),
        "rows": float(len(rows)),
        "tokens": float(len(rows.tokens)),
    }
    return sums, norms.astype(np.float32)
