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
from fedsim.gradients.trial import differing, tolerances
from fedsim.gradients.units import pack_units

log = logging.getLogger(__name__)

COMPILED_FROM = 2**26
"""Parameters of a model, frozen ones included, from which on its pass is compiled on a GPU."""

_compiled: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], CompiledPass | None]] = WeakKeyDictionary()


def worth_compiling(asked: FastSum) -> bool:
    """Whether a run is likely to win back the minute that compilation takes: large models on a GPU."""
    return asked.device.type == "cuda" and sum(p.numel() for p in asked.model.parameters()) >= COMPILED_FROM


def compiled_pass(asked: FastSum) -> CompiledPass | None:
    """The model's pass as compiled graphs; None where it cannot be, or differs from the ordinary one.

    Args:
        asked: The caller's sum, still empty, for a model that the fast path is right for; it is left so.
    """
    if asked.head is None or asked.model.training or not len(pack_units(asked.units, asked.budget)[0]):
        return None
    known = _compiled.setdefault(asked.model, {})
    key = _pass_key(asked)
    if key not in known:
        try:
            made = CompiledPass(asked.model, asked.layers, asked.head, varied=_shapes(asked) > 2)
            fault = _fault(asked, made)
        except (torch.OutOfMemoryError, MemoryError, InvalidInput, Failure):
            raise
        except Exception as error:
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if fault is None:
            return None
        if fault:
            log.warning("%s is not compiled: %s", type(asked.model).__name__, fault)
        known[key] = None if fault else made
    return known[key]


def forget_compiled(asked: FastSum, error: Exception) -> None:
    """Leave the model's pass uncompiled from now on: it failed."""
    words = f"{type(error).__name__}: {error}".splitlines()[0]
    log.warning("%s goes on without a compiled pass: %s", type(asked.model).__name__, words)
    _compiled[asked.model][_pass_key(asked)] = None


def _pass_key(asked: FastSum) -> tuple[object, ...]:
    """What a compiled pass was made for: other parameters, or other ones that are trained, need another."""
    return asked.layout, asked.autocast, tuple(map(id, asked.model.parameters()))


def _shapes(asked: FastSum) -> int:
    """How many shapes the caller's micro-batches have."""
    together, _ = pack_units(asked.units, asked.budget)
    return len({(int(asked.units.counts[units].sum()), asked.padded(units)) for units in together})


def _fault(asked: FastSum, made: CompiledPass) -> str | None:
    """In what the compiled pass differs from the ordinary one on a micro-batch of the caller's, in words.

    Empty if in nothing; None if the micro-batch is not finite, and tells nothing.
    """
    together, _ = pack_units(asked.units, asked.budget)
    ordinary, ours = asked.anew(), asked.anew()
    ours.compiled = made
    left, found = _unclipped(ordinary, together[len(together) // 2]), _unclipped(ours, together[len(together) // 2])
    if not bool((left.norms <= LARGEST_NORM).all()):
        return None
    for name, forms in made.forms().items():
        if asked.allowed is not None and not forms <= asked.allowed.get(name, set()):
            return f"{name} is called in a way in which it was not when the model was tried"
    relative, absolute = tolerances(asked)
    off = (found.norms - left.norms).abs().masked_fill(left.unsure | found.unsure, 0)
    if not bool((off <= relative * left.norms + absolute * left.norms.norm(dim=0)).all()):
        return "a unit's norm differs from that of the ordinary pass"
    parameter = differing(asked, ordinary.total, ours.total)
    return f"the gradient of {parameter} differs from that of the ordinary pass" if parameter else ""


@dataclass(frozen=True)
class _Norms:
    """Norms [blocks, u] of a pass and where they are unsure."""

    norms: torch.Tensor
    unsure: torch.Tensor


def _unclipped(sum_: FastSum, chosen: np.ndarray) -> _Norms:
    """A pass over the chosen units, added up as they are; what it took is free again."""
    pass_ = sum_.passed(chosen)
    for group in pass_.groups:
        group.add_weighted(sum_.views, torch.ones_like(pass_.norms[:, group.units]))
    return _Norms(pass_.norms, pass_.unsure)
