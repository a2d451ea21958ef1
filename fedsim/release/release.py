"""A run's releases: the clipped sum with its noise over a public constant, and the state from one to the next."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from fedsim.clip import Clip
from fedsim.engine.work import Vector, on_host
from fedsim.errors import Failure, InvalidInput
from fedsim.plan import Plan
from fedsim.privacy.adjacency import Adjacency
from fedsim.privacy.mechanisms import DrawsAhead, GaussianNoise, Noise, NoiseSource
from fedsim.privacy.mechanisms.banded.filter import BufferFilter, CorrelatedNoise, FloatFilter, GridFilter, NoiseFilter
from fedsim.privacy.mechanisms.quantile_clip import COUNT_RESOLUTION
from fedsim.randomness import StreamNoise
from fedsim.release.ahead import Ahead
from fedsim.release.log import Kept, ReleasesLost
from fedsim.secure_noise import SecureNoise

CLIP_NORM = "clip_norm"
SUM = "noise"
"""Purpose of the noise of a round's sum."""
NOISE = "noise/"
CHAIN, PAST = "chain", "past"
"""Of correlated noise: how the chain stands, and, where it cannot be drawn again, what earlier rounds drew."""

AHEAD_BYTES = 4 << 30
"""Bytes of noise that are drawn ahead at most. A round's takes as many as its sum, four a parameter; twice as many in
exact mode and from the cryptographic generator; and of each band's as many again as it is kept with."""


