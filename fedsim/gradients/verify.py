"""Trust, but check once: is the fast path right for this very model?

A model may use a weight without calling the layer that owns it, or mix rows in a way that no rule foresees. So the
first call for a model compares the fast path with plain autograd on two of the caller's own units; if they differ,
the model takes the reference path, and the log says why.
"""

import logging
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.gradients.fast import FastSum
from fedsim.gradients.packing import pack_units
from fedsim.gradients.precision import keeps_half
from fedsim.gradients.reference import unit_gradient
from fedsim.gradients.tape import RowsMixedError

log = logging.getLogger(__name__)

_verdicts: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], str]] = WeakKeyDictionary()
_paths: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()


def layer_paths(model: torch.nn.Module) -> dict[str, str]:
    """How the last checked call formed each trainable parameter's per-unit norms, by parameter name.

    "held": the unit's gradient itself. "Gram norm" and "direct norm": from activations and output gradients.
    "gathered": table rows. "exact cross term": a tied input and output embedding. Empty before the first call.
    """
    return dict(_paths.get(model, {}))


def why_reference(asked: FastSum) -> str:
    """Why this model must take the reference path, in words; empty if the fast path is right for it.

    Args:
        asked: The caller's sum, still empty; it is left so.
    """
    known = _verdicts.setdefault(asked.model, {})
    key = (asked.layout, asked.objective, asked.autocast, asked.model.training)
    if key in known:
        return known[key]
    trial = _trial(asked)
    together, _ = pack_units(trial.units, trial.budget)
    if not together:
        return ""  # every unit is alone, and that is plain autograd
    chosen = together[-1][-2:]
    reason = _difference(trial, chosen)
    if reason is None:
        return ""  # nothing to compare by: not finite
    if trial.units.counts[chosen].sum() > 1:  # a single row cannot show that rows mix
        known[key] = reason
    _paths[trial.model] = {name: ", ".join(sorted(paths)) for name, paths in sorted(trial.paths.items())}
    if reason:
        log.warning("%s takes the reference path: %s", type(trial.model).__name__, reason)
    else:
        for name, path in _paths[trial.model].items():
            log.debug("%s: %s", name, path)
        for name, kind in trial.kinds().items():
            if kind.startswith("generic"):
                log.info("%s has no rule of its own: %s", name, kind)
    return reason


def _trial(asked: FastSum) -> FastSum:
    """A sum like the one asked for, with every parameter in a block of its own, whatever the caller's clip.

    So each parameter's norms are seen, and the verdict holds for any blocks and any scales.
    """
    blocks = tuple(ClipBlock(parameters=(name,), share=len(asked.layout.names) ** -0.5) for name in asked.layout.names)
    clip = Clip(norm=LARGEST_NORM, blocks=blocks)
    return FastSum(asked.model, asked.rows, asked.units, asked.objective, clip, asked.budget, asked.autocast)


def _difference(trial: FastSum, chosen: np.ndarray) -> str | None:
    """In what the fast path differs from plain autograd on the chosen units; None if those are not finite."""
    try:
        pass_ = trial.passed(chosen)
    except torch.OutOfMemoryError:
        raise
    except (RowsMixedError, RuntimeError) as error:
        return str(error)
    relative, absolute = (5e-2, 2e-2) if keeps_half(trial.model, trial.autocast) else (1e-3, 1e-4)
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
            return (
                f"a unit's norm in {trial.layout.names[worst]} is {float(norms[worst]):.6g} by autograd and "
                f"{float(found[worst]):.6g} in one pass"
            )
        expected += gradient
    for group in pass_.groups:
        group.add_weighted(trial.views, torch.ones_like(pass_.norms[:, group.units]))
    scale = float(expected.norm())
    sums = trial.layout.views(trial.total)
    for name, view in trial.layout.views(expected).items():
        if not float((view - sums[name]).norm()) <= relative * float(view.norm()) + absolute * scale:
            return f"the gradient of {name} differs from autograd's"
    return ""
