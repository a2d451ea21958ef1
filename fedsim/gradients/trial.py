"""What the first call for a model tries: whether the fast path is right for it."""

import logging
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.clip import Clip, ClipBlock
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.gradients.fast import FastSum
from fedsim.gradients.model import ParameterLayout, keeps_half
from fedsim.gradients.reference import unit_gradient
from fedsim.gradients.tape import Forms
from fedsim.gradients.units import make_units, measured_pass, pack_units
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)

_verdicts: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], tuple[str, Forms]]] = WeakKeyDictionary()
_paths: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()


def layer_paths(model: torch.nn.Module) -> dict[str, str]:
    """How the last checked call formed each trainable parameter's per-unit norms, by parameter name.

    "held": the unit's gradient itself. "Gram norm" and "direct norm": from activations and output gradients.
    "gathered": table rows. "exact cross term": a tied input and output embedding. Empty before the first call.
    """
    return dict(_paths.get(model, {}))


def why_reference(asked: FastSum) -> str:
    """Why this model must take the reference path, in words; empty if the fast path is right for it.

    A model may use a weight without calling the layer that owns it, mix rows in a way that no rule foresees, or see
    the padding. So the first call for a model compares the fast path with plain autograd on two units of different
    lengths, made of the caller's own.

    Args:
        asked: The caller's sum, still empty; it is left so, but may from now on call layers only as they were called
            in the trial: of any other call, of a layer that was not reached then, say, the trial tells nothing.
    """
    known = _verdicts.setdefault(asked.model, {})
    key = (asked.layout, asked.objective, asked.autocast, asked.model.training)
    if key in known:
        reason, asked.allowed = known[key]
        return reason
    trial = _trial(asked)
    if trial is None:
        return ""  # every unit is alone, and that is plain autograd
    found = _difference(trial, np.arange(2))
    if found is None:
        return ""  # nothing to compare by: not finite
    reason, asked.allowed = found, trial.forms
    if len(set(trial.units.lengths.tolist())) > 1:  # rows of one length cannot show what padding does
        known[key] = reason, trial.forms
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


def _trial(asked: FastSum) -> FastSum | None:
    """A sum of two units of different lengths, with every parameter in a block of its own, whatever the caller's clip.

    So each parameter's norms are seen, and the verdict holds for any blocks and any scales. One unit is the longest of
    the caller's that shares a micro-batch; the other is the shortest that fits beside it, or the same once more, cut
    to about half. None if no unit shares one.
    """
    units, together = asked.units, pack_units(asked.units, asked.budget)[0]
    if not together:
        return None
    sharing = np.concatenate(together)  # from the shortest to the longest
    longest = int(sharing[-1])
    own = units.rows[units.offsets[longest] : units.offsets[longest + 1]]
    most = int(asked.rows.lengths[own].max())
    fits = sharing[:-1][(units.counts[sharing[:-1]] + units.counts[longest]) * most <= asked.budget]
    shortest = int(fits[0]) if len(fits) else longest
    other = units.rows[units.offsets[shortest] : units.offsets[shortest + 1]]
    rows = TokenRows.joined([asked.rows.take(own), *(_cut(asked, row, most // 2 + 1) for row in other)])
    ids = np.repeat([0, 1], [len(own), len(other)])
    return FastSum(
        asked.model,
        rows,
        make_units(rows, ids, asked.objective, "examples", None),
        asked.objective,
        clip_by_parameter(asked.layout),
        asked.budget,
        asked.autocast,
    )


def _cut(asked: FastSum, index: int, length: int) -> TokenRows:
    """A row's first or, if these score no label, its last `length` tokens: of more than half a row, either does."""
    row = asked.rows.take(np.array([index]))
    first = _part(row, slice(0, length))
    return first if asked.objective.label_counts(first).any() else _part(row, slice(-length, None))


def _part(row: TokenRows, piece: slice) -> TokenRows:
    """Some of the tokens of a single row."""
    tokens, labels = row.tokens[piece], row.labels
    labels = None if labels is None else labels[piece]
    return TokenRows(tokens=tokens, offsets=np.array([0, len(tokens)]), labels=labels, classes=row.classes)


def _difference(trial: FastSum, chosen: np.ndarray) -> str | None:
    """In what the fast path differs from plain autograd on the chosen units; None if those are not finite."""
    try:
        with measured_pass(trial.model, trial.device, trial.padded(chosen), trial.autocast):
            pass_ = trial.passed(chosen)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return str(error) or type(error).__name__
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
            return (
                f"a unit's norm in {trial.layout.names[worst]} is {float(norms[worst]):.6g} by autograd and "
                f"{float(found[worst]):.6g} in one pass"
            )
        expected += gradient
    try:
        for group in pass_.groups:
            group.add_weighted(trial.views, torch.ones_like(pass_.norms[:, group.units]))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return str(error) or type(error).__name__
    name = differing(trial, expected, trial.total)
    return f"the gradient of {name} differs from autograd's" if name else ""
