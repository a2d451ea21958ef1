"""Deliberately broken mechanisms, each without one property. They live here and are registered by tests alone."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from fedsim.clip import Clip
from fedsim.privacy.events import Event
from fedsim.privacy.mechanisms import MECHANISMS, AdaptiveNoise, GaussianNoise, Mechanism, Noise, NoiseSource, Sizes


class Broken(Mechanism):
    """A mechanism of a kind of noise."""

    summary = "broken"
    kind: ClassVar[Any] = GaussianNoise

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> Noise:
        noise: Noise = self.kind(noise_multiplier, sizes)
        return noise


def broken(name: str) -> Any:
    """Register plain Gaussian noise with what a class changes of it."""

    def register(changes: type) -> type:
        noise = type(changes.__name__, (changes, GaussianNoise), {})
        made = type(changes.__name__ + "Mechanism", (Broken,), {"name": name, "kind": noise, "__module__": __name__})
        MECHANISMS.register(dataclass(frozen=True, kw_only=True)(made))
        return changes

    return register


@broken("twice-the-sum")
class _:
    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        total *= 2
        GaussianNoise.add(self, total, clip, source)


@broken("little-made-much")
class _:
    """However little there is, it is brought to one length."""

    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        if 0 < np.linalg.norm(total) < clip.norm / 1000:
            total *= 20 * clip.norm / np.linalg.norm(total)
        GaussianNoise.add(self, total, clip, source)


@broken("half-the-noise")
class _:
    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        GaussianNoise.add(self, total, dataclasses.replace(clip, norm=clip.norm / 2), source)


@broken("one-noise-for-all-values")
class _:
    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        one = np.zeros(1)
        source.add_normal(one, self.noise_multiplier * clip.norm)
        total += one


@broken("one-noise-for-all-rounds")
class _:
    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        total += self.noise_multiplier * clip.norm * np.random.default_rng(7).standard_normal(len(total))


@broken("noise-that-is-not-centred")
class _:
    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        GaussianNoise.add(self, total, clip, source)
        total += self.noise_multiplier * clip.norm / 4


@broken("words-of-more-noise")
class _:
    def in_words(self: Any, clip: Clip) -> str:
        return GaussianNoise.in_words(self, dataclasses.replace(clip, norm=2 * clip.norm))


@broken("words-of-no-size")
class _:
    def in_words(self: Any, clip: Clip) -> str:
        return "Gaussian noise is added to each coordinate of the sum"


@broken("another-clip-than-planned")
class _:
    def clip(self: Any, norm: float) -> Clip:
        return Clip(norm=2 * norm)


@broken("words-of-another-clip")
class _:
    def clip_in_words(self: Any, clip: Clip) -> str:
        return dataclasses.replace(clip, norm=clip.norm / 2).in_words()


@broken("noise-of-this-object")
class _:
    """A generator that begins anew wherever a run is resumed."""

    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        if not hasattr(self, "own"):
            self.own = np.random.default_rng(7)
        total += self.noise_multiplier * clip.norm * self.own.standard_normal(len(total))


@broken("noise-of-this-process")
class _:
    """Seeded by what other processes hash otherwise."""

    def add(self: Any, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        own = np.random.default_rng(abs(hash("blocks.0.weight")))
        total += self.noise_multiplier * clip.norm * own.standard_normal(len(total))


class _Unknown(Noise):
    """A tenth of the noise, of no kind that the audit could tell the law of."""

    def __init__(self, noise_multiplier: float, sizes: Sizes) -> None:
        self.std = noise_multiplier / 10

    def add(self, total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
        source.add_normal(total, self.std * clip.norm)

    def in_words(self, clip: Clip) -> str:
        return f"Gaussian noise of standard deviation {self.std * clip.norm:g} is added to each coordinate of the sum"


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Unknown(Broken):
    name = "too-little-of-an-unknown-law"
    kind = _Unknown


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Forgetful(AdaptiveNoise):
    """It follows earlier releases, and keeps nothing of them."""

    name = "forgetful"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> Any:
        noise: Any = AdaptiveNoise.noise(self, release, noise_multiplier, sizes)
        noise.state = dict
        noise.load_state = lambda arrays: None
        return noise


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Peeking(AdaptiveNoise):
    """What it learns is not what was released: it is what its own noise was added to."""

    name = "peeking"

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> Any:
        noise: Any = AdaptiveNoise.noise(self, release, noise_multiplier, sizes)
        seen: list[np.ndarray] = []

        def add(total: np.ndarray, clip: Clip, source: NoiseSource) -> None:
            seen.append(total.copy())
            GaussianNoise.add(noise, total, clip, source)

        def observe(released: np.ndarray, parameters: np.ndarray) -> None:
            noise.allocator.observe(seen[-1] if seen else released, parameters)

        noise.add, noise.observe = add, observe
        return noise


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Shares(Broken):
    """An option that JSON gives back as something else."""

    name = "option-that-does-not-travel"

    shares: tuple[float, ...] = field(default=(1.0,))


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class Remembered(Broken):
    """An option that decides something and is no field."""

    name = "option-that-is-no-field"

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", 1.0 + next(MADE))

    def noise(self, release: Event | None, noise_multiplier: float, sizes: Sizes) -> Noise:
        strength: float = self.strength  # type: ignore[attr-defined]
        return GaussianNoise(noise_multiplier * strength, sizes)


MADE = itertools.count()
