"""Rows, and a model that is drawn in memory: nothing is read but what a test gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

WORDS = ["budget", "meeting", "moved", "note", "about", "is", "the", "to", "pm", "[END]", *map(str, range(20))]


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a working directory of the test's own; returns the latter."""
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Ten notes of each of 40 users."""
    return [
        {"user_id": f"user {i % 40}", "text": f"note {i % 13} about the budget meeting {i % 7} is moved to {i % 5} pm"}
        for i in range(400)
    ]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    library = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[END]"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=library, eos_token="[END]", pad_token="[END]")


@pytest.fixture
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(WORDS), n_positions=64, n_embd=16, n_layer=1, n_head=2))


@pytest.fixture
def options() -> dict[str, Any]:
    """A run of three rounds that repeats itself."""
    return {
        "epsilon": 8,
        "delta": 1e-2,
        "rounds": 3,
        "gradients_per_round": 32,
        "sampling_seed": 1,
        "noise_seed": 2,
        "evaluation_every": 2,
    }
