"""What a guarantee does not cover, in sentences."""

from collections.abc import Mapping
from typing import Literal

from fedsim.plan import Plan
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.statement.splits_words import METRICS_NOT_COVERED, TEST_USERS_NOT_COVERED, VALIDATION_USERS

METRICS = (
    "Metrics of the run that were computed from private data without noise (training loss, cohort sizes, clipped "
    "fractions, evaluations on held-out users) are not private; the guarantee is for the models of this run."
)
HELD_OUT_USERS = (
    "Users held out for validation and testing are not protected by the noise: their data only enters metrics."
)
ALWAYS_NOT_COVERED = (
    "Choosing hyper-parameters (learning rate, clip norm, group size and the like) by looking at results on private "
    "data costs privacy that is not counted here.",
    "Models of other runs on the same users (the other arms of a comparison, the points of a sweep, runs before "
    "this one, but for those whose charges it carries on): whoever gets them too learns more, and what all of them "
    "cost together is more than this ε.",
    METRICS,
    HELD_OUT_USERS,
    "Text that the pre-trained model and its tokenizer were made from is outside the guarantee.",
    "A user is one identifier of the data set: a person with several, or a group of people, is protected less, and "
    "what other users wrote about somebody is protected as theirs.",
    "The machines that compute the updates and add the noise see private data and are trusted.",
)
"""What no run's guarantee covers."""

SHARED_ROUNDING = (
    "Units that are computed together may change the rounding of each other's updates and of their running sum: by "
    "about a millionth of the sum's length, or a billionth for each unit where there are more than a thousand. Exact "
    "sums (--engine.exact) rule this out."
)
FLOATING = (
    "Noise is drawn in floating point by a pseudo-random generator: attacks on rounding and on the generator are not "
    "excluded."
)
PSEUDO_RANDOM_SAMPLING = (
    "Who takes part is drawn by Philox, which is no cryptographic generator, under a key of 128 bits: that "
    "nobody predicts it, on which amplification by sampling rests, is assumed."
)
REPRODUCIBLE_NOISE = (
    "Reproducible noise: for experiments, not for release. The noise seed was fixed in the configuration, and "
    "whoever knows it can subtract the noise, so these models must not be released."
)
CLASSES_FROM_DATA = (
    "The names of the classes, and how many there are, were read from the data and are treated as public: a label "
    "that one user alone has given would show."
)
MADE_UP_USERS = (
    "The users are made up: rows of real ones were dealt out anew (--data.regroup), so that ε is of no person, and "
    "these models must not be released."
)
KNOWN_SAMPLING = (
    "The sampling seed was fixed in the configuration: from whoever knows it the sampling hides nobody, and ε is "
    "larger."
)
KNOWN_TURNS = (
    "The sampling seed was fixed in the configuration, and turns and examples are drawn by users' places in the data "
    "set: from whoever knows it ε hides what a user's data is, but not that a user was added before others, which "
    "moves their places."
)
PSEUDO_RANDOM_DRAW = (
    "Who of the held-out users is measured is drawn by Philox, which is no cryptographic generator, under a key of "
    "128 bits: that nobody predicts it is assumed."
)
KNOWN_DRAW = (
    "The sampling seed was fixed in the configuration, and held-out users are drawn by their places in the data set: "
    "from whoever knows it ε of the evaluations hides what a user's data is, but not that a user was added before "
    "others, which moves their places."
)
ROUNDED_LOSSES = (
    "Losses of held-out users are computed together with those of others, and rounded in floating point: how far one "
    "user's presence can carry the rounding of another's loss is not counted."
)
NoiseOrigin = Literal["statistical", "statistical-exact", "secure", "secure-exact"]
NOT_COVERED_BY_ORIGIN: Mapping[NoiseOrigin, tuple[str, ...]] = {
    "statistical": (FLOATING, SHARED_ROUNDING),
    "statistical-exact": (FLOATING,),
    "secure": (
        "The noise comes from a cryptographic generator and lies on a grid, but sums are rounded in floating point "
        "before it is added: how far rounding can carry one user's influence beyond the clip norm is not counted.",
        SHARED_ROUNDING,
        PSEUDO_RANDOM_SAMPLING,
    ),
    "secure-exact": (
        "Updates are computed and clipped in floating point, and only then bounded exactly: time and memory that the "
        "computation takes are not hidden.",
        PSEUDO_RANDOM_SAMPLING,
    ),
}
"""What depends on how noise was drawn: floating point; on a grid from a cryptographic generator; the same added to
exact integer sums."""


def not_covered_by(
    plan: Plan,
    noise_origin: NoiseOrigin,
    seeds_given: tuple[str, ...],
    also: tuple[str, ...] = (),
    evaluation: PrivateEvaluation | None = None,
) -> tuple[str, ...]:
    """What the guarantee of a run does not cover.

    Args:
        plan: What was done.
        noise_origin: How the noise was drawn.
        seeds_given: Seeds that the configuration fixes ("noise", "sampling").
        also: What follows from other settings, and what the guarantees of the runs that it went on from do not cover;
            said once where it holds for both.
        evaluation: The run's private evaluations.
    """
    instead = {} if evaluation is None else {METRICS: METRICS_NOT_COVERED, HELD_OUT_USERS: TEST_USERS_NOT_COVERED}
    own = (
        *_of_this_run(plan, seeds_given),
        *_of_evaluation(evaluation, plan.sampling.amplifies, seeds_given),
        *(instead.get(sentence, sentence) for sentence in ALWAYS_NOT_COVERED),
        *(
            sentence
            for sentence in NOT_COVERED_BY_ORIGIN[noise_origin]
            if plan.sampling.amplifies or sentence is not PSEUDO_RANDOM_SAMPLING
        ),
    )
    more = [sentence for sentence in also if sentence not in own]
    return tuple(sorted((*own, *more), key=lambda sentence: sentence != REPRODUCIBLE_NOISE))  # which comes first


def _of_evaluation(
    evaluation: PrivateEvaluation | None, pseudo_random_said: bool, seeds_given: tuple[str, ...]
) -> list[str]:
    """What the guarantee of private evaluations rests on.

    Args:
        evaluation: The run's, if any.
        pseudo_random_said: Whether PSEUDO_RANDOM_SAMPLING is said of training.
        seeds_given: Seeds that the configuration fixes.
    """
    if evaluation is None:
        return []
    all_measured = evaluation.users == evaluation.population
    rate = "" if all_measured else "the rate at which each of them is drawn to be measured and "
    sentences = [
        f"The number of {VALIDATION_USERS} ({evaluation.population}) is treated as public: {rate}the constant that "
        f"evaluations are divided by {'follows' if all_measured else 'follow'} from it.",
        ROUNDED_LOSSES,
    ]
    if not all_measured and "sampling" in seeds_given:
        sentences.append(KNOWN_DRAW)
    elif not all_measured and not pseudo_random_said:
        sentences.append(PSEUDO_RANDOM_DRAW)
    return sentences


def _of_this_run(plan: Plan, seeds_given: tuple[str, ...]) -> list[str]:
    sentences = [
        f"The number of {name} ({count}) is treated as public: the sampling probability and the constant that "
        "sums are divided by follow from it."
        for name, count in plan.public_sizes.items()
    ]
    if "noise" in seeds_given:
        sentences.insert(0, REPRODUCIBLE_NOISE)
    if "sampling" in seeds_given:
        sentences.append(KNOWN_SAMPLING if plan.sampling.amplifies else KNOWN_TURNS)
    return sentences
