"""Whether the fast path is right for a model, and its rows may be packed: tried on the first call, and remembered."""

import logging
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.clip import Clip, ClipBlock
from fedsim.gradient_paths import GradientPaths
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.gradients.fast import FastSum
from fedsim.gradients.layers import layer_kinds
from fedsim.gradients.model import ParameterLayout, keeps_half
from fedsim.gradients.reference import unit_gradient
from fedsim.gradients.rules.again import AGAIN
from fedsim.gradients.tape import Forms, RowsMixedError
from fedsim.gradients.trial.leaks import LEAST_TOKENS, NOT_FINITE, LeakTrial
from fedsim.gradients.trial.pieces import packed_pieces, padded_pieces
from fedsim.gradients.units import make_units, measured_pass, sharing_units
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a trial found of a model.

    Attributes:
        reason: Why it must take the reference path; empty if it need not.
        paths: Which way its layers take.
        forms: In which forms its layers were called.
        packed: Whether rows may lie end to end.
        tokens: Of the micro-batch in which they kept to themselves.
        most: The same, if there was memory for no longer one; else None.
        longest: Tokens of the longest row that shared a micro-batch with others.
    """

    reason: str
    paths: GradientPaths | None
    forms: Forms
    packed: bool = False
    tokens: int = 0
    most: int | None = None
    longest: int = 0


_verdicts: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], tuple[object, Verdict]]] = WeakKeyDictionary()
"""By what is asked, the settings that a model had then, and the verdict."""
_paths: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()
_taken: WeakKeyDictionary[torch.nn.Module, GradientPaths] = WeakKeyDictionary()


@dataclass(frozen=True)
class Fault:
    """Why one pass does not do.

    Attributes:
        words: For whoever may see the rows.
        cause: The same of the model alone.
    """

    words: str
    cause: str

    @classmethod
    def of(cls, error: Exception) -> "Fault":
        """That a pass failed."""
        kind = type(error).__name__
        cause = error.cause if isinstance(error, RowsMixedError) else f"a pass over several units fails with {kind}"
        return cls(str(error) or kind, cause)


DISAGREE = "a pass over several units gives other gradients than plain autograd"


def layer_paths(model: torch.nn.Module) -> dict[str, str]:
    """How the last checked call formed each trainable parameter's per-unit norms, by parameter name.

    "held": the unit's gradient itself. "Gram norm" and "direct norm": from activations and output gradients.
    "formed again": from those of a head whose logits' gradient is too large to keep. "gathered": table rows. "exact
    cross term": a tied input and output embedding. Empty before the first call.
    """
    return dict(_paths.get(model, {}))


def gradient_paths(model: torch.nn.Module) -> GradientPaths | None:
    """Which way each layer's gradients take since the last call that found out; None before. Nothing of the rows."""
    return _taken.get(model)


def note_reference(model: torch.nn.Module, because: str) -> None:
    """Have `gradient_paths` say that this model's units come one after the other, and why."""
    _taken[model] = GradientPaths.of(layer_kinds(model, None), set(), because=because)


def note_paths(model: torch.nn.Module, paths: GradientPaths) -> None:
    """Have `gradient_paths` say this of a model that was tried elsewhere."""
    _taken[model] = paths


def why_reference(asked: FastSum) -> str:
    """Why this model must take the reference path, in words; empty if the fast path is right for it.

    A model may use a weight without calling the layer that owns it, mix rows in a way that no rule foresees, or see
    the padding. So the first call for a model compares the fast path with plain autograd on two units of different
    lengths, made of the caller's own. It is tried again where the model is another than it was, its values apart, and
    for longer rows or packed micro-batches than those that were tried.

    Args:
        asked: The caller's sum, still empty; it is left so, but may from now on call layers only as they were called
            in the trial: of any other call, of a layer that was not reached then, say, the trial tells nothing.
    """
    known = _verdicts.setdefault(asked.model, {})
    of_both = (asked.layout, asked.objective, asked.autocast, asked.model.training)
    key = (*of_both, asked.packable, asked.packable and asked.units.whole)
    then, verdict = known.get(key, (None, None))
    if verdict is None or then != asked.settings or _beyond(verdict, asked):
        verdict, lasting = _tried_with_memory_left(asked)
        if lasting:
            known[key] = asked.settings, verdict
            if not verdict.packed:  # which is the verdict on padded rows
                known[*of_both, False, False] = asked.settings, verdict
    asked.allowed, asked.packed = verdict.forms or None, verdict.packed
    if verdict.paths is not None:
        _taken[asked.model] = verdict.paths
    if verdict.most is not None:
        asked.budget = min(asked.budget, verdict.most)
    return verdict.reason


