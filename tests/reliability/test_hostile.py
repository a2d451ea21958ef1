"""Hostile and broken input that no other test covers: see the table in docs/reliability.md."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from small_runs import trained

from experiments.report.run import write_report
from experiments.run import main
from fedsim.config import EngineConfig
from fedsim.data.config import DataConfig
from fedsim.errors import Failure


def posts(path: Path, records: list[dict]) -> DataConfig:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return DataConfig(source="files", path=str(path), user_column="author", text_column="text", sequence_length=16)


TEXT = "the quick brown fox jumps over the lazy dog, again and again"


def writers(count: int) -> list[dict]:
    return [
        {"author": f"writer {user}", "text": f"{TEXT} says {user} in post {post}"}
        for user in range(count)
        for post in range(3)
    ]


def test_users_with_one_row_many_rows_and_none_are_trained_together(small_run, tmp_path: Path) -> None:
    records = writers(40)
    records += [{"author": "single", "text": TEXT}]
    records += [{"author": "busy", "text": f"post {post}"} for post in range(1_000_000)]
    records += [{"author": "silent", "text": ""}, {"author": "blank", "text": "  \n\t "}]
    records += [{"author": "long", "text": f"{TEXT} " * 5_000}]
    summary = trained(small_run(tmp_path / "out", data=posts(tmp_path / "posts.jsonl", records)))
    assert summary["rounds"] == 10
    assert np.isfinite(summary["test_loss_after"])


def test_odd_unicode_is_text_like_any_other(small_run, tmp_path: Path) -> None:
    odd = [
        "\u202eright to left",
        "e\u0301 combining",
        "👩‍👩‍👧 family",
        "\x00 null \x07 bell",
        "\ufeff mark",
        "𝕬𝖓𝖈𝖎𝖊𝖓𝖙",
    ]
    records = writers(40) + [{"author": text, "text": f"{text} {TEXT}"} for text in odd]
    assert np.isfinite(
        trained(small_run(tmp_path / "o", data=posts(tmp_path / "p.jsonl", records)))["test_loss_after"]
    )


@pytest.mark.parametrize("records", [[], [{"author": "a", "text": ""}], [{"author": "a", "text": TEXT}]])
def test_data_without_enough_users_is_refused(records: list[dict], tmp_path: Path, small_run, capsys) -> None:
    path = tmp_path / "posts.jsonl"
    posts(path, records)
    code = main([
        "train", "--data.source", "files", "--data.path", str(path), "--data.user-column", "author",
        "--model.small.steps", "2", "--model.small.layers", "1", "--model.small.width", "16",
        "--model.small.heads", "2", "--model.small.context", "16", "--model.small.vocabulary-size", "300",
        "--model.small.batch-rows", "2",
        "--data.sequence-length", "16", "--engine.kind", "local", "--engine.workers", "1",
        "--output", str(tmp_path / "o"),
    ])  # fmt: skip
    assert code == 2
    printed = capsys.readouterr().err
    assert "error: data" in printed or "at most the 1 users" in printed
    assert not (tmp_path / "o/ledger.jsonl").exists()


@pytest.mark.parametrize("name", ["../escape", "a/../../escape", "<b>bold</b>", "nul\tname"])
def test_a_users_name_decides_no_path(name: str, small_run, tmp_path: Path) -> None:
    records = [*writers(40), {"author": name, "text": TEXT}]
    before = set(tmp_path.parent.iterdir())
    trained(small_run(tmp_path / "out", data=posts(tmp_path / "p.jsonl", records)))
    assert set(tmp_path.parent.iterdir()) == before
    assert not list(tmp_path.rglob("*escape*"))


def test_html_in_any_text_of_a_run_is_shown_as_text(small_run, tmp_path: Path) -> None:
    trained(small_run(tmp_path))
    attack = "<img src=x onerror=alert(1)>"
    for path in (tmp_path / "config.json", tmp_path / "privacy.json", tmp_path / "summary.json"):
        values = json.loads(path.read_text())

        def poisoned(value):
            if isinstance(value, dict):
                return {key: poisoned(item) for key, item in value.items()}
            if isinstance(value, list):
                return [poisoned(item) for item in value]
            return attack if isinstance(value, str) and value not in ("uls", "els") else value

        path.write_text(json.dumps(poisoned(values)))
    assert "onerror" in (page := write_report(tmp_path).read_text(encoding="utf-8"))
    assert "<img src=x" not in page


def test_a_run_whose_workers_all_fail_says_so_and_can_go_on(small_run, tmp_path: Path, monkeypatch) -> None:
    from clients import worker

    config = small_run(tmp_path)

    def fails(self, request):
        raise RuntimeError("out of order")

    from experiments.train import Train

    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(type(config))}
    with monkeypatch.context() as patched:
        patched.setattr(worker.Worker, "train", fails)
        # The command line says so in one sentence and ends with 1, as it does whatever has failed.
        with pytest.raises(Failure, match=r"round 0: .*out of order"):
            Train(**values).run()
    assert trained(dataclasses.replace(config, resume=str(tmp_path)))["rounds"] == 10
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1 + 11  # a header, and round 0 twice


def test_more_tokens_than_fit_at_once_change_nothing_but_time(small_run, tmp_path: Path) -> None:
    whole = trained(small_run(tmp_path / "a"))
    engine = EngineConfig(kind="local", workers=1, max_tokens=16)
    cut = trained(small_run(tmp_path / "b", engine=engine))
    assert cut["test_loss_after"] == pytest.approx(whole["test_loss_after"], abs=1e-4)
