"""The command line end to end, on a slice of the docstrings with a very small model."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from dp_accounting.pld import privacy_loss_distribution
from scipy.stats import binom
from small_flags import LOCAL, SMALL

from experiments.run import main
from fedsim.privacy.accountant import epsilon_bounds
from fedsim.privacy.ledger import merged, read_entries


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def without_noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without-noise")
    arguments = ["--plan.epsilon", "inf", "--plan.allow-no-privacy", "--plan.rounds", "10", "--output", str(folder)]
    assert main(["train", *SMALL, *LOCAL, *arguments]) == 0
    return folder


def test_held_out_loss_falls_without_noise(without_noise: Path) -> None:
    summary = read(without_noise / "summary.json")
    assert summary["test_loss_after"] < summary["test_loss_before"] - 0.05
    assert summary["epsilon"] is None


def test_a_run_without_noise_claims_nothing(without_noise: Path) -> None:
    statement = read(without_noise / "privacy.json")
    assert statement["private"] is False
    assert statement["epsilon"]["upper"] is None
    assert "no" in statement["in_words"].lower()


def test_the_reference_gradients_give_the_same_losses(without_noise: Path, tmp_path: Path) -> None:
    arguments = ["--plan.epsilon", "inf", "--plan.allow-no-privacy", "--plan.rounds", "10", "--output", str(tmp_path)]
    assert main(["train", *SMALL, *LOCAL, *arguments, "--gradients", "reference"]) == 0
    fast, reference = read(without_noise / "summary.json"), read(tmp_path / "summary.json")
    assert reference["test_loss_after"] == pytest.approx(fast["test_loss_after"], abs=1e-3)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comparison")
    arguments = ["--plan.epsilon", "6", "--plan.rounds", "5", "--evaluation.every", "2", "--output", str(folder)]
    assert main(["compare", *SMALL, *arguments]) == 0
    return folder


def test_a_comparison_leaves_a_folder_for_each_arm(comparison: Path) -> None:
    arms = read(comparison / "comparison.json")["arms"]
    assert [arm["algorithm"] for arm in arms] == ["uls", "els"]
    for arm in arms:
        folder = comparison / arm["algorithm"]
        assert arm["epsilon"] <= 6
        assert arm["epsilon"] > 5.9
        assert arm["gradient_evaluations"] == pytest.approx(5 * 64)
        for name in ("config.json", "metrics.jsonl", "privacy.json", "ledger.jsonl", "model/model.safetensors"):
            assert (folder / name).stat().st_size > 0
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == [0, 1, 2, 3, 4, 5]
        assert [line["round"] for line in lines if "loss" in line] == [0, 2, 4, 5]
    needed = {
        "algorithm", "epsilon", "delta", "noise_multiplier", "group_size", "gradient_evaluations", "test_loss_before",
        "test_loss_after", "test_accuracy_before", "test_accuracy_after", "seconds",
    }  # fmt: skip
    assert all(needed <= set(arm) for arm in arms)
    assert arms[0]["test_loss_before"] == arms[1]["test_loss_before"]


def test_releasing_all_arms_costs_the_composition_of_their_ledgers(comparison: Path) -> None:
    together = read(comparison / "comparison.json")["released_together"]
    both = merged(entry.event for arm in ("uls", "els") for entry in read_entries(comparison / arm / "ledger.jsonl"))
    bounds = epsilon_bounds(both, 1e-3)
    assert together["epsilon"] == {"upper": bounds.upper, "lower": bounds.lower}
    assert bounds.upper > 6
    assert together["unclaimed"] is None
    page = html.unescape((comparison / "report.html").read_text(encoding="utf-8"))
    assert together["in_words"] in page
    assert "Where the time of a round went" in page
    assert "none of their models may be released" in together["in_words"], "the seeds were given"
    for arm in ("uls", "els"):
        words = read(comparison / arm / "privacy.json")["in_words"]
        assert "The models of this run alone are user-level differentially private" in words
        assert "what all of them cost together is more than this ε" in words
    seeds = [read(comparison / arm / "config.json")["config"][f"{kind}-seed"]
             for arm in ("uls", "els") for kind in ("sampling", "noise")]  # fmt: skip
    assert len(set(seeds)) == 4


def test_the_planners_word_in_a_comparison_is_marked(comparison: Path) -> None:
    mark = "Not private: computed from the data to be protected, without noise: number of training users"
    assert mark in html.unescape((comparison / "report.html").read_text(encoding="utf-8"))


def test_the_statement_agrees_with_an_independent_accountant(comparison: Path) -> None:
    statement = read(comparison / "uls" / "privacy.json")
    independent = privacy_loss_distribution.from_gaussian_mechanism(
        statement["noise_multiplier"],
        sampling_prob=statement["sampling"]["probability"],
        value_discretization_interval=1e-3,
    )
    assert_agrees(statement, independent)

    statement = read(comparison / "els" / "privacy.json")
    counts = list(range(statement["contribution_bound"]["group_size"] + 1))
    independent = privacy_loss_distribution.from_mixture_gaussian_mechanism(
        statement["noise_multiplier"],
        counts,
        list(binom.pmf(counts, counts[-1], statement["sampling"]["probability"])),
        value_discretization_interval=1e-2,
    )
    assert_agrees(statement, independent)


def assert_agrees(statement: dict[str, Any], one_step: Any) -> None:
    """The statement's interval lies where dp_accounting's (coarser, also pessimistic) value says."""
    epsilon = one_step.self_compose(statement["steps"]).get_epsilon_for_delta(statement["delta"])
    assert statement["epsilon"]["lower"] <= epsilon
    assert statement["epsilon"]["upper"] == pytest.approx(epsilon, rel=2e-2)


def test_the_report_opens_from_disk_and_escapes_what_it_shows(comparison: Path) -> None:
    page = (comparison / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg ") == page.count("<figure>") >= 3
    assert not re.findall(r'(?:src|href)="(?!#)', page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")  # a name, which nothing is fetched from
    assert "https://" not in page
    assert "did better on held-out users" in page
    for arm in read(comparison / "comparison.json")["arms"]:
        assert f"{arm['test_loss_after']:.4f}" in page

    config = comparison / "uls" / "config.json"
    kept = config.read_text(encoding="utf-8")
    config.write_text(kept.replace('"fast"', '"<script>alert(1)</script>"'), encoding="utf-8")
    try:
        assert main(["report", str(comparison)]) == 0
        assert "<script>" not in (comparison / "report.html").read_text(encoding="utf-8")
    finally:
        config.write_text(kept, encoding="utf-8")


def test_files_with_users_of_ones_own(tmp_path: Path) -> None:
    posts = tmp_path / "posts.jsonl"
    with posts.open("w", encoding="utf-8") as file:
        for user in range(60):
            for post in range(4):
                text = f"Post {post} of writer {user}: the quick brown fox jumps over the lazy dog, again and again."
                file.write(json.dumps({"author": f"user {user}", "text": text}) + "\n")
    assert main([
        "train", *SMALL, *LOCAL, "--data.source", "files", "--data.path", str(posts), "--data.user-column", "author",
        "--data.text-column", "text", "--plan.algorithm", "uls", "--plan.epsilon", "8", "--plan.rounds", "2",
        "--plan.gradients-per-round", "20", "--output", str(tmp_path / "out"),
    ]) == 0  # fmt: skip
    statement = read(tmp_path / "out" / "privacy.json")
    assert statement["private"] is True
    assert statement["epsilon"]["upper"] <= 8


@pytest.mark.parametrize("mechanism", ["matrix-noise", "adaptive-noise"])
def test_replies_are_held_to_the_rounds_own_clip(tmp_path: Path, mechanism: str) -> None:
    """Scales above 1 let a sum be longer than the clip norm says: such replies are honest, one by one or together."""
    arguments = ["--plan.mechanism", mechanism, "--model.lora-rank", "4", "--model.lora-targets", "c_proj"]
    arguments += ["--plan.clip-norm", "0.001", "--plan.gradients-per-round", "2", "--plan.rounds", "5"]
    losses = []
    for users_per_message in ("0", "1"):
        folder = tmp_path / users_per_message
        message = ["--engine.users-per-message", users_per_message, "--output", str(folder)]
        assert main(["train", *SMALL, *LOCAL, *arguments, *message]) == 0
        losses.append(read(folder / "summary.json")["test_loss_after"])
        words = read(folder / "privacy.json")["contribution_bound"]["in_words"]
        assert "after division by a scale" in words
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
