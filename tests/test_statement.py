"""The privacy statement says what the ledger holds, and no more."""

import dataclasses
import json
import math

import pytest
from stated import ELS, ULS, stated

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import (
    Adjacency,
    Composed,
    FixedSizeSubsampledGaussian,
    Gaussian,
    Repeated,
    from_json,
)
from fedsim.privacy.held_out import PrivateEvaluation
from fedsim.privacy.ledger import merged
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.sampling import CyclicPoisson
from fedsim.sampling.turns import Turns
from fedsim.statement.not_covered import KNOWN_DRAW, PSEUDO_RANDOM_DRAW, ROUNDED_LOSSES, not_covered_by

# ε is the ledger's --------------------------------------------------------------------------------------------------


def test_epsilon_is_that_of_the_ledger() -> None:
    step = ULS.step_event()
    statement = stated(ULS, Composed(events=(step, step, step)))
    assert statement.epsilon == epsilon_bounds(merged((step, step, step)), 1e-5)
    assert statement.steps == 3
    assert statement.private


def test_charges_without_a_release_count_as_steps() -> None:
    statement = stated(ULS, Repeated(event=ULS.step_event(), count=5))
    assert statement.steps == 5
    assert statement.epsilon == epsilon_bounds(merged([ULS.step_event()] * 5), 1e-5)


def test_a_release_without_a_charge_can_not_be_stated() -> None:
    with pytest.raises(InvalidInput, match="steps"):
        stated(ULS, Repeated(event=ULS.step_event(), count=2))


def test_json_holds_everything_and_survives_a_round_trip() -> None:
    statement = stated(ULS)
    values = statement.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["unit"] == "user"
    assert values["adjacency"] == "add-or-remove-one-user"
    assert values["epsilon"] == {"upper": statement.epsilon.upper, "lower": statement.epsilon.lower}
    assert (values["steps"], values["delta"], values["noise_multiplier"]) == (3, 1e-5, 1.5)
    assert values["sampling"]["probability"] == 0.1
    assert (values["contribution_bound"]["group_size"], values["contribution_bound"]["clip_norm"]) == (4, 2.0)
    assert "standard deviation 3 " in values["mechanism"]
    assert values["versions"] == {"fedsim": "x"}
    assert values["in_words"] == statement.in_words()
    assert from_json(values["event"]) == statement.event
    assert "3931" in values["not_covered"][0]


def test_the_paragraph_rounds_epsilon_outwards() -> None:
    statement = stated(ULS)
    words = statement.in_words()
    upper = float(words.split("ε = ")[1].split(",")[0])
    lower = float(words.split("is at least ")[1].split(" ")[0].rstrip("."))
    assert lower <= statement.epsilon.lower <= statement.epsilon.upper <= upper
    assert upper - statement.epsilon.upper < 2e-3 * upper
    assert "adding or removing one user" in words
    assert all(sentence in words for sentence in statement.not_covered)


def test_a_bound_from_below_is_of_the_mechanism_only_where_the_pair_is() -> None:
    exact = "the exact value for this mechanism is at least"
    assert exact in stated(ULS).in_words()
    assert exact in stated(ELS).in_words()
    looser = FixedSizeSubsampledGaussian(cohort_size=4, population_size=3931, noise_multiplier=1.5)
    words = stated(ULS, Repeated(event=looser, count=3)).in_words()
    assert exact not in words
    assert "as far as it is accounted for here, at least" in words


def test_turns_that_nobody_knows_hide_more_than_one_groups_pair_tells() -> None:
    turns = dataclasses.replace(ULS, sampling=CyclicPoisson(groups=3))
    statement = stated(turns, merged(turns.charge(round) for round in range(3)))
    assert statement.steps == 3
    assert statement.epsilon.upper == turns.epsilon().upper
    assert "the exact value for this mechanism is at least" not in statement.in_words()
    assert "--bands 3" in str(statement.recompute)


def test_els_and_replacement_in_words() -> None:
    plan = dataclasses.replace(ELS, adjacency=Adjacency.REPLACE_ONE_USER)
    words = stated(plan, seeds_given=("noise",)).in_words()
    assert "replacing one user" in words
    assert "at most 4 of a user's examples in the whole run; each gradient is clipped to L2 norm 2;" in words
    assert "each kept example joins a step independently with probability 0.1" in words
    assert "noise seed was fixed" in words


