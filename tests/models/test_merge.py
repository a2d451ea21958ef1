"""Adapters merged into their base: a plain model of the same loss."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from full_disk import full_disk
from safetensors.torch import load_file
from stated import ULS, stated
from test_adapters import foreign, loss, shaken
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from experiments.run import main
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.export import ExportMismatch, export, export_merged
from fedsim.models.load import load_model
from fedsim.models.quantised import QUANTISATION_FILE
from fedsim.privacy.earlier import digest_of, mark_of, own_event
from fedsim.privacy.ledger import Ledger

FORMS = [
    {},
    {"use_rslora": True, "rank_pattern": ("c_fc=3",), "lora_init": "orthonormal"},
    {"use_dora": True},
    {"lora_targets": ("wte", "c_attn")},
    {"modules_to_save": ("wte",)},
    {"modules_to_save": ("lm_head",)},
    {"task": "sequence-classification", "num_labels": 5},
]


def accounted(folder: Path, steps: int = 4) -> None:
    """Ledger and statement of a run in a folder."""
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        for round in range(steps):
            ledger.charge(ULS.charge(round), round=round)
        statement = stated(ULS, own_event(ledger.entries), steps=steps)
    (folder / "privacy.json").write_text(json.dumps(statement.to_json()))


@pytest.mark.parametrize("form", FORMS, ids=lambda form: ",".join(form) or "plain")
def test_a_merged_model_is_a_plain_one_of_the_same_loss(load, form: dict, tmp_path: Path) -> None:
    """Even where an embedding that the head shares was adapted or trained by itself."""
    loaded = load(lora_rank=2, export="merged", **form)
    shaken(loaded.model)
    trained, kind = loss(loaded), loaded.config.task
    folder = export(loaded, tmp_path / "model")
    assert not list(folder.glob("adapter*"))
    assert not any("lora" in name for name in load_file(folder / "model.safetensors"))
    assert len(AutoTokenizer.from_pretrained(folder)) == len(loaded.tokenizer)
    auto = AutoModelForCausalLM if kind == "causal-lm" else AutoModelForSequenceClassification
    assert loss(loaded, auto.from_pretrained(folder).eval()) == pytest.approx(trained, rel=1e-5)
    again = load_model(load(lora_rank=2, export="merged", **form).config.reading(str(folder)))
    assert loss(again) == pytest.approx(trained, rel=1e-5)
    assert not again.adapted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_command_merges_a_runs_adapters_or_anybodys(story_llama: str, dtype: str, tmp_path: Path, capsys) -> None:
    theirs = foreign(story_llama, tmp_path / "run" / "model", use_rslora=True)
    accounted(tmp_path / "run")
    for number, path in enumerate((tmp_path / "run", tmp_path / "run" / "model")):
        output = tmp_path / f"merged-{number}"
        assert main(["merge", str(path), "--output", str(output), "--dtype", dtype]) == 0
        assert str(output) in capsys.readouterr().out
        read = AutoModelForCausalLM.from_pretrained(output)
        assert {p.dtype for p in read.parameters()} == {getattr(torch, dtype)}
        assert (output / "ledger.jsonl").read_bytes() == (tmp_path / "run/ledger.jsonl").read_bytes()
        assert mark_of(output) == digest_of(output / "ledger.jsonl")
        assert (output / "privacy.json").is_file()
        loaded = load_model(ModelConfig(path=str(output)))
        assert loss(loaded) == pytest.approx(loss(loaded, theirs), rel={"float32": 1e-5}.get(dtype, 3e-4))
        assert loss(loaded) != pytest.approx(loss(load_model(ModelConfig(path=story_llama))), rel=1e-3)


def test_the_command_finds_out_a_classifiers_classes(load, tmp_path: Path) -> None:
    loaded = load(task="sequence-classification", num_labels=5, lora_rank=2)
    shaken(loaded.model)
    export(loaded, tmp_path / "model")
    assert main(["merge", str(tmp_path / "model"), "--output", str(tmp_path / "merged")]) == 0
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert read.config.num_labels == 5
    assert loss(loaded, read) == pytest.approx(loss(loaded), rel=1e-5)


def test_a_base_in_half_precision_is_merged_in_float32(story_llama: str, tmp_path: Path) -> None:
    loaded = load_model(ModelConfig(path=story_llama, lora_rank=2, base_dtype="bfloat16", export="merged"))
    shaken(loaded.model)
    base = {name: p.detach().float().clone() for name, p in loaded.model.named_parameters() if "o_proj.base" in name}
    layers = ((name, m) for name, m in loaded.model.named_modules() if name.endswith("o_proj"))
    added = {name: layer.get_delta_weight("default").detach() for name, layer in layers}
    merged = load_file(export(loaded, tmp_path / "model") / "model.safetensors")
    for (name, delta), before in zip(added.items(), base.values(), strict=True):
        torch.testing.assert_close(merged[f"{name.removeprefix('base_model.model.')}.weight"], before + delta)


def test_what_adapters_or_their_base_spent_is_not_lost_by_merging(story_llama: str, tmp_path: Path, capsys) -> None:
    base, adapters = shutil.copytree(story_llama, tmp_path / "base"), tmp_path / "adapters"
    foreign(str(base), adapters)
    arguments = ["merge", str(adapters), "--output"]
    accounted(base, steps=3)
    assert main([*arguments, str(tmp_path / "of-base")]) == 0  # nobody charged for the adapters
    assert mark_of(tmp_path / "of-base") == digest_of(base / "ledger.jsonl")
    accounted(adapters)
    assert main([*arguments, str(tmp_path / "of-both")]) == 2
    assert "tells of what their base spent" in capsys.readouterr().err
    (base / "privacy.json").unlink()
    assert main([*arguments, str(tmp_path / "of-both")]) == 2
    assert "put it back" in capsys.readouterr().err
    (base / "ledger.jsonl").unlink()
    assert main([*arguments, str(tmp_path / "of-adapters")]) == 0
    assert mark_of(tmp_path / "of-adapters") == digest_of(adapters / "ledger.jsonl")
    assert not list(tmp_path.glob("of-both*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_merged_model_that_differs_is_not_kept(story_llama: str, tmp_path: Path, monkeypatch, dtype: str) -> None:
    loaded = load_model(ModelConfig(path=story_llama, lora_rank=2, lora_targets=("q_proj",)))
    shaken(loaded.model)  # by less than what rounding to 16 bits is allowed
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.merge", lambda *_, **__: None)
    with pytest.raises(ExportMismatch):
        export_merged(loaded, tmp_path / "model", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_merged_is_refused_in_a_sentence(load, story_llama: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "merged"
    with pytest.raises(InvalidInput, match=r"model\.export is 'merged'"):
        load(export="merged")
    with pytest.raises(InvalidInput, match=r"model\.export is 'merged'"):
        ModelConfig(lora_rank=2, quantise="nf4", export="merged")
    with pytest.raises(InvalidInput, match="nothing to merge"):
        export_merged(load(), output)
    broken = load(lora_rank=2)
    broken.layout.load(broken.model, np.full(broken.layout.size, np.nan, np.float32))
    with pytest.raises((InvalidInput, ExportMismatch)):
        export_merged(broken, output)
    assert main(["merge", story_llama, "--output", str(output)]) == 2
    foreign(story_llama, tmp_path / "theirs")
    assert main(["merge", str(tmp_path / "theirs"), "--output", str(tmp_path)]) == 2
    (tmp_path / "theirs" / QUANTISATION_FILE).write_text(json.dumps({"base": story_llama}))
    assert main(["merge", str(tmp_path / "theirs"), "--output", str(output)]) == 2
    assert "not quantised" in capsys.readouterr().err
    assert not output.exists()


def test_a_disk_that_takes_no_merged_model_is_told_in_a_sentence(story_llama: str, tmp_path: Path, capsys) -> None:
    """At each of its writes; and nothing that looks like a model is left."""
    foreign(story_llama, tmp_path / "theirs")
    accounted(tmp_path / "theirs")
    there = tmp_path / "disk"
    there.mkdir()
    arguments = ["merge", str(tmp_path / "theirs"), "--output", str(there / "merged")]
    failed = 0
    for first in itertools.count():
        with full_disk(there, first) as disk:
            code = main(arguments)
        if not disk.refused:
            break
        said = capsys.readouterr().err
        assert code == 1
        assert "failed: the merged model cannot be written to" in said
        assert "No space left on device" in said
        assert "Traceback" not in said
        assert not list(there.iterdir())
        failed += 1
    assert code == 0
    assert failed > 5
    assert (there / "merged/README.md").is_file()
