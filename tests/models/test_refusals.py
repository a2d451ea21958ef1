"""Checkpoints that cannot be loaded: each is told in one sentence, and no code of theirs is run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.models.families import CLASSIFIERS, DECODERS
from benchmarks.models.tiny import save_tiny
from experiments.prepare import _tokenizer as tokenizer_to_prepare_with
from fedsim.data.hub import _load as load_data_set
from fedsim.errors import InvalidInput
from fedsim.models.config import ModelConfig
from fedsim.models.load import load_model

TRAP = "import pathlib\npathlib.Path({!r}).touch()\n"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(save_tiny(*DECODERS["Llama"], True, tmp_path_factory.mktemp("llama")))


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    shutil.copytree(llama, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, file: str = "config.json", **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal(folder: Path, **fields: Any) -> str:
    with pytest.raises(InvalidInput) as raised:
        load_model(ModelConfig(path=str(folder), **fields))
    assert raised.value.field == "model.path"
    assert "\n" not in str(raised.value)
    assert len(raised.value.hint) < 450
    return raised.value.hint


def test_missing_files_of_weights_are_named(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert load_model(ModelConfig(path=str(folder)))
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2
    (folder / files[1]).unlink()
    assert f"of {len(files)} files of weights 1 are missing: download {files[1]}" in refusal(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "damaged" in refusal(folder)


def pickle(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def halve(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


DAMAGES: dict[str, tuple[Any, str]] = {
    "half a file": (halve, "not downloaded whole"),
    "an empty file": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not downloaded whole"),
    "a pointer to a file": (
        lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"),
        "not downloaded whole",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"no file named model\.safetensors"),
    "pickled weights": (pickle, r"pickled \(pytorch_model\.bin\)"),
    "no configuration": (lambda folder: (folder / "config.json").unlink(), "model_type"),
    "half a configuration": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON"),
    "an unknown kind": (lambda folder: edit(folder, model_type="nonesuch"), "nonesuch"),
    "a kind for pictures": (lambda folder: edit(folder, model_type="vit"), "no causal language model of the kind vit"),
    "another shape": (lambda folder: edit(folder, intermediate_size=32), "none of the shape"),
    "more layers": (lambda folder: edit(folder, num_hidden_layers=3), r"layers\.2\.\S+, .* and 6 more"),
    "an impossible shape": (lambda folder: edit(folder, num_attention_heads=3), "multiple of the number of attention"),
    "a word for a number": (lambda folder: edit(folder, hidden_size="16"), "expected int, got str"),
    "no tokenizer": (remove_tokenizer, "its tokenizer cannot be read"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "its tokenizer cannot be read"),
    "a hub's attention": (
        lambda folder: edit(folder, attn_implementation="someone/kernel"),
        "someone/kernel.*not run",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_told_in_a_sentence(damage: str, folder: Path) -> None:
    make, said = DAMAGES[damage]
    make(folder)
    with pytest.raises(InvalidInput, match=said):
        load_model(ModelConfig(path=str(folder)))
    refusal(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 128},
        {"quant_method": "awq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"load_in_8bit": True},
        {"quant_method": "compressed-tensors", "config_groups": {}},
        {"quant_method": "torchao", "quant_type": "int8"},
        {"quant_method": "hqq"},
        {"quant_method": "nonesuch"},
    ],
    ids=str,
)
def test_quantised_checkpoints_are_refused_whatever_is_installed(settings: dict[str, Any], folder: Path) -> None:
    edit(folder, quantization_config=settings)
    said = refusal(folder)
    assert f"quantised ({settings.get('quant_method', 'bitsandbytes')})" in said
    assert "--model.quantise nf4" in said


def test_a_model_for_another_task_names_that_task(tmp_path: Path) -> None:
    path = save_tiny(*CLASSIFIERS["T5"], False, tmp_path)
    assert "set model.task to sequence-classification" in refusal(Path(path))


def test_a_classifier_draws_its_head_and_no_block(folder: Path) -> None:
    task = {"task": "sequence-classification", "num_labels": 3}
    assert load_model(ModelConfig(path=str(folder), **task))
    edit(folder, num_hidden_layers=3)
    assert "no weights for model.layers.2" in refusal(folder, **task)


@pytest.fixture
def nobody_answers(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What was asked on the terminal; whoever asks is told yes."""
    asked: list[object] = []

    def answer(question: object = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return asked


def test_code_that_comes_with_a_model_is_not_run_and_nobody_is_asked(
    folder: Path, tmp_path: Path, nobody_answers: list[object]
) -> None:
    ran = tmp_path / "ran"
    trap = TRAP.format(str(ran))
    (folder / "theirs.py").write_text(
        f"{trap}from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    plain = json.loads((folder / "config.json").read_text())
    edit(folder, model_type="theirs", auto_map={"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"})
    assert "code that comes with it, which is not run" in refusal(folder)
    (folder / "config.json").write_text(json.dumps(plain))
    edit(folder, "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": ["theirs.T", None]})
    assert "its tokenizer cannot be read: it needs code" in refusal(folder)
    with pytest.raises(InvalidInput, match="it needs code that comes with it"):
        tokenizer_to_prepare_with(ModelConfig(path=str(folder)), lambda *_: None)
    assert nobody_answers == []
    assert not ran.exists()


def test_code_that_comes_with_data_is_not_run(tmp_path: Path, nobody_answers: list[object]) -> None:
    data, ran = tmp_path / "data", tmp_path / "ran"
    data.mkdir()
    (data / "data.py").write_text(TRAP.format(str(ran)))
    with pytest.raises(InvalidInput, match=r"data\.path.*plain files.*not run"):
        load_data_set(str(data), None, "train", None)
    assert nobody_answers == []
    assert not ran.exists()
