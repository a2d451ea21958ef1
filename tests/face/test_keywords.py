"""Keywords: each field of a configuration has one, and refusals speak of keywords."""

import ast
from pathlib import Path
from typing import Any

import pytest

import fedsim
from experiments.compare import Compare
from experiments.face.arguments import configured, in_python, keywords
from experiments.sweep.command import Sweep
from fedsim import InvalidInput, RunConfig, fine_tune
from fedsim.config import to_flat

KINDS = (RunConfig, Compare, Sweep)


@pytest.mark.parametrize("kind", KINDS)
def test_each_field_has_its_long_keyword(kind: type) -> None:
    ways = set(keywords(kind).values())
    fields = {name.replace("-", "_") for name in to_flat(kind())}
    assert fields <= {".".join(way) for way in ways}
    for way in ways:
        assert keywords(kind)["_".join(way)] == way


@pytest.mark.parametrize("kind", KINDS)
def test_a_keyword_sets_its_field_and_no_other(kind: type) -> None:
    defaults = to_flat(kind())
    for name, value in {"clip_norm": 0.3, "rounds": 7, "learning_rate": 0.2, "lora_rank": 3, "threads": 5}.items():
        way = ".".join(keywords(kind)[name]).replace("_", "-")
        changed = to_flat(configured(kind, {name: value}))
        assert changed.pop(way) == value
        assert changed == {key: kept for key, kept in defaults.items() if key != way}


def test_one_field_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="left out beside epsilon"):
        configured(RunConfig, {"epsilon": 3, "plan_epsilon": 3})


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr", "learning_rate"),
        ("lora_rnk", "lora_rank"),
        ("eps", "epsilon"),
        ("clip", "clip_norm"),
        ("seed", "noise_seed"),
        ("optimiser", "optimizer_name"),
    ],
)
def test_misspelt_keywords_are_suggested(given: str, meant: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        configured(RunConfig, {given: 1})
    assert meant in refused.value.hint


@pytest.mark.parametrize(
    ("line", "python"),
    [
        ("Set --plan.clip-norm, or leave out model.lora-rank.", "Set clip_norm, or leave out lora_rank."),
        ("unset with --noise.secure", "unset with secure"),
        ("It goes on by train --resume runs/a.", "It goes on by resume='runs/a'."),
        ("noise-seed is 3; leave out output", "noise_seed is 3; leave out output"),
        ("an embedded-token of 1e-3, or stop-word", "an embedded-token of 1e-3, or stop-word"),
    ],
)
def test_sentences_are_spelt_for_python(line: str, python: str) -> None:
    assert in_python(RunConfig, line) == python


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"epsilon": -1}, "epsilon is -1.0; it must be a number above 0"),
    ({"rounds": "many"}, "rounds is 'many'; it must be of type int"),
    ({"model": 3}, "model is 'int'; it must be a name"),
    ({"model": "./nowhere"}, "model is './nowhere'"),
    ({"rows": []}, "rows is 'empty'"),
    ({"rows": "nowhere.jsonl"}, "rows is 'nowhere.jsonl'"),
    ({"rows": ["text"]}, r"rows\[0\] is 'str'; it must be a dict"),
    ({"rows": 7}, "rows is 'int'; it must be a list of dicts"),
    ({"rows": [{"user": "a", "text": "b"}]}, "user_column is 'user_id'; it must be one of the columns"),
    ({"rows": {"ann": "Good morning."}}, "rows is 'dict'; it must be a list of dicts"),
    ({"rows": [{"user_id": "a", "text": "b"}], "data_path": "x"}, "data_path is 'x'; it must be left out beside rows"),
    ({"tokenizer": "gpt2"}, "tokenizer is 'str'; it must be left out beside a model's name"),
    ({"algorithm": "dpsgd"}, "algorithm is 'dpsgd'"),
    ({"optimizer": "sgd"}, "optimizer_name"),
    ({"noise_seed": 1, "secure": True}, "noise_seed is 1; it must be unset with secure"),
    ({"resume": "nowhere"}, "resume is 'nowhere'; it must be the folder of a run"),
]


@pytest.mark.parametrize(("given", "said"), WRONG)
def test_what_is_wrong_is_said_in_keywords_and_leaves_nothing(given: dict[str, Any], said: str, places: Path) -> None:
    with pytest.raises(InvalidInput, match=said) as refused:
        fine_tune(**given)
    assert "--" not in str(refused.value)
    assert not list(places.iterdir())


def test_the_face_names_what_it_has() -> None:
    for name in fedsim.__all__:
        assert getattr(fedsim, name) is not None
        assert name in dir(fedsim)
    with pytest.raises(AttributeError, match="no attribute 'fine_tnue'"):
        fedsim.fine_tnue  # noqa: B018


def test_editors_see_what_there_is() -> None:
    stub = ast.parse((Path(fedsim.__file__).parent / "__init__.pyi").read_text(encoding="utf-8"))
    seen = {name.asname: node.module for node in stub.body if isinstance(node, ast.ImportFrom) for name in node.names}
    assert {name: fedsim._MODULES[name] for name in fedsim.__all__ if name != "__version__"} == seen
