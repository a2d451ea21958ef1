"""The one call: the clipped sum of many units' gradients, by the fast path where that is right for the model."""

import logging
from typing import Literal

import numpy as np
import torch

from fedsim.clip import Clip
from fedsim.errors import Failure, InvalidInput
from fedsim.gradients.clipping import SMALLEST_LIMIT, ClippedSum
from fedsim.gradients.compiled.trial import compiled_pass, forget_compiled, may_compile, worth_compiling
from fedsim.gradients.fast import FastSum
from fedsim.gradients.model import check_deterministic, exact_products, model_device
from fedsim.gradients.objective import Objective
from fedsim.gradients.reference import LocalSteps, clipped_units, reference_sum
from fedsim.gradients.trial.verdict import note_reference, why_reference
from fedsim.gradients.units import make_units, token_budget
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)


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
    caller's settings are the same afterwards. Gradients are computed under `torch.no_grad()` and
    `torch.inference_mode()` too.

    Args:
        model: Any module whose rows are independent of each other and of how far they are padded, in evaluation mode
            (or in training mode with every dropout 0). Its parameters with requires_grad make up the gradient; it is
            left as it was. `load_model` tries what it loads; of any other, the first call compares two units.
        rows: The units' rows, ragged.
        unit_ids: Integer [rows], values 0..U-1. A value without rows is a unit with a zero gradient.
        clip: The norm, its order, scales and blocks. The sum is of unscaled g_u. The guarantee holds only for scales
            and blocks that do not depend on private data other than by noised releases. L1 norms need every unit's
            whole gradient: they take the reference path, and so do limits below SMALLEST_LIMIT.
        objective: CausalLanguageModel(), SequenceClassification() or SequenceToSequence(start).
        weighting: "examples": a unit's loss is the mean over its rows of each row's mean label loss. "tokens": the
            mean over its labels. Rows that score no label are left out of either mean.
        weights: Non-negative relative weight of each row within its unit, float [rows]; None means equal.
        method: "fast": many units in one pass. "reference": one after the other by plain autograd.
        max_tokens: Tokens of one micro-batch, padding included where rows are padded; None chooses by device,
            memory and model.
        autocast: torch.bfloat16 to run the model in mixed precision; norms and sums stay float32. None: as it is.
        local_steps: Steps that each unit takes from θ, one unit after the other; losses are those at θ. None: none.
        compiled: Whether the fast path's pass is compiled (`torch.compile`), where the model allows it. None: of a
            large model on a GPU, where the minute that it takes is likely to be won back. Graphs take padded rows; any
            other pass packs them, where the model allows that.

    Returns:
        The sum and, for each unit, its norm before the clip, its loss and whether it was finite.

    Raises:
        InvalidInput: An argument outside the above, a clip of other parameters, or a model with dropout on.
        Failure: The device rounds products of float32 numbers whatever torch says, or the settings changed meanwhile;
            or what the model's last layer was given was written to meanwhile.
    """
    if method not in ("fast", "reference"):
        raise InvalidInput("method", method, "'fast' or 'reference'")
    device = model_device(model)
    with exact_products(device), torch.inference_mode(False), torch.enable_grad():
        chosen = chosen_reference(method, clip, local_steps)
        if chosen:
            note_reference(model, chosen)
        else:
            check_deterministic(model)
            units = make_units(rows, unit_ids, objective, weighting, weights)
            budget = token_budget(model, device, max_tokens, autocast)
            asked = FastSum(model, rows, units, objective, clip, budget, autocast)
            wanted = worth_compiling(asked) if compiled is None else compiled
            for by_graphs in (True, False) if wanted and may_compile(asked) else (False,):
                found = _summed(asked, by_graphs, max_tokens)
                if found is not None:
                    return found
                asked = asked.anew()
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


def _summed(asked: FastSum, by_graphs: bool, max_tokens: int | None) -> ClippedSum | None:
    """The sum asked for, by compiled graphs of padded rows or by the model itself; None if another way must be taken.

    Args:
        asked: Still empty.
    """
    asked.packable = not by_graphs
    if why_reference(asked):
        return None
    asked.budget = token_budget(asked.model, asked.device, max_tokens, asked.autocast)  # measured by now
    if why_reference(asked):  # packed rows are tried in micro-batches as long as they may now be
        return None
    if by_graphs:
        asked.compiled = compiled_pass(asked)
        if asked.compiled is None:
            return None
    return _run(asked)


def _run(asked: FastSum) -> ClippedSum | None:
    """The sum asked for; None if another way must be taken."""
    try:
        return asked.run()
    except (torch.OutOfMemoryError, MemoryError, InvalidInput, Failure):
        raise
    except Exception as error:
        if asked.compiled is not None:
            forget_compiled(asked, error)
        else:  # rows that cannot be told apart, or what the reference will tell in words
            log.warning("%s takes the reference path for this call: %s", type(asked.model).__name__, error)
        return None


def chosen_reference(method: str, clip: Clip, local_steps: LocalSteps | None) -> str:
    """Why what is asked for takes the reference path whatever the model; empty if it need not."""
    if method == "reference":
        return "the reference path was asked for"
    if local_steps is not None:
        return "each unit takes local steps of its own"
    if clip.order != 2:
        return "L1 norms need each unit's whole gradient"
    return "" if _shortest(clip) >= SMALLEST_LIMIT else f"float32 norms are not sure below {SMALLEST_LIMIT:g}"


def _shortest(clip: Clip) -> float:
    """The least norm, of Δ⊘s or of Δ itself, to which the clip may bring a block: squares of both are added up."""
    parts = [block.parameters for block in clip.blocks] or [tuple(clip.scales)]
    least = [min((clip.scales.get(name, 1.0) for name in part), default=1.0) for part in parts]
    return min(limit * min(scale, 1.0) for limit, scale in zip(clip.limits, least, strict=True))
