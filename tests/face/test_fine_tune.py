"""`fine_tune` on objects: what it returns, what rows may be, and where it may run."""

import asyncio
import json
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest
import torch
from own_models import (
    AddsEarlierRows,
    Configured,
    MeanOverBatch,
    Pooled,
    Recurrent,
    Remembering,
    Scaled,
    ScoresPadding,
    Smoothed,
)

from experiments.run import main
from fedsim import FineTuned, InvalidInput, fine_tune
from fedsim.models.given import keep_model

Rows = list[dict[str, Any]]


def test_a_run_from_a_list_of_dicts(rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = fine_tune(model, rows, tokenizer=tokenizer, **options)
    assert [record["round"] for record in tuned.metrics] == [1, 2, 3]
    assert tuned.before["round"] == 0
    assert tuned.metrics[-1]["loss"] < tuned.before["loss"]
    spent = [record["epsilon"] for record in tuned.metrics]
    assert 0 < spent[0] < spent[1] < spent[2] <= 8
    assert tuned.statement == json.loads((tuned.folder / "privacy.json").read_text())
    assert tuned.epsilon == tuned.statement["epsilon"]["upper"] == pytest.approx(spent[-1], rel=1e-6)
    assert tuned.folder.parent == Path("runs")
    assert tuned.report().name == "report.html"
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    moved = [not torch.equal(before[name].cpu(), tensor.cpu()) for name, tensor in tuned.model.state_dict().items()]
    assert any(moved)
    assert type(tuned.model) is type(model)
    assert tuned.tokenizer("note 3 is moved")["input_ids"] == tokenizer("note 3 is moved")["input_ids"]
    assert "ε ≤ 8" in str(tuned)


FORMS: dict[str, Callable[[Rows], Any]] = {
    "an iterator": iter,
    "a dict of columns": lambda rows: {name: [row[name] for row in rows] for name in rows[0]},
    "a DataFrame": pd.DataFrame,
    "an Arrow table": pa.Table.from_pylist,
    "a Dataset": datasets.Dataset.from_list,
    "some of a Dataset": lambda rows: datasets.Dataset.from_list([*rows, *rows]).select(range(len(rows))),
    "a streamed Dataset": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "a file": lambda rows: _file(rows),
}


def _file(rows: Rows) -> Path:
    path = Path("rows.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_any_kind_are_the_same_rows(
    form: str, rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    options |= {"rounds": 1}
    losses = [
        fine_tune(model, given, tokenizer=tokenizer, **options).metrics[-1]["loss"]
        for given in (rows, FORMS[form](rows))
    ]
    assert losses[0] == losses[1]


def test_a_prepared_store_and_columns_of_other_names(
    rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    named = [{"author": row["user_id"], "body": row["text"], "seen": object()} for row in rows]
    ours = fine_tune(model, named, tokenizer=tokenizer, user_column="author", text_column="body", **options)
    with pytest.raises(InvalidInput, match=r"rows\[0\]\['body'\] is 'object'"):
        fine_tune(
            model, [{"author": 1, "body": object()}], tokenizer=tokenizer, user_column="author", text_column="body"
        )
    store = next(path for path in (Path("..") / "cache" / "stores").iterdir() if path.is_dir())
    again = fine_tune(model, store, tokenizer=tokenizer, **options)
    assert again.metrics[-1]["loss"] == ours.metrics[-1]["loss"]


def test_rows_are_kept_for_their_owner_alone(rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    fine_tune(model, rows, tokenizer=tokenizer, **options)
    kept = list((Path("..") / "cache" / "given").iterdir())
    assert kept
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept)


@pytest.mark.parametrize("where", ["a thread", "a running event loop"])
def test_it_runs_anywhere(where: str, rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    found: list[FineTuned] = []

    def run() -> None:
        found.append(fine_tune(model, rows, tokenizer=tokenizer, **options))

    async def looping() -> None:
        run()

    run()
    if where == "a thread":
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    else:
        asyncio.run(looping())
    assert found[0].metrics[-1]["loss"] == found[1].metrics[-1]["loss"]
    assert found[0].folder != found[1].folder


def test_the_command_is_the_same_run(rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    tuned = fine_tune(model, rows, tokenizer=tokenizer, output="ours", **options)
    written = json.loads((tuned.folder / "config.json").read_text())["config"]
    flags = [word for name, value in written.items() for word in _flag(name, value)]
    assert main(["train", *flags, "--output", "theirs"]) == 0
    assert FineTuned(Path("theirs")).metrics[-1]["loss"] == tuned.metrics[-1]["loss"]


def _flag(name: str, value: Any) -> list[str]:
    if name in ("output", "resume", "data.missing-ids", "data.packages"):
        return []
    if isinstance(value, bool):
        return (
            [f"--{name}"]
            if value
            else [f"--{name.rpartition('.')[0]}{'.' if '.' in name else ''}no-{name.rpartition('.')[2]}"]
        )
    if isinstance(value, str) and value.startswith("["):
        return [f"--{name}", *json.loads(value)] if json.loads(value) else []
    return [f"--{name}", str(value)]


@pytest.mark.parametrize("objective", [None, Smoothed()])
def test_a_module_and_an_objective_of_ones_own(
    objective: Any, rows: Rows, tokenizer: Any, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    own = Recurrent(len(tokenizer))
    tuned = fine_tune(own, rows, tokenizer=tokenizer, objective=objective, learning_rate=0.05, **options)
    assert tuned.metrics[-1]["loss"] < tuned.before["loss"]
    assert isinstance(tuned.model, Recurrent)
    assert not torch.equal(tuned.model.head.weight.cpu(), own.head.weight)
    assert (tuned.folder / "model" / "model.safetensors").is_file()
    assert "Recurrent" in (tuned.folder / "model" / "README.md").read_text()


def test_a_classifier_of_ones_own(rows: Rows, tokenizer: Any, options: dict[str, Any]) -> None:
    labelled = [row | {"label": "early" if "1 pm" in row["text"] else "late"} for row in rows]
    own = Pooled(len(tokenizer), 2)
    options |= {"task": "sequence-classification", "label_column": "label", "learning_rate": 0.05}
    tuned = fine_tune(own, labelled, tokenizer=tokenizer, **options)
    assert tuned.metrics[-1]["loss"] < tuned.before["loss"]
    assert json.loads((tuned.folder / "model" / "config.json").read_text())["id2label"] == {"0": "early", "1": "late"}


def test_what_is_frozen_stays(rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
    model.transformer.wte.requires_grad_(False)
    before = model.transformer.wte.weight.clone()
    tuned = fine_tune(model, rows, tokenizer=tokenizer, **options)
    assert torch.equal(tuned.model.transformer.wte.weight.cpu(), before)
    assert not torch.equal(tuned.model.transformer.wpe.weight.cpu(), model.transformer.wpe.weight)


def test_what_is_frozen_stays_though_what_is_trained_is_a_part_of_its_name(
    rows: Rows, tokenizer: Any, options: dict[str, Any]
) -> None:
    own = Scaled(len(tokenizer))
    own.inner.requires_grad_(False)
    tuned = fine_tune(own, rows, tokenizer=tokenizer, **options)
    assert torch.equal(tuned.model.inner.head.weight.cpu(), own.inner.head.weight)
    assert not torch.equal(tuned.model.head.weight.cpu(), own.head.weight)


@pytest.mark.parametrize("objective", [MeanOverBatch(), ScoresPadding(), AddsEarlierRows()])
def test_objectives_that_look_at_a_rows_company_are_refused(objective: Any, rows: Rows, tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match="depends on that row alone"):
        fine_tune(Recurrent(len(tokenizer)), rows, tokenizer=tokenizer, objective=objective)
    assert not Path("runs").exists()


def test_a_module_that_keeps_what_it_reads_is_refused(rows: Rows, tokenizer: Any) -> None:
    with pytest.raises(InvalidInput, match="changes the buffer seen"):
        fine_tune(Remembering(len(tokenizer)), rows, tokenizer=tokenizer)
    assert not Path("runs").exists()


@pytest.mark.parametrize("given", ["the result", "its folder", "its model", "its model, loaded by transformers"])
def test_what_a_result_spent_counts_when_training_goes_on(
    given: str, rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    first = fine_tune(model, rows, tokenizer=tokenizer, **options)
    onward: dict[str, tuple[Any, Any]] = {
        "the result": (first, None),
        "its folder": (first.folder, None),
        "its model": (first.model, first.tokenizer),
        "its model, loaded by transformers": (
            type(model).from_pretrained((first.folder / "model").resolve()),
            tokenizer,
        ),
    }
    begun, its_tokenizer = onward[given]
    with pytest.raises(InvalidInput, match=r"epsilon is 8\.0; it must be above 8"):
        fine_tune(begun, rows, tokenizer=its_tokenizer, **options)
    second = fine_tune(begun, rows, tokenizer=its_tokenizer, **options | {"epsilon": 11})
    assert second.statement["earlier"]["runs"]
    assert 8 < second.epsilon <= 11


def test_a_results_own_module_brings_its_ledger(rows: Rows, tokenizer: Any, options: dict[str, Any]) -> None:
    first = fine_tune(Recurrent(len(tokenizer)), rows, tokenizer=tokenizer, **options)
    second = fine_tune(first.model, rows, tokenizer=tokenizer, **options | {"epsilon": 11})
    assert second.statement["earlier"]["runs"]


def test_a_result_without_its_ledger_is_refused(
    rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    first = fine_tune(model, rows, tokenizer=tokenizer, **options)
    there = first.model
    for place in (first.folder, first.folder / "model"):
        (place / "ledger.jsonl").unlink()
    with pytest.raises(InvalidInput, match=r"ledger\.jsonl"):
        fine_tune(there, rows, tokenizer=tokenizer, **options | {"epsilon": 11})


def test_adapters_of_a_result_without_its_ledger_are_refused(
    rows: Rows, model: Any, tokenizer: Any, options: dict[str, Any]
) -> None:
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    first = fine_tune("base", rows, lora_rank=2, **options)
    there = first.model
    for place in (first.folder, first.folder / "model"):
        (place / "ledger.jsonl").unlink(missing_ok=True)
    with pytest.raises(InvalidInput, match=r"ledger\.jsonl"):
        fine_tune(there, rows, tokenizer=tokenizer, **options | {"epsilon": 11})


@pytest.mark.parametrize("config", [{"width": 16}, types.SimpleNamespace(width=16)])
def test_a_module_may_have_a_configuration_of_its_own(
    config: Any, rows: Rows, tokenizer: Any, options: dict[str, Any]
) -> None:
    first = fine_tune(Configured(len(tokenizer), config), rows, tokenizer=tokenizer, **options)
    second = fine_tune(first.model, rows, tokenizer=tokenizer, **options | {"epsilon": 11})
    assert second.statement["earlier"]["runs"]


def test_what_is_kept_of_a_model_is_told_apart_by_what_it_spent(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    ledger.write_text("{}\n")
    keep_model(model, tokenizer, None, tmp_path)  # the first time transformers notes its class in its configuration
    without = keep_model(model, tokenizer, None, tmp_path)
    assert (keep_model(model, tokenizer, None, tmp_path, (ledger,)) / ledger.name).is_file()
    assert not (without / ledger.name).exists()


def test_a_table_with_two_columns_of_one_name_is_refused(model: Any, tokenizer: Any) -> None:
    twice = pd.DataFrame([["ann", "one", "two"]], columns=["user_id", "text", "text"])
    with pytest.raises(InvalidInput, match="Duplicate column names"):
        fine_tune(model, twice, tokenizer=tokenizer)