def tolerances(sum_: FastSum) -> tuple[float, float]:
    """By how much two ways may differ: of what is compared, and of the whole gradient's norm."""
    return (5e-2, 2e-2) if keeps_half(sum_.model, sum_.autocast) else (1e-3, 1e-4)


def differing(sum_: FastSum, expected: torch.Tensor, found: torch.Tensor) -> str | None:
    """A parameter in which two gradients [P] differ by more than the tolerances."""
    relative, absolute = tolerances(sum_)
    scale, views = float(expected.norm()), sum_.layout.views(found)
    for name, view in sum_.layout.views(expected).items():
        if not float((view - views[name]).norm()) <= relative * float(view.norm()) + absolute * scale:
            return name
    return None


def clip_by_parameter(layout: ParameterLayout) -> Clip:
    """A clip that bites nowhere and has every parameter in a block of its own, so that each one's norms are seen."""
    share = len(layout.names) ** -0.5
    blocks = tuple(ClipBlock(parameters=(name,), share=share) for name in layout.names)
    return Clip(norm=LARGEST_NORM, blocks=blocks)


def _beyond(verdict: Verdict, asked: FastSum) -> bool:
    """Whether a verdict that the fast path is right tells nothing of rows so long, or of so many packed tokens."""
    if verdict.reason:
        return False
    if verdict.packed and verdict.most is None and verdict.tokens < _longest_pass(asked):
        return True
    sharing = sharing_units(asked.units, asked.budget, verdict.packed)
    return bool(asked.units.longest[sharing].max(initial=0) > verdict.longest)


def _tried_with_memory_left(asked: FastSum) -> tuple[Verdict, bool]:
    """As `_tried`, with smaller micro-batches where a trial runs out of memory, as those to come then would."""
    while True:
        try:
            return _tried(asked)
        except torch.OutOfMemoryError:
            if asked.budget < 2 * LEAST_TOKENS:
                raise
        torch.cuda.empty_cache()
        asked.budget //= 2


def _tried(asked: FastSum) -> tuple[Verdict, bool]:
    """The verdict on a model, packed if it may be, and whether it holds for later calls."""
    lasting = True
    for packed in (True, False) if asked.packable else (False,):
        trial = _trial(asked, packed)
        if trial is None:
            if packed:
                continue
            return Verdict(reason="", paths=None, forms={}), False  # every unit is alone: none can reach another
        found = _difference(trial, np.flatnonzero(trial.units.counts))
        if found is None:
            return Verdict(reason="of the units that were tried none is finite", paths=None, forms={}), False
        reason, tokens, most = found.words, 0, None
        if packed and not reason:
            reason, tokens, most = _leak(asked)
            lasting = reason != NOT_FINITE
        if packed and reason:
            log.info("%s: rows are padded, for packed ones fail: %s", type(asked.model).__name__, reason)
            continue
        # Padded rows of one length cannot show what padding does.
        lasting = lasting and (packed or len(set(trial.units.lengths.tolist())) > 1)
        _tell(trial, reason, asked.packable)
        longest = int(trial.units.lengths.max())
        verdict = Verdict(
            reason=reason,
            paths=paths_of(trial, found.cause, packed),
            forms=trial.forms,
            packed=packed,
            tokens=tokens,
            most=most,
            longest=longest,
        )
        return verdict, lasting
    raise AssertionError("the padded trial has an answer")


def _longest_pass(asked: FastSum) -> int:
    """Tokens of a packed micro-batch at most."""
    return min(asked.budget, int(asked.units.lengths.sum()))


def paths_of(trial: FastSum, because: str, packed: bool) -> GradientPaths:
    """Which way a model's layers take that was tried so."""
    kinds = trial.kinds()
    again = {name.rpartition(".")[0] for name, paths in trial.paths.items() if AGAIN in paths}
    redone = {name for name, kind in kinds.items() if name in again or kind.startswith("generic")}
    return GradientPaths.of(kinds, redone, because=because, packed=packed)


