"""Adapters that are there already, ours or PEFT's, are put on their base and trained on."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import AutoPeftModelForCausalLM, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import VeloraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import clipped_sum
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import export, probe_rows
from fedsim.models.fingerprint import weights_fingerprint
from fedsim.models.load import load_model


def shaken(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Trained weights as after training: none at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def loss(loaded, model=None) -> float:
    return evaluate(model or loaded.model, probe_rows(loaded), loaded.objective).loss


def open_again(folder: Path, **fields):
    return load_model(ModelConfig(path=str(folder), **fields))


def foreign(base: str, folder: Path, **settings) -> torch.nn.Module:
    """Adapters that PEFT made and saved, without us."""
    usual = {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = shaken(get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(usual | settings))))
    model.save_pretrained(str(folder))
    return model.eval()


def edit(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


FORMS = [{"lora_rank": 2}, {"task": "sequence-classification", "num_labels": 5, "lora_rank": 2}]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_run", [False, True])
def test_an_export_of_adapters_is_trained_on(load, form: dict, of_run: bool, tmp_path: Path) -> None:
    """With its base beside it, wherever the folder is moved; as a run's folder too."""
    first = load(**form)
    shaken(first.model)
    export(first, tmp_path / "run" / "model")
    for name in ("ledger.jsonl", "config.json"):
        (tmp_path / "run" / name).write_text("{}")
    moved = shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    asked = {name: value for name, value in form.items() if name != "lora_rank"}
    second = open_again(moved if of_run else Path(moved) / "model", **asked)
    assert second.layout == first.layout
    assert torch.equal(second.layout.flatten(second.model), first.layout.flatten(first.model))
    assert weights_fingerprint(second.model) == weights_fingerprint(first.model)
    assert loss(second) == loss(first)
    shaken(second.model, seed=1)
    export(second, tmp_path / "again")
    shutil.rmtree(moved)
    again = open_again(tmp_path / "again", **form)
    assert loss(again) == pytest.approx(loss(second), rel=1e-6)
    assert loss(again) != pytest.approx(loss(first), rel=1e-3)


