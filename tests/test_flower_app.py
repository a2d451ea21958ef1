"""The Flower app section of pyproject.toml stands for the whole configuration."""

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

from flwr.common.config import flatten_dict

from fedsim.config import RunConfig, from_flat

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
SMALLER = {"plan.rounds", "evaluation.every", "evaluation.max-rows", "evaluation.test-rows"}
"""What `flwr run .` sets lower than the defaults, so that the example is short."""


def all_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        name, value = f"{prefix}{item.name.replace('_', '-')}", getattr(config, item.name)
        fields |= all_fields(value, name + ".") if dataclasses.is_dataclass(value) else {name: value}
    return fields


def test_every_field_can_be_set_with_flwr_run() -> None:
    declared = flatten_dict(tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"])
    assert set(declared) == set(all_fields(RunConfig()))
    read, defaults = all_fields(from_flat(RunConfig, declared)), all_fields(RunConfig())
    assert {name for name in read if read[name] != defaults[name]} == SMALLER
