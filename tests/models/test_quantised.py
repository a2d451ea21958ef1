"""A frozen base of 4-bit weights: whose contribution is whose, what stays as it was, and what goes out."""

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from model_families import VOCABULARY, saved
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fedsim.clip import Clip
from fedsim.errors import InvalidInput
from fedsim.gradients import ClippedSum, clipped_sum, clipped_units, layer_paths
from fedsim.gradients.units import token_bytes
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.export import export, probe_rows
from fedsim.models.fingerprint import model_fingerprint, weights_fingerprint
from fedsim.models.load import LoadedModel, load_model
from fedsim.models.quantised import QUANTISATION_FILE
from fedsim.rows import TokenRows

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: fedsim[quantised]"
)
LENGTHS = ((9, 3, 1), (14,), (2, 2, 6), (20,))


@pytest.fixture
def quantised(load, story_llama):
    """Freshly loaded, adapters away from zero: of the default model (whose layers are Conv1D) or of a Llama."""

    def make(base: str = "llama", **fields) -> LoadedModel:
        path = {} if base == "default" else {"path": story_llama}
        loaded = load(lora_rank=2, **{"quantise": "nf4", **path, **fields})
        flat = loaded.layout.flatten(loaded.model)
        noise = torch.randn(flat.shape, generator=torch.Generator().manual_seed(0))
        loaded.layout.load(loaded.model, flat + 0.03 * noise)
        return loaded

    return make


def users() -> tuple[TokenRows, np.ndarray]:
    rng = np.random.default_rng(0)
    lists = [rng.integers(1, 300, length).tolist() for user in LENGTHS for length in user]
    return TokenRows.from_lists(lists), np.repeat(np.arange(len(LENGTHS)), [len(user) for user in LENGTHS])


@needs_package
@pytest.mark.parametrize("fields", [{"base": "default"}, {"base": "llama"}, {"base": "llama", "checkpointing": True}])
def test_removing_a_user_removes_what_it_added_and_nothing_else(quantised, fields, caplog) -> None:
    loaded = quantised(**fields)
    rows, ids = users()

    def total(clip: Clip, of: np.ndarray, max_tokens: int = 10**6, method: str = "fast") -> ClippedSum:
        chosen = np.flatnonzero(np.isin(ids, of))
        return clipped_sum(
            loaded.model, rows.take(chosen), ids[chosen], clip, objective=loaded.objective, max_tokens=max_tokens,
            method=method,
        )  # fmt: skip

    everybody = np.arange(len(LENGTHS))
    norms = total(Clip(norm=1e6), everybody).norms
    clip = Clip(norm=float(norms.min()) / 2)
    whole = total(clip, everybody)
    assert layer_paths(loaded.model)
    assert "reference path" not in caplog.text
    rounding = 1e-5 * clip.norm
    for other in (total(clip, everybody, 20), total(clip, everybody, 20, "reference")):
        assert float((other.total - whole.total).norm()) <= rounding
        torch.testing.assert_close(other.norms, whole.norms, rtol=1e-5, atol=0)
    each = [u for _, u, _, _ in clipped_units(loaded.model, rows, ids, clip, objective=loaded.objective)]
    for user in everybody:
        left = total(clip, np.delete(everybody, user))
        moved = whole.total - left.total
        assert float(moved.norm()) <= clip.norm * (1 + 1e-6)
        assert float((moved - each[user]).norm()) <= rounding


@needs_package
def test_the_base_is_quantised_and_stays_as_it_was(quantised) -> None:
    """Through gradients, through evaluation and on into gradients; what is trained is not quantised, nor the head."""
    loaded = quantised()
    frozen = {type(p).__name__ for p in loaded.model.parameters() if not p.requires_grad and p.ndim == 2}
    assert "Params4bit" in frozen
    assert {p.dtype for p in loaded.model.parameters() if p.requires_grad} == {torch.float32}
    assert type(loaded.model.get_output_embeddings()) is torch.nn.Linear
    before = weights_fingerprint(loaded.model)
    stored = [p.data.clone() for p in loaded.model.parameters()]
    rows, ids = users()

    def norms() -> torch.Tensor:
        return clipped_sum(loaded.model, rows, ids, Clip(norm=1.0), objective=loaded.objective).norms

    first, loss = norms(), evaluate(loaded.model, rows, loaded.objective).loss
    assert torch.equal(norms(), first)
    assert evaluate(loaded.model, rows, loaded.objective).loss == loss
    assert all(torch.equal(p, kept) for p, kept in zip(loaded.model.parameters(), stored, strict=True))
    assert weights_fingerprint(loaded.model) == before
    assert all(torch.equal(p, kept) for p, kept in zip(loaded.model.parameters(), stored, strict=True))


