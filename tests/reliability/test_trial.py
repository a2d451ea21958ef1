"""What would fail after the last round, or in the first, fails before anything is charged."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from full_disk import full_disk
from small_runs import trained
from transformers import BertConfig, BertForMaskedLM

from clients.worker import Worker
from fedsim.config import EngineConfig, RunConfig
from fedsim.errors import Failure, InvalidInput
from fedsim.models import export as exporting
from fedsim.models.config import ModelConfig
from fedsim.resources import open_resources
from server.precautions import patience, trial
from server.precautions.trial import TrialFailed, moved


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "_exported", {})
    monkeypatch.setattr(patience, "PAUSES", ())


@pytest.fixture
def labelled(posts: Path, tmp_path: Path) -> Path:
    """The same texts, in two classes."""
    path = tmp_path / "labelled.jsonl"
    lines = [json.loads(line) for line in posts.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(line | {"label": n % 2}) + "\n" for n, line in enumerate(lines)))
    return path


def nothing_left(folder: Path) -> bool:
    """No charge, nothing of the trial, no seeds: what was not there before is not there now."""
    return not folder.exists()


@pytest.mark.parametrize("lora", [0, 2])
def test_an_export_that_lacks_what_is_trained_is_found_before_anything_is_charged(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: int
) -> None:
    config = small_run(tmp_path / "run")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, lora_rank=lora))
    saved, as_loaded = exporting._save, open_resources(config).loaded

    def forgetful(loaded: Any, folder: Path, *marks: Any) -> None:
        saved(as_loaded, folder, *marks)

    with monkeypatch.context() as patched:
        patched.setattr(exporting, "_save", forgetful)
        with pytest.raises(TrialFailed, match="some weights are not saved"):
            trained(config)
    assert nothing_left(tmp_path / "run")
    assert trained(config)["rounds"] == 10


def test_the_trial_leaves_every_weight_as_it_was(small_run: Callable[..., RunConfig]) -> None:
    config = small_run("")
    for rank in (0, 2):
        model = dataclasses.replace(config.model, lora_rank=rank)
        loaded = open_resources(dataclasses.replace(config, model=model)).loaded
        before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
        with moved(loaded, np.array(loaded.layout.flatten(loaded.model))):
            for name, parameter in loaded.model.named_parameters():
                assert parameter.requires_grad == bool((parameter != before[name]).all())
        assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())


def test_adapters_on_a_classifier_with_weights_of_its_own_drawing_are_kept_or_refused(
    small_run: Callable[..., RunConfig], labelled: Path, tmp_path: Path
) -> None:
    """BERT's language model has no pooler: a classifier draws one, which must be saved too."""
    config = small_run(tmp_path / "run")
    shape = BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=300
    )
    BertForMaskedLM(shape).save_pretrained(tmp_path / "bert")
    open_resources(config).loaded.tokenizer.save_pretrained(tmp_path / "bert")
    config = dataclasses.replace(
        config,
        model=ModelConfig(path=str(tmp_path / "bert"), task="sequence-classification", lora_rank=2),
        data=dataclasses.replace(config.data, path=str(labelled), label_column="label"),
    )
    try:
        assert trained(config)["rounds"] == 10
    except TrialFailed:
        assert nothing_left(tmp_path / "run")
    else:
        assert (tmp_path / "run/model").is_dir()


def test_workers_that_cannot_train_are_found_before_anything_is_charged(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path, engine=EngineConfig(kind="local", workers=2))
    asked: list[int] = []

    def fails(self: Worker, max_tokens: int) -> int:
        asked.append(max_tokens)
        if len(asked) > 2 and len(asked) % 3:  # of the second trial, one worker's
            return 1
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(Worker, "work", fails)
    with pytest.raises(TrialFailed, match=r"training on random rows.*no kernel image\. Nothing is charged"):
        trained(config)
    assert not list(tmp_path.iterdir())
    assert asked == [32, 32]
    assert trained(config)["rounds"] == 10


def test_a_model_whose_gradients_are_not_finite_is_found(small_run: Callable[..., RunConfig]) -> None:
    worker = Worker.of(small_run(""))
    assert worker.work(32) == 32
    worker.layout.load(worker.model, np.full(worker.layout.size, np.nan, np.float32))
    with pytest.raises(Failure, match="no gradient of random tokens is finite"):
        worker.work(32)


@pytest.mark.parametrize("occurs", [False, True])
def test_a_token_without_an_embedding_is_refused_where_it_occurs(
    small_run: Callable[..., RunConfig], posts: Path, tmp_path: Path, occurs: bool
) -> None:
    config = small_run(tmp_path / "run")
    loaded = open_resources(config).loaded
    loaded.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    loaded.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    text = posts.read_text(encoding="utf-8").replace("Post 3 of writer 7", "<image>" if occurs else "Post")
    (tmp_path / "posts.jsonl").write_text(text, encoding="utf-8")
    config = dataclasses.replace(
        config,
        model=ModelConfig(path=str(tmp_path / "model")),
        data=dataclasses.replace(config.data, path=str(tmp_path / "posts.jsonl")),
    )
    if not occurs:
        assert trained(config)["rounds"] == 10
        return
    with pytest.raises(InvalidInput, match=r"model\.path.*301 tokens, its embedding 300; .*'<image>', number 300"):
        trained(config)
    assert nothing_left(tmp_path / "run")


def test_too_little_room_is_said_before_anything_is_charged(
    small_run: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr(trial, "free_bytes", lambda path: 200_000)
        with pytest.raises(TrialFailed, match=r"two checkpoints and the model need 0\.\d MB, and 0\.2 MB are free"):
            trained(config)
    assert nothing_left(tmp_path / "run")
    needed = trial._exported.copy()
    summary = trained(config)
    assert summary["rounds"] == 10
    # What was said to be needed is what was written, but for the small files beside the model.
    files = [path for path in (tmp_path / "run/model").rglob("*") if not (tmp_path / "run" / path.name).exists()]
    written = sum(path.stat().st_size for path in files if path.name != "README.md")
    assert next(iter(needed.values())) == pytest.approx(written, rel=0.1)


def test_a_disk_that_takes_no_model_is_found_before_anything_is_charged(
    small_run: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """Files as large as a model's, and not those that a run writes before."""
    config = small_run(tmp_path / "run")
    with full_disk(tmp_path / "run" / trial.SCRATCH, 3), pytest.raises(TrialFailed, match=r"Make room in .*free"):
        trained(config)
    assert nothing_left(tmp_path / "run")
    assert trained(config)["rounds"] == 10
