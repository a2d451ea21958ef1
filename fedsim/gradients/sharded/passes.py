"""The units of a group of processes, in step: each has passes of its own, and all take part in gathering blocks."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from fedsim.clip import Clip
from fedsim.gradients.clipping import is_finite
from fedsim.gradients.fast import FastSum, Pass
from fedsim.gradients.sharded.model import ShardedModel
from fedsim.gradients.sharded.total import Fill, ShardedTotal
from fedsim.gradients.tape import Record
from fedsim.gradients.units import Units, measured_pass, pack_units, split_rows
from fedsim.rows import TokenRows

OnGrid = Callable[[Mapping[str, torch.Tensor]], Callable[[str], torch.Tensor]]
"""From a unit's clipped update, a tensor for each parameter, to each parameter's whole steps of a grid, int64."""


@dataclass(frozen=True, kw_only=True)
class ShardedSum:
    """As `ClippedSum`, of which each process of a group has all but the total, of which it has its part.

    Attributes:
        total: This process's part.
        norms, losses, finite: As of `ClippedSum`, of the units of all.
    """

    total: ShardedTotal
    norms: torch.Tensor
    losses: torch.Tensor
    finite: torch.Tensor


class ShardedPasses(FastSum):
    """A clipped sum under way in a group of processes.

    Micro-batches are those of one process, some of them halved so that all processes have as many; so are the passes
    that units take by themselves. They are dealt out to the processes one after the other. A process that has none
    left while another has runs some unit's once more, to be there when blocks are gathered, and makes nothing of it.

    Args:
        sharded: The model. All processes give the same rows and units.
        rows, units, clip, budget, autocast: As for `FastSum`.
        one_by_one: Whether each unit passes by itself, through plain autograd.
        on_grid: What is added of a unit that passes by itself; None adds its update.
    """

    def __init__(
        self,
        sharded: ShardedModel,
        rows: TokenRows,
        units: Units,
        clip: Clip,
        budget: int,
        autocast: torch.dtype | None,
        *,
        one_by_one: bool = False,
        on_grid: OnGrid | None = None,
    ) -> None:
        self.sharded, self.one_by_one, self.on_grid = sharded, one_by_one, on_grid
        super().__init__(sharded.model, rows, units, sharded.objective, clip, budget, autocast)
        self.packable = False

    def sharded_sum(self) -> ShardedSum:
        """Every unit once, by one of the processes."""
        dtype = self.dtype if self.on_grid is None else torch.int64
        total = ShardedTotal(self.sharded.buckets, dtype, self.device)
        every = np.flatnonzero(self.units.counts).tolist()
        together, alone = ([], every) if self.one_by_one else pack_units(self.units, self.budget)
        together = shared_out(together, self.sharded.ranks)
        with self.sharded.gathered(), self._hooked() if together else nullcontext():
            own = alone[self.sharded.rank :: self.sharded.ranks] + self._add_together(total, together)
            for place in range(self.sharded.most(len(own))):
                self._add_by_itself(total, own[place] if place < len(own) else None)
        for values in (self.norms, self.losses):
            dist.all_reduce(values)  # each unit's are 0 but where it passed
        return ShardedSum(total=total, norms=self.norms, losses=self.losses, finite=is_finite(self.norms))

    def _add_together(self, total: ShardedTotal, together: list[np.ndarray]) -> list[int]:
        """Add the units that share micro-batches; returns those of this process that have to be done again, alone."""
        again: list[int] = []
        for start in range(0, len(together), self.sharded.ranks):
            place = start + self.sharded.rank
            busy = place < len(together)
            units = together[place] if busy else together[0][:1]
            with measured_pass(self.model, self.device, self.tokens(units), self.autocast):
                pass_ = self.passed(units)
            again += self._add_pass(total, pass_ if busy else None)
            del pass_
        return again

    def _add_pass(self, total: ShardedTotal, pass_: Pass | None) -> list[int]:
        if pass_ is None:
            total.add(None)
            return []
        factors, again = self._weights(pass_)
        total.add(lambda name, target: pass_.gradients.add_weighted_of(name, target, factors))
        return again

    def _add_by_itself(self, total: ShardedTotal, unit: int | None) -> None:
        """Add a unit whose micro-batches hold no other: plain autograd, then the clip.

        Until its norm is known its gradient lies in the host's memory.
        """
        gradient, loss = self.gradient_on_host(unit)
        if unit is None:
            total.add(None)
            return
        self.norms[unit] = self.clip.clip_views_(gradient, self.device)
        self.losses[unit] = loss
        total.add(self._adding(gradient))

    def _adding(self, update: Mapping[str, torch.Tensor]) -> Fill:
        of = update.__getitem__ if self.on_grid is None else self.on_grid(update)

        def fill(name: str, target: torch.Tensor) -> None:
            target += of(name).to(self.device).view(target.shape)

        return fill

    def gradient_on_host(self, unit: int | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """A unit's gradient by parameter, in the order of the layout, and its loss; as of `unit_gradient`.

        Args:
            unit: None only takes part in the passes of the others.
        """
        parts = [] if unit is None else split_rows(self.units, unit, self.budget)
        loss = self.losses.new_zeros(())
        shapes = {} if unit is None else dict(zip(self.layout.names, self.layout.shapes, strict=True))
        gradient = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in shapes.items()}

        def take(name: str, piece: torch.Tensor) -> None:
            gradient[name] += piece.to("cpu")

        for place in range(self.sharded.most(len(parts))):
            busy = place < len(parts)
            batch, coefficients, _ = self._batch(parts[place] if busy else self._shortest)
            with self.sharded.giving(take if busy else None):
                part_loss, _ = self._loss(batch, coefficients)
                torch.autograd.backward(part_loss)
            if busy:
                loss += part_loss.detach()
        return gradient, loss

    @property
    def _shortest(self) -> np.ndarray:
        """Where in `units.rows` the shortest is."""
        return np.array([self.units.lengths.argmin()])

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return self.sharded.parameters

    def _owned(self, module: torch.nn.Module) -> Iterable[torch.nn.Parameter]:
        return self.sharded.owned.get(module, [])

    def _found_head(self) -> torch.nn.Linear | None:
        return None if self.one_by_one else self.sharded.head

    def _layers(self) -> dict[torch.nn.Module, tuple[str, Record]]:
        return self.sharded.layers

    def kinds(self) -> dict[str, str]:
        """As of `FastSum`, found out while the model was whole."""
        return self.sharded.kinds


def shared_out(together: list[np.ndarray], ranks: int) -> list[np.ndarray]:
    """Micro-batches in the same order, the largest of them halved until there are as many for each of the processes.

    Args:
        together: Units that share a micro-batch.
        ranks: How many processes there are; where units are too few, some of them get one micro-batch less.
    """
    shared = list(together)
    while len(shared) % ranks and (largest := max(map(len, shared))) > 1:
        place = next(place for place, units in enumerate(shared) if len(units) == largest)
        shared[place : place + 1] = [shared[place][: largest // 2], shared[place][largest // 2 :]]
    return shared
