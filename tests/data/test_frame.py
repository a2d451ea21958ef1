"""Every row of a classifier has its tokenizer's special tokens, whatever the length of its text."""

from itertools import takewhile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import write_jsonl
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from fedsim.data.config import DataConfig
from fedsim.data.encode import TextEncoder
from fedsim.data.frame import Frame
from fedsim.data.ingest import build_store, open_or_build
from fedsim.data.shape import Examples, rows_of
from fedsim.errors import InvalidInput

GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
SPECIAL = ["<unk>", "[CLS]", "[SEP]", "<s>", "</s>"]
WORDS = [*SPECIAL, *(f"w{n}" for n in range(60))]
CLS, SEP, BOS, EOS = 1, 2, 3, 4
EOT = 1
"""ByT5's </s>."""
IDS = [(name, place) for place, name in enumerate(SPECIAL)]


def template(single: str, pair: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=IDS)


FAMILIES = {
    "BERT, ALBERT, DeBERTa": template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
    "DistilBERT": processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS)),
    "RoBERTa, BART": processors.RobertaProcessing(("</s>", EOS), ("<s>", BOS)),
    "XLNet": template("$A [SEP] [CLS]", "$A [SEP] $B [SEP] [CLS]"),
    "T5": template("$A </s>", "$A </s> $B </s>"),
    "Llama": template("<s> $A", "<s> $A <s> $B"),
    "GPT-2": processors.ByteLevel(trim_offsets=False),
}


def tokenizer_of(family: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = FAMILIES[family]
    return tokenizer


def text_of(words: int) -> str:
    return " ".join(f"w{n % 60}" for n in range(words))


def split(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [row.tolist() for row in np.split(tokens, np.cumsum(lengths)[:-1])]


def rows(encoder: TextEncoder, texts: list[str], length: int, long_texts: str, prompts: list[str] | None = None):
    """Rows of labelled texts, of one user each."""
    tokens, lengths = encoder.encode_framed(texts)
    prefixes = None
    if prompts is not None:
        before = split(*encoder.encode_framed(prompts))
        joined = [a + b for a, b in zip(before, split(tokens, lengths), strict=True)]
        prefixes, lengths = (np.array(list(map(len, rows))) for rows in (before, joined))
        tokens = np.concatenate([np.array(row, tokens.dtype) for row in joined])
    users = np.arange(len(texts))
    examples = Examples(tokens=tokens, lengths=lengths, users=users, prefixes=prefixes)
    return rows_of(examples, length, long_texts, 1, encoder.frame)


@settings(max_examples=60)
@given(st.sampled_from(sorted(FAMILIES)), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(4, 40))
def test_truncated_texts_are_those_of_the_tokenizer_itself(family, sizes, length) -> None:
    tokenizer = tokenizer_of(family)
    texts = list(map(text_of, sizes))
    found = rows(TextEncoder(tokenizer, framed="text"), texts, length, "truncate")
    tokenizer.enable_truncation(length)
    assert split(found.tokens, found.lengths) == [tokenizer.encode(text).ids for text in texts]


@settings(max_examples=100)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=5),
    st.integers(6, 40),
)
def test_truncated_pairs_are_those_of_the_tokenizer_itself(family, sizes, length) -> None:
    tokenizer = tokenizer_of(family)
    pairs = [(text_of(a), text_of(b)) for a, b in sizes]
    encoder = TextEncoder(tokenizer, framed="pair")
    found = rows(encoder, [b for _, b in pairs], length, "truncate", [a for a, _ in pairs])
    tokenizer.enable_truncation(length, strategy="longest_first")
    assert split(found.tokens, found.lengths) == [tokenizer.encode(*pair).ids for pair in pairs]
    assert (found.prefixes < found.lengths).all()


@settings(max_examples=100)
@given(
    st.sampled_from(sorted(FAMILIES)),
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=5),
    st.integers(6, 40),
    st.booleans(),
)
def test_pieces_of_a_long_text_each_have_the_special_tokens_and_the_prompt(family, sizes, length, pair) -> None:
    encoder = TextEncoder(tokenizer_of(family), framed="pair" if pair else "text")
    texts, prompts = [text_of(b) for _, b in sizes], [text_of(a) for a, _ in sizes] if pair else None
    found = rows(encoder, texts, length, "split", prompts)
    frame = encoder.frame
    read: dict[int, list[int]] = {}
    asked: dict[int, set[tuple[int, ...]]] = {}
    for place, row in enumerate(split(found.tokens, found.lengths)):
        assert len(row) <= length
        ends = len(row) - len(frame.after)
        assert tuple(row[: len(frame.before)]) == frame.before
        assert tuple(row[ends:]) == frame.after
        begins = int(found.prefixes[place]) if pair else len(frame.before)
        assert tuple(row[begins - len(frame.between) : begins]) == frame.between or not pair
        read.setdefault(int(found.users[place]), []).extend(row[begins:ends])
        prompt = row[len(frame.before) : begins - len(frame.between)] if pair else []
        asked.setdefault(int(found.users[place]), set()).add(tuple(prompt))
    plain = split(*encoder.encode_framed(texts))
    assert [read[user] for user in range(len(texts))] == plain  # nothing of a text is lost
    for user, (prompt_size, _) in enumerate(sizes):
        (prompt,) = asked[user]  # the same before each piece
        assert list(prompt) == split(*encoder.encode_framed([text_of(prompt_size)]))[0][: len(prompt)]


