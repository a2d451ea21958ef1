"""Broken builds in which users put in more than they may, or somebody who was not sampled."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from builds import ELS, QUANTILE, build, mechanism

import clients.worker
import fedsim.gradients.clipping
import fedsim.plan.els
import fedsim.plan.uls
import server.dispatch
import server.round
from clients.worker import Worker
from fedsim.clip import Clip
from fedsim.data.contribution import bounded_rows, bounded_rows_of, draw_rows
from fedsim.engine.messages import TrainReply, TrainRequest
from fedsim.engine.sums import ServerSum
from fedsim.engine.totals import Expected
from fedsim.gradients import ClippedSum, clipped_sum, clipped_units
from fedsim.plan import ElsPlan
from fedsim.sampling import Poisson
from server.dispatch import _Gathering

# The worker -------------------------------------------------------------------------------------------------------

NO_CLIP = 1e30


def _unchecked(patch: pytest.MonkeyPatch) -> None:
    """Without the server's own check of replies, which refuses those that are longer than all their units could be."""
    patch.setattr(server.dispatch, "check_answer", lambda answer, request, units: None)
    patch.setattr(Expected, "check", lambda self, total: None)


def _without_clip(clip: Clip) -> Clip:
    """In effect none."""
    return dataclasses.replace(clip, norm=NO_CLIP)


@build("no clipping", "a round could not be run")
def _(patch: pytest.MonkeyPatch) -> None:
    def unclipped(model: Any, rows: Any, units: Any, clip: Clip, **common: Any) -> ClippedSum:
        return clipped_sum(model, rows, units, _without_clip(clip), **common)

    patch.setattr(clients.worker, "clipped_sum", unclipped)


@build("a clip at twice the norm", "a unit reached 2 times")
def _(patch: pytest.MonkeyPatch) -> None:
    def looser(model: Any, rows: Any, units: Any, clip: Clip, **common: Any) -> ClippedSum:
        return clipped_sum(model, rows, units, dataclasses.replace(clip, norm=2 * clip.norm), **common)

    patch.setattr(clients.worker, "clipped_sum", looser)
    _unchecked(patch)


@build("the last unit of a message is not clipped", "times as far as its clip")
def _(patch: pytest.MonkeyPatch) -> None:
    def all_but_one(model: Any, rows: Any, units: np.ndarray, clip: Clip, **common: Any) -> ClippedSum:
        last = np.flatnonzero(units == units.max())
        clipped, unclipped = (
            clipped_sum(model, rows.take(last), np.zeros(len(last), np.int64), one, **common).total
            for one in (clip, _without_clip(clip))
        )
        result = clipped_sum(model, rows, units, clip, **common)
        return dataclasses.replace(result, total=result.total - clipped + unclipped)

    patch.setattr(clients.worker, "clipped_sum", all_but_one)
    _unchecked(patch)


@build("an update that is not finite counts", "a round could not be run", attacked=False)
def _(patch: pytest.MonkeyPatch) -> None:
    everything = lambda norms: torch.ones_like(norms, dtype=torch.bool)  # noqa: E731
    patch.setattr(fedsim.gradients.clipping, "is_finite", everything)


def _rows_alone(model: Any, rows: Any, units: np.ndarray, clip: Clip, **common: Any) -> ClippedSum:
    result = clipped_sum(model, rows, np.arange(len(rows)), clip, **common)
    nothing = torch.zeros(int(units.max()) + 1, dtype=torch.float64)
    return dataclasses.replace(result, norms=nothing, losses=nothing, finite=nothing == 0)


