"""Release mode: nothing that would void the guarantee, nothing in the results that no noise protects."""

import dataclasses
import json
from pathlib import Path

import pytest
from small_runs import trained

from experiments.run import main
from fedsim.config import NoiseConfig, RunConfig
from fedsim.errors import InvalidInput
from fedsim.resources import open_resources
from fedsim.statement import ALWAYS_NOT_COVERED, PSEUDO_RANDOM_SAMPLING

RELEASE = ["train", "--release"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([*RELEASE, "--noise-seed", "1"], ["noise-seed", "unset with --release"]),
        ([*RELEASE, "--sampling-seed", "1"], ["sampling-seed", "unset with --release"]),
        ([*RELEASE, "--plan.epsilon", "inf", "--plan.allow-no-privacy"], ["plan.epsilon", "finite with --release"]),
        (
            [*RELEASE, "--plan.noise-multiplier", "0", "--plan.allow-no-privacy"],
            ["plan.noise-multiplier", "above 0"],
        ),
        (["compare", "--release"], ["release", "chooses an algorithm", "not counted"]),
        (["sweep", "--release"], ["release", "chooses settings", "not counted"]),
        (["train", "--noise.secure", "--noise-seed", "3"], ["noise-seed", "Secure noise has no seed"]),
        (["train", "--noise.secure", "--plan.mechanism", "randomised-laplace"], ["noise.secure", "off with"]),
        (["train", "--checkpoint.keep", "0"], ["checkpoint.keep", "at least 1"]),
        (["train", "--checkpoint.rounds", "-1"], ["checkpoint.rounds", "at least 0"]),
    ],
)
def test_what_would_void_the_guarantee_is_refused(arguments: list[str], words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(arguments))
    assert ended.value.code == 2
    # tyro draws boxes and breaks lines; the words are what counts.
    printed = " ".join(capsys.readouterr().err.replace("│", " ").split())
    for word in words:
        assert word in printed


def released(config: RunConfig) -> RunConfig:
    return dataclasses.replace(
        config, release=True, sampling_seed=None, noise_seed=None, noise=NoiseConfig(secure=True)
    )


def test_a_released_run_keeps_metrics_of_training_users_to_itself(small_run, tmp_path: Path, capsys) -> None:
    trained(released(small_run(tmp_path)))
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["not_private"] == {}
        assert "seconds" not in line  # rounds take as long as there is text
    # This run clips everyone, which is not said either.
    assert "not private" not in capsys.readouterr().err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["alarms"] == []
    assert summary["training_seconds"] is None
    assert summary["seconds"] is None
    statement = json.loads((tmp_path / "privacy.json").read_text())
    assert not any("Reproducible noise" in sentence for sentence in statement["not_covered"])


def test_a_finished_run_holds_no_fingerprint_of_its_data(small_run, tmp_path: Path, capsys) -> None:
    """It is a function of all users without noise: whoever knows all but one could try out who that one is."""
    config = released(small_run(tmp_path))
    trained(config)
    fingerprint = open_resources(config).store.fingerprint
    assert main(["report", str(tmp_path)]) == 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or fingerprint.encode() not in path.read_bytes(), path
    before = (tmp_path / "summary.json").read_bytes()
    assert main(["train", "--resume", str(tmp_path)]) == 0  # finished: shown again
    assert (tmp_path / "summary.json").read_bytes() == before


def test_metrics_of_training_users_are_marked_wherever_they_are_written(small_run, tmp_path: Path, capsys) -> None:
    trained(small_run(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["not_private"]["units"] > 0
    private = {"units", "train_loss", "clipped_fraction", "nonfinite_units"}
    assert not any(private & set(line) for line in lines)
    for alarm in json.loads((tmp_path / "summary.json").read_text())["alarms"]:
        assert "not private" in alarm["in_words"]
    assert "(not private: computed from training users without noise)" in capsys.readouterr().err


@pytest.mark.parametrize("exact", [False, True])
def test_the_statement_says_how_the_noise_was_drawn(small_run, tmp_path: Path, exact: bool) -> None:
    config = released(small_run(tmp_path))
    trained(dataclasses.replace(config, engine=dataclasses.replace(config.engine, exact=exact)))
    not_covered = json.loads((tmp_path / "privacy.json").read_text())["not_covered"]
    assert set(ALWAYS_NOT_COVERED) <= set(not_covered)
    assert not any("pseudo-random generator" in sentence for sentence in not_covered)
    assert PSEUDO_RANDOM_SAMPLING in not_covered
    assert any("sums are rounded in floating point" in sentence for sentence in not_covered) is not exact


def test_a_given_noise_seed_marks_the_statement(small_run, tmp_path: Path) -> None:
    trained(small_run(tmp_path))
    words = json.loads((tmp_path / "privacy.json").read_text())["in_words"]
    assert "Reproducible noise: for experiments, not for release" in words
    assert "pseudo-random generator" in words


def test_a_given_seed_is_refused_however_it_is_given() -> None:
    with pytest.raises(InvalidInput, match="unset with --release"):
        RunConfig(release=True, noise_seed=0)