@pytest.mark.parametrize("long_texts", ["split", "truncate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_stores_with_labels_hold_whole_rows(tmp_path, family, long_texts) -> None:
    """From the file to the row, for texts of all lengths and their pairs."""
    tokenizer = tokenizer_of(family)
    for pair in (False, True):
        records = [{"user_id": f"u{n}", "ask": text_of(9), "text": text_of(n), "label": n % 2} for n in range(1, 40)]
        path = write_jsonl(tmp_path / f"{pair}.jsonl", records)
        options = {"prompt_column": "ask" if pair else None, "sequence_length": 16, "minimum_tokens": 2}
        options |= {"validation_fraction": 0, "test_fraction": 0, "long_texts": long_texts, "label_column": "label"}
        store = build_store(DataConfig(source="files", path=str(path), **options), tokenizer, tmp_path / f"{pair}")
        taken = store.take(np.arange(store.num_rows))
        whole = tokenizer.encode("w1", "w2" if pair else None).ids
        starts, ends = ([*takewhile(lambda token: token < len(SPECIAL), row)] for row in (whole, whole[::-1]))
        for row in split(taken.tokens, taken.lengths):
            assert len(row) <= 16
            assert row[: len(starts)] == starts
            assert row[::-1][: len(ends)] == ends
            specials = sum(token < len(SPECIAL) for token in row)
            assert specials == sum(token < len(SPECIAL) for token in whole)


def test_a_tokenizer_written_in_python() -> None:
    tokenizer = ByT5Tokenizer()
    assert TextEncoder(tokenizer, framed="pair").frame == Frame(between=(EOT,), after=(EOT,))
    found = rows(TextEncoder(tokenizer, framed="text"), ["abcdefgh", "a"], 6, "truncate")
    expected = tokenizer(["abcdefgh", "a"], truncation=True, max_length=6)["input_ids"]
    assert split(found.tokens, found.lengths) == expected
    literal = TextEncoder(tokenizer, framed="text").encode_framed(["</s>"])[0]
    assert EOT not in literal.tolist()


def test_options_still_decide_what_stands_around_a_row() -> None:
    bert, llama = tokenizer_of("BERT, ALBERT, DeBERTa"), tokenizer_of("Llama")
    assert TextEncoder(bert, framed="text", special_tokens=False).frame == Frame()
    ended = PreTrainedTokenizerFast(tokenizer_object=llama, eos_token="</s>")
    assert TextEncoder(ended, framed="text", end_of_text=True).frame == Frame(before=(BOS,), after=(EOS,))
    ended = PreTrainedTokenizerFast(tokenizer_object=tokenizer_of("T5"), eos_token="</s>")
    assert TextEncoder(ended, framed="text", end_of_text=True).frame == Frame(after=(EOS,))
    assert TextEncoder(lambda texts: [[1]] * len(texts), framed="text").frame == Frame()


def test_a_text_that_spells_the_last_token_does_not_end_there() -> None:
    """BART and T5 answer at the last </s> and refuse rows of which one has more of them than another."""
    tokenizer = tokenizer_of("RoBERTa, BART")
    tokenizer.model = models.WordLevel({word: place for place, word in enumerate(["<unk>", "w1"])}, unk_token="<unk>")
    tokenizer.add_special_tokens(["[CLS]", "[SEP]", "<s>", "</s>"])
    end = tokenizer.token_to_id("</s>")
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", end), ("<s>", tokenizer.token_to_id("<s>")))
    encoder = TextEncoder(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>"), framed="text")
    found = rows(encoder, ["w1 w1", "w1 </s> w1", "</s>"], 16, "truncate")
    assert [row.count(end) for row in split(found.tokens, found.lengths)] == [1, 1, 1]


def test_a_row_without_room_for_text_is_refused(tmp_path) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "text": "w1 w2", "label": 0}])
    config = DataConfig(source="files", path=str(path), label_column="label", sequence_length=2, minimum_tokens=2)
    with pytest.raises(InvalidInput, match=r"data\.sequence-length is 2; it must be at least 3"):
        build_store(config, tokenizer_of("RoBERTa, BART"), tmp_path / "store")


