import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from readable_stores import write_jsonl

from experiments.prepare import Prepare
from experiments.run import main
from fedsim.cache import default_cache
from fedsim.data.config import DataConfig
from fedsim.data.store import UserStore
from fedsim.models.config import ModelConfig
from fedsim.models.tokenizer import train_tokenizer


@pytest.fixture
def arguments(tmp_path, monkeypatch) -> list[str]:
    """Options that name a small file and a small tokenizer."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    tokenizer = train_tokenizer(["some text of nobody"] * 9, 300)
    tokenizer.save_pretrained(tmp_path / "model")
    records = [{"author": f"u{n % 40}", "body": f"text number {n}"} for n in range(200)] + [{"author": "u1"}]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    options = {"source": "files", "path": path, "user-column": "author", "text-column": "body"}
    named = [word for name, value in options.items() for word in (f"--data.{name}", str(value))]
    return [*named, "--model.path", str(tmp_path / "model")]


def test_prepare_prints_what_is_in_the_store(arguments, capsys) -> None:
    assert main(["prepare", *arguments]) == 0
    printed = capsys.readouterr()
    assert "Rows per user: minimum 5" in printed.out
    assert "1 × missing text (first: data.jsonl:201)" in printed.out
    assert "Grouping by user" in printed.err


def test_a_prepared_folder_is_a_source(arguments, tmp_path, capsys) -> None:
    output = tmp_path / "elsewhere" / "store"
    assert main(["prepare", *arguments, "--output", str(output), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["num_users"] == 40
    config = DataConfig(source="store", path=str(output))
    from transformers import AutoTokenizer

    from fedsim.data.ingest import open_or_build

    tokenizer = AutoTokenizer.from_pretrained(arguments[-1])
    assert open_or_build(config, tokenizer).fingerprint == UserStore.open(output).fingerprint == printed["fingerprint"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--data.user-column", "writer"], "data.user-column is 'writer'; it must be one of the columns"),
        (["--data.minimum-tokens", "60"], "enough text"),
        (["--model.path", "/no/such/model"], "model.path"),
    ],
)
def test_bad_input_ends_in_exit_code_2_and_one_sentence(arguments, capsys, change, words) -> None:
    assert main(["prepare", *arguments, *change]) == 2
    printed = capsys.readouterr().err.splitlines()
    assert words in printed[-1]
    assert not any("Traceback" in line for line in printed)


def test_the_default_is_docstrings_with_the_default_tokenizer(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path))
    monkeypatch.setattr("experiments.prepare.public_texts", lambda *_: ["public text"] * 9)
    folder = tmp_path / "site" / "talkative"
    folder.mkdir(parents=True)
    for name in ("__init__", "first", "second", "third", "fourth", "fifth"):
        (folder / f"{name}.py").write_text(f'"""Docstring of {name}, long enough."""\n')
    monkeypatch.syspath_prepend(str(folder.parent))
    assert Prepare(data=DataConfig(packages=("talkative",)), model=ModelConfig(), json=True).run() == 0
    assert json.loads(capsys.readouterr().out)["num_users"] == 6
    assert default_cache() == tmp_path
    assert "talkative" not in sys.modules
    kept = pq.read_table(next(tmp_path.glob("docstrings/*.parquet")))
    assert kept["module"][0].as_py() == "talkative"


def test_prepare_that_is_ended_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(*arguments: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.prepare.build_store", ended)
    monkeypatch.setattr("experiments.prepare._tokenizer", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        Prepare(output=str(tmp_path / "store")).run()
    assert "go on with the same command: what is read and encoded is kept" in capsys.readouterr().err
