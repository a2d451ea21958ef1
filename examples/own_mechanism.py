"""A mechanism of your own: embeddings get a smaller share of the clip than all other parameters.

    python examples/own_mechanism.py [MODEL]

Ledger, statement and audit know it by the name of its module, so it must lie in a file that can be imported: this one.
"""

import sys
from dataclasses import dataclass, field

from own_text import made_up

from fedsim import MECHANISMS, Clip, InvalidInput, Mechanism, compare
from fedsim.clip import ClipBlock
from fedsim.privacy.mechanisms import GaussianNoise, Sizes


@MECHANISMS.register
@dataclass(frozen=True, kw_only=True)
class ShareOfEmbeddings(Mechanism):
    """Two blocks, clipped apart: the squares of their shares add up to 1, so that the Gaussian's event holds."""

    name = "share-of-embeddings"
    summary = "embeddings clipped to a share of the clip norm by themselves, one Gaussian noise"

    share: float = field(default=0.3, metadata={"help": "of the clip norm, for embeddings"})

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise InvalidInput("plan.mechanism-options share", self.share, "between 0 and 1")

    def noise(self, release: object, noise_multiplier: float, sizes: Sizes) -> "ApartNoise":
        return ApartNoise(noise_multiplier, sizes, self.share)


class ApartNoise(GaussianNoise):
    """N(0, σ²C²) on every coordinate."""

    def __init__(self, noise_multiplier: float, sizes: Sizes, share: float) -> None:
        super().__init__(noise_multiplier, sizes)
        embeddings = tuple(name for name in sizes if "embed" in name or "wte" in name or "wpe" in name)
        others = tuple(name for name in sizes if name not in embeddings)
        rest = (1 - share**2) ** 0.5
        self._blocks = (ClipBlock(parameters=embeddings, share=share), ClipBlock(parameters=others, share=rest))

    def clip(self, norm: float) -> Clip:
        return Clip(norm=norm, blocks=self._blocks)


def main(model: str = "default") -> None:
    mechanisms = ["gaussian", "own_mechanism:share-of-embeddings"]
    options = {"epsilon": 8, "delta": 1e-3, "rounds": 4, "gradients_per_round": 128}
    print(compare(model, made_up(), algorithms="uls", mechanisms=mechanisms, **options))


if __name__ == "__main__":
    main(*sys.argv[1:])
