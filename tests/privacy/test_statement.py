"""The privacy statement says what the ledger holds, and no more."""

import json
import math
from typing import Any

import pytest

from fedsim.errors import InvalidInput
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.events import (
    Adjacency,
    BinomialMixtureGaussian,
    Composed,
    Event,
    Gaussian,
    PoissonSubsampledGaussian,
    Repeated,
    from_json,
)
from fedsim.privacy.ledger import merged
from fedsim.privacy.statement import PrivacyStatement

ULS = PoissonSubsampledGaussian(sampling_probability=0.1, noise_multiplier=1.5)
ELS = BinomialMixtureGaussian(group_size=4, sampling_probability=0.1, noise_multiplier=1.5)


def statement(event: Event, **changes: Any) -> PrivacyStatement:
    values: dict[str, Any] = {
        "algorithm": "uls",
        "group_size": 4,
        "clip_norm": 2.0,
        "sampling_probability": 0.1,
        "noise_multiplier": 1.5,
        "steps": 3,
        "delta": 1e-5,
    }
    return PrivacyStatement.of(event, **(values | changes))


def test_epsilon_is_that_of_the_ledger() -> None:
    stated = statement(Composed(events=(ULS, ULS, ULS)))
    assert stated.epsilon == epsilon_bounds(merged((ULS, ULS, ULS)), 1e-5)
    assert stated.steps == 3
    assert stated.private


def test_charges_without_a_release_count_as_steps() -> None:
    stated = statement(Repeated(event=ULS, count=5))
    assert stated.steps == 5
    assert stated.epsilon == epsilon_bounds(merged([ULS] * 5), 1e-5)


def test_a_release_without_a_charge_can_not_be_stated() -> None:
    with pytest.raises(InvalidInput, match="steps"):
        statement(Repeated(event=ULS, count=2))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group_size", 0),
        ("clip_norm", 0.0),
        ("sampling_probability", 1.5),
        ("noise_multiplier", math.nan),
        ("steps", -1),
        ("delta", 1.0),
    ],
)
def test_bad_values_are_named(field: str, value: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        statement(Repeated(event=ULS, count=3), **{field: value})
    assert caught.value.field == field


def test_json_holds_everything_and_survives_a_round_trip() -> None:
    stated = statement(Repeated(event=ULS, count=3), public_sizes={"users in the training split": 3931})
    values = stated.to_json()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["unit"] == "user"
    assert values["adjacency"] == "add-or-remove-one-user"
    assert values["epsilon"] == {"upper": stated.epsilon.upper, "lower": stated.epsilon.lower}
    assert (values["steps"], values["delta"], values["noise_multiplier"]) == (3, 1e-5, 1.5)
    assert values["sampling"]["probability"] == 0.1
    assert (values["contribution_bound"]["group_size"], values["contribution_bound"]["clip_norm"]) == (4, 2.0)
    assert "standard deviation 3 " in values["mechanism"]
    assert {"fedsim", "python", "numpy", "scipy"} <= set(values["versions"])
    assert values["in_words"] == stated.in_words()
    assert from_json(values["event"]) == stated.event
    assert "3931" in values["not_covered"][0]


def test_the_paragraph_rounds_epsilon_outwards() -> None:
    stated = statement(Repeated(event=ULS, count=3))
    words = stated.in_words()
    upper = float(words.split("ε = ")[1].split(",")[0])
    lower = float(words.split("is at least ")[1].split(" ")[0].rstrip("."))
    assert lower <= stated.epsilon.lower <= stated.epsilon.upper <= upper
    assert upper - stated.epsilon.upper < 2e-3 * upper
    assert "adding or removing one user" in words
    assert all(sentence in words for sentence in stated.not_covered)


def test_els_and_replacement_in_words() -> None:
    words = statement(
        Repeated(event=ELS, count=3), algorithm="els", adjacency=Adjacency.REPLACE_ONE_USER, seeds_given=("noise",)
    ).in_words()
    assert "replacing one user" in words
    assert "at most 4 of a user's examples in the whole run" in words
    assert "each kept example joins a step independently with probability 0.1" in words
    assert "noise seed was fixed" in words


def test_without_noise_it_plainly_says_so() -> None:
    stated = statement(Composed(events=()), noise_multiplier=0.0)
    assert stated.epsilon.upper == math.inf
    assert not stated.private
    assert "NO privacy guarantee" in stated.in_words()
    values = stated.to_json()
    assert values["epsilon"] == {"upper": None, "lower": None}
    assert values["recompute"] is None
    json.dumps(values, allow_nan=False)


def test_nothing_released_is_epsilon_zero() -> None:
    assert statement(Composed(events=()), noise_multiplier=0.0, steps=0).epsilon.upper == 0


def test_the_command_names_the_ledger_when_releases_differ() -> None:
    alike = statement(Repeated(event=ULS, count=3)).recompute
    assert alike is not None
    assert "--sampling-probability 0.1 --noise-multiplier 1.5 --steps 3 --delta 1e-05" in alike
    mixed = statement(Composed(events=(ULS, ULS, Gaussian(noise_multiplier=9.0))), ledger="a run/ledger.jsonl")
    assert mixed.recompute is not None
    assert "--ledger 'a run/ledger.jsonl'" in mixed.recompute
    assert "other kinds" in mixed.in_words()
    other = statement(Repeated(event=ULS, count=3), noise_multiplier=1.4)
    assert other.recompute is not None
    assert "--ledger" in other.recompute, "parameters that are not the ledger's would give another ε"
