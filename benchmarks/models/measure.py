"""What becomes of one tiny model in one form of training: loaded, summed, read to its last position, exported."""

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.models.families import CLASSES, CLASSIFIERS, DECODERS, VOCABULARY
from benchmarks.models.memory import PeakBytes
from benchmarks.models.tiny import save_tiny
from fedsim.clip import Clip
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients import ClippedSum, clipped_sum, layer_paths
from fedsim.gradients.fast import FastSum
from fedsim.gradients.units import make_units
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import export
from fedsim.models.load import LoadedModel, load_model
from fedsim.rows import TokenRows

Form = Literal["full", "LoRA", "LoRA, bfloat16", "classifier", "classifier, LoRA"]
FORMS: dict[Form, dict[str, Any]] = {
    "full": {},
    "LoRA": {"lora_rank": 2},
    "LoRA, bfloat16": {"lora_rank": 2, "base_dtype": "bfloat16"},
    "classifier": {"task": "sequence-classification", "num_labels": CLASSES},
    "classifier, LoRA": {"task": "sequence-classification", "num_labels": CLASSES, "lora_rank": 2},
}
TOLERANCE = 1e-5
"""How far a sum may be from the loop's in float32, relatively."""
HALF_AS_MUCH, HALF_TOLERANCE = 1.5, 5e-3
"""How far a sum on a base in bfloat16 may be from float32's: so many times as far as the loop's, and a little more."""
LENGTHS = ((9, 3, 1), (14,), (2, 2, 6), (5, 8), (1, 11), (7,))
"""Tokens of each user's rows."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A family in a form."""

    family: str
    form: Form

    @property
    def name(self) -> str:
        return f"{self.family}/{self.form}"

    @property
    def causal(self) -> bool:
        return not self.form.startswith("classifier")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What became of a case.

    Attributes:
        refusal: The sentence that it was refused with; empty if it trains.
        fault: A traceback's last line, where no sentence was told; empty if all is well.
        reference: Why the sum took the reference path; empty if it is fast.
        generic: Kinds of layers that have no rule of their own.
        error: How far the sum is from the loop's, relatively; in bfloat16 how far from float32's.
        loop_error: In bfloat16, how far the loop's sum is from float32's; else 0.
        memory: Peak bytes of the sum over those of the loop, for all users in one micro-batch.
        context: Most tokens of a row.
        exported: Whether it was exported, and read back with an equal loss.
    """

    refusal: str = ""
    fault: str = ""
    reference: str = ""
    generic: tuple[str, ...] = ()
    error: float = float("nan")
    loop_error: float = 0.0
    memory: float = float("nan")
    context: int | None = None
    exported: bool = False

    @property
    def trains(self) -> bool:
        """Whether it was summed and exported."""
        return not self.refusal and not self.fault

    @property
    def agrees(self) -> bool:
        """Whether the sum is the loop's, up to rounding; in bfloat16 up to what that makes of the loop's, too."""
        return self.error <= (TOLERANCE if not self.loop_error else HALF_AS_MUCH * self.loop_error + HALF_TOLERANCE)

    @property
    def fast(self) -> bool:
        """Whether every layer took part by a rule of its own."""
        return self.trains and not self.reference and not self.generic


def all_cases() -> list[Case]:
    """Every family in every form that it is offered in."""
    language: tuple[Form, ...] = ("full", "LoRA", "LoRA, bfloat16")
    classifying: tuple[Form, ...] = ("classifier", "classifier, LoRA")
    return [
        *(Case(family=family, form=form) for family in DECODERS for form in language),
        *(Case(family=family, form=form) for family in CLASSIFIERS for form in classifying),
    ]


def measure(case: Case) -> Finding:
    """Make the case's model, and do with it what a user would."""
    model_type, fields = (DECODERS if case.causal else CLASSIFIERS)[case.family]
    with tempfile.TemporaryDirectory() as folder:
        path = save_tiny(model_type, fields, case.causal, Path(folder) / "model")
        found = Finding()
        try:
            loaded = load_model(ModelConfig(path=path, **FORMS[case.form]))
            _draw(loaded)
            found = _summed(loaded)
            found = replace(found, context=_read_longest(loaded))
            export(loaded, Path(folder) / "export")
        except (InvalidInput, Failure) as error:
            return replace(found, refusal=str(error).replace(repr(path), "…"))
        except Exception as error:
            return replace(found, fault=f"{type(error).__name__}: {_first_line(error)}")
        return replace(found, exported=True)


