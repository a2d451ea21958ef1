"""`push` uploads what may be released, with statement and card, and refuses what is not certified."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from trained_models import data_flags, posts, story_llama, train

from experiments.run import main
from fedsim.privacy.bounds import shown_above


class Hub:
    """Stands for the hub's API: remembers what was uploaded."""

    def __init__(self) -> None:
        self.made: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> None:
        self.made[repo] = private

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], commit_message: str) -> None:
        assert repo_id in self.made
        chosen = huggingface_hub.utils.filter_repo_objects(
            [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()],
            allow_patterns=allow_patterns,
        )
        self.uploaded = {name: (Path(folder_path) / name).read_bytes() for name in chosen}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(folder / "x", *data_flags(posts(folder / "very_private_posts.jsonl")))


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, for each test to spoil."""

    return Path(shutil.copytree(finished, tmp_path / "x"))


@pytest.mark.parametrize("part", [".", "model"])
def test_the_model_its_statement_and_card_are_uploaded_and_nothing_else(run: Path, hub: Hub, part: str) -> None:
    for name in ("secret.json", "metrics.jsonl", "optimizer.pt", "users.csv"):
        (run / "model" / name).write_text("private")
    (run / "model/checkpoints").mkdir()
    (run / "model/checkpoints/arrays.safetensors").write_text("private")
    assert main(["push", str(run / part), "me/mine"]) == 0
    assert hub.made == {"me/mine": True}
    assert hub.uploaded.keys() == {
        *("README.md", "privacy.json", "ledger.jsonl", "config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    assert b"private" not in hub.uploaded["config.json"]
    # Nothing that is uploaded names the data, or a folder of this machine.
    for content in hub.uploaded.values():
        assert b"very_private_posts" not in content
        assert str(run.parent).encode() not in content


def test_the_card_says_what_the_statement_says(run: Path) -> None:
    said = json.loads((run / "privacy.json").read_text())
    card = (run / "model/README.md").read_text()
    assert said["in_words"] in card
    assert f"| ε | {shown_above(said['epsilon']['upper'])}, a certified upper bound" in card
    assert "| δ | 0.001 |" in card
    assert "add-or-remove-one-user" in card
    assert all(f"- {sentence}" in card for sentence in said["not_covered"])
    assert said["recompute"] in card
    assert "users in the training split: 51" in card
    assert 'AutoModelForCausalLM.from_pretrained("FOLDER")' in card
    assert (run / "README.md").read_text() == card


def lowered(model: Path) -> None:
    """A statement that claims less than its ledger holds."""
    said = json.loads((model / "privacy.json").read_text())
    said["epsilon"] = {"upper": said["epsilon"]["upper"] / 2, "lower": 0.0}
    (model / "privacy.json").write_text(json.dumps(said))


def without_guarantee(model: Path) -> None:
    said = json.loads((model / "privacy.json").read_text())
    said |= {"private": False, "epsilon": {"upper": None, "lower": None}}
    (model / "privacy.json").write_text(json.dumps(said))


def known_noise(model: Path) -> None:
    said = json.loads((model / "privacy.json").read_text())
    from fedsim.statement import REPRODUCIBLE_NOISE

    said["not_covered"] = [REPRODUCIBLE_NOISE, *said["not_covered"]]
    (model / "privacy.json").write_text(json.dumps(said))


def shortened(model: Path) -> None:
    path = model / "ledger.jsonl"
    path.write_bytes(path.read_bytes().rsplit(b"\n", 2)[0] + b"\n")


def no_statement(model: Path) -> None:
    (model / "privacy.json").unlink()


def no_ledger(model: Path) -> None:
    (model / "ledger.jsonl").unlink()


@pytest.mark.parametrize("harm", [lowered, without_guarantee, known_noise, shortened, no_statement, no_ledger])
def test_what_is_not_certified_is_refused_unless_asked(
    run: Path, hub: Hub, harm: Callable[[Path], None], capsys
) -> None:
    harm(run / "model")
    assert main(["push", str(run), "me/mine"]) == 2
    assert not hub.made
    assert main(["push", str(run), "me/mine", "--without-guarantee", "--public"]) == 0
    assert hub.made == {"me/mine": False}
    assert "model.safetensors" in hub.uploaded


@pytest.mark.parametrize("folder", ["/absent", "."])
def test_no_model_is_a_sentence(folder: str, tmp_path: Path, hub: Hub, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["push", folder, "me/mine"]) == 2
    assert "error: folder" in capsys.readouterr().err


def test_adapters_are_pushed_merged_where_nobody_else_has_their_base(tmp_path: Path, hub: Hub, capsys) -> None:
    data = data_flags(posts(tmp_path / "posts.jsonl"))
    run = train(tmp_path / "x", *data, "--model.path", story_llama(), "--model.lora-rank", "2")
    card = (run / "model/README.md").read_text()
    assert "AutoPeftModelForCausalLM" in card
    assert "`model_stories260k`, from a folder" in card
    assert main(["push", str(run), "me/mine"]) == 2
    assert "merge" in capsys.readouterr().err
    assert main(["merge", str(run), "--output", str(tmp_path / "merged")]) == 0
    assert main(["push", str(tmp_path / "merged"), "me/mine"]) == 0
    assert b"AutoModelForCausalLM" in hub.uploaded["README.md"]
    # What was spent stays with the merged model, and with what goes on from adapters.
    for name, base in (("y", tmp_path / "merged"), ("z", run)):
        train(tmp_path / name, *data, "--model.path", str(base), "--plan.epsilon", "9")
        said = json.loads((tmp_path / name / "privacy.json").read_text())
        assert said["earlier"]["runs"] == [base.name]
        assert 8 < said["epsilon"]["upper"] <= 9


def test_what_the_hub_refuses_is_a_sentence(run: Path, hub: Hub, monkeypatch, capsys) -> None:
    def refused(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.HFValidationError("no such form")

    monkeypatch.setattr(hub, "create_repo", refused)
    assert main(["push", str(run), "me mine"]) == 2
    assert "no such form" in capsys.readouterr().err
