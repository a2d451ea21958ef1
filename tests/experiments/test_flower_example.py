"""examples/flower_app under Flower's own command: an app that is not ours, trained with user-level DP."""

import json
import re
from pathlib import Path

import pytest
from own_superlink import ROOT, flwr_run, own_superlink
from safetensors.numpy import load_file

from experiments.confirmation import confirm_folder
from fedsim.plan.nodes import NodePlan
from fedsim.privacy.ledger import read_entries

EXAMPLE = ROOT / "examples" / "flower_app"


def test_the_example_trains_under_flwr_run(tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = ("--run-config", f"output='{output}' num-server-rounds=4")
    with own_superlink(tmp_path) as environment:
        said = flwr_run(EXAMPLE, environment, "--federation-config", "num-supernodes=60", *settings)
    assert (output / "privacy.json").exists(), said
    spent = [float(found) for found in re.findall(r"ε spent: ([0-9.]+)", said)]
    stated = json.loads((output / "privacy.json").read_text(encoding="utf-8"))
    assert len(spent) == len(read_entries(output / "ledger.jsonl")) == stated["steps"] == 4
    plan = NodePlan(
        num_users=60, group_size=1, sampling_probability=0.3, clip_norm=1.0, noise_multiplier=1.0, steps=4, delta=1e-3
    ).calibrate(8)
    assert stated["epsilon"]["upper"] == plan.epsilon().upper <= 8
    assert spent[-1] == pytest.approx(stated["epsilon"]["upper"], abs=1e-3)
    assert confirm_folder(output, (), as_json=True) == 0
    rounds = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = [one["not_private"].get("units", 0) for one in rounds]
    assert [one["not_private"].get("counted", 0) for one in rounds] == asked
    assert sum(asked) > 0
    accuracies = [float(found) for found in re.findall(r"'accuracy': ([0-9.]+)", said)]
    assert accuracies[-1] > 0.5 > accuracies[0]
    assert {name: array.shape for name, array in load_file(output / "arrays.safetensors").items()} == {
        "0": (16, 10),
        "1": (10,),
    }


def test_two_lines_of_the_server_app_and_two_of_the_client_app_are_changed() -> None:
    """What the page shows as added is what the app has, but for numbers that it reads from its configuration."""
    page = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    code = "".join(
        (EXAMPLE / "digits" / name).read_text(encoding="utf-8") for name in ("server_app.py", "client_app.py")
    )
    added = [line[1:].strip() for line in page.splitlines() if line.startswith("+")]
    assert len(added) == 6
    assert [line for line in added if line not in code] == [added[2]]
    named = set(re.findall(r"(\w+)=", added[2]))
    assert named == set(re.findall(r"^        (\w+)=", code, re.MULTILINE)) - {
        "grid",
        "initial_arrays",
        "num_rounds",
    } - {"evaluate_fn"}
