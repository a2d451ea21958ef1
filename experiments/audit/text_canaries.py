"""Users as canaries in text: made-up users, each in training or held out by a fair coin, told by the final model.

One training run of the plan's own rounds. The auditor sees the model before and after it, and no release between: a
canary's score is how far training lowered the loss of its text. Of a run without other users nothing is private.

The text of a canary is of tokens that it shares with few others, and all its examples are that same text: its clipped
gradients then point in one direction, almost orthogonal to all others', which is the worst that a clip permits.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.audit.attacks import claim_of, guesses_of
from experiments.audit.training import Everybody, JoinedUsers, Learner, train_in_place
from fedsim.config import OptimizerConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.models.evaluate import evaluate_rows
from fedsim.plan import Plan
from fedsim.privacy.audit.membership import AttackArea, TruePositives, attack_area, true_positives
from fedsim.privacy.audit.one_run import guess, one_run_epsilon
from fedsim.privacy.audit.result import AuditFinding
from fedsim.resources import computing_device
from fedsim.rows import TokenRows, UserView

TOKENS = 8
"""Of a canary's text: few, so that it costs little, and enough that texts differ."""
REPEATS = "Not private: it trained again on the private users, which no ledger charges."


class TextUsers:
    """Users of made-up text, whose examples are all the same. Every split is all of them.

    Args:
        texts: Tokens of each user's text, int [users, tokens].
        each: Examples of each user.
    """

    def __init__(self, texts: np.ndarray, each: int) -> None:
        users, self._length = texts.shape
        self._texts, self._each = texts, each
        self.user_offsets = np.arange(users + 1, dtype=np.int64) * each
        self.row_lengths = np.full(users * each, self._length, dtype=np.int64)

    @classmethod
    def made_up(
        cls, users: int, vocabulary: np.ndarray, generator: np.random.Generator, *, each: int, tokens: int = TOKENS
    ) -> "TextUsers":
        """So many users, over whom the tokens are dealt out: nobody has one twice before everybody's turn is over.

        Args:
            users: How many.
            vocabulary: Tokens to choose from, int [tokens].
            generator: Deals them out.
            each: Examples of each user.
            tokens: Length of a text.
        """
        decks = -(-users * tokens // len(vocabulary))
        dealt = np.concatenate([generator.permutation(vocabulary) for _ in range(decks)])
        return cls(dealt[: users * tokens].reshape(users, tokens), each)

    @property
    def num_users(self) -> int:
        """Users."""
        return len(self._texts)

    @property
    def num_rows(self) -> int:
        """Rows of all of them."""
        return len(self.row_lengths)

    def take(self, row_indices: np.ndarray, /) -> TokenRows:
        """Rows by number; every token counts, whether or not rows that these are joined to have prompts."""
        tokens = self._texts[np.asarray(row_indices) // self._each].ravel()
        offsets = np.arange(len(row_indices) + 1, dtype=np.int64) * self._length
        return TokenRows(tokens=tokens, offsets=offsets, labels=tokens)

    def split(self, name: str) -> "TextUsers":
        """All users, whatever the split's name."""
        return self

    def losses(self, learner: Learner) -> np.ndarray:
        """Mean loss of each user's text, nats a token, float64 [users]."""
        rows = self.take(np.arange(self.num_users, dtype=np.int64) * self._each)
        found: np.ndarray = evaluate_rows(learner.model, rows, learner.objective).losses
        return found


@dataclass(frozen=True, kw_only=True)
class TextFinding:
    """What text canaries showed.

    Attributes:
        finding: The lower bounds on ε beside the certified one.
        area: Area under the curve of canaries in against canaries out.
        found: True positives at few false ones.
        canaries: How many were in, and out.
        private_users: Whether training read private users too, whom no ledger charges for it.
    """

    finding: AuditFinding
    area: AttackArea
    found: TruePositives
    canaries: tuple[int, int]
    private_users: bool

    def in_words(self) -> str:
        """A few sentences."""
        area = self.area
        told = (
            f"{self.finding.in_words()} {self.canaries[0]} were in and {self.canaries[1]} out, told by how far the "
            f"final model lowered their losses: AUC {area.area:.3f} ({area.lower:.3f} to {area.upper:.3f}; 0.5 is "
            f"guessing), {self.found.in_words()}."
        )
        return f"{told} {REPEATS}" if self.private_users else told

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        values: Mapping[str, Any] = dataclasses.asdict(self) | {"finding": self.finding.to_json()}
        private = {"private": False} if self.private_users else {}
        return {**values, "kind": "evidence", **private, "in_words": self.in_words()}


def text_canaries(
    config: RunConfig,
    plan: Plan,
    learner: Learner,
    vocabulary: np.ndarray,
    *,
    canaries: int,
    optimizer: OptimizerConfig,
    confidence: float,
    seed: int,
    train: UserView | None = None,
    row_tokens: int = TOKENS,
    control: bool = False,
) -> TextFinding:
    """Train once with canaries among the users, and tell from the model which were in.

    Args:
        config: How clients compute.
        plan: The plan; its population becomes that of training users and canaries, those held out included.
        learner: Model and objective; the model is trained in place.
        vocabulary: Tokens that canaries' texts are made of, int [tokens].
        canaries: How many.
        optimizer: The server's.
        confidence: Of the intervals and of the bound.
        seed: Seed of coins, texts, sampling and noise.
        train: Training users who all take part; None for none.
        row_tokens: Tokens of the longest row that the model is to read.
        control: Flip the coins, and keep everybody out: nothing is to be told.
    """
    learner.model.to(computing_device())
    generator = np.random.default_rng(seed)
    coins = generator.random(canaries) < 0.5
    each = 1 if plan.redraws else plan.group_size  # of examples that are averaged into one unit one says as much
    inserted = TextUsers.made_up(canaries, vocabulary, generator, each=each, tokens=min(TOKENS, row_tokens))
    users: Everybody = inserted if train is None else JoinedUsers(train, inserted, np.arange(canaries))
    there = np.ones(users.num_users, dtype=bool)
    there[users.num_users - canaries :] = coins & (not control)
    before = inserted.losses(learner)
    train_in_place(
        config,
        plan,
        learner,
        users,
        optimizer=optimizer,
        row_tokens=row_tokens,
        seed=seed,
        present=units_of_users(plan, users, there),
    )
    scores = before - inserted.losses(learner)
    inside, outside = scores[coins], scores[~coins]
    return TextFinding(
        finding=one_run_finding(plan.on(users), scores, coins, confidence),
        area=attack_area(inside, outside, confidence=confidence),
        found=true_positives(inside, outside, confidence=confidence),
        canaries=(len(inside), len(outside)),
        private_users=train is not None,
    )


def units_of_users(plan: Plan, users: UserView, there: np.ndarray) -> np.ndarray:
    """Ids of all units that these users may stand for.

    Args:
        plan: The plan, in which units are users, or rows of theirs.
        users: The population.
        there: bool [users].
    """
    return np.flatnonzero(there if plan.redraws else np.repeat(there, np.diff(users.user_offsets)))


def one_run_finding(plan: Plan, scores: np.ndarray, coins: np.ndarray, confidence: float) -> AuditFinding:
    """What the scores of one run's canaries say of its ε.

    Args:
        plan: The plan with the population that was trained on.
        scores: float [canaries]; larger means more likely in.
        coins: bool [canaries].
        confidence: Of the bounds.

    Raises:
        InvalidInput: Training has ended in losses that are no numbers.
    """
    if not np.isfinite(scores).all():
        hint = "Training diverged: lower --optimizer.learning-rate."
        raise InvalidInput("text-canaries", len(scores), "canaries whose losses are finite after training", hint)
    guesses = guess(scores, coins, guesses_of(len(scores)))
    free = one_run_epsilon(guesses, plan.delta, confidence=confidence)
    lower, certified, impossible = free, math.inf, False
    if plan.noise_multiplier > 0:  # without noise nothing is claimed
        claim = claim_of(plan, whole=True)
        lower, certified = claim.epsilon_from_guesses(guesses, confidence=confidence), claim.epsilon
        impossible = claim.contradicted_by_guesses(guesses, confidence=confidence) or free > certified
    return AuditFinding(
        attack="one run, text canaries",
        epsilon_lower=lower,
        epsilon_lower_free=free,
        epsilon_certified=certified,
        delta=plan.delta,
        confidence=confidence,
        contradicts=impossible,
        trials=len(scores),
    )
