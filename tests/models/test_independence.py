"""What load_model refuses: models of whose rows one is moved by another, by the padding, or by what comes later."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from model_families import CLASSES, DECODERS, ENCODERS, LANGUAGE_MODEL_HEADS, MIXERS, VOCABULARY, saved, tiny
from transformers import BertConfig, BertLMHeadModel

from fedsim.errors import InvalidInput
from fedsim.models import independence
from fedsim.models.config import ModelConfig
from fedsim.models.independence import require_independent_rows
from fedsim.models.load import load_model

LORA = {"lora_rank": 2}
HALF = {"lora_rank": 2, "base_dtype": "bfloat16"}


@pytest.mark.parametrize("fields", [{}, LORA, HALF], ids=["full", "lora", "bfloat16"])
@pytest.mark.parametrize("family", LANGUAGE_MODEL_HEADS)
def test_an_encoder_is_no_language_model(family: str, fields: dict[str, object], tmp_path: Path) -> None:
    path = saved(tiny(family, "causal-lm"), tmp_path)
    with pytest.raises(InvalidInput, match=r"reads in both directions.*sequence-classification") as raised:
        load_model(ModelConfig(path=path, **fields))
    assert raised.value.field == "model.path"


def test_weights_as_they_are_first_drawn_show_it_too(tmp_path: Path) -> None:
    shape = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    path = saved(BertLMHeadModel(shape), tmp_path)
    for fields in ({}, LORA, HALF):
        with pytest.raises(InvalidInput, match="reads in both directions"):
            load_model(ModelConfig(path=path, **fields))


def test_the_same_architecture_is_one_as_a_decoder(tmp_path: Path) -> None:
    for fields in ({}, LORA, HALF):
        assert load_model(ModelConfig(path=saved(tiny("bert", "causal-lm", is_decoder=True), tmp_path), **fields))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "starcoder2", "mixtral", "mamba", "mpt", "gemma3_text"])
def test_half_precision_does_not_pass_for_a_leak(family: str, tmp_path: Path) -> None:
    targets = ("in_proj",) if family == "mamba" else ()
    loaded = load_model(ModelConfig(path=saved(tiny(family, "causal-lm"), tmp_path), lora_targets=targets, **HALF))
    assert {p.dtype for p in loaded.model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("rank", "strength"), [(0, 1.0), (2, 1.0), (0, 0.25)])
@pytest.mark.parametrize("family", MIXERS)
def test_a_classifier_that_lets_the_padding_in_is_refused(
    family: str, rank: int, strength: float, tmp_path: Path
) -> None:
    model = tiny(family, "sequence-classification")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:  # a quarter is how they are first drawn: hardly anything reaches the logits yet
                parameter.mul_(strength)
    path = saved(model, tmp_path)
    config = ModelConfig(path=path, task="sequence-classification", num_labels=CLASSES, lora_rank=rank)
    with pytest.raises(InvalidInput, match="how far the row is padded"):
        load_model(config)


class Company(torch.nn.Module):
    """A causal model of running means, and something done to them."""

    def __init__(self, doing: str) -> None:
        super().__init__()
        self.doing = doing
        self.table = torch.nn.Embedding(VOCABULARY, 8)
        self.head = torch.nn.Linear(8, VOCABULARY)
        self.eval()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.table

    def forward(self, input_ids: torch.Tensor, attention_mask=None, **_: object) -> SimpleNamespace:
        x = self.table(input_ids).cumsum(1) / torch.arange(1, input_ids.shape[1] + 1).view(1, -1, 1)
        if self.doing == "capacity":  # an expert takes as many of the batch's tokens as it has room for
            wanted = (x[..., 0] > x[..., 0].median()).flatten()
            room = (wanted.cumsum(0) <= len(wanted) // 4) & wanted
            x = x + room.view(*x.shape[:2], 1)
        elif self.doing == "batch mean":
            x = x - 0.01 * x.mean(0, keepdim=True)
        elif self.doing == "length":  # positions counted from the end
            x = x * (1 + torch.arange(input_ids.shape[1]).flip(0).view(1, -1, 1) / 100)
        elif self.doing == "later":
            x = x + 0.01 * x.mean(1, keepdim=True)
        elif self.doing == "nan":
            x = x * torch.nan
        elif self.doing == "fails":
            raise RuntimeError("the tensors\ndo not fit")
        logits = self.head(x)
        if attention_mask is not None:
            logits = logits[torch.arange(len(x)), attention_mask.sum(1) - 1]
        return SimpleNamespace(logits=logits, hidden_states=(x,))


CAUSAL = ModelConfig(path="a/model")
CLASSIFIER = ModelConfig(path="a/model", task="sequence-classification")


@pytest.mark.parametrize("config", [CAUSAL, CLASSIFIER], ids=["causal-lm", "classification"])
@pytest.mark.parametrize(
    ("doing", "said"),
    [
        ("capacity", "row beside it"),
        ("batch mean", "row beside it"),
        ("length", "how far the row is padded"),
        ("nan", "not finite"),
        ("fails", "random tokens said: the tensors$"),
    ],
)
def test_rows_that_move_each_other_are_refused(doing: str, said: str, config: ModelConfig) -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match=said):
        require_independent_rows(Company(doing), config, 0, None, None)
    require_independent_rows(Company("nothing"), config, 0, None, None)


class EndTokens(Company):
    """Reads its answer at the end token, of which every row must have as many, as T5 and BART do."""

    def forward(self, input_ids: torch.Tensor, attention_mask=None, **_: object) -> SimpleNamespace:
        ended = input_ids == 1
        if len(set(ended.sum(1).tolist())) > 1:
            raise ValueError("All examples must have the same number of end tokens.")
        x = self.table(input_ids)
        return SimpleNamespace(logits=self.head(x[ended].view(len(x), -1, 8)[:, -1]))


class Backwardless(Company):
    """Has a backward pass in training mode alone, as Reformer does."""

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        output = super().forward(input_ids, **_)
        if output.logits.requires_grad:
            output.logits.register_hook(self.refuse)
        return output

    def refuse(self, gradient: torch.Tensor) -> None:
        raise AssertionError("use model.train()")


class Tableless(Company):
    """Does not say where its table is, as Canine does not."""

    def get_input_embeddings(self) -> torch.nn.Module:
        raise NotImplementedError("no input embeddings here")


@pytest.mark.parametrize(
    ("model", "config", "said"),
    [
        (EndTokens, CLASSIFIER, "same number of end tokens"),
        (Backwardless, CAUSAL, r"use model\.train"),
        (Backwardless, CLASSIFIER, r"use model\.train"),
        (Tableless, CLASSIFIER, "no input embeddings"),
        (Tableless, CAUSAL, "no input embeddings"),
    ],
)
def test_what_would_fail_in_a_round_is_refused_in_a_sentence(model: type, config: ModelConfig, said: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match=f"random tokens said: .*{said}"):
        require_independent_rows(model("nothing"), config, 0, 1, None)


def test_what_comes_later_is_told_from_who_is_beside() -> None:
    torch.manual_seed(0)
    with pytest.raises(InvalidInput, match="both directions"):
        require_independent_rows(Company("later"), CAUSAL, 0, None, None)


@pytest.mark.parametrize("context", [1, 2, 3, 16, None])
@pytest.mark.parametrize("config", [CAUSAL, CLASSIFIER], ids=["causal-lm", "classification"])
def test_no_more_is_read_than_the_model_can(context: int | None, config: ModelConfig) -> None:
    torch.manual_seed(0)
    model, shapes = Company("nothing"), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    require_independent_rows(model, config, 0, 1, context)
    assert len(shapes) == 4
    assert sum(rows * tokens for rows, tokens in shapes) <= 80
    assert all(p.grad is None for p in model.parameters())
    assert max(tokens for _, tokens in shapes) <= max(2, context or 16)


def test_a_leak_below_halved_weights_is_looked_for_in_float32_and_the_weights_are_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(ModelConfig(path=saved(tiny("llama", "causal-lm"), tmp_path), **HALF))
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    seen: list[torch.dtype] = []
    norm = loaded.model.get_base_model().model.norm
    norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    monkeypatch.setattr(independence, "HALF_SAME_SHAPE", -1.0)
    require_independent_rows(loaded.model, loaded.config, 0, None, None)
    assert torch.float32 in seen
    assert torch.bfloat16 in seen
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])


def test_rotations_that_change_with_the_longest_row_limit_the_context(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0], "long_factor": [4.0, 4.0, 4.0, 4.0],
    }  # fmt: skip
    lengths = {"original_max_position_embeddings": 8, "max_position_embeddings": 32}
    model = tiny("phi3", "causal-lm", rope_parameters=rope, **lengths)
    long, short = torch.randint(1, VOCABULARY, (2, 9))
    with torch.no_grad():
        apart = model(short[None, :8]).logits - model(torch.stack([short, long])).logits[:1, :8]
    assert float(apart.abs().max()) > 1e-3  # what would happen beyond
    loaded = load_model(ModelConfig(path=saved(model, tmp_path)))
    assert loaded.context == 8
    plain = dataclasses.replace(loaded, model=tiny("phi3", "causal-lm"))
    assert plain.context == 64


def test_families_that_keep_rows_apart_are_loaded(tmp_path: Path) -> None:
    """Those of the leave-one-out test are loaded there; here the remaining ways."""
    for family in ("llama", "qwen2_moe", "recurrent_gemma", "rwkv"):
        assert family in DECODERS
        assert load_model(ModelConfig(path=saved(tiny(family, "causal-lm"), tmp_path / family), **HALF))
    for family in ("distilbert",):
        assert family in ENCODERS
        path = saved(tiny(family, "sequence-classification"), tmp_path / family)
        assert load_model(ModelConfig(path=path, task="sequence-classification", num_labels=CLASSES, lora_rank=2))
