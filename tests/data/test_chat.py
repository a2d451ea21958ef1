"""Conversations: what the assistant said is scored, and what a chat template refuses is a bad row."""

import json

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from readable_stores import write_jsonl
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.ingest import build_store
from fedsim.errors import InvalidInput
from fedsim.models.tokenizer import train_tokenizer

HEADERS = "{{ '<|start|>' + m.role + '\\n' }}"
TURNS = "{% for m in messages %}" + HEADERS + "{{ m.content + '<|end|>\\n' }}{% endfor %}"
MARKED = (
    "{% for m in messages %}" + HEADERS + "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|end|>' }}{% endif %}"
    "{{ '\\n' }}{% endfor %}"
)
PROMPTED = TURNS + "{% if add_generation_prompt %}{{ '<|start|>assistant\\n' }}{% endif %}"
ENDLESS = "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}{% endfor %}" + TURNS
)
FORGETFUL = (
    "{% for m in messages %}" + HEADERS + "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    "{{ '<|end|>\\n' }}{% endfor %}"
)


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["of nobody"], 257)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def scored(tokenizer, messages, replies: str) -> str:
    """The text that counts in the loss."""
    encoder = TextEncoder(tokenizer, replies=replies)
    tokens, lengths, marks = encoder.encode_conversations([encoder.render(messages)])
    assert lengths.tolist() == [len(tokens)] == [len(marks)]
    assert tokens.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    return tokenizer.decode(tokens[marks == 1])


CONTENTS = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda text: "<|" not in text)
CONVERSATIONS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS | st.sampled_from(["0", "1", " x ", "\n"])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("template", "end"),
    [(TURNS, "<|end|>"), (MARKED, "<|end|>"), (PROMPTED, "<|end|>"), (ENDLESS, "")],
    ids=["turns", "marked", "prompted", "endless"],
)
@settings(max_examples=50)
@given(CONVERSATIONS)
@example([("assistant", "    indented\n\n        code  "), ("user", "  "), ("assistant", "")])
def test_exactly_what_the_assistant_said_is_scored(template, end, talk) -> None:
    """The contents and the tokens that end the turns: no header, no line break behind, nothing of anybody else."""
    tokenizer = tokenizer_with(template)
    # As GPT-2's: blanks are taken out of the characters that a token says it stands for.
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    messages = [message(*turn) for turn in talk]
    said = [content + end for role, content in talk if role == "assistant"]
    everything = tokenizer.apply_chat_template(messages, tokenize=False)
    last = said[-1] if talk[-1][0] == "assistant" else everything
    assert scored(tokenizer, messages, "last") == last
    assume(said)
    assert scored(tokenizer, messages, "all") == "".join(said)


@settings(max_examples=30)
@given(CONVERSATIONS)
def test_marks_of_a_template_are_read_as_transformers_reads_them(talk) -> None:
    tokenizer = tokenizer_with(MARKED)
    assume(any(role == "assistant" for role, _ in talk))
    messages = [message(*turn) for turn in talk]
    encoder = TextEncoder(tokenizer, replies="all")
    marks = encoder.encode_conversations([encoder.render(messages)])[2]
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert marks.tolist() == theirs["assistant_masks"]


def test_a_tokenizer_that_begins_texts_with_a_blank_reads_the_whole_conversation() -> None:
    """Replies encoded by themselves would each begin with one more."""
    words = ["<unk>", "▁", *(f"▁{word}" for word in ("user:", "bot:", "hello", "there"))]
    library = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    library.decoder = decoders.Metaspace()
    template = (
        "{% for m in messages %}{{ ' ' if not loop.first }}{{ 'user: ' if m.role == 'user' else 'bot: ' }}"
        "{{ m.content }}{% endfor %}"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=library, unk_token="<unk>", chat_template=template)
    messages = [message("user", "hello"), message("assistant", "hello there"), message("user", "there")]
    encoder = TextEncoder(tokenizer, replies="all")
    tokens, _, marks = encoder.encode_conversations([encoder.render(messages)])
    assert [words[token] for token in tokens] == ["▁user:", "▁hello", "▁bot:", "▁hello", "▁there", "▁user:", "▁there"]
    assert marks.tolist() == [0, 0, 0, 1, 1, 0, 0]


class Letters:
    """A tokenizer that does not say which characters a token stands for."""

    vocab_size, eos_token_id = 256, 0

    def __init__(self, template: str):
        self._templates = tokenizer_with(template)
        self.chat_template = template
        self.apply_chat_template = self._templates.apply_chat_template

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode("latin-1", "replace")) for text in texts]


@pytest.mark.parametrize("end_of_text", [False, True])
def test_other_tokenizers_read_piece_by_piece(end_of_text) -> None:
    encoder = TextEncoder(Letters(PROMPTED), replies="all", end_of_text=end_of_text)
    talks = [
        [message("user", "a"), message("assistant", "bc"), message("user", "d"), message("assistant", "e")],
        [message("assistant", "fg"), message("user", "h")],
    ]
    tokens, lengths, marks = encoder.encode_conversations(list(map(encoder.render, talks)))
    rows = np.split(np.where(marks, tokens, ord("_")), np.cumsum(lengths)[:-1])
    said = [bytes(row.tolist()).decode("latin-1").replace("_", "") for row in rows]
    end = "\0" if end_of_text else ""
    assert said == ["bc<|end|>\ne<|end|>\n" + end, "fg<|end|>\n"]