class Release:
    """What leaves the server each round, and the mechanism's state between rounds.

    State is made of released values alone, but for noise that is correlated over rounds: secure noise cannot be drawn
    again, so what earlier rounds drew is part of the state, and as secret as what it hides.

    Args:
        plan: Names mechanism and clip rule; its noise multiplier is that of the whole release.
        sizes: Values of each parameter by name, in the order of the flat vector.
        noise_seed: Seed or secret key of the noise; None draws it from a cryptographic generator, under new keys for
            each release.
        exact: Whether sums are exact, and so float64.
        threads: How many may draw noise at the same time; the noise is the same whatever it is.
        device: A torch.device: where sums are, and where Gaussian noise of a seed, drawn on the host, is added to
            float32 sums; anything else is added on the host. None, or a CPU, is the host, which needs no torch.

    Raises:
        InvalidInput: A mechanism whose noise is none that a moving clip norm's count can share, or whose clip is not
            of these parameters.
    """

    def __init__(
        self,
        plan: Plan,
        sizes: Mapping[str, int],
        noise_seed: int | bytes | None,
        *,
        exact: bool = False,
        threads: int = 1,
        device: Any = None,
    ) -> None:
        self.plan = plan
        self.clip_norm = plan.clip_norm
        self.clip_rule = plan.clip_rule
        self._noise_seed = noise_seed
        self._dtype = np.float64 if exact else np.float32
        self._threads = threads
        self.device = device
        self._drawn: tuple[object, NoiseSource, Ahead] | None = None
        event = plan.step_event() if plan.noise_multiplier > 0 else None
        self.noise = plan.mechanism.noise(event, plan.sum_noise_multiplier, sizes)
        self._sizes = sizes
        self.chain = _chain(plan, sum(sizes.values()), noise_seed is None, exact)
        self._begins, self._attempt = 0, 0
        plain = isinstance(self.noise, GaussianNoise) and self.noise.noise_multiplier == plan.sum_noise_multiplier
        if self.clip_rule is not None and not plain:
            raise InvalidInput("plan.clip-quantile", plan.clip_quantile, f"0 with {plan.mechanism.name}")
        self.clip  # noqa: B018 - a clip that is not of this model is refused before anything is charged

    @property
    def clip(self) -> Clip:
        """What each unit's update is brought to in the coming round.

        Raises:
            InvalidInput: The mechanism made a clip of another norm or of other parameters.
        """
        clip = self.noise.clip(self.clip_norm)
        clip.require_parameters(self._sizes)
        if clip.order != self.plan.mechanism.norm_order:
            raise InvalidInput("clip.order", clip.order, f"{self.plan.mechanism.norm_order}, as its mechanism says")
        return clip

    @property
    def correlated(self) -> bool:
        """Whether a round's noise depends on that of earlier ones, so that it cannot be released anew if lost."""
        return self.chain is not None

    @property
    def on_device(self) -> bool:
        """Whether noise is added on the sums' device rather than the host."""
        gaussian = isinstance(self.noise, GaussianNoise) and type(self.noise).add is GaussianNoise.add
        elsewhere = self.correlated or self._noise_seed is None or self._dtype != np.float32
        return self.device is not None and self.device.type != "cpu" and gaussian and not elsewhere

    @property
    def chain_state(self) -> tuple[int, int, int]:
        """First round and number of the chain that goes on, and rounds that it has."""
        return self._begins, self._attempt, 0 if self.chain is None else self.chain.rounds

    def begin_chain(self, round: int, attempt: int) -> None:
        """Begin a chain of correlated noise with a round; nothing is left of the one before.

        Args:
            round: Its first round.
            attempt: Which chain it is, from 0; each has noise of its own.
        """
        self._begins, self._attempt = round, attempt
        if self.chain is not None:
            self.chain.restart()

    @contextmanager
    def drawing_ahead(
        self, clip: Clip, round: int, attempt: int = 0, resolution: float = 0.0
    ) -> Iterator[Ahead | None]:
        """Within it a thread draws the noise of a round, which noised_mean takes if it is asked for the same.

        The noise depends on nothing that workers compute; its bits are those that noised_mean would draw. The first
        piece is drawn at once, so that a source that does not work says so before anything is charged; what goes
        wrong later is raised by noised_mean. Noise that is not taken is forgotten, and nothing else has changed.

        Args:
            clip, round, attempt, resolution: As noised_mean will be given them.

        Yields:
            The thread's work; None where the mechanism's noise cannot be drawn ahead.
        """
        if not (normals := self.noise.normals(clip)):
            yield None
            return
        source = self._source_of(round, attempt, resolution)
        ahead = Ahead(source.draw_ahead(normals, self._dtype, AHEAD_BYTES))
        self._drawn = (clip, round, attempt, resolution), source, ahead
        try:
            yield ahead
        finally:
            self._drawn = None
            ahead.stop()

    def noised_mean(
        self, total: Vector, clip: Clip, round: int, *, attempt: int = 0, resolution: float = 0.0
    ) -> Vector:
        """(total + noise)/normaliser, in place: the released mean.

        The noise of one round is drawn from its own keyed stream and never used for another sum. Divided by the
        expected, never the realised, number of units: the latter would leak who took part.

        Args:
            total: The sum of updates clipped by `clip`, float32 or (from exact sums) float64 [P]; overwritten, but for
                a tensor whose noise is not added on its device: that is brought to the host.
            clip: The round's clip.
            round: The round, from 0.
            attempt: How often the round was released before (and lost); each attempt has noise of its own.
            resolution: Step of the grid that exact sums lie on; 0 for float sums.

        Raises:
            Failure: A sum of another number of values than the model has, some of which would get no noise; or, with
                correlated noise, a round that is not the next of its chain.
        """
        if len(total) != sum(self._sizes.values()):
            raise Failure(
                f"a sum of {len(total)} values cannot be released for {sum(self._sizes.values())} parameters"
            )
        drawn, self._drawn = self._drawn, None
        if drawn is not None and drawn[0] == (clip, round, attempt, resolution):
            source = drawn[1]
            drawn[2].finish()
        else:
            source = self._source_of(round, attempt, resolution)
        total = self._beside_its_noise(total)
        self.noise.add(total, clip, source)
        if isinstance(source, CorrelatedNoise):
            source.finish()
        total /= float(self.plan.normaliser)
        return total

    def _beside_its_noise(self, total: Vector) -> Vector:
        """A sum where its noise is added; one of nobody, which no worker computed, is the host's at first."""
        if not self.on_device:
            return on_host(total)
        import torch  # here, because a host without devices does without

        return torch.as_tensor(total, device=self.device)

    def kept(self, mean: np.ndarray) -> Kept:
        """What must be known of the round just released, before it leaves, so that it could be repeated."""
        state = {CLIP_NORM: np.array(self.clip_norm)}
        if isinstance(self.chain, GridFilter):
            state[PAST] = self.chain.latest()
        return Kept(mean=mean, state=state)

    def repeat(self, kept: Kept, parameters: np.ndarray, round: int, attempt: int) -> None:
        """Take in a release that was made before: what follows is as it was then.

        Args:
            kept: What kept() returned then.
            parameters: The parameters [P] it belongs to, before the step.
            round: The round.
            attempt: As then.
        """
        assert self.chain is not None
        correlated = self._next_of_chain(self.chain, self._source(SUM, round, attempt), round, attempt)
        if isinstance(self.chain, GridFilter):
            self.chain.take(kept.state[PAST])
        else:
            correlated.finish(draw=True)
        self.noise.observe(kept.mean, parameters)
        self.clip_norm = float(kept.state[CLIP_NORM])

    def noise_key(self, round: int, attempt: int, repeat: int = 0) -> bytes:
        """What tells the noise of one sum (`StreamNoise.key`); empty where it comes from a cryptographic generator.

        Args:
            round, attempt: As noised_mean is given them.
            repeat: Above 0 tells apart other sums of the same attempt; 0 is what noised_mean draws.
        """
        if self._noise_seed is None:
            return b""
        return StreamNoise.key(self._noise_seed, SUM, *_place(round, attempt, repeat))

    def _source_of(self, round: int, attempt: int, resolution: float) -> DrawsAhead:
        """Where the noise of a round's sum comes from."""
        source = self._source(SUM, round, attempt, resolution)
        return source if self.chain is None else self._next_of_chain(self.chain, source, round, attempt)

    def _next_of_chain(self, chain: NoiseFilter, source: NoiseSource, round: int, attempt: int) -> CorrelatedNoise:
        following = self._begins + chain.rounds
        if (round, attempt) != (following, self._attempt):
            raise Failure(f"round {round} cannot get correlated noise: its chain goes on with round {following}")
        return chain.correlated(source)

    def observe(
        self,
        released: Vector,
        parameters: Vector,
        statistics: Mapping[str, float],
        round: int,
        *,
        attempt: int = 0,
    ) -> None:
        """Prepare the next round from this one's release, and from a noised count where the clip norm follows one.

        Args:
            released: The released mean [P].
            parameters: The parameters [P] it belongs to, before the step.
            statistics: Private sums over the units: "units", "clipped_units" and "empty_units" enter, noised.
            round: The round.
            attempt: How often the round was released before.
        """
        if type(self.noise).observe is not Noise.observe:  # others would copy what they do not look at
            self.noise.observe(on_host(released), on_host(parameters))
        if self.clip_rule is not None:
            units = self.clip_rule.counted(statistics, emptied=self.plan.adjacency is Adjacency.FIXED_GRAPH)
            fraction = self.clip_rule.noised_fraction(
                units - statistics.get("clipped_units", 0.0),
                units,
                self._source("clip-count", round, attempt, COUNT_RESOLUTION),
                private=self.plan.noise_multiplier > 0,
            )
            self.clip_norm = self.clip_rule.moved(self.clip_norm, fraction)

    def _source(self, purpose: str, round: int, attempt: int, resolution: float = 0.0) -> DrawsAhead:
        """Where the noise of one release comes from; used for nothing else.

        resolution: Step of the public grid that the exact value lies on; 0 for float sums.
        """
        if self._noise_seed is None:
            return SecureNoise(resolution, threads=self._threads)
        source = StreamNoise(self._noise_seed, purpose, *_place(round, attempt), threads=self._threads)
        if purpose == SUM and self.on_device:
            from fedsim.release.device_noise import DeviceNoise  # here, because it loads torch

            return DeviceNoise(source)
        return source

    def state(self) -> dict[str, np.ndarray]:
        """Everything a resumed run needs, as named arrays."""
        kept = {NOISE + name: array for name, array in self.noise.state().items()}
        if self.chain is not None:
            kept[CHAIN] = np.array([*self.chain_state, zlib.crc32(self.chain.past.data)])
            if isinstance(self.chain, GridFilter):
                kept[PAST] = self.chain.past
        return {CLIP_NORM: np.array(self.clip_norm), **kept}

    def load_state(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Continue from what state() returned; noise that a seed decides is drawn again, round after round.

        Raises:
            ReleasesLost: It is not what was drawn then: other software draws otherwise from the same seed.
        """
        self.clip_norm = float(arrays[CLIP_NORM])
        self.noise.load_state(under(arrays, NOISE))
        if self.chain is None:
            return
        begins, attempt, rounds, checksum = map(int, arrays[CHAIN])
        self.begin_chain(begins, attempt)
        if isinstance(self.chain, GridFilter):
            self.chain.load(arrays[PAST], rounds)
            return
        for round in range(begins, begins + rounds):
            self.chain.correlated(self._source(SUM, round, attempt)).finish(draw=True)
        if zlib.crc32(self.chain.past.data) != checksum:
            raise ReleasesLost(begins + rounds, "the noise of rounds before it cannot be drawn again by this software")


def _place(round: int, attempt: int, repeat: int = 0) -> tuple[int, ...]:
    """The place of a release's stream: of another length for each kind, so that no two are the same."""
    if repeat:
        return round, attempt, repeat
    return (round, attempt) if attempt else (round,)


def _chain(plan: Plan, size: int, secure: bool, exact: bool) -> NoiseFilter | None:
    """What correlates the noise of rounds; None where it is independent."""
    if (correlation := plan.correlation) is None or plan.noise_multiplier == 0:
        return None
    if (buffered := correlation.buffered) is not None:
        if secure:
            hint = "Its decays have no grid that integers could apply them on: take --plan.bands."
            raise InvalidInput("plan.buffers", len(buffered.decays), "0 with secure noise", hint)
        return BufferFilter(buffered, correlation.norm, size, wide=exact)
    if secure:
        return GridFilter(plan.noise_coefficients, size, plan.sum_noise_multiplier)
    return FloatFilter(plan.noise_coefficients, size, wide=exact)


def under(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays of one part of a state, by their names in it."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
