"""Whether a model's pass is compiled: where that is likely to pay, where it can be, where it is like the other."""

import logging
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.gradients.compiled.graphs import CompiledPass
from fedsim.gradients.fast import FastSum
from fedsim.gradients.tape import RowsMixedError
from fedsim.gradients.trial.verdict import clip_by_parameter, differing, tolerances
from fedsim.gradients.units import pack_units

log = logging.getLogger(__name__)

COMPILED_FROM = 2**26
"""Parameters of a model, frozen ones included, from which on its pass is compiled on a GPU."""

_compiled: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], CompiledPass | None]] = WeakKeyDictionary()


def worth_compiling(asked: FastSum) -> bool:
    """Whether a run is likely to win back the minute that compilation takes: large models on a GPU."""
    return asked.device.type == "cuda" and sum(p.numel() for p in asked.model.parameters()) >= COMPILED_FROM


def may_compile(asked: FastSum) -> bool:
    """Whether a compiled pass of the model is known, or may be tried."""
    if asked.head is None or asked.model.training or _chosen(asked) is None:
        return False
    return _compiled.get(asked.model, {}).get(_pass_key(asked), True) is not None


def compiled_pass(asked: FastSum) -> CompiledPass | None:
    """The model's pass as compiled graphs; None where it cannot be, or differs from the ordinary one.

    It is compared with the ordinary one before it is taken, on a micro-batch of the caller's. One that cannot be
    compared yet (nothing finite, no memory for it, one row) is kept, and compared in a later call.

    Args:
        asked: The caller's sum, still empty and of padded rows, for a model that the fast path is right for; it is
            left so.
    """
    if not may_compile(asked) or asked.allowed is None or asked.unreached or (chosen := _chosen(asked)) is None:
        return None
    key = _pass_key(asked)
    known = _compiled.setdefault(asked.model, {})
    if key not in known:
        known.clear()  # a pass keeps its parameters alive, and a model that has changed needs another
        try:
            known[key] = CompiledPass(asked.model, asked.layers, asked.head, varied=_shapes(asked) > 2)
        except RowsMixedError as error:
            forget_compiled(asked, error)
    made = known[key]
    if made is None or made.trusted:
        return made
    try:
        fault = _fault(asked, made, chosen)
    except torch.OutOfMemoryError:
        fault = None
    except (MemoryError, InvalidInput, Failure):
        raise
    except Exception as error:
        fault = _in_a_line(error)
    if fault is None:
        torch.cuda.empty_cache()
        return None
    made.trusted = not fault
    if fault:
        forget_compiled(asked, RowsMixedError(fault))
    return known[key]


def forget_compiled(asked: FastSum, error: Exception) -> None:
    """Leave the model's pass uncompiled from now on."""
    log.warning("%s goes without a compiled pass: %s", type(asked.model).__name__, _in_a_line(error))
    _compiled[asked.model][_pass_key(asked)] = None


def _in_a_line(error: Exception) -> str:
    kind = "" if isinstance(error, RowsMixedError) else f"{type(error).__name__}: "
    return f"{kind}{error}".splitlines()[0]


def _pass_key(asked: FastSum) -> tuple[object, ...]:
    """What a compiled pass was made for: whatever of the model may be another than in the copy that was compiled."""
    return asked.autocast, asked.settings


def _shapes(asked: FastSum) -> int:
    """How many shapes the caller's micro-batches have."""
    together, _ = pack_units(asked.units, asked.budget)
    return len({(int(asked.units.counts[units].sum()), asked.tokens(units)) for units in together})


def _chosen(asked: FastSum) -> np.ndarray | None:
    """A micro-batch of the caller's to compare by: the middle one of those with several rows; None without any."""
    together, _ = pack_units(asked.units, asked.budget)
    several = [units for units in together if asked.units.counts[units].sum() > 1]
    return several[len(several) // 2] if several else None


def _fault(asked: FastSum, made: CompiledPass, chosen: np.ndarray) -> str | None:
    """In what the compiled pass differs from the ordinary one on a micro-batch, in words.

    Each parameter is looked at by itself, whatever the caller's clip. Empty if in nothing; None if no unit is finite,
    and nothing is told.
    """
    ordinary, ours = _by_parameter(asked), _by_parameter(asked)
    ours.compiled = made
    left = _unclipped(ordinary, chosen)
    if not bool(left.finite.any()):
        return None
    found = _unclipped(ours, chosen, left.finite)
    for name, forms in made.forms().items():
        assert asked.allowed is not None
        if not forms <= asked.allowed.get(name, set()):
            return f"{name} is called in a way in which it was not when the model was tried"
    relative, absolute = tolerances(asked)
    off = (found.norms - left.norms).abs().masked_fill(left.unsure | found.unsure | ~left.finite, 0)
    if not bool((off <= relative * left.norms + absolute * left.norms.norm(dim=0)).all(0)[left.finite].all()):
        return "a unit's norm differs from that of the ordinary pass"
    parameter = differing(asked, ordinary.total, ours.total)
    return f"the gradient of {parameter} differs from that of the ordinary pass" if parameter else ""


def _by_parameter(asked: FastSum) -> FastSum:
    """The caller's sum, empty, with every parameter in a block of its own."""
    clip = clip_by_parameter(asked.layout)
    other = FastSum(asked.model, asked.rows, asked.units, asked.objective, clip, asked.budget, asked.autocast)
    other.allowed = asked.allowed
    return other


@dataclass(frozen=True)
class _Norms:
    """Norms [blocks, u] of a pass, where they are unsure, and which units are finite."""

    norms: torch.Tensor
    unsure: torch.Tensor
    finite: torch.Tensor


def _unclipped(sum_: FastSum, chosen: np.ndarray, finite: torch.Tensor | None = None) -> _Norms:
    """A pass over the chosen units, those that are finite added up as they are; what it took is free again."""
    pass_ = sum_.passed(chosen)
    if finite is None:
        finite = (pass_.norms <= LARGEST_NORM).all(0)
    pass_.gradients.zero(~finite)
    pass_.gradients.add_weighted(sum_.views, torch.ones_like(pass_.norms))
    return _Norms(pass_.norms, pass_.unsure, finite)