@needs_package
def test_gradients_are_those_of_the_weights_that_the_base_stands_for(quantised) -> None:
    """What reaches the adapters is what reaches them over a float base of the same, dequantised weights."""
    from bitsandbytes.functional import dequantize_4bit

    loaded, plain = quantised(), quantised(quantise="none")
    weights = {
        name: dequantize_4bit(p.data, p.quant_state)
        for name, p in loaded.model.named_parameters()
        if hasattr(p, "quant_state")
    }
    for name, parameter in plain.model.named_parameters():
        if name in weights:
            assert not torch.equal(parameter, weights[name])
            parameter.data.copy_(weights[name])
    rows, ids = users()
    found, expected = (
        clipped_sum(one.model, rows, ids, Clip(norm=1.0), objective=one.objective) for one in (loaded, plain)
    )
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
    assert float((found.total - expected.total).norm()) <= 1e-5 * float(expected.total.norm())


@needs_package
def test_another_quantisation_is_another_model_and_the_same_is_the_same(quantised) -> None:
    def prints(**fields) -> tuple[str, str]:
        model = quantised(**fields).model
        weights = weights_fingerprint(model)
        return weights, model_fingerprint(model, weights)

    once, again, plain = prints(), prints(), prints(quantise="none")
    assert once == again
    assert all(a != b for a, b in zip(once, plain, strict=True))
    other = prints(base_dtype="bfloat16")  # products of another precision
    assert other[1] != once[1]


@needs_package
def test_every_process_quantises_alike_however_many_threads_it_has(tmp_path: Path) -> None:
    """Of matrices large enough for sums over their scales to be shared out."""
    shape = LlamaConfig(
        hidden_size=512, intermediate_size=4608, num_hidden_layers=1, num_attention_heads=2, vocab_size=VOCABULARY
    )
    path, threads = saved(LlamaForCausalLM(shape), tmp_path), torch.get_num_threads()
    prints = []
    for number in (1, 3):
        torch.set_num_threads(number)
        prints.append(weights_fingerprint(load_model(ModelConfig(path=path, lora_rank=1, quantise="nf4")).model))
    torch.set_num_threads(threads)
    assert len(set(prints)) == 1


@needs_package
@pytest.mark.parametrize("base", ["default", "llama"])
def test_adapters_go_out_and_say_what_they_stand_on(quantised, base: str, story_llama: str, tmp_path: Path) -> None:
    loaded = quantised(base)
    folder = export(loaded, tmp_path / "model")  # reads it back over the base, quantised again, and compares losses
    said = json.loads((folder / QUANTISATION_FILE).read_text())
    named = str(folder / "base") if base == "default" else story_llama
    assert said["base"] == json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == named
    settings = BitsAndBytesConfig.from_dict(said["quantization_config"])
    read = AutoModelForCausalLM.from_pretrained(said["base"], quantization_config=settings, device_map={"": "cpu"})
    for module in read.modules():
        module.support_avx512bf16_for_cpu = False
    rows = probe_rows(loaded)
    again = evaluate(PeftModel.from_pretrained(read, folder).eval(), rows, loaded.objective).loss
    assert again == pytest.approx(evaluate(loaded.model, rows, loaded.objective).loss, rel=1e-5)
    assert not list(folder.glob("model*.safetensors"))


@needs_package
def test_a_token_takes_as_much_memory_as_over_a_plain_base(quantised) -> None:
    plain, packed = quantised(quantise="none"), quantised()
    assert token_bytes(packed.model, None) == token_bytes(plain.model, None)


def test_without_the_package_it_says_what_to_install(story_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(InvalidInput, match=r"model\.quantise.*bitsandbytes(.|\n)*fedsim\[quantised\]"):
        load_model(ModelConfig(path=story_llama, lora_rank=2, quantise="nf4"))


def test_what_is_imported_for_adapters_asks_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """As bitsandbytes does of another package, when PEFT imports it for adapters over any base."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("please install")
    assert not caplog.records


def test_a_plain_export_says_nothing_of_it(load, tmp_path: Path) -> None:
    assert not (export(load(lora_rank=2), tmp_path / "model") / QUANTISATION_FILE).exists()
