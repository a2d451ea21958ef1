"""What a private selection guarantees, in words and as the statement of the released model."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.selection.budget import SelectionBudget
from experiments.sweep.points import ARM_TITLES, Point
from fedsim.privacy.bounds import shown_above, shown_below
from fedsim.privacy.events import Adjacency, to_json
from fedsim.privacy.selection import runs_of
from fedsim.statement.not_covered import ALWAYS_NOT_COVERED
from fedsim.statement.splits_words import METRICS_NOT_COVERED
from fedsim.statement.statement import NEIGHBOURS

CHOICES, OTHER_MODELS, METRICS, HELD_OUT_USERS = ALWAYS_NOT_COVERED[:4]
COVERED = {
    CHOICES: "Choices other than that among the listed settings (which settings are tried, how large the clip of the "
    "score is and the like) cost privacy that is not counted here where they are made by looking at private data.",
    OTHER_MODELS: "How many runs there were, and what the others gave: whoever learns of it knows more than this ε "
    "covers, and so does whoever gets other models of the same users.",
    METRICS_NOT_COVERED: "Metrics of the runs that were computed from private data without noise (training loss, "
    "cohort sizes, clipped fractions, and losses, perplexities and accuracies of held-out users) are not private, and "
    "nor is any run's score but the released one; the guarantee is for one model and its one score.",
}
"""What is not covered by a selection, in place of what a run says."""
SCORE = ("private_change", "private_change_std", "private_change_clip")
"""What a run's summary has of what it released of held-out users."""


def chosen_in_words(setting: Point) -> str:
    """A setting, as a clause."""
    return (
        f"{ARM_TITLES[setting.arm]}, {setting.gradients_per_round} gradients a round, "
        f"group size {setting.group_size}, learning rate {setting.learning_rate:g}, clip norm {setting.clip_norm:g}, "
        f"bands {setting.bands}, average {setting.average}"
    )


def selection_in_words(settings: int, budget: SelectionBudget) -> str:
    """What was selected from what, and what stays secret."""
    return (
        f"The selection: runs of settings drawn uniformly from {settings}, {runs_of(budget.event):.4g} in "
        "expectation, each with sampling and noise of its own, were scored by held-out users' loss with noise; the "
        "best alone is released. How many runs were drawn and all others stay secret, and ε is of the selection as a "
        "whole."
    )


def score_in_words(selection: Mapping[str, Any]) -> str:
    """The score that was released, what it is worth, and why it flatters.

    Args:
        selection: What the statement has of the selection, as JSON values.
    """
    return (
        f"The loss of held-out users changed by {selection['private_change']:+.4f} nats since before training, as "
        f"released: the sum of each user's change, clipped to ±{selection['private_change_clip']:g} nats, with "
        "Gaussian noise, divided by a public number of users, so that it has an error of standard deviation "
        f"{selection['private_change_std']:.3g} nats; in one run that costs a held-out user an ε of "
        f"{shown_above(selection['score_epsilon'])}. It is optimistic: the least of several noisy scores is often one "
        "whose noise fell low, so expect less of the model than it says."
    )


def cost_in_words(settings: int, budget: SelectionBudget, delta: float) -> str:
    """The total, beside what releasing a run of every setting would cost."""
    return (
        f"The selection costs ε ≤ {shown_above(budget.epsilon.upper)} at δ = {delta:g} in total, certified, "
        f"user-level: it is charged once. Each run spends {shown_above(budget.run_epsilon)}; releasing one run of "
        f"each of the {settings} settings instead, and choosing among them, is charged "
        f"{shown_above(budget.composed)} by composition."
    )


def statement_of(
    run: Mapping[str, Any],
    setting: Point,
    settings: Sequence[Point],
    summary: Mapping[str, Any],
    budget: SelectionBudget,
) -> dict[str, Any]:
    """The released model's privacy.json.

    Args:
        run: That of the selected run.
        setting: What the selected run drew.
        settings: The grid.
        summary: Of the selected run; what it has of its private score is released, and nothing else.
        budget: What the selection costs.
    """
    delta, adjacency = float(run["delta"]), Adjacency(run["adjacency"])
    not_covered = [COVERED.get(sentence, sentence) for sentence in run["not_covered"] if sentence != HELD_OUT_USERS]
    upper, lower = shown_above(budget.epsilon.upper), shown_below(budget.epsilon.lower)
    selection: dict[str, Any] = {
        "in_words": selection_in_words(len(settings), budget),
        "expected_runs": runs_of(budget.event),
        "eta": budget.event.eta,
        "settings": [one.to_json() for one in settings],
        "selected": setting.to_json(),
        **{name: float(summary[name]) for name in SCORE},
        "run_epsilon": budget.run_epsilon,
        "score_epsilon": budget.score_epsilon,
    }
    words = (
        f"The selected model is user-level differentially private with ε = {upper}, δ = {delta:g}: "
        f"{NEIGHBOURS[adjacency]} changes the probability of any outcome by a factor of at most e^ε, up to δ. The ε "
        f"is a certified upper bound; as far as a selection by any score is accounted for, it is at least {lower}. "
        f"{selection['in_words']} Selected: {chosen_in_words(setting)}. In its run: {run['sampling']['in_words']}; "
        f"{run['contribution_bound']['in_words']}; {run['mechanism']} (noise multiplier {run['noise_multiplier']:g}); "
        f"{run['steps']} steps. {score_in_words(selection)} "
        f"What this does not cover: {' '.join(not_covered)}"
    )
    kept = {name: value for name, value in run.items() if name != "private_evaluation"}
    options = f"--ledger ledger.jsonl --delta {delta!r} --adjacency {adjacency.value}"
    return kept | {
        "in_words": words,
        "epsilon": {"upper": budget.epsilon.upper, "lower": budget.epsilon.lower},
        "not_covered": not_covered,
        "recompute": f"python -m experiments.run account {options} --json",
        "check": "python -m experiments.run account --check .",
        "event": to_json(budget.event),
        "selection": selection,
    }