@pytest.mark.skipif(not GLUE.is_dir(), reason="the GLUE files are not here")
def test_pairs_of_glue(tmp_path) -> None:
    table = pq.read_table(GLUE / "qnli_dev.parquet").slice(0, 300)
    table = table.append_column("user_id", [[f"u{n}" for n in range(len(table))]])
    pq.write_table(table, tmp_path / "qnli.parquet")
    tokenizer = ByT5Tokenizer()
    options = {"prompt_column": "text", "text_column": "text2", "label_column": "label", "long_texts": "truncate"}
    options |= {"validation_fraction": 0, "test_fraction": 0, "sequence_length": 128}
    config = DataConfig(source="files", path=str(tmp_path / "qnli.parquet"), **options)
    store = build_store(config, tokenizer, tmp_path / "store")
    taken = store.take(np.arange(store.num_rows))
    question, answer = table["text"].to_pylist(), table["text2"].to_pylist()
    expected = tokenizer(question, answer, truncation="longest_first", max_length=128)["input_ids"]
    by_user = {name: row for name, row in zip(store.user_ids(), split(taken.tokens, taken.lengths), strict=True)}
    ends = [len(row) for row in expected]
    assert [len(by_user[f"u{n}"]) for n in range(len(table))] == ends
    assert all(by_user[f"u{n}"].count(EOT) == 2 for n in range(len(table)))


class Bilingual(ByT5Tokenizer):
    """Has other tokens, and another vocabulary, for what a decoder is to write, as translators have."""

    _writes = False

    def _switch_to_target_mode(self) -> None:
        self._writes = True

    def _switch_to_input_mode(self) -> None:
        self._writes = False

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [200, *token_ids_0, EOT] if self._writes else [100, *token_ids_0, EOT]

    def _convert_token_to_id(self, token):
        return super()._convert_token_to_id(token) + 20 * self._writes


SEQ2SEQ = {
    "T5": (tokenizer_of("T5"), [], [EOS], [], [EOS]),
    "BART": (tokenizer_of("RoBERTa, BART"), [BOS], [EOS], [BOS], [EOS]),
    "GPT-2": (tokenizer_of("GPT-2"), [], [], [], []),
    "in Python": (ByT5Tokenizer(), [], [EOT], [], [EOT]),
    "bilingual": (Bilingual(), [100], [EOT], [200], [EOT]),
}


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("length", [16, 200])
def test_a_prompt_and_its_text_apart_are_each_whole(tmp_path, family, length) -> None:
    """As an encoder and a decoder read them, also where a row is too short: a text is cut, and never split."""
    tokenizer, *around = SEQ2SEQ[family]
    sizes = [(1, 1), (3, 30), (30, 3), (30, 30)]
    records = [{"user_id": f"u{n}", "ask": text_of(a), "text": text_of(b)} for n, (a, b) in enumerate(sizes)]
    options = {"prompt_column": "ask", "sequence_length": length, "validation_fraction": 0, "test_fraction": 0}
    path = write_jsonl(tmp_path / "d.jsonl", records)
    config = DataConfig(source="files", path=str(path), minimum_tokens=2, **options)
    store = build_store(config, tokenizer, tmp_path / "store", apart=True)
    taken = store.take(np.arange(store.num_rows))
    assert store.num_rows == len(sizes)
    for row, labels in zip(split(taken.tokens, taken.lengths), split(taken.labels, taken.lengths), strict=True):
        read = [token for token, label in zip(row, labels, strict=True) if label < 0]
        written = [label for label in labels if label >= 0]
        assert len(row) <= length
        assert read + written == row
        for part, begin, end in ((read, around[0], around[1]), (written, around[2], around[3])):
            assert len(part) > len(begin) + len(end)
            assert part[: len(begin)] == begin
            assert part[len(part) - len(end) :] == end
    if length == 200:
        row = split(taken.tokens, taken.lengths)[store.user_ids().index("u0")]
        library = isinstance(tokenizer, Tokenizer)
        both = (
            [tokenizer("w0"), tokenizer(text_target="w0")]
            if not library
            else [{"input_ids": tokenizer.encode("w0").ids}] * 2
        )
        assert row == [token for part in both for token in part["input_ids"]]


def test_rows_apart_need_prompts_and_a_store_of_their_kind(tmp_path) -> None:
    tokenizer = tokenizer_of("T5")
    path = write_jsonl(tmp_path / "d.jsonl", [{"user_id": "a", "ask": "w1 w2", "text": "w3 w4"}])
    common = {"source": "files", "path": str(path), "validation_fraction": 0, "test_fraction": 0}
    with pytest.raises(InvalidInput, match=r"data\.prompt-column"):
        build_store(DataConfig(**common), tokenizer, tmp_path / "none", apart=True)
    config = DataConfig(**common, prompt_column="ask")
    stores = {apart: build_store(config, tokenizer, tmp_path / f"{apart}", apart=apart) for apart in (False, True)}
    assert stores[False].manifest["recipe"]["key"] != stores[True].manifest["recipe"]["key"]
    for apart, store in stores.items():
        prepared = DataConfig(source="store", path=str(store.path))
        assert open_or_build(prepared, tokenizer, apart=apart).fingerprint == store.fingerprint
        with pytest.raises(InvalidInput, match=rf"a store prepared with{'out' * apart} --model"):
            open_or_build(prepared, tokenizer, apart=not apart)