def _tell(trial: FastSum, reason: str, last: bool) -> None:
    """What the log and `layer_paths` say of a trial; unless it is the last, another way than the reference is left."""
    _paths[trial.model] = {name: ", ".join(sorted(paths)) for name, paths in sorted(trial.paths.items())}
    if reason and not last:
        log.warning("%s is not compiled: %s", type(trial.model).__name__, reason)
        return
    if reason:
        log.warning("%s takes the reference path: %s", type(trial.model).__name__, reason)
        return
    for name, path in _paths[trial.model].items():
        log.debug("%s: %s", name, path)
    for name, kind in trial.kinds().items():
        if kind.startswith("generic"):
            log.info("%s has no rule of its own: %s", name, kind)


def _leak(asked: FastSum) -> tuple[str, int, int | None]:
    """How packed rows see each other, in words; of how many tokens that was tried, and if these were all there was
    memory for, their number again."""
    rows, most = asked.rows.take(asked.units.rows), None
    # A power of 2, so that a call of a few more tokens than this one needs no trial of its own.
    tokens = min(asked.budget, 1 << (_longest_pass(asked) - 1).bit_length())
    if tokens < LEAST_TOKENS:
        return f"of micro-batches of {tokens} tokens little can be seen", tokens, most
    while True:
        try:
            found = LeakTrial(asked.model, asked.head, list(asked.layers), rows, tokens, asked.autocast).leak()
            return found, tokens, most
        except torch.OutOfMemoryError:
            if tokens < 2 * LEAST_TOKENS:
                raise
        except Exception as error:
            return str(error) or type(error).__name__, tokens, most
        torch.cuda.empty_cache()
        tokens = most = tokens // 2


def _trial(asked: FastSum, packed: bool) -> FastSum | None:
    """A sum of a few units of different lengths, every parameter in a block of its own, whatever the caller's clip.

    So each parameter's norms are seen, and the verdict holds for any blocks and any scales. None if there are no such
    units, or rows of this model need not be packed to know that they must not be.
    """
    pieces = packed_pieces(asked) if packed else padded_pieces(asked)
    if pieces is None:
        return None
    rows = TokenRows.joined([row for unit in pieces for row in unit])
    unit_ids = np.repeat(np.arange(len(pieces)), [sum(map(len, unit)) for unit in pieces])
    trial = FastSum(
        asked.model,
        rows,
        replace(make_units(rows, unit_ids, asked.objective, "examples", None), whole=asked.units.whole),
        asked.objective,
        clip_by_parameter(asked.layout),
        asked.budget,
        asked.autocast,
    )
    trial.packed = packed
    return trial


def _difference(trial: FastSum, chosen: np.ndarray) -> Fault | None:
    """In what the fast path differs from plain autograd on the chosen units; None if those are not finite."""
    try:
        with measured_pass(trial.model, trial.device, trial.tokens(chosen), trial.autocast):
            pass_ = trial.passed(chosen)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return Fault.of(error)
    relative, absolute = tolerances(trial)
    expected = torch.zeros_like(trial.total)
    for place, unit in enumerate(map(int, pass_.units)):
        gradient, _ = unit_gradient(
            trial.model, trial.rows, trial.units, unit, trial.objective, trial.layout, trial.budget, trial.autocast
        )
        norms, found = trial.clip.block_norms(trial.layout.views(gradient)), pass_.norms[:, place].double()
        whole = float(norms.norm())
        if not whole <= LARGEST_NORM:
            return None
        # Where the fast path is unsure it computes the norm as is done here.
        off = (found - norms).abs().masked_fill(pass_.unsure[:, place], 0) - relative * norms - absolute * whole
        worst = int(off.argmax())
        if not off[worst] <= 0:
            words = (
                f"a unit's norm in {trial.layout.names[worst]} is {float(norms[worst]):.6g} by autograd and "
                f"{float(found[worst]):.6g} in one pass"
            )
            return Fault(words, DISAGREE)
        expected += gradient
    try:
        pass_.gradients.add_weighted(trial.views, torch.ones_like(pass_.norms))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return Fault.of(error)
    name = differing(trial, expected, trial.total)
    return Fault(f"the gradient of {name} differs from autograd's", DISAGREE) if name else Fault("", "")