SETTINGS = [
    {},
    {"task_type": None, "target_modules": r".*\.(q|v)_proj", "use_rslora": True},
    {"rank_pattern": {"down_proj": 5}, "alpha_pattern": {"q_proj": 2}, "modules_to_save": ["lm_head"]},
    {
        "lora_dropout": 0.5,
        "init_lora_weights": "gaussian",
        "bias": "all",
        "exclude_modules": ["0.mlp.down_proj"],
    },
    {"use_dora": True},
    {"target_modules": ["embed_tokens", "q_proj"], "layers_to_transform": [1]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda one: ",".join(one) or "plain")
def test_adapters_of_anybody_compute_and_go_out_as_peft_does(story_llama: str, settings: dict, tmp_path: Path) -> None:
    trained = foreign(story_llama, tmp_path / "theirs", **settings)
    loaded = open_again(tmp_path / "theirs")
    rows = probe_rows(loaded)
    tokens = torch.randint(3, 500, (4, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = trained(tokens).logits
        torch.testing.assert_close(loaded.model(tokens).logits, expected)
        loaded.model.train()
        torch.testing.assert_close(loaded.model(tokens).logits, expected)
        loaded.model.eval()
    ours = {name for name, p in loaded.model.named_parameters() if p.requires_grad}
    assert ours == {name for name, p in trained.named_parameters() if p.requires_grad}
    few, ids, clip = rows.take(np.arange(6)), np.arange(6) // 2, Clip(norm=1.0)
    fast, plain = (
        clipped_sum(loaded.model, few, ids, clip, objective=loaded.objective, method=method).total
        for method in ("fast", "reference")
    )
    torch.testing.assert_close(fast, plain, rtol=1e-3, atol=1e-4)
    assert float(plain.norm()) > 0.1
    shaken(loaded.model, seed=1)
    folder = export(loaded, tmp_path / "ours")
    if settings.get("task_type", 1):
        read = AutoPeftModelForCausalLM.from_pretrained(folder)
        assert loss(loaded, read) == pytest.approx(loss(loaded), rel=1e-5)
    assert loss(open_again(folder)) == pytest.approx(loss(loaded), rel=1e-6)


def test_adapters_saved_in_half_precision_are_trained_in_float32(story_llama: str, tmp_path: Path) -> None:
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(story_llama, dtype=torch.bfloat16),
        LoraConfig(r=2, target_modules=["q_proj"]),
        autocast_adapter_dtype=False,
    )
    shaken(model).save_pretrained(str(tmp_path))
    loaded = open_again(tmp_path, base_dtype="bfloat16")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in loaded.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}


def test_adapters_that_added_tokens_bring_them(story_llama: str, tmp_path: Path) -> None:
    base, tokenizer = AutoModelForCausalLM.from_pretrained(story_llama), AutoTokenizer.from_pretrained(story_llama)
    tokenizer.add_tokens(["<user>", "<model>"])
    base.resize_token_embeddings(len(tokenizer))
    model = shaken(get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")))
    model.save_pretrained(str(tmp_path / "theirs"))
    tokenizer.save_pretrained(str(tmp_path / "theirs"))
    loaded = open_again(tmp_path / "theirs")
    assert len(loaded.tokenizer) == len(tokenizer) == loaded.model.config.vocab_size
    assert loss(loaded) == pytest.approx(loss(loaded, model.eval()), rel=1e-6)
    assert all("lora_" in name for name in loaded.layout.names)
    again = open_again(export(shaken_loaded(loaded), tmp_path / "ours"))
    assert loss(again) == pytest.approx(loss(loaded), rel=1e-6)


def shaken_loaded(loaded):
    shaken(loaded.model, seed=1)
    return loaded


def test_a_base_named_from_where_the_adapters_lie_is_found(story_llama: str, tmp_path: Path) -> None:
    foreign(story_llama, tmp_path / "theirs")
    shutil.copytree(story_llama, tmp_path / "llama")
    edit(tmp_path / "theirs", base_model_name_or_path="../llama")
    assert open_again(tmp_path / "theirs").base == str(tmp_path / "llama")


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"base_model_name_or_path": "/no/such/base"}, "model.path", "belong to /no/such/base, and there is no such"),
        ({"base_model_name_or_path": None}, "model.path", "Set base_model_name_or_path"),
        ({"base_model_name_or_path": "nobody/nothing"}, "model.path", "the base of these adapters, nobody/nothing: "),
        ({"base_model_name_or_path": "."}, "model.path", "no plain model"),
        ({"peft_type": "ADALORA"}, "model.path", "ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "model.path", "rewriting the base"),
        ({"velora_config": dataclasses.asdict(VeloraConfig())}, "model.path", "velora_config"),
        ({"of_the_future": 3}, "model.path", "of_the_future"),
        ({"target_modules": ["c_attn"]}, "model.path", "adapters that fit"),
        ({"target_modules": ["q_proj"]}, "model.path", "have weights for layers that it lacks"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "model.path", "have no weights for layers of it"),
        ({"modules_to_save": ["lm_head"]}, "model.path", "no weights for .*lm_head"),
        ({"r": 4}, "model.path", "size mismatch"),
        ({"task_type": "SEQ_CLS"}, "model.task", "sequence-classification"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_adapters_that_cannot_be_trained_on_are_refused_in_a_sentence(
    story_llama: str, tmp_path: Path, monkeypatch, values: dict, field: str, words: str
) -> None:
    foreign(story_llama, tmp_path / "theirs")
    edit(tmp_path / "theirs", **values)
    monkeypatch.chdir(tmp_path / "theirs")
    with pytest.raises(InvalidInput, match=words) as raised:
        open_again(tmp_path / "theirs")
    assert raised.value.field == field


@pytest.mark.parametrize(
    "settings",
    [
        IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ],
    ids=lambda one: one.peft_type.value,
)
def test_adapters_of_another_kind_are_refused(story_llama: str, settings, tmp_path: Path) -> None:
    get_peft_model(AutoModelForCausalLM.from_pretrained(story_llama), settings).save_pretrained(str(tmp_path))
    with pytest.raises(InvalidInput, match=rf"LORA.*says {settings.peft_type.value}"):
        open_again(tmp_path)


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"lora_rank": 8}, "model.lora-rank", "3, as the adapters"),
        ({"lora_alpha": 3.0}, "model.lora-alpha", "left out"),
        ({"lora_rank": 3, "lora_targets": ("q_proj",)}, "model.lora-targets", "left out"),
        ({"task": "sequence-classification"}, "model.task", "causal-lm"),
    ],
)
def test_what_adapters_have_decided_cannot_be_asked_otherwise(
    story_llama: str, tmp_path: Path, fields: dict, field: str, allowed: str
) -> None:
    foreign(story_llama, tmp_path)
    with pytest.raises(InvalidInput) as raised:
        open_again(tmp_path, **fields)
    assert raised.value.field == field
    assert allowed in str(raised.value)
    assert open_again(tmp_path, lora_rank=3).layout == open_again(tmp_path).layout


def test_a_rounded_base_needs_adapters_wherever_they_come_from(story_llama: str, tmp_path: Path) -> None:
    foreign(story_llama, tmp_path, modules_to_save=["lm_head"])
    for path in (story_llama, str(tmp_path)):
        with pytest.raises(InvalidInput) as raised:
            load_model(ModelConfig(path=path, base_dtype="bfloat16"))
        assert raised.value.field == "model.base-dtype"


def test_pickled_adapters_are_refused(story_llama: str, tmp_path: Path) -> None:
    model = foreign(story_llama, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "adapter_model.bin")
    with pytest.raises(InvalidInput, match="safetensors"):
        open_again(tmp_path)


def test_the_folder_of_an_unfinished_run_says_how_to_finish_it(tmp_path: Path) -> None:
    for name in ("ledger.jsonl", "config.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InvalidInput, match="train --resume"):
        open_again(tmp_path)


def test_adapters_from_the_hub_are_read_from_its_cache(story_llama: str, tmp_path: Path, monkeypatch) -> None:
    """Named as on the hub, as its client keeps them; nothing is asked of the network."""
    snapshot = tmp_path / "models--someone--adapters" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    foreign(story_llama, snapshot)
    refs = tmp_path / "models--someone--adapters" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model(ModelConfig(path="someone/adapters"))
    assert isinstance(loaded.model, PeftModel)
    assert loaded.base == story_llama
