"""Black-box audit of a finished run: does the fine-tuned model know its training users from others?"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import load_peft_weights, set_peft_model_state_dict
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from fedsim.config import RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.evaluate import evaluate_rows
from fedsim.models.load import load_model
from fedsim.models.quiet import quiet_transformers
from fedsim.privacy.audit.claim import epsilon_free
from fedsim.privacy.audit.membership import AttackArea, TruePositives, attack_area, true_positives
from fedsim.privacy.audit.rates import attack_rates
from fedsim.resources import open_resources
from server.alarms import NOT_PRIVATE
from server.results.run_folder import RunFolder

ROWS_PER_USER = 32
"""Rows of one user that are scored at most."""


@dataclass(frozen=True, kw_only=True)
class UserInference:
    """User inference by loss: a user's score is how far fine-tuning lowered its loss.

    Attributes:
        area: Area under the curve of members against held-out users.
        found: Members found while few held-out users are accused.
        epsilon_lower: Lower bound on ε at delta, whatever the mechanism; over users of the data, not a worst case.
        users: How many of each kind were scored.
    """

    area: AttackArea
    found: TruePositives
    epsilon_lower: float
    users: tuple[int, int]

    def in_words(self) -> str:
        """One sentence."""
        area = self.area
        return (
            f"User inference by loss, {self.users[0]} training against {self.users[1]} held-out users: "
            f"AUC {area.area:.3f} ({area.lower:.3f} to {area.upper:.3f}; 0.5 is guessing), {self.found.in_words()}, "
            f"ε at least {self.epsilon_lower:.2f} at {area.confidence:.0%} confidence. "
            f"It is evidence about these users and this attack, no proof {NOT_PRIVATE}."
        )

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {**dataclasses.asdict(self), "kind": "evidence", "private": False, "in_words": self.in_words()}


def infer_users(
    config: RunConfig, folder: RunFolder, *, users: int, delta: float, confidence: float, seed: int
) -> UserInference:
    """Score training and test users under the run's model, each against the model that it started from.

    Args:
        config: The run's configuration.
        folder: Its folder.
        users: Most users of each kind.
        delta: δ of the bound on ε.
        confidence: Of the interval and of the bound.
        seed: Seed of the choice of users.
    """
    resources = open_resources(config)
    tuned = _fine_tuned(config, folder)
    generator = np.random.default_rng(seed)
    gains = []
    for name in ("train", "test"):
        split = resources.store.split(name)
        chosen = np.sort(generator.choice(split.num_users, size=min(users, split.num_users), replace=False))
        sizes = np.minimum(np.diff(split.user_offsets)[chosen], ROWS_PER_USER)
        rows = np.concatenate(
            [
                np.arange(split.user_offsets[user], split.user_offsets[user] + n)
                for user, n in zip(chosen, sizes, strict=True)
            ]
        )
        owners = np.repeat(np.arange(len(chosen)), sizes)
        taken = split.take(rows)
        before, after = (
            evaluate_rows(model, taken, resources.loaded.objective).by_unit(owners, len(chosen)).losses
            for model in (resources.loaded.model, tuned)
        )
        gained = before - after
        gains.append(gained[np.isfinite(gained)])
    inside, outside = gains
    shuffled = [generator.permutation(side) for side in gains]
    return UserInference(
        area=attack_area(inside, outside, confidence=confidence),
        found=true_positives(inside, outside, confidence=confidence),
        epsilon_lower=epsilon_free(attack_rates(*shuffled, confidence=confidence), delta),
        users=(len(inside), len(outside)),
    )


def _fine_tuned(config: RunConfig, folder: RunFolder) -> torch.nn.Module:
    if not folder.model.is_dir():
        raise InvalidInput("run", str(folder.path), "the folder of a finished run", "It holds no model.")
    if not (folder.model / ADAPTER_CONFIG_NAME).is_file():
        return load_model(config.model.reading(str(folder.model))).model.eval()
    # On the base as it was trained on, rounded or not.
    model = open_resources(config).loaded.model
    with quiet_transformers():
        set_peft_model_state_dict(model, load_peft_weights(str(folder.model), device="cpu"))
    return model.eval()
