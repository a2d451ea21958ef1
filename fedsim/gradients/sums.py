"""The one call: the clipped sum of many units' gradients, by the fast path where that is right for the model."""

import logging
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch

from fedsim.clip import Clip, ClipBlock
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.clipping import LARGEST_NORM, SMALLEST_LIMIT, ClippedSum
from fedsim.gradients.fast import FastSum
from fedsim.gradients.model import check_deterministic, exact_products, keeps_half, model_device
from fedsim.gradients.objective import Objective
from fedsim.gradients.reference import LocalSteps, clipped_units, reference_sum, unit_gradient
from fedsim.gradients.compiled import CompiledPass
from fedsim.gradients.tape import Forms, RowsMixedError
from fedsim.gradients.units import make_units, measured_pass, pack_units, token_budget
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)

COMPILED_FROM = 2**26
"""Parameters of a model, frozen ones included, from which on its pass is compiled on a GPU."""

_verdicts: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], tuple[str, Forms]]] = WeakKeyDictionary()
_compiled: WeakKeyDictionary[torch.nn.Module, dict[tuple[object, ...], CompiledPass | None]] = WeakKeyDictionary()
_paths: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()


def clipped_sum(
    model: torch.nn.Module,
    rows: TokenRows,
    unit_ids: np.ndarray,
    clip: Clip,
    *,
    objective: Objective,
    weighting: str = "examples",
    weights: np.ndarray | None = None,
    method: Literal["fast", "reference"] = "fast",
    max_tokens: int | None = None,
    autocast: torch.dtype | None = None,
    local_steps: LocalSteps | None = None,
    compiled: bool | None = None,
) -> ClippedSum:
    """Σ over units u of g_u, clipped: the gradient of the unit's weighted mean loss, brought to within the clip.

    Each block of g_u, all of it where the clip has no blocks, is multiplied by min(1, limit / norm), the norm being
    that of g_u ⊘ s in the block. With local steps g_u is θ − θ_K instead, how far the unit's own gradient descent goes
    from θ.

    A unit is what the guarantee protects together: a user's drawn examples (ULS), or one example (ELS). Adding or
    removing one unit changes each block of the sum by at most its limit, whatever the unit's data; a unit whose
    gradient is not finite, in any block, adds exactly zero and leaves the others as they are.

    Products of float32 numbers are computed as such, whatever the caller allows torch to round (`exact_products`); the
    caller's settings are the same afterwards.

    Args:
        model: Any module whose rows are independent of each other and of how far they are padded, in evaluation mode
            (or in training mode with every dropout 0). Its parameters with requires_grad make up the gradient; it is
            left as it was. `load_model` tries what it loads; of any other, the first call compares two units.
        rows: The units' rows, ragged.
        unit_ids: Integer [rows], values 0..U-1. A value without rows is a unit with a zero gradient.
        clip: The norm, its order, scales and blocks. The sum is of unscaled g_u. The guarantee holds only for scales
            and blocks that do not depend on private data other than by noised releases. L1 norms need every unit's
            whole gradient: they take the reference path, and so do limits below SMALLEST_LIMIT.
        objective: CausalLanguageModel() or SequenceClassification().
        weighting: "examples": a unit's loss is the mean over its rows of each row's mean label loss. "tokens": the
            mean over its labels. Rows that score no label are left out of either mean.
        weights: Non-negative relative weight of each row within its unit, float [rows]; None means equal.
        method: "fast": many units in one pass. "reference": one after the other by plain autograd.
        max_tokens: Tokens of one micro-batch, padding included; None chooses by device and memory.
        autocast: torch.bfloat16 to run the model in mixed precision; norms and sums stay float32. None: as it is.
        local_steps: Steps that each unit takes from θ, one unit after the other; losses are those at θ. None: none.

    Returns:
        The sum and, for each unit, its norm before the clip, its loss and whether it was finite.

    Raises:
        InvalidInput: An argument outside the above, a clip of other parameters, or a model with dropout on.
        Failure: The device rounds products of float32 numbers whatever torch says, or the settings changed meanwhile.
    """
    if method not in ("fast", "reference"):
        raise InvalidInput("method", method, "'fast' or 'reference'")
    device = model_device(model)
    with exact_products(device):
        if method == "fast" and clip.order == 2 and local_steps is None and _shortest(clip) >= SMALLEST_LIMIT:
            check_deterministic(model)
            units = make_units(rows, unit_ids, objective, weighting, weights)
            budget = token_budget(model, device, max_tokens, autocast)
            asked = FastSum(model, rows, units, objective, clip, budget, autocast)
            if not why_reference(asked):
                asked.budget = token_budget(model, device, max_tokens, autocast)  # measured by now
                if compiled or (compiled is None and worth_compiling(asked)):
                    asked.compiled = compiled_pass(asked)
                try:
                    return asked.run()
                except (torch.OutOfMemoryError, MemoryError, InvalidInput, Failure):
                    raise
                except Exception as error:  # rows that cannot be told apart, or what the reference will tell in words
                    log.warning("%s takes the reference path for this call: %s", type(model).__name__, error)
        return reference_sum(
            clipped_units(
                model,
                rows,
                unit_ids,
                clip,
                objective=objective,
                weighting=weighting,
                weights=weights,
                max_tokens=max_tokens,
                autocast=autocast,
                local_steps=local_steps,
            )
        )


def worth_compiling(asked: FastSum) -> bool:
    """Whether a run is likely to win back the minute that compilation takes: large models on a GPU."""
    return asked.device.type == "cuda" and sum(p.numel() for p in asked.model.parameters()) >= COMPILED_FROM


def compiled_pass(asked: FastSum) -> CompiledPass | None:
    """The model's pass as compiled graphs; None where it cannot be."""
    if asked.head is None or asked.model.training:
        return None
    known = _compiled.setdefault(asked.model, {})
    key = (asked.layout, asked.autocast, tuple(map(id, asked.model.parameters())))
    if key not in known:
        layers = {name: module for module, (name, _) in asked.layers.items()}
        wanted = {id(p) for p in asked.parameters.values()}
        try:
            known[key] = CompiledPass(asked.model, layers, wanted, asked.head)
        except RowsMixedError as error:
            log.info("%s is not compiled: %s", type(asked.model).__name__, error)
            known[key] = None
    return known[key]


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


def _shortest(clip: Clip) -> float:
    """The least norm, of Δ itself and not of Δ⊘s, to which the clip may bring a block."""
    parts = [block.parameters for block in clip.blocks] or [tuple(clip.scales)]
    least = [min((clip.scales.get(name, 1.0) for name in part), default=1.0) for part in parts]
    return min(limit * scale for limit, scale in zip(clip.limits, least, strict=True))


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
    blocks = tuple(ClipBlock(parameters=(name,), share=len(asked.layout.names) ** -0.5) for name in asked.layout.names)
    return FastSum(
        asked.model,
        rows,
        make_units(rows, ids, asked.objective, "examples", None),
        asked.objective,
        Clip(norm=LARGEST_NORM, blocks=blocks),
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
    try:
        for group in pass_.groups:
            group.add_weighted(trial.views, torch.ones_like(pass_.norms[:, group.units]))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return str(error) or type(error).__name__
    scale = float(expected.norm())
    sums = trial.layout.views(trial.total)
    for name, view in trial.layout.views(expected).items():
        if not float((view - sums[name]).norm()) <= relative * float(view.norm()) + absolute * scale:
            return f"the gradient of {name} differs from autograd's"
    return ""
