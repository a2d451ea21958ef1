"""A round in which the workers form the sum, noise it and take the step."""

import logging
import math
import time
from dataclasses import replace

import numpy as np

from fedsim import phases
from fedsim.engine.cohort import Cohort
from fedsim.engine.kept import KeptSum
from fedsim.engine.shard_messages import Committed
from fedsim.engine.totals import Expected
from fedsim.engine.work import Work
from fedsim.errors import Failure
from fedsim.release import CoordinateNoise, norms_of_length
from server.round import Diverged, Gather, Round
from server.sharded.optimizer import ShardedOptimizer
from server.sharded.workers import GroupBroken

log = logging.getLogger(__name__)


class ShardedRound(Round):
    """The same round: sampled and charged here, gathered without vectors, released and stepped by the workers.

    One charge stands for one release. A commit that fails has released nothing (`clients.shard`), so that it is tried
    again at that charge, with the units of workers that are gone computed by others.
    """

    optimizer: ShardedOptimizer

    def run(self, number: int, gather: Gather) -> dict[str, float]:
        with self.phases.of(phases.TRANSPORT):
            if not self.optimizer.group.whole:
                self.optimizer.regroup()
        return super().run(number, gather)

    def state(self) -> dict[str, np.ndarray]:
        self.optimizer.everything()  # at once, rather than the parameters first
        return super().state()

    def _attempt(self, number: int) -> int:
        """As for any round; but one of floats that was lost is never repeated, whoever gave the seeds.

        Workers that form its sum again give it other last bits, and noise by how often they failed (`_committed`): the
        same cohort under other noise would be worth more than its charges.
        """
        return super()._attempt(number) if self.exact else self.budget.attempts(number)

    def _released(self, request: Work, costs: np.ndarray, attempt: int, gather: Gather) -> dict[str, float]:
        with self.phases.of(phases.CHARGE):
            self.budget.charge(request.round)
        group, total, failures = self.optimizer.group, KeptSum.of_nobody(Expected.of(request)), 0
        while True:
            try:
                total = self._gathered(request, total, gather)
                done = self._committed(request, total, attempt, failures)
                break
            except GroupBroken as broken:
                failures += 1
                if failures >= group.attempts:
                    raise Failure(
                        f"round {request.round}: the workers cannot take a step together: {broken}"
                    ) from broken
                log.warning("round %d: %s; the workers that are left go on", request.round, broken)
                with self.phases.of(phases.TRANSPORT):
                    total = total.within(self.optimizer.regroup(total.names))
        if not all(one.finite for one in done):
            raise Diverged(request.round)
        length = math.sqrt(math.fsum(one.square for one in done))
        self.norms = norms_of_length(self.release, length, request.clip, 0)
        self.optimizer.stepped()
        cohort = Cohort()
        for part in total.parts:
            cohort.add(part)
        return {**cohort.statistics, "units": float(len(request.units))}

    def _gathered(self, request: Work, total: KeptSum, gather: Gather) -> KeptSum:
        """The sum, with what is missing of it computed.

        Raises:
            GroupBroken: The workers that hold the parameters are not those that were asked.
        """
        have = np.concatenate([np.empty(0, np.int64), *(part.units for part in total.parts)])
        missing = request.units[~np.isin(request.units, have)]
        if not len(missing):
            return total
        asked = replace(request, units=missing, parameters=self.optimizer.vector)
        with self.phases.of(phases.TRANSPORT):
            gathered = gather(asked, self._costs(missing))
        self.phases.divide(phases.TRANSPORT, gathered.seconds, gathered.phases)
        assert isinstance(gathered.total, KeptSum)
        return total + gathered.total

    def _committed(self, request: Work, total: KeptSum, attempt: int, failures: int) -> list[Committed]:
        """The commit of a whole sum. One of floats that is another than before has noise of its own."""
        counted = np.concatenate([np.empty(0, np.int64), *(part.units for part in total.parts)])
        if not np.array_equal(np.sort(counted), np.sort(request.units)):
            raise Failure(f"round {request.round}: the sum does not stand for exactly the units asked for")
        noise = CoordinateNoise.of(
            self.release,
            request.clip,
            request.round,
            attempt,
            0 if request.resolution else failures,
            request.resolution,
        )
        noise.require_all(total.size)
        began = time.monotonic()
        with self.phases.of(phases.TRANSPORT):
            done = self.optimizer.group.commit(total.names, total.dtype, noise.to_values())
        slowest = max(done, key=lambda one: sum(one.seconds.values()))
        self.phases.divide(phases.TRANSPORT, time.monotonic() - began, slowest.seconds)
        return done
