from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from tiny_models import public_texts
from transformers import AutoTokenizer

from fedsim.models.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(public_texts(), 500)


@given(st.text(max_size=60))
def test_every_text_decodes_to_itself(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert all(0 <= token < len(TOKENIZER) for token in ids)


def test_the_vocabulary_keeps_its_size_and_text_becomes_shorter() -> None:
    assert len(TOKENIZER) == 500
    text = "Return the object as a string."
    assert len(TOKENIZER(text)["input_ids"]) < len(text) / 1.5


def test_bytes_alone_are_enough() -> None:
    tokenizer = train_tokenizer(["abc"], 257)
    assert len(tokenizer) == 257
    assert tokenizer.decode(tokenizer("zażółć")["input_ids"]) == "zażółć"


def test_learning_is_reproducible_and_survives_saving(tmp_path: Path) -> None:
    again = train_tokenizer(public_texts(), 500)
    assert again.get_vocab() == TOKENIZER.get_vocab()
    TOKENIZER.save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return x  # é"
    assert read(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert read.pad_token_id == read.eos_token_id == read.bos_token_id == 0