def _draw(loaded: LoadedModel) -> None:
    """Give the halves of adapters that start as zero values, as after a first step."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in loaded.model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def _summed(loaded: LoadedModel) -> Finding:
    """The path, agreement and memory of the clipped sum over a few users."""
    rows, ids = users()

    def total(clip: Clip, method: Literal["fast", "reference"] = "fast") -> ClippedSum:
        return clipped_sum(
            loaded.model, rows, ids, clip, objective=loaded.objective, method=method, max_tokens=10**6
        )  # fmt: skip

    with _warnings() as said:
        norms = total(Clip(norm=1e6)).norms  # the first sum of a model tries it
    if not float(norms.min()) > 0:
        raise AssertionError("a user's gradient is zero or not finite")
    clip = Clip(norm=float(norms.median()))
    with PeakBytes() as fast:
        found = total(clip)
    with PeakBytes() as loop:
        expected = total(clip, "reference")
    units = make_units(rows, ids, loaded.objective, "examples", None)
    kinds = FastSum(loaded.model, rows, units, loaded.objective, clip, 10**6, None).kinds()
    result = Finding(
        reference=" ".join(dict.fromkeys(said)),
        generic=tuple(sorted({kind[9:-1] for kind in kinds.values() if kind.startswith("generic")})),
        error=_apart(found, expected),
        memory=fast.peak / loop.peak,
    )
    if not said and not layer_paths(loaded.model):
        raise AssertionError("the sum was not tried")
    if loaded.config.base_dtype == "float32":
        return result
    with _widened(loaded.model):
        exact = total(clip, "reference")
    return replace(result, error=_apart(found, exact), loop_error=_apart(expected, exact))


def users() -> tuple[TokenRows, np.ndarray]:
    """Rows of random tokens, none of them special, and whose they are."""
    generator = np.random.default_rng(0)
    lists = [generator.integers(6, VOCABULARY, length).tolist() for user in LENGTHS for length in user]
    ids = np.repeat(np.arange(len(LENGTHS)), [len(user) for user in LENGTHS])
    return TokenRows.from_lists(lists, generator.integers(0, CLASSES, len(lists))), ids


def _read_longest(loaded: LoadedModel) -> int | None:
    """The context, once a row of so many tokens was read."""
    tokens = np.random.default_rng(1).integers(6, VOCABULARY, loaded.context or 200).tolist()
    evaluate(loaded.model, TokenRows.from_lists([tokens], np.array([0])), loaded.objective)
    return loaded.context


def _apart(found: ClippedSum, expected: ClippedSum) -> float:
    """The relative distance of sums or of norms, whichever is larger."""
    worst = 0.0
    for name in ("total", "norms"):
        one, other = getattr(found, name).double(), getattr(expected, name).double()
        worst = max(worst, float((one - other).norm() / other.norm()))
    return worst


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """What the gradient room warns of within: why a sum took the reference path."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(re.split(r"\. |\n", record.getMessage().partition(": ")[2])[0].rstrip("."))

    log, listener = logging.getLogger("fedsim.gradients"), Listener(logging.WARNING)
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


@contextmanager
def _widened(model: torch.nn.Module) -> Iterator[None]:
    """Within it the model's halved parameters are float32."""
    halves = {parameter: parameter.data for parameter in model.parameters() if parameter.dtype == torch.bfloat16}
    try:
        for parameter, data in halves.items():
            parameter.data = data.float()
        yield
    finally:
        for parameter, data in halves.items():
            parameter.data = data


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]
