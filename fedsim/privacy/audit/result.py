"""What an audit found, in numbers and in words."""

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AuditFinding:
    """One attack against one guarantee.

    Attributes:
        attack: What was attacked and how.
        epsilon_lower: Lower bound on ε at delta: within the family of the certified event.
        epsilon_lower_free: Lower bound on ε at delta that rests on no family; usually weaker.
        epsilon_certified: The upper bound that was claimed; inf where none was.
        delta: δ of all three.
        confidence: Of each lower bound.
        contradicts: Whether the attack did better than the claimed guarantee permits, at the confidence.
        trials: Runs or canaries behind it.
    """

    attack: str
    epsilon_lower: float
    epsilon_lower_free: float
    epsilon_certified: float
    delta: float
    confidence: float
    contradicts: bool
    trials: int

    def to_json(self) -> dict[str, Any]:
        """As JSON values, with what kind of statement it is."""
        certified = self.epsilon_certified if math.isfinite(self.epsilon_certified) else None
        return asdict(self) | {"epsilon_certified": certified, "kind": "evidence", "in_words": self.in_words()}

    def in_words(self) -> str:
        """One sentence a reader cannot mistake for a proof."""
        found = f"{self.attack}: at {self.confidence:.0%} confidence ε is at least {self.epsilon_lower:.2f} at δ = "
        found += f"{self.delta:g}, from {self.trials} trials; "
        if math.isinf(self.epsilon_certified):
            return f"{found}nothing is certified."
        found += f"certified is at most {self.epsilon_certified:.2f}."
        if self.contradicts:
            return f"{found} This contradicts the claimed guarantee: something is broken."
        return (
            f"{found} This does not contradict the guarantee. It is evidence, no proof: other attacks may do better."
        )


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Something that the guarantee rests on, and whether it was kept.

    Attributes:
        what: The promise.
        broken: How it was broken, one phrase each; empty where it was kept.
    """

    what: str
    broken: tuple[str, ...]

    @property
    def kept(self) -> bool:
        """Whether nothing broke it."""
        return not self.broken

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"kept": self.kept}
