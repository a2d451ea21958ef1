"""What a statement says of users who are trained on and of users who are held out, where both are charged."""

from typing import Any

from fedsim.privacy.bounds import Bounds, shown_above
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.splits import HELD_OUT, TRAINING

VALIDATION_USERS = "users held out for validation"
METRICS_NOT_COVERED = (
    "Metrics of the run that were computed from private data without noise (training loss, cohort sizes, clipped "
    "fractions, and losses, perplexities and accuracies of held-out users) are not private; the guarantee is for the "
    "models of this run and the private changes of the held-out loss."
)
TEST_USERS_NOT_COVERED = (
    "Users held out for testing are not protected by the noise: their data only enters metrics that are not private."
)


def evaluation_in_words(evaluation: PrivateEvaluation, count: int) -> str:
    """What was released of validation users, a sentence."""
    of = "all" if evaluation.users == evaluation.population else f"{evaluation.users:,} of {evaluation.population:,}"
    drawn = "" if evaluation.users == evaluation.population else " on average, each drawn independently,"
    return (
        f"{count} {'evaluation' if count == 1 else 'evaluations'} of {of} validation users{drawn} released how their "
        f"loss changed since before training: the sum of each user's change, clipped to ±{evaluation.clip_norm:g} "
        f"nats, with Gaussian noise (noise multiplier {evaluation.noise_multiplier:g}), divided by "
        f"{evaluation.users:,}, so that each has an error of standard deviation "
        f"{evaluation.standard_deviation:.3g} nats."
    )


def splits_in_words(evaluation: PrivateEvaluation, count: int, bounds: dict[str, Bounds]) -> str:
    """Who pays how much, sentences.

    Args:
        evaluation: What was planned.
        count: Evaluations charged.
        bounds: On ε, of each split.
    """
    return (
        f" For users whose text trained the models ε is {shown_above(bounds[TRAINING].upper)}, for held-out users, of "
        f"whom evaluations were released, it is {shown_above(bounds[HELD_OUT].upper)}, both certified upper bounds; "
        "each user's own hash decides which of the two a user is, so that nobody pays for both. "
        f"{evaluation_in_words(evaluation, count)}"
    )


def evaluation_json(evaluation: PrivateEvaluation, count: int, bounds: dict[str, Bounds]) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "in_words": evaluation_in_words(evaluation, count),
        "released": count,
        "standard_deviation": evaluation.standard_deviation,
        **evaluation.to_values(),
        "epsilon": {split: {"upper": one.upper, "lower": one.lower} for split, one in bounds.items()},
    }