@build("examples clipped, accounted as users", "a unit reached 1.41 times")
def _(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(clients.worker, "clipped_sum", _rows_alone)
    _unchecked(patch)


@build("the worker ignores the scales of the clip", "times as far as its clip", *mechanism("matrix-noise"))
def _(patch: pytest.MonkeyPatch) -> None:
    def unscaled(model: Any, rows: Any, units: Any, clip: Clip, **common: Any) -> ClippedSum:
        return clipped_sum(model, rows, units, dataclasses.replace(clip, scales={}), **common)

    patch.setattr(clients.worker, "clipped_sum", unscaled)


@build("the worker keeps the clip of its first message", "times as far as its clip", *QUANTILE)
def _(patch: pytest.MonkeyPatch) -> None:
    clips: dict[int, Clip] = {}

    def first(model: Any, rows: Any, units: Any, clip: Clip, **common: Any) -> ClippedSum:
        return clipped_sum(model, rows, units, clips.setdefault(id(model), clip), **common)

    patch.setattr(clients.worker, "clipped_sum", first)
    _unchecked(patch)


@build("exact sums of updates that are not clipped", "times as far as its clip")
def _(patch: pytest.MonkeyPatch) -> None:
    def unclipped(model: Any, rows: Any, units: Any, clip: Clip, **common: Any) -> Any:
        return clipped_units(model, rows, units, dataclasses.replace(clip, norm=3 * clip.norm), **common)

    def quantised(update: torch.Tensor, clip: Clip, sizes: Mapping[str, int], resolution: float) -> torch.Tensor:
        return (update.double() / resolution).trunc().long()

    patch.setattr(clients.worker, "clipped_units", unclipped)
    patch.setattr(clients.worker, "quantise", quantised)
    _unchecked(patch)


@build("the worker computes on the announced units too", "not sampled put something in")
def _(patch: pytest.MonkeyPatch) -> None:
    train = Worker.train

    def greedy(self: Worker, request: TrainRequest) -> TrainReply:
        units = np.union1d(request.units, request.next_units)
        return dataclasses.replace(train(self, dataclasses.replace(request, units=units)), units=request.units)

    patch.setattr(Worker, "train", greedy)
    _unchecked(patch)


# The dispatcher ---------------------------------------------------------------------------------------------------


def _put(gathering: _Gathering, answer: TrainReply) -> None:
    """Into the round's sum, whatever it stands for."""
    assert isinstance(gathering.sums, ServerSum)
    gathering.sums.put(answer.total)


@build("each reply added twice", "a unit reached 2 times")
def _(patch: pytest.MonkeyPatch) -> None:
    add = _Gathering._add

    def twice(self: _Gathering, place: str, asked: Any, answer: TrainReply) -> None:
        add(self, place, asked, answer)
        _put(self, answer)

    patch.setattr(_Gathering, "_add", twice)


@build("the announced units are sent too", "not sampled put something in")
def _(patch: pytest.MonkeyPatch) -> None:
    record_for = TrainRequest.record_for

    def greedy(self: TrainRequest, units: np.ndarray, next_units: np.ndarray) -> Any:
        return record_for(self, np.union1d(units, next_units), next_units)

    patch.setattr(TrainRequest, "record_for", greedy)
    _unchecked(patch)


@build("a late reply is added beside the recomputed one", "a unit reached 2 times")
def _(patch: pytest.MonkeyPatch) -> None:
    take, given_up = _Gathering._take, {}

    def taken(self: _Gathering, reply: Any) -> None:
        place = reply.metadata.reply_to_message_id
        if reply.has_error():
            given_up[place] = self
        elif given_up.get(place) is self:
            _put(self, TrainReply.from_record(reply.content))
        take(self, reply)

    patch.setattr(_Gathering, "_take", taken)


@build("a reply that comes twice is added twice", "a unit reached 2 times")
def _(patch: pytest.MonkeyPatch) -> None:
    take, answered = _Gathering._take, {}

    def taken(self: _Gathering, reply: Any) -> None:
        place = reply.metadata.reply_to_message_id
        if place in answered and answered[place] is self and not reply.has_error():
            _put(self, TrainReply.from_record(reply.content))
        elif place in self.asked and not reply.has_error():
            answered[place] = self
        take(self, reply)

    patch.setattr(_Gathering, "_take", taken)


# Which rows -------------------------------------------------------------------------------------------------------


def _listed(patch: pytest.MonkeyPatch) -> None:
    """Without slots: all kept examples in a list."""
    patch.setattr(Poisson, "permits_empty_places", lambda self: False)


@build("ELS keeps more than G rows of a user", "a user of group size 2 put in 3 examples", *ELS)
def _(patch: pytest.MonkeyPatch) -> None:
    def more(view: Any, group_size: int, seed: int, selection: Any) -> np.ndarray:
        return bounded_rows(view, group_size + 1, seed, selection)

    patch.setattr(fedsim.plan.els, "bounded_rows", more)
    _listed(patch)


@build("ELS draws the rows it keeps anew in each round", "examples over the run", *ELS)
def _(patch: pytest.MonkeyPatch) -> None:
    def unit_ids(self: ElsPlan, users: Any, seed: int) -> Callable[[np.ndarray], np.ndarray]:
        calls = itertools.count()
        return lambda places: self.kept_rows(users, seed + next(calls))[places]

    patch.setattr(ElsPlan, "unit_ids", unit_ids)
    _listed(patch)


@build("slots hold other rows in each round", "examples over the run", *ELS)
def _(patch: pytest.MonkeyPatch) -> None:
    calls = itertools.count()

    def anew(view: Any, users: Any, group_size: int, seed: int, selection: Any) -> tuple[np.ndarray, np.ndarray]:
        return bounded_rows_of(view, users, group_size, seed + next(calls), selection)

    patch.setattr(fedsim.plan.els, "bounded_rows_of", anew)


def _rows_in(patch: pytest.MonkeyPatch, changed: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> None:
    """Slots taken for others, given with their users' numbers of rows and the group size."""
    rows_in = ElsPlan._rows_in

    def broken(self: ElsPlan, slots: np.ndarray, users: Any, seed: int) -> np.ndarray:
        owned = np.diff(users.user_offsets)[slots // self.group_size]
        return rows_in(self, changed(slots, owned, self.group_size), users, seed)

    patch.setattr(ElsPlan, "_rows_in", broken)


@build("an empty slot holds its user's first row", "a unit was sampled twice in one round", *ELS, attacked=False)
def _(patch: pytest.MonkeyPatch) -> None:
    _rows_in(patch, lambda slots, owned, group: slots - slots % group + slots % group % owned)


@build("a full user's last slot is taken for empty", "units a round were sampled, not", *ELS, attacked=False)
def _(patch: pytest.MonkeyPatch) -> None:
    _rows_in(patch, lambda slots, owned, group: slots[(slots % group + 1 < group) | (owned < group)])


@build("a user's rows are another's", "not sampled put something in")
def _(patch: pytest.MonkeyPatch) -> None:
    def of_the_next(view: Any, users: np.ndarray, *rest: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        return draw_rows(view, (np.asarray(users) + 1) % view.num_users, *rest, **options)

    patch.setattr(fedsim.plan.uls, "draw_rows", of_the_next)


@build("units that share their rows", "depended on who else was there")
def _(patch: pytest.MonkeyPatch) -> None:
    def shifted(*arguments: Any, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        rows, units = draw_rows(*arguments, **options)
        return rows, np.roll(units, 1)

    patch.setattr(fedsim.plan.uls, "draw_rows", shifted)
