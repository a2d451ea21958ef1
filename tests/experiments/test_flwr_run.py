"""The same apps under Flower's own command, `flwr run .`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from own_superlink import ROOT, flwr_run, own_superlink
from small_flags import SMALL
from strangers_ray import Stranger, strangers_ray

WATCHED = "trackers = '[\"tensorboard\"]'\n"


def as_toml(flags: list[str]) -> str:
    """Command-line flags as the lines of a run-config file; --data.packages takes a list."""
    names, values = flags[::2], flags[1::2]
    fields = {name.removeprefix("--"): value for name, value in zip(names, values, strict=True)}
    fields["data.packages"] = f"'{json.dumps([fields['data.packages']])}'"
    return "".join(f"{name} = {value}\n" for name, value in fields.items())


@pytest.fixture(scope="module")
def stranger() -> Iterator[Stranger]:
    with strangers_ray() as started:
        yield started


def test_flwr_run_trains_with_the_same_apps_and_on_nobody_elses_ray(tmp_path: Path, stranger: Stranger) -> None:
    """RAY_ADDRESS names it, and without that Ray itself would find what `ray start` began here."""
    output, settings = tmp_path / "out", tmp_path / "run.toml"
    settings.write_text(as_toml(SMALL) + f'plan.rounds = 2\nevaluation.every = 1\noutput = "{output}"\n{WATCHED}')
    with own_superlink(tmp_path) as environment:
        environment |= {"RAY_TMPDIR": stranger.environment["RAY_TMPDIR"], "RAY_ADDRESS": stranger.address}
        said = flwr_run(ROOT, environment, "--run-config", str(settings))
    assert stranger.joined() == 0
    assert (output / "summary.json").exists(), said
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    assert summary["algorithm"] == "uls"
    assert summary["epsilon"] <= 8
    assert summary["rounds"] == 2
    assert (output / "model" / "model.safetensors").exists()
    assert list((output / "tensorboard").glob("events.*"))