def build(tmp_path, tokenizer, talks, **options):
    records = [{"user_id": f"u{n:03}", "chat": talk} for n, talk in enumerate(talks)]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    options = {"messages_column": "chat", "validation_fraction": 0, "test_fraction": 0} | options
    config = DataConfig(source="files", path=str(path), **options)
    return build_store(config, tokenizer, tmp_path / "-".join(["store", *map(str, options.values())]))


TALK = [message("user", "one"), message("assistant", "two"), message("user", "three"), message("assistant", "four")]


@pytest.mark.parametrize(("replies", "expected"), [("last", "four<|end|>"), ("all", "two<|end|>four<|end|>")])
@pytest.mark.parametrize("sequence_length", [256, 10])
def test_a_store_scores_the_replies_in_every_row(tmp_path, replies, expected, sequence_length) -> None:
    tokenizer = tokenizer_with(PROMPTED)
    store = build(tmp_path, tokenizer, [TALK, TALK[:2]], replies=replies, sequence_length=sequence_length)
    user = store.user_ids().index("u000")
    taken = store.take(np.arange(*store.rows_of(user)))
    assert tokenizer.decode(taken.labels[taken.labels >= 0]) == expected
    assert ((taken.labels == taken.tokens) | (taken.labels == -100)).all()
    lengths = taken.lengths
    assert (lengths <= sequence_length).all()
    scored_rows = np.split(taken.labels, taken.offsets[1:-1])
    assert all((row[1:] >= 0).any() for row in scored_rows)  # a row with nothing to predict is left out
    if sequence_length == 10:
        assert len(taken) < -(-len(tokenizer.apply_chat_template(TALK, return_dict=False)) // 10)


def test_conversations_that_read_alike_but_are_scored_otherwise_are_not_the_same(tmp_path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    talks = [
        [message("user", "aaaa"), message("assistant", "bbbb")],
        [message("user", "aa"), message("assistant", "aabbbb")],
        [message("user", "aaaa"), message("assistant", "bbbb")],
    ]
    records = [{"user_id": "u", "chat": talk} for talk in talks]
    path = write_jsonl(tmp_path / "d.jsonl", records)
    options = {"messages_column": "chat", "replies": "all", "validation_fraction": 0, "test_fraction": 0}
    config = DataConfig(source="files", path=str(path), **options)
    assert build_store(config, tokenizer_with(template), tmp_path / "store").num_rows == 2


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path) -> None:
    twice = [message("user", "one"), message("user", "two")]
    store = build(tmp_path, tokenizer_with(ALTERNATING), [TALK, twice, TALK, twice])
    assert store.num_users == 2
    reason = "conversation that the chat template refuses (Roles must alternate user/assistant)"
    assert store.manifest["bad_rows"] == {reason: {"count": 2, "first": ["d.jsonl:2", "d.jsonl:4"]}}
    with pytest.raises(InvalidInput, match=r"d\.jsonl:2.*Roles must alternate"):
        build(tmp_path, tokenizer_with(ALTERNATING), [TALK, twice], bad_rows="refuse")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('No such talk') }}", "No such talk"),
        ("{% for m in messages %}{{ m.name.first }}{% endfor %}", "has no attribute 'name'"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "can only concatenate str"),
        ("{% for m in messages %}{{ m.content }}", "Unexpected end of template"),
    ],
)
def test_a_template_that_refuses_all_is_named_with_its_own_words(tmp_path, template, words) -> None:
    with pytest.raises(InvalidInput) as error:
        build(tmp_path, tokenizer_with(template), [TALK, TALK[:2]])
    assert "data.messages-column is 'chat'" in str(error.value)
    assert "2 of 2 records: 2 × conversation that the chat template refuses" in str(error.value)
    assert words in str(error.value)


def test_what_people_said_is_in_no_reason(tmp_path) -> None:
    template = "{{ raise_exception('Bad: ' + messages[0].content) if 'secret' in messages[0].content }}" + TURNS
    talks = [[message("user", f"my secret is\n{n}"), message("assistant", "ok")] for n in range(3)]
    store = build(tmp_path, tokenizer_with(template), [TALK, *talks])
    assert store.manifest["bad_rows"]["conversation that the chat template refuses"]["count"] == 3
    assert "secret" not in json.dumps(store.manifest["bad_rows"])


def test_what_cannot_be_scored_is_a_bad_row(tmp_path) -> None:
    talks = [
        [message("user", "no reply")],
        [message("user", "a"), message("assistant", "x</think>y"), message("user", "b"), message("assistant", "z")],
        TALK,
    ]
    store = build(tmp_path, tokenizer_with(FORGETFUL), talks, replies="all")
    assert {reason: entry["count"] for reason, entry in store.manifest["bad_rows"].items()} == {
        "conversation without a reply of the assistant": 1,
        "conversation of which the chat template writes a reply otherwise once the talk goes on": 1,
    }
    assert build(tmp_path, tokenizer_with(FORGETFUL), talks, replies="last").manifest["bad_rows"] == {}


def test_replies_without_conversations_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"data\.replies is 'all'.*messages-column"):
        DataConfig(source="files", path="x", replies="all")
    with pytest.raises(InvalidInput, match=r"data\.replies is 'some'; it must be one of last, all"):
        DataConfig(source="files", path="x", messages_column="m", replies="some")
