"""`search-noise`: the most useful randomised-scale Laplace noise for a target, as a file that others can check."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedsim.disk import require_writable_file
from fedsim.privacy.mechanisms.laplace.search import NoiseTarget, read_noise_file, search_noise
from fedsim.validation import require_at_least


@dataclass(frozen=True, kw_only=True)
class SearchNoise:
    """Search, without any data, for the law of the inverse scale that makes Laplace noise most useful.

    The file holds the law and the target; whoever reads it proves the guarantee again from the law alone.
    """

    epsilon: float = 1.0
    """ε of all releases together."""
    delta: float = 1e-5
    """δ of all releases together."""
    releases: int = 1
    """Releases composed, without sampling."""
    query: Literal["number", "l1-vector"] = "l1-vector"
    """One number of sensitivity 1, or a vector clipped to 1 in L1."""
    within: float = 1.0
    """Usefulness is the probability that the noise on a coordinate stays within this distance."""
    generations: int = 40
    """Generations of the search."""
    seed: int = 0
    """Seed of the search."""
    output: str = "noise.json"
    """The file."""

    def __post_init__(self) -> None:
        require_at_least("generations", self.generations, 0)
        require_writable_file(Path(self.output))

    def run(self) -> int:
        """Search, write the file, read it back and print how it compares."""
        target = NoiseTarget(
            epsilon=self.epsilon,
            delta=self.delta,
            releases=self.releases,
            query=self.query,
            within=self.within,
        )
        Path(self.output).parent.mkdir(parents=True, exist_ok=True)
        search_noise(target, seed=self.seed, generations=self.generations).write(Path(self.output))
        found = read_noise_file(self.output)
        print(f"{self.output}: δ({self.epsilon:g}) = {found.delta:.3g}, checked again from the file")
        print(f"noise within ±{self.within:g} with probability {found.usefulness:.4f}")
        print(f"  plain Laplace {found.laplace_usefulness:.4f}, Gaussian {found.gaussian_usefulness:.4f}")
        for name, weight, first, second in found.law:
            print(f"  {weight:.4f} {name} ({first:g}, {second:g})")
        return 0
