import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from tiny_models import TINY, public_texts
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MambaConfig,
    MambaForCausalLM,
)

from fedsim.errors import InvalidInput
from fedsim.gradients import CausalLanguageModel, SequenceClassification
from fedsim.models.config import ModelConfig
from fedsim.models.evaluate import evaluate
from fedsim.models.load import load_model
from fedsim.models.tokenizer import train_tokenizer
from fedsim.rows import TokenRows

STORIES = [
    "Once upon a time, there was a little girl named Lily. She loved to play in the park with her friends. One day, "
    "she saw a big red ball. She wanted to play with it, but it was too high up in the tree.",
    'Tom and his mom went to the store. They wanted to buy some apples and a toy. Tom was very happy. He said, "Thank '
    'you, mom!" They went home and played together.',
]


def flat(loaded) -> torch.Tensor:
    return loaded.layout.flatten(loaded.model)


def test_the_default_model_is_what_was_asked_for(load) -> None:
    loaded = load()
    assert isinstance(loaded.objective, CausalLanguageModel)
    assert loaded.context == TINY.context
    assert len(loaded.tokenizer) == loaded.model.config.vocab_size == TINY.vocabulary_size
    assert not loaded.model.training
    assert loaded.layout.size == sum(parameter.numel() for parameter in loaded.model.parameters())
    assert loaded.model.get_output_embeddings().weight is loaded.model.get_input_embeddings().weight


def test_a_classifier_on_the_default_model_keeps_its_backbone(load) -> None:
    causal, classifier = load(), load(task="sequence-classification", num_labels=17)
    assert isinstance(classifier.objective, SequenceClassification)
    backbone = dict(classifier.model.transformer.named_parameters())
    for name, parameter in causal.model.transformer.named_parameters():
        assert torch.equal(parameter, backbone[name])
    assert classifier.model.score.weight.shape == (17, TINY.width)
    assert classifier.model.config.pad_token_id == classifier.pad_token


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_every_process_draws_the_same_weights_and_no_other_random_number_changes(load, task: str) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = load(task=task, lora_rank=2)
    assert torch.equal(torch.rand(3), expected)
    second, other = load(task=task, lora_rank=2), load(task=task, lora_rank=2, seed=5)
    assert torch.equal(flat(first), flat(second))
    assert not torch.equal(flat(first), flat(other))


def test_adapters_start_as_nothing_and_the_base_is_frozen(load) -> None:
    loaded, base = load(lora_rank=2), load()
    assert all("lora_" in name for name in loaded.layout.names)
    assert loaded.layout.size < base.layout.size / 4
    tokens = torch.randint(0, TINY.vocabulary_size, (2, 9))
    torch.testing.assert_close(loaded.model(tokens).logits, base.model(tokens).logits)


def test_adapters_go_where_they_are_told(load) -> None:
    names = load(lora_rank=2, lora_targets=("c_attn",)).layout.names
    assert names
    assert all(".attn.c_attn." in name for name in names)
    with pytest.raises(InvalidInput, match="c_attn") as raised:
        load(lora_rank=2, lora_targets=("q_proj",))
    assert raised.value.field == "model.lora-targets"