def test_without_noise_it_plainly_says_so() -> None:
    statement = stated(dataclasses.replace(ULS, noise_multiplier=0.0, group_size=10**9), Composed(events=()))
    assert statement.epsilon.upper == math.inf
    assert not statement.private
    assert "NO privacy guarantee" in statement.in_words()
    assert "all of a user's examples" in statement.in_words()
    assert "no noise is added" in statement.in_words()
    values = statement.to_json()
    assert values["epsilon"] == {"upper": None, "lower": None}
    assert values["recompute"] is None
    json.dumps(values, allow_nan=False)


def test_nothing_released_is_epsilon_zero() -> None:
    plan = dataclasses.replace(ULS, noise_multiplier=0.0)
    assert stated(plan, Composed(events=()), steps=0).epsilon.upper == 0


def test_the_command_names_the_ledger_when_releases_differ() -> None:
    alike = stated(ULS).recompute
    assert alike is not None
    assert "--sampling-probability 0.1 --noise-multiplier 1.5 --steps 3 --delta 1e-05" in alike
    events = (*[ULS.step_event()] * 3, Gaussian(noise_multiplier=9.0))
    mixed = stated(ULS, Composed(events=events), ledger="a run/ledger.jsonl")
    assert mixed.recompute is not None
    assert "--ledger 'a run/ledger.jsonl'" in mixed.recompute
    assert "other kinds" in mixed.in_words()
    other = stated(dataclasses.replace(ULS, noise_multiplier=1.4), ULS.event())
    assert other.recompute is not None
    assert "--ledger" in other.recompute, "parameters that are not the ledger's would give another ε"


def test_a_mechanism_that_account_does_not_know_is_recomputed_from_the_ledger() -> None:
    laplace = dataclasses.replace(ULS, mechanism=MECHANISMS.build("randomised-laplace"))
    recompute = stated(laplace).recompute
    assert recompute is not None
    assert "--ledger ledger.jsonl" in recompute
    assert "other kinds" not in stated(laplace).in_words()


def test_what_was_made_of_the_releases_is_stated_and_changes_nothing_else() -> None:
    plain, averaged = stated(ULS), stated(ULS, post_processing=("The mean is exported.",))
    assert "3 steps. The mean is exported. What this does not cover" in averaged.in_words()
    assert (plain.to_json()["post_processing"], averaged.to_json()["post_processing"]) == (
        [],
        ["The mean is exported."],
    )
    assert averaged.in_words().replace(" The mean is exported.", "") == plain.in_words()
    own = {"in_words", "post_processing"}
    assert all(plain.to_json()[name] == value for name, value in averaged.to_json().items() if name not in own)
    free = stated(dataclasses.replace(ULS, noise_multiplier=0.0), Composed(events=()), post_processing=("A mean.",))
    assert "A mean." in free.in_words()


EVALUATION = PrivateEvaluation(noise_multiplier=5.0, clip_norm=2.0, count=3, users=500, population=3000)


def test_what_private_evaluations_rest_on_is_stated() -> None:
    def said(evaluation: PrivateEvaluation, *, amplifies: bool = True, seeds: tuple[str, ...] = ()) -> str:
        plan = ULS if amplifies else dataclasses.replace(ULS, sampling=Turns(), sampling_probability=1.0)
        return " ".join(not_covered_by(plan, "statistical", seeds, evaluation=evaluation))

    assert "validation (3000) is treated as public: the rate at which" in said(EVALUATION)
    assert KNOWN_DRAW in said(EVALUATION, seeds=("sampling",))
    assert KNOWN_DRAW not in said(EVALUATION)
    assert PSEUDO_RANDOM_DRAW in said(EVALUATION, amplifies=False)
    assert PSEUDO_RANDOM_DRAW not in said(EVALUATION)
    everybody = dataclasses.replace(EVALUATION, users=3000)
    assert "the rate at which" not in said(everybody)
    assert KNOWN_DRAW not in said(everybody, seeds=("sampling",))
    assert all(ROUNDED_LOSSES in said(one) for one in (EVALUATION, everybody))


def test_made_up_users_are_said_to_be_no_persons() -> None:
    assert not any("made up" in sentence for sentence in stated(ULS).not_covered)
    found = [sentence for sentence in stated(ULS, made_up_users=True).not_covered if "made up" in sentence]
    assert len(found) == 1
    assert "must not be released" in found[0]


def test_local_steps_are_stated() -> None:
    plan = dataclasses.replace(ULS, local_steps=3, local_learning_rate=0.05)
    assert "one update of 3 local steps (learning rate 0.05) is clipped to L2 norm 2" in stated(plan).in_words()
