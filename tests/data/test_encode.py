import numpy as np
import pytest
from readable_stores import texts_by_user, write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.ingest import build_store
from fedsim.errors import InvalidInput

WORDS = ["<unk>", "<s>", "</s>", "user", "assistant", ":", "hello", "there", "bye", "now"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture
def words() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@pytest.fixture
def hugging_face(words) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def rows(encoded: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    tokens, lengths = encoded
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def test_every_kind_of_tokenizer_encodes_alike(words, hugging_face) -> None:
    texts = ["hello there", "bye"]
    expected = [[1, 6, 7], [1, 8]]
    assert rows(TextEncoder(words).encode(texts)) == expected
    assert rows(TextEncoder(hugging_face).encode(texts)) == expected
    assert rows(TextEncoder(lambda texts: [words.encode(text).ids for text in texts]).encode(texts)) == expected
    assert rows(TextEncoder(words, special_tokens=False).encode(texts)) == [[6, 7], [8]]
    assert rows(TextEncoder(words, end_of_text=True).encode(texts)) == [[1, 6, 7, 2], [1, 8, 2]]
    assert rows(TextEncoder(hugging_face, end_of_text=True).encode(texts, begin=False)) == [[6, 7, 2], [8, 2]]
    assert rows(TextEncoder(hugging_face, end_of_text=True).encode(texts, end=False)) == expected
    assert TextEncoder(words).encode([])[0].size == 0


def test_truncation_and_padding_left_on_are_ignored(words) -> None:
    words.enable_truncation(2)
    words.enable_padding(pad_id=2)
    assert rows(TextEncoder(words).encode(["hello there now", "bye"])) == [[1, 6, 7, 9], [1, 8]]
    assert words.truncation is not None


def test_fingerprints_tell_tokenizers_apart(words, hugging_face) -> None:
    first = TextEncoder(words).fingerprint
    assert TextEncoder(Tokenizer.from_str(words.to_str())).fingerprint == first
    words.add_tokens(["new"])
    assert TextEncoder(words).fingerprint != first
    with_template = TextEncoder(hugging_face).fingerprint
    hugging_face.chat_template = "{{ messages }}"
    assert TextEncoder(hugging_face).fingerprint != with_template
    one, other = (lambda texts: [[1]] * len(texts)), (lambda texts: [[2]] * len(texts))
    assert TextEncoder(one).fingerprint != TextEncoder(other).fingerprint


def test_a_saved_tokenizer_has_the_same_fingerprint(hugging_face, tmp_path) -> None:
    hugging_face(["hello there"], truncation=True, max_length=2, padding="max_length")
    hugging_face.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert TextEncoder(loaded).fingerprint == TextEncoder(hugging_face).fingerprint


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, np.uint8), (257, np.uint16), (65536, np.uint16), (65537, np.uint32)]
)
def test_the_narrowest_type(tokenizer, size, dtype) -> None:
    tokenizer.vocab_size = size
    assert TextEncoder(tokenizer).encode(["abc"])[0].dtype == dtype


def test_ids_outside_the_vocabulary_are_refused(tokenizer) -> None:
    tokenizer.vocab_size = 100
    with pytest.raises(InvalidInput, match="0 to 99"):
        TextEncoder(tokenizer).encode(["z"])


def test_what_is_no_tokenizer_is_refused(words) -> None:
    with pytest.raises(InvalidInput, match="tokenizer"):
        TextEncoder("gpt2")
    with pytest.raises(InvalidInput, match=r"data\.end-of-text"):
        TextEncoder(lambda texts: [[1]] * len(texts), end_of_text=True)


def test_conversations_predict_the_last_reply_alone(hugging_face, tmp_path) -> None:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    records = [
        {"user_id": "a", "chat": [said("user", "hello"), said("assistant", "hello there")]},
        {"user_id": "a", "chat": [said("user", "hello there"), said("assistant", "bye"), said("user", "bye now")]},
        {"user_id": "a", "chat": []},
        {"user_id": "a", "chat": [{"role": "user"}]},
        {"user_id": "a", "chat": "hello"},
    ]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    options = {"validation_fraction": 0, "test_fraction": 0, "messages_column": "chat"}
    config = DataConfig(source="files", path=str(path), **options)
    store = build_store(config, hugging_face, tmp_path / "store")
    taken = store.take([0, 1])
    first, second = np.split(taken.labels, [taken.offsets[1]])
    assert " ".join(WORDS[token] for token in taken.tokens[: len(first)]) == "user : hello assistant : hello there"
    assert [WORDS[token] for token in first[first >= 0]] == ["hello", "there"]
    assert (second >= 0).all()  # the user spoke last, so that there is no reply to predict alone
    bad = {reason: entry["count"] for reason, entry in store.manifest["bad_rows"].items()}
    assert bad == {"missing messages": 1, "messages of the wrong type": 2}
    hugging_face.chat_template = None
    with pytest.raises(InvalidInput, match="chat template"):
        build_store(config, hugging_face, tmp_path / "other")


def test_a_prompt_gets_the_beginning_and_a_text_the_end(hugging_face, tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "ask": "hello", "text": "bye now"}])
    options = {"validation_fraction": 0, "test_fraction": 0, "prompt_column": "ask", "end_of_text": True}
    store = build_store(DataConfig(source="files", path=str(path), **options), hugging_face, tmp_path / "store")
    rows = store.take([0])
    assert rows.tokens.tolist() == [1, 6, 8, 9, 2]
    assert rows.labels.tolist() == [-100, -100, 8, 9, 2]
    assert texts_by_user(store).keys() == {"a"}
