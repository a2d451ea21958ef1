"""A run with adapters that is to leave a plain model: the trial merges, and the export at the end merges again."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import trained
from transformers import AutoModelForCausalLM

from experiments.run import main
from fedsim.config import RunConfig
from fedsim.models.export import export
from fedsim.models.lora import adapters_of
from fedsim.resources import open_resources
from server.precautions import trial


@pytest.fixture
def merging(small_run: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunConfig]:
    """merging(output, **model): the small run with adapters that are merged at its end."""
    monkeypatch.setattr(trial, "_exported", {})

    def configured(output: object, **model: object) -> RunConfig:
        config = small_run(output)
        return dataclasses.replace(
            config, model=dataclasses.replace(config.model, lora_rank=2, export="merged", **model)
        )

    return configured


@pytest.mark.parametrize("targets", [(), ("wte", "c_attn")], ids=["linear", "shared-embedding"])
def test_a_run_that_merges_ends_in_a_plain_model_that_writes(
    merging: Callable[..., RunConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str], targets: tuple[str, ...]
) -> None:
    config = merging(tmp_path / "run", lora_targets=targets)
    assert trained(config)["rounds"] == 10
    folder = tmp_path / "run" / "model"
    assert not list(folder.glob("adapter*"))
    assert type(AutoModelForCausalLM.from_pretrained(folder)).__name__ == "GPT2LMHeadModel"
    assert main(["generate", str(tmp_path / "run"), "--prompt", "Post", "--max-new-tokens", "4"]) == 0
    assert "Post" in capsys.readouterr().out
    assert "adapter" not in (tmp_path / "run/model/README.md").read_text()
    again = dataclasses.replace(
        config.model, path=str(tmp_path / "run"), lora_targets=(), lora_rank=0, export="adapters"
    )
    assert trained(dataclasses.replace(config, model=again, output=str(tmp_path / "on")))["rounds"] == 10


@pytest.mark.parametrize("form", [{}, {"lora_targets": ("wte",)}, {"base_dtype": "bfloat16"}], ids=str)
def test_a_merged_export_leaves_the_model_as_it_was(
    merging: Callable[..., RunConfig], tmp_path: Path, form: dict[str, object]
) -> None:
    loaded = open_resources(merging(tmp_path / "run", **form)).loaded
    model, layout = loaded.model, loaded.layout
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_parameters()]
    shared = model.get_output_embeddings()  # type: ignore[operator]
    for number in range(2):  # a disk that was full is written again
        assert export(loaded, tmp_path / f"model-{number}")
    assert loaded.adapted
    assert list(adapters_of(model))
    assert shared is model.get_output_embeddings()  # type: ignore[operator]
    assert [name for name, _ in model.named_parameters()] == names
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name])
    assert layout.size == loaded.layout.size