def test_what_peft_refuses_is_said_with_what_it_offers(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    shape = MambaConfig(vocab_size=400, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(shape).save_pretrained(tmp_path)
    offered = r"some of the model's linear layers: dt_proj, in_proj, x_proj\. PEFT said: .*incompatible with Mamba"
    assert load_model(ModelConfig(path=str(tmp_path), lora_rank=2)).layout.names
    with pytest.raises(InvalidInput, match=rf"\('out_proj',\).*{offered}"):
        load_model(ModelConfig(path=str(tmp_path), lora_rank=2, lora_targets=("out_proj",)))
    assert load_model(ModelConfig(path=str(tmp_path), lora_rank=2, lora_targets=("in_proj",))).layout.names


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(InvalidInput, match=r"model\.path is 'nobody/nothing'.*couldn't connect"):
        load_model(ModelConfig(path="nobody/nothing"))
    assert waited == []


def test_loading_says_nothing_that_nobody_here_can_act_on(load, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    for task in ("causal-lm", "sequence-classification"):
        load(task=task, lora_rank=2)
    assert [str(warning.message) for warning in recwarn if warning.category is FutureWarning] == []


def test_a_head_on_adapters_is_trained(load) -> None:
    names = load(task="sequence-classification", num_labels=3, lora_rank=2).layout.names
    assert any("score" in name for name in names)


def test_dropout_is_off_even_in_training_mode(tmp_path: Path) -> None:
    tokenizer_of(tmp_path)
    shape = BertConfig(
        vocab_size=400, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, classifier_dropout=0.5,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(shape).save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(path=str(tmp_path), task="sequence-classification"))
    loaded.model.train()
    tokens = torch.randint(1, 400, (2, 9))
    with torch.no_grad():
        assert torch.equal(loaded.model(tokens).logits, loaded.model(tokens).logits)


def tokenizer_of(folder: Path) -> None:
    train_tokenizer(public_texts(), 400).save_pretrained(folder)


def test_a_tokenizer_without_padding_gets_some_that_exists(tmp_path: Path, load) -> None:
    shutil.copytree(load().base, tmp_path / "model")
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"pad_token"', '"ignored_token"'))
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token is None
    loaded = load_model(ModelConfig(path=str(tmp_path / "model"), task="sequence-classification"))
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token
    assert len(loaded.tokenizer) == TINY.vocabulary_size


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "./none", str(tmp_path)):
        with pytest.raises(InvalidInput, match=r"model\.path"):
            load_model(ModelConfig(path=path))
    with pytest.raises(InvalidInput, match=r"model\.path"):
        load_model(ModelConfig())


def test_pickled_weights_are_refused(tmp_path: Path, load) -> None:
    folder = tmp_path / "model"
    shutil.copytree(load().base, folder)
    torch.save(load().model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidInput, match="safetensors"):
        load_model(ModelConfig(path=str(folder)))


def test_weights_that_are_not_there_are_an_error_for_a_language_model_and_said_for_a_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer_of(tmp_path)
    shape = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
    )
    BertModel(shape).save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match="no weights for"):
        load_model(ModelConfig(path=str(tmp_path)))
    with caplog.at_level(logging.INFO, "fedsim.models.load"):
        load_model(ModelConfig(path=str(tmp_path), task="sequence-classification", num_labels=4))
    assert "classifier.weight" in caplog.text


def test_a_real_llama_knows_its_stories(story_llama: str) -> None:
    full, adapted = (load_model(ModelConfig(path=story_llama, lora_rank=rank)) for rank in (0, 4))
    rows = TokenRows.from_lists(full.tokenizer(STORIES)["input_ids"])
    loss = evaluate(full.model, rows, full.objective).loss
    assert 0.8 < loss < 1.6
    assert evaluate(adapted.model, rows, adapted.objective).loss == pytest.approx(loss, rel=1e-5)
    assert full.layout.size == 260_032
    assert full.context == 512
    expected = sum(4 * sum(m.weight.shape) for m in full.model.model.layers.modules() if hasattr(m, "in_features"))
    assert adapted.layout.size == expected


def test_frozen_weights_may_be_bfloat16_and_adapters_stay_float32(story_llama: str) -> None:
    loaded = load_model(ModelConfig(path=story_llama, lora_rank=4, base_dtype="bfloat16"))
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in loaded.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    rows = TokenRows.from_lists(loaded.tokenizer(STORIES)["input_ids"])
    assert 0.8 < evaluate(loaded.model, rows, loaded.objective).loss < 1.6


def test_the_context_is_the_shorter_of_model_and_tokenizer(load) -> None:
    loaded = load()
    assert loaded.context == TINY.context
    loaded.tokenizer.model_max_length = 20
    assert loaded.context == 20
    loaded.tokenizer.model_max_length = int(1e30)
    assert loaded.context == TINY.context
