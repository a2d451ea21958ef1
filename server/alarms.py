"""Alarms for failures that make no noise: training that cannot learn, or does not do what it seems to."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.plan import Plan
from fedsim.rows import SizeCounts

log = logging.getLogger(__name__)

HOPELESS = 20.0
"""Length of the whole run's noise over that of the largest possible sum of updates. Gradients of language models lie
near a few directions, so that runs learn at ratios well above 1; at this one nothing has been seen to."""
FEW_UNITS = 50
"""Units that must have been seen before a share of them means anything."""
NOT_PRIVATE = "(not private: computed from training users without noise)"


class Alarms:
    """Says each alarm once, as a warning, and keeps it for the summary.

    Args:
        plan: What is carried out.
        size: Number of trainable parameters P.
        private_too: Whether to look at statistics of training users, which no noise protects.
    """

    def __init__(self, plan: Plan, size: int, *, private_too: bool) -> None:
        self.plan, self.size, self.private_too = plan, size, private_too
        self.sounded: dict[str, str] = {}
        self._seen = dict.fromkeys(("units", "clipped_units"), 0.0)

    def sound(self, name: str, sentence: str) -> None:
        """Say it, unless it was said before."""
        if name not in self.sounded:
            self.sounded[name] = sentence
            log.warning("%s", sentence)

    def before_training(self, counts: SizeCounts) -> None:
        """What the plan's public numbers and the store's sizes give away."""
        self._noise()
        single = int(counts.users[counts.sizes == 1].sum()) / max(counts.num_users, 1)
        if self.private_too and single > 0.5:
            self.sound(
                "single-examples",
                f"{single:.0%} of the training users have one example {NOT_PRIVATE}: protecting users then costs what "
                "protecting examples costs, but is the user column the right one? See --data.user-column.",
            )

    def after_round(self, statistics: Mapping[str, float]) -> None:
        """What a round's private statistics show."""
        if not self.private_too:
            return
        for name in self._seen:
            self._seen[name] += statistics.get(name, 0.0)
        if bad := int(statistics.get("nonfinite_units", 0.0)):
            self.sound(
                "not-finite",
                f"{bad} units had a gradient that is not finite and were left out {NOT_PRIVATE}. Lower the learning "
                "rate, or look at the model's weights.",
            )
        if empty := int(statistics.get("empty_units", 0.0)):
            self.sound(
                "empty-loss",
                f"{empty} units had a gradient of exactly zero {NOT_PRIVATE}: nothing in their rows is predicted. "
                "Look at masked prompts and --data.sequence-length.",
            )
        self._clip()

    def after_training(self, unchanged: Sequence[str]) -> None:
        """Parameters that stayed bit for bit as they were."""
        if unchanged:
            names = ", ".join(unchanged[:3]) + (f" and {len(unchanged) - 3} more" if len(unchanged) > 3 else "")
            self.sound("unchanged", f"these trainable parameters did not change at all: {names}.")

    def _noise(self) -> None:
        plan = self.plan
        ratio = noise_to_signal(plan, self.size)
        if ratio <= HOPELESS:
            return
        self.sound(
            "noise",
            f"over the whole run the noise is {ratio:,.0f} times as long as the largest possible sum of updates: "
            f"little can be learned. What helps: {ratio / HOPELESS:,.1f} times as many {plan.unit}s a round "
            f"(--plan.gradients-per-round), {(ratio / HOPELESS) ** 2:,.0f} times fewer parameters (--model.lora-rank, "
            f"now {self.size:,}), or a larger --plan.epsilon.",
        )

    def _clip(self) -> None:
        units, clipped = self._seen["units"], self._seen["clipped_units"]
        if units < FEW_UNITS or self.plan.clip_rule is not None or self.plan.noise_multiplier == 0:
            return  # without noise there is nothing that a clip norm could be weighed against
        if clipped == units:
            self.sound(
                "clips-everyone",
                f"the clip norm {self.plan.clip_norm:g} clipped all of {units:.0f} units {NOT_PRIVATE}, so each "
                "counts by its direction alone. That is common, and no fault where the loss falls. Another clip norm "
                "that clips all of them scales sum and noise alike: with --optimizer.name adam it changes nothing, "
                "with the others it does what another --optimizer.learning-rate does. One that leaves some whole can "
                "be found privately by --plan.clip-quantile.",
            )
        elif clipped == 0:
            self.sound(
                "clips-no-one",
                f"the clip norm {self.plan.clip_norm:g} clipped none of {units:.0f} units {NOT_PRIVATE}: a smaller "
                "one needs less noise, or let --plan.clip-quantile find it privately.",
            )


def noise_to_signal(plan: Plan, size: int) -> float:
    """Expected length of the run's summed noise over the longest that its summed mean updates can be: σ√P/(M√T), and
    less where noise is correlated over rounds.

    Made of public numbers. For sums clipped in L1 the two are not comparable, and 0 is returned.

    Args:
        plan: Gives σ, the expected units a round M, and the rounds T.
        size: Number of parameters P.
    """
    if plan.mechanism.norm_order != 2:
        return 0.0
    correlation = plan.correlation
    summed = math.sqrt(plan.steps) if correlation is None else correlation.summed_noise(plan.steps)
    return plan.sum_noise_multiplier * summed * math.sqrt(size) / (plan.normaliser * plan.steps)


def as_json(alarms: Alarms) -> list[dict[str, Any]]:
    """The alarms for summary.json."""
    return [{"alarm": name, "in_words": sentence} for name, sentence in alarms.sounded.items()]
