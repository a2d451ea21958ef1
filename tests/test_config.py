"""The typed configuration: round trips, and values that are refused."""

import dataclasses
import math

import pytest

from fedsim.config import (
    Average,
    EngineConfig,
    EvaluationConfig,
    OptimizerConfig,
    PlanConfig,
    RunConfig,
    from_flat,
    to_flat,
)
from fedsim.errors import InvalidInput
from fedsim.privacy.mechanisms import MECHANISMS
from fedsim.sampling import SAMPLINGS


def test_flat_form_round_trips_through_flower_scalars() -> None:
    config = RunConfig(
        plan=PlanConfig(algorithm="els", epsilon=4.0, group_size=16, noise_multiplier=0.7),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.5),
        sampling_seed=3,
    )
    flat = to_flat(config)
    assert all(isinstance(value, (bool, int, float, str)) for value in flat.values())
    assert flat["plan.group-size"] == 16
    assert from_flat(RunConfig, flat) == config


def test_flower_may_hand_a_whole_number_for_a_float() -> None:
    assert from_flat(RunConfig, {"plan.epsilon": 4}).plan.epsilon == 4.0


@pytest.mark.parametrize(
    ("flat", "field"),
    [
        ({"plan.epsilonn": 4.0}, "plan.epsilonn"),
        ({"nonsense": 1}, "nonsense"),
        ({"plan.rounds": "many"}, "plan.rounds"),
        ({"plan.rounds": True}, "plan.rounds"),
        ({"plan.algorithm": "fedavg"}, "plan.algorithm"),
        ({"plan": 3}, "plan"),
        ({"plan.epsilon.value": 3.0}, "plan.epsilon"),
    ],
)
def test_unknown_fields_and_wrong_types_are_named(flat: dict, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        from_flat(RunConfig, flat)
    assert caught.value.field.startswith(field.split(".value")[0])


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (PlanConfig, {"epsilon": 0.0}, "plan.epsilon"),
        (PlanConfig, {"epsilon": -1.0}, "plan.epsilon"),
        (PlanConfig, {"epsilon": math.nan}, "plan.epsilon"),
        (PlanConfig, {"epsilon": math.inf}, "plan.epsilon"),
        (PlanConfig, {"delta": 1.0}, "plan.delta"),
        (PlanConfig, {"group_size": 0}, "plan.group-size"),
        (PlanConfig, {"algorithm": "els", "group_size": 99_999_999}, "plan.group-size"),
        (PlanConfig, {"clip_norm": 0.0}, "plan.clip-norm"),
        (PlanConfig, {"clip_norm": math.inf}, "plan.clip-norm"),
        (PlanConfig, {"rounds": 0}, "plan.rounds"),
        (PlanConfig, {"noise_multiplier": 0.0}, "plan.noise-multiplier"),
        (PlanConfig, {"noise_multiplier": math.nan}, "plan.noise-multiplier"),
        (PlanConfig, {"algorithm": "els", "local_steps": 3}, "plan.local-steps"),
        (OptimizerConfig, {"learning_rate": 0.0}, "optimizer.learning-rate"),
        (OptimizerConfig, {"average": "exponential", "average_decay": 1.0}, "optimizer.average-decay"),
        (OptimizerConfig, {"average": "exponential", "average_decay": 0.0}, "optimizer.average-decay"),
        (OptimizerConfig, {"average": "exponential", "average_decay": math.nan}, "optimizer.average-decay"),
        (OptimizerConfig, {"average": "tail", "average_share": 0.0}, "optimizer.average-share"),
        (OptimizerConfig, {"average": "tail", "average_share": 1.1}, "optimizer.average-share"),
        (EngineConfig, {"workers": -1}, "engine.workers"),
        (EngineConfig, {"gpus_per_worker": -0.5}, "engine.gpus-per-worker"),
        (EvaluationConfig, {"every": 0}, "evaluation.every"),
    ],
)
def test_values_out_of_range_are_refused(kind: type, values: dict, field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        kind(**values)
    assert caught.value.field == field
    assert repr(caught.value.value) in str(caught.value)


def test_how_many_examples_a_user_has_matters_where_there_is_noise() -> None:
    free = {"algorithm": "els", "group_size": 10**9, "epsilon": math.inf, "allow_no_privacy": True}
    assert PlanConfig(**free).group_size == PlanConfig(**free, noise_multiplier=0.0).group_size == 10**9
    with pytest.raises(InvalidInput, match=r"plan\.group-size"):
        PlanConfig(**free, noise_multiplier=1.0)
    assert PlanConfig(algorithm="uls", group_size=2 * 10**6).group_size == 2 * 10**6


@pytest.mark.parametrize(
    ("average", "option"),
    [
        ("none", "average_decay"),
        ("tail", "average_decay"),
        ("none", "average_share"),
        ("exponential", "average_share"),
    ],
)
def test_an_option_of_another_average_would_do_nothing_and_is_refused(average: Average, option: str) -> None:
    with pytest.raises(InvalidInput, match="does nothing") as caught:
        OptimizerConfig(average=average, **{option: 0.7})
    assert caught.value.field == f"optimizer.{option.replace('_', '-')}"
    OptimizerConfig(average=average, **{option: getattr(OptimizerConfig, option)})
    own = "exponential" if option == "average_decay" else "tail"
    assert OptimizerConfig(average=own, **{option: 0.7}).averaging(average) == OptimizerConfig(average=average)


@pytest.mark.parametrize(
    ("rounds", "optimizer", "averaged"),
    [
        (12, {"average": "none"}, 0),
        (12, {"average": "exponential"}, 12),
        (12, {"average": "tail"}, 6),
        (5, {"average": "tail"}, 3),
        (30, {"average": "tail", "average_share": 0.1}, 3),
        (7, {"average": "tail", "average_share": 1.0}, 7),
    ],
)
def test_how_many_rounds_an_average_is_over(rounds: int, optimizer: dict, averaged: int) -> None:
    assert OptimizerConfig(**optimizer).averaged_rounds(rounds) == averaged


@pytest.mark.parametrize(("average", "rounds"), [("exponential", 1), ("tail", 2)])
def test_an_average_over_one_round_would_do_nothing_and_is_refused(average: Average, rounds: int) -> None:
    with pytest.raises(InvalidInput, match="two rounds or more"):
        RunConfig(plan=PlanConfig(rounds=rounds), optimizer=OptimizerConfig(average=average))
    RunConfig(plan=PlanConfig(rounds=rounds + 1), optimizer=OptimizerConfig(average=average))


def test_infinite_epsilon_needs_an_explicit_flag() -> None:
    assert PlanConfig(epsilon=math.inf, allow_no_privacy=True).epsilon == math.inf


def test_every_field_is_documented() -> None:
    import inspect

    for kind in (PlanConfig, OptimizerConfig, EngineConfig, EvaluationConfig, RunConfig):
        source = inspect.getsource(kind)
        for item in dataclasses.fields(kind):
            if kind is RunConfig and dataclasses.is_dataclass(item.type):
                continue
            after = source.split(f"    {item.name}:", 1)[1]
            documented = after.split("\n", 1)[1].lstrip().startswith('"""') or after.lstrip().startswith("Annotated[")
            assert documented, f"{kind.__name__}.{item.name} has no docstring"


def test_the_help_lists_every_mechanism_and_sampling_scheme(capsys) -> None:
    from experiments.run import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for registry in (MECHANISMS, SAMPLINGS):
        for name, kind in registry.items():
            if ":" not in name:  # other tests import modules with kinds of their own
                assert f"{name}: {kind.summary}" in shown


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"bands": "4"}, "plan.bands"),
        ({"bands": "auto"}, "plan.bands"),
        ({"mechanism": "banded"}, "plan.mechanism"),
        ({"mechanism": "banded", "bands": "4"}, "plan.bands"),
        ({"buffers": 2, "sampling": "none"}, "plan.buffers"),
    ],
)
def test_noise_for_which_users_take_turns_is_refused_where_examples_have_several_owners(values, field) -> None:
    common = {"algorithm": "els", "adjacency": "fixed-graph"}
    assert PlanConfig(**common, bands="1").adjacency == "fixed-graph"
    with pytest.raises(InvalidInput) as error:
        PlanConfig(**common, **values)
    assert error.value.field == field
    assert "fixed-graph" in str(error.value)
