"""Whether the fast path is right for a sharded model: tried by all processes of the group on the same units."""

import logging

import numpy as np
import torch

from fedsim.gradient_paths import GradientPaths
from fedsim.gradients.clipping import LARGEST_NORM
from fedsim.gradients.fast import Pass
from fedsim.gradients.sharded.passes import ShardedPasses
from fedsim.gradients.tape import Forms
from fedsim.gradients.trial.pieces import padded_pieces
from fedsim.gradients.trial.verdict import DISAGREE, Fault, clip_by_parameter, note_paths, paths_of, tolerances
from fedsim.gradients.units import make_units, sharing_units
from fedsim.rows import TokenRows

log = logging.getLogger(__name__)

NOT_FINITE = "of the units that were tried none is finite"


def why_one_by_one(asked: ShardedPasses) -> str:
    """Why this model's units must pass one by one, in words; empty if the fast path is right for it.

    As `why_reference`, of padded rows. All processes of the group try the same units, and find the same: should one of
    them differ, that is what all of them do.

    Args:
        asked: The sum asked for, still empty; from now on it may call layers only as they were called in the trial.
    """
    sharded, key = asked.sharded, asked.autocast
    longest = int(asked.units.longest[sharing_units(asked.units, asked.budget)].max(initial=0))
    tried, reason, forms = sharded.verdicts.get(key, (-1, "", {}))
    if longest > tried and not reason:
        found = _tried(asked)
        if found is None:
            return NOT_FINITE
        reason, forms, longest = found
        sharded.verdicts[key] = longest, reason, forms
    asked.allowed = forms or None
    return reason


def _tried(asked: ShardedPasses) -> tuple[str, Forms, int] | None:
    """Why not, in which forms layers were called, and how long the longest row was; None if nothing was learnt."""
    pieces = padded_pieces(asked)
    if pieces is None:
        return "", {}, 0  # every unit is by itself: none can reach another
    rows = TokenRows.joined([row for unit in pieces for row in unit])
    unit_ids = np.repeat(np.arange(len(pieces)), [sum(map(len, unit)) for unit in pieces])
    trial = ShardedPasses(
        asked.sharded,
        rows,
        make_units(rows, unit_ids, asked.objective, "examples", None),
        clip_by_parameter(asked.layout),
        asked.budget,
        asked.autocast,
    )
    fault = _fault(trial)
    learnt = 0 if fault is None else 2 if fault.words else 1
    least, most = asked.sharded.least(learnt), asked.sharded.most(learnt)
    if least == 0 or fault is None:
        return None
    if most == 2 and not fault.words:
        fault = Fault("another process of the group found that it is wrong", DISAGREE)
    if fault.words:
        log.warning("%s takes the reference path: %s", type(asked.model).__name__, fault.words)
    note_paths(asked.model, paths_of(trial, fault.cause, False))
    return fault.words, trial.forms, int(trial.units.lengths.max())


def _fault(trial: ShardedPasses) -> Fault | None:
    """In what the fast path differs from plain autograd; None if the units are not finite."""
    try:
        with trial.sharded.gathered(), trial._hooked():
            pass_ = trial.passed(np.flatnonzero(trial.units.counts))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        return Fault.of(error)
    reference = ShardedPasses(
        trial.sharded, trial.rows, trial.units, trial.clip.clip, trial.budget, trial.autocast, one_by_one=True
    )
    with trial.sharded.gathered():  # as many passes in every process, whatever one of them finds
        gradients = [reference.gradient_on_host(unit)[0] for unit in pass_.units.tolist()]
        return _compared(trial, pass_, gradients)


def _compared(trial: ShardedPasses, pass_: Pass, gradients: list[dict[str, torch.Tensor]]) -> Fault | None:
    """The same, of a pass and each of its units' gradients by plain autograd."""
    relative, absolute = tolerances(trial)
    for place, gradient in enumerate(gradients):
        norms, found = trial.clip.block_norms(gradient), pass_.norms[:, place].double().cpu()
        whole = float(norms.norm())
        if not whole <= LARGEST_NORM:
            return None
        unsure = pass_.unsure[:, place].cpu()
        off = (found - norms).abs().masked_fill(unsure, 0) - relative * norms - absolute * whole
        if not float(off.max()) <= 0:
            return Fault(f"a unit's norm in {trial.layout.names[int(off.argmax())]} is another", DISAGREE)
    expected = {name: sum(gradient[name] for gradient in gradients[1:]) + gradients[0][name] for name in gradients[0]}
    scale = float(torch.stack([view.norm() for view in expected.values()]).norm())
    ones = torch.ones_like(pass_.norms)
    for name, view in expected.items():
        total = torch.zeros_like(view, device=trial.device)
        pass_.gradients.add_weighted_of(name, total, ones)
        if not float((total.cpu() - view).norm()) <= relative * float(view.norm()) + absolute * scale:
            return Fault(f"the gradient of {name} differs from autograd's", DISAGREE)
    return Fault("", "")


def paths_one_by_one(asked: ShardedPasses, because: str) -> None:
    """Have `gradient_paths` say that this model's units come one after the other, and why."""
    note_paths(asked.model, GradientPaths.of(asked.sharded.kinds, set(), because=because))
