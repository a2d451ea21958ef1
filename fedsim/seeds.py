"""The secret seeds of a run, from which its sampling and its noise come."""

import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.randomness import derived_seed

SEED_BITS = 256
"""Of a secret seed, more than the 128 of a stream's key: amplification by sampling holds while nobody guesses it."""


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """Where sampling and noise come from.

    A round may run more than once: after a crash, those since the last checkpoint run again. With a given noise seed
    (experiments) the round then repeats what it did, bit for bit. Otherwise the lost release may have been seen, and a
    second one with the same cohort or the same noise would be worth more than two charges; so each attempt samples
    anew and draws new noise.

    Attributes:
        sampling: Seed of the sampling; also decides which examples ELS keeps, so it is stored to resume.
        noise: Seed of the noise; None draws it from a cryptographic generator under keys that are never stored.
        repeats: Whether a round that runs again repeats itself.
    """

    sampling: int
    noise: int | None
    repeats: bool = False

    @classmethod
    def drawn(cls, config: RunConfig, earlier: str = "") -> Self:
        """The seeds that a configuration gives, others from the operating system.

        Args:
            config: The configuration.
            earlier: Tells apart runs by what they go on from. A run that goes on from another draws anew, though both
                be given the same seeds: composition needs independent randomness.
        """
        given = config.noise_seed is not None

        def seed(kind: str, number: int | None) -> int:
            if number is None:
                return secrets.randbits(SEED_BITS)
            return derived_seed(number, kind, earlier) if earlier else number

        noise = None if config.noise.secure else seed("noise", config.noise_seed)
        return cls(sampling=seed("sampling", config.sampling_seed), noise=noise, repeats=given)

    def store(self, path: Path) -> None:
        """Write them where only the owner can read, to disk before anything depends on them."""
        partial = path.with_name(path.name + ".partial")
        partial.unlink(missing_ok=True)
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump({"sampling": self.sampling, "noise": self.noise, "repeats": self.repeats}, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> Self:
        """What store() wrote.

        Raises:
            InvalidInput: When it is not there or not what was written.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            sampling, noise, repeats = values["sampling"], values["noise"], values["repeats"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InvalidInput("resume", str(path), "the run's seeds", f"Reading them said: {error}.") from None
        if not isinstance(sampling, int) or not isinstance(noise, int | None) or not isinstance(repeats, bool):
            raise InvalidInput("resume", str(path), "the run's seeds", "They are of another type.")
        return cls(sampling=sampling, noise=noise, repeats=repeats)
