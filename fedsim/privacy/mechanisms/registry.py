"""Mechanisms by name: how each clips, what each is accounted as, and how its noise is made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedsim.errors import InvalidInput
from fedsim.privacy.events import BinomialMixtureGaussian, Event, PoissonSubsampledGaussian, RandomisedScaleLaplace
from fedsim.privacy.mechanisms.allocation import ImportanceAllocator, equal_energy
from fedsim.privacy.mechanisms.blocks import Blocks
from fedsim.privacy.mechanisms.inverse_scale import Law, rescaled
from fedsim.privacy.mechanisms.noise import AllocatedNoise, GaussianNoise, LaplaceNoise, Noise

Sizes = Mapping[str, int]
"""Values of each parameter by name, in the order of the flat vector."""
Sampled = PoissonSubsampledGaussian | BinomialMixtureGaussian
LARGEST_SCALE = 4.0
"""How far a public scale may be from the mean of all."""
PLAIN_LAPLACE: Law = (("point", 1.0, 1.0, 0.0),)


@dataclass(frozen=True)
class Mechanism:
    """One mechanism.

    Attributes:
        norm_order: The norm in which units are clipped.
        event: (the sampled Gaussian of the plan, law) → what one release is accounted as.
        noise: (event, noise multiplier of the sum, sizes) → the noise; the event is None for a run without privacy.
        what: One line for help texts.
    """

    norm_order: int
    event: Callable[[Sampled, Law], Event]
    noise: Callable[[Event | None, float, Sizes], Noise]
    what: str


def mechanism_named(name: str) -> Mechanism:
    """The mechanism of a name.

    Raises:
        InvalidInput: For an unknown name.
    """
    if name not in MECHANISMS:
        raise InvalidInput("plan.mechanism", name, "one of " + ", ".join(MECHANISMS))
    return MECHANISMS[name]


def _laplace_event(sampled: Sampled, law: Law) -> Event:
    return RandomisedScaleLaplace(
        law=rescaled(law or PLAIN_LAPLACE, 1 / sampled.noise_multiplier),
        sampling_probability=sampled.sampling_probability,
        group_size=getattr(sampled, "group_size", 1),
    )


def _laplace_noise(event: Event | None, multiplier: float, sizes: Sizes) -> Noise:
    assert event is None or isinstance(event, RandomisedScaleLaplace)
    return LaplaceNoise(event)


def _layer_noise(event: Event | None, multiplier: float, sizes: Sizes) -> Noise:
    blocks = Blocks.by_layer(sizes)
    return AllocatedNoise(multiplier, blocks, fixed=equal_energy(blocks, LARGEST_SCALE))


def _matrix_noise(event: Event | None, multiplier: float, sizes: Sizes) -> Noise:
    blocks = Blocks.by_matrix(sizes)
    return AllocatedNoise(multiplier, blocks, fixed=equal_energy(blocks, LARGEST_SCALE))


def _adaptive_noise(event: Event | None, multiplier: float, sizes: Sizes) -> Noise:
    blocks = Blocks.by_matrix(sizes)
    return AllocatedNoise(multiplier, blocks, allocator=ImportanceAllocator(blocks))


def _same(sampled: Sampled, law: Law) -> Event:
    return sampled


MECHANISMS = {
    "gaussian": Mechanism(
        norm_order=2,
        event=_same,
        noise=lambda event, multiplier, sizes: GaussianNoise(multiplier),
        what="the same Gaussian noise on every parameter",
    ),
    "adaptive-noise": Mechanism(
        norm_order=2,
        event=_same,
        noise=_adaptive_noise,
        what="Gaussian noise allocated by importance seen in earlier releases (after ANADP, whitened)",
    ),
    "layer-noise": Mechanism(
        norm_order=2,
        event=_same,
        noise=_layer_noise,
        what="Gaussian noise of the same total on every layer, whitened",
    ),
    "matrix-noise": Mechanism(
        norm_order=2,
        event=_same,
        noise=_matrix_noise,
        what="Gaussian noise of the same total on every matrix, whitened: fixed scales from sizes alone",
    ),
    "randomised-laplace": Mechanism(
        norm_order=1,
        event=_laplace_event,
        noise=_laplace_noise,
        what="Laplace noise of random scale on sums clipped in L1 (after LMO-DP)",
    ),
}
"""Mechanisms by name; a new one is a file and a line here."""
