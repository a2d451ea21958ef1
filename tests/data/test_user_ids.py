"""One person, one id: in whatever notation, type and file format; and no id of which digits are lost."""

import csv
import dataclasses
import json
import math
import uuid
from decimal import Decimal

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from readable_stores import read_texts, texts_by_user

from fedsim.data.config import MISSING_IDS, DataConfig
from fedsim.data.ingest import build_store
from fedsim.data.records import BadRecord
from fedsim.data.user_ids import canonical_id, loose_form, normal_form

SEVEN = [
    7,
    7.0,
    "7",
    "7.0",
    "7.00",
    "7.",
    "+7",
    " 7",
    "7 ",
    "7e0",
    "7E+0",
    "70e-1",
    "0.7e1",
    Decimal("7"),
    Decimal("7.00"),
]
SEVEN += [kind(7) for kind in (np.int8, np.uint16, np.int64, np.uint64, np.float16, np.float32, np.float64)]


@pytest.mark.parametrize("value", SEVEN, ids=repr)
def test_seven_is_seven(value) -> None:
    assert canonical_id(value) == "7"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("007", "007"),  # a code: who writes leading zeros means them
        ("00", "00"),
        ("-0", "0"),
        (-0.0, "0"),
        ("-0.0", "0"),
        ("-7.0", "-7"),
        ("1e3", "1000"),
        ("1E3", "1000"),
        ("1e+05", "100000"),  # as R writes it
        ("1.2345678E7", "12345678"),  # as Java and Spark write it
        ("7.50", "7.5"),
        (Decimal("7.50"), "7.5"),
        (np.float32(7.1), "7.1"),
        ("7.0999999999999996447", "7.1"),
        ("6.99999999999999999999", "7"),
        ("1e-07", "1e-07"),
        (2**53 - 1, "9007199254740991"),
        (2.0**53 - 1, "9007199254740991"),
        ("9007199254740991.0", "9007199254740991"),
        (10**30 + 1, f"{10**30 + 1}"),
        (f"{10**30 + 1}", f"{10**30 + 1}"),
        (Decimal(10**30 + 1), f"{10**30 + 1}"),
        ("123e4567", "123e4567"),  # no float is written so: a hash
        ("4e99", "4e99"),
        ("12e3f", "12e3f"),
        ("٧", "٧"),
        ("1_000", "1_000"),
        ("nan", "nan"),
        (".5", "0.5"),
        ("-.50", "-0.5"),
        (".0", "0"),
        (".", "."),
        (".e5", ".e5"),
        ("True", "True"),
        (uuid.UUID(int=10), "00000000-0000-0000-0000-00000000000a"),
        ("00000000-0000-0000-0000-00000000000A", "00000000-0000-0000-0000-00000000000a"),
        ("Ann", "Ann"),
        (" bob", " bob"),
        ("\ufeffbob", "bob"),
    ],
)
def test_other_ids(value, expected) -> None:
    assert canonical_id(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "missing user"),
        (math.nan, "missing user"),
        (np.float32("nan"), "missing user"),
        (Decimal("nan"), "missing user"),
        ("", "missing user"),
        (" \n", "missing user"),
        ("\ufeff", "missing user"),
        (True, "user of the wrong type (bool)"),
        (np.bool_(True), "user of the wrong type"),
        ([7], "user of the wrong type (list)"),
        (b"7", "user of the wrong type (bytes)"),
        (math.inf, "not finite"),
        (Decimal("inf"), "not finite"),
        (2.0**53, "digits are lost"),
        (-(2.0**53), "digits are lost"),
        (np.float32(2**24), "digits are lost"),
        (np.float16(2**11), "digits are lost"),
        ("9007199254740992.0", "digits are lost"),
        ("12345678901234567890.0", "digits are lost"),
        ("1.2345678901234567E18", "digits are lost"),
        ("1e+17", "digits are lost"),
        ("1.23457E+11", "rounded by a spreadsheet"),
        ("1.0e-400", "too near to zero"),
        (Decimal("1e-400"), "too near to zero"),
    ],
    ids=repr,
)
def test_what_is_no_id(value, reason) -> None:
    with pytest.raises(BadRecord) as error:
        canonical_id(value)
    assert reason in str(error.value)


def test_the_role_is_named() -> None:
    with pytest.raises(BadRecord, match="missing label"):
        canonical_id(None, "label")


@settings(max_examples=300)
@given(st.integers(-(2**53) + 1, 2**53 - 1))
def test_a_number_is_one_id_in_every_notation(number) -> None:
    notations = [number, float(number), str(number), f"{number}.0", repr(float(number)), f"{number:.3f}", f" {number}"]
    notations += [Decimal(number), Decimal(number).scaleb(-2).scaleb(2), np.int64(number), np.float64(number)]
    notations += [f"{Decimal(number):E}".replace("E+0", "E0")] if abs(number) < 10**10 else []
    notations += [json.loads(f"{number}"), json.loads(f"{number}.0")]
    assert {canonical_id(value) for value in notations} == {str(number)}


@settings(max_examples=300)
@given(st.text(max_size=20) | st.from_regex(r"0[0-9]{1,9}", fullmatch=True) | st.integers(0, 2**70).map(str))
def test_an_id_is_its_own_id_and_only_numbers_change(text) -> None:
    try:
        once = canonical_id(text)
    except BadRecord:
        return
    assert canonical_id(once) == once
    if not any(letter.isdigit() for letter in text):
        assert once == text.strip("\ufeff")
    assert normal_form(normal_form(text)) == normal_form(text)
    try:
        normalised = canonical_id(text, normalised=True)
    except BadRecord:
        assert not normal_form(text)
        return
    assert canonical_id(normalised, normalised=True) == normalised == canonical_id(once, normalised=True)


BOB = ["bob", " bob", "bob ", "bob\u00a0", "\u200bbob"]
E_ACUTE = ["Jos\u00e9", "Jose\u0301", " Jose\u0301\t"]


@pytest.mark.parametrize("spellings", [BOB, E_ACUTE])
def test_blanks_and_composition_are_unified_on_request(spellings) -> None:
    assert len({canonical_id(spelling) for spelling in spellings}) == len(spellings)
    assert {canonical_id(spelling, normalised=True) for spelling in spellings} == {normal_form(spellings[0])}


def test_the_loose_form_knows_case_width_zeros_and_uuids() -> None:
    assert loose_form("Bob") == loose_form("bob ") == loose_form("ＢＯＢ")
    assert loose_form("007") == loose_form("7")
    number = uuid.UUID(int=7**40)
    assert loose_form(str(number)) == loose_form(number.hex) == loose_form(f"{{{number}}}".upper())
    assert loose_form("0") == "0"


IDS = st.integers(0, 2**53 - 1) | st.integers(0, 99) | st.integers(2**53, 2**63 - 1)
FORMATS = [
    "csv by csv",
    "csv by pandas",
    "csv of floats",
    "tsv by pandas",
    "jsonl",
    "jsonl of text",
    "jsonl of floats",
]
FORMATS += ["parquet of int64", "parquet of text", "parquet of float64", "parquet of decimal", "parquet by pandas"]
FORMATS += ["hub of parquet", "hub of jsonl", "hub saved"]


def written(folder, kind: str, ids: list[int | None]) -> DataConfig:
    """A file or data set of these users, one text each; None is a missing one, which makes pandas write floats."""
    folder.mkdir(exist_ok=True)
    texts = [f"text {place}" for place in range(len(ids))]
    floats = [None if id is None else float(id) for id in ids]
    path = folder / f"data.{kind.split()[0]}"
    if kind == "csv by csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("user_id", "text"), *zip(ids, texts, strict=True)])
    elif kind.startswith(("csv", "tsv")) or kind == "parquet by pandas":
        frame = pandas.DataFrame({"user_id": pandas.Series(ids, dtype="Int64"), "text": texts})
        frame = frame.astype({"user_id": "float64"}) if "floats" in kind or "parquet" in kind else frame
        if kind.startswith("parquet"):
            frame.to_parquet(path)
        else:
            frame.to_csv(path, index=False, sep="\t" if kind.startswith("tsv") else ",")
    elif kind.startswith("jsonl"):
        values = {"jsonl of text": list(map(str, ids)), "jsonl of floats": floats}.get(kind, ids)
        values = [None if id is None else value for id, value in zip(ids, values, strict=True)]
        lines = (json.dumps({"user_id": user, "text": text}) for user, text in zip(values, texts, strict=True))
        path.write_text("\n".join(lines))
    else:
        users = pa.array(ids, pa.int64())
        if kind.endswith("text"):
            users = users.cast(pa.string())
        elif kind.endswith("decimal"):
            users = users.cast(pa.decimal128(38, 2))
        elif kind.endswith("float64"):
            users = pa.array(floats, pa.float64())
        table = pa.table({"user_id": users, "text": texts})
        if kind == "hub saved":
            datasets.Dataset(table).save_to_disk(folder / "saved")
        elif kind == "hub of jsonl":
            datasets.Dataset(table).to_json(folder / "train.jsonl")
        else:
            pq.write_table(table, folder / "train.parquet" if kind.startswith("hub") else path)
    if kind.startswith("hub"):
        return DataConfig(source="hub", path=str(folder / "saved" if kind == "hub saved" else folder))
    return DataConfig(source="files", path=str(path))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_person_is_one_user_through_every_format(kind, tmp_path_factory) -> None:
    @settings(max_examples=4 if kind.startswith("hub") else 15)
    @given(st.lists(IDS | st.none(), min_size=2, max_size=6))
    def check(ids) -> None:
        texts, bad = read_texts(written(tmp_path_factory.mktemp("data") / "it", kind, ids))
        lossy = "float" in kind or kind == "parquet by pandas"
        lost = {id for id in ids if id is not None and lossy and float(id) >= 2**53}
        expected = {str(id) for id in ids if id is not None and id not in lost}
        assert set(texts) == expected
        assert sum(bad.values()) == sum(id is None or id in lost for id in ids)
        for place, id in enumerate(ids):
            if id is not None and id not in lost:
                assert texts[str(id)][f"text {place}"] == 1

    check()


def test_one_person_over_files_of_all_kinds_is_one_user_of_the_store(tmp_path, tokenizer) -> None:
    kinds = [kind for kind in FORMATS if not kind.startswith("hub")]
    for number, kind in enumerate(kinds):
        folder = tmp_path / "data" / str(number)
        folder.parent.mkdir(exist_ok=True)
        written(folder, kind, [7, None, 12345678])
    config = DataConfig(source="files", path=str(tmp_path / "data"), validation_fraction=0, test_fraction=0)
    store = build_store(config, tokenizer, tmp_path / "store")
    assert texts_by_user(store) == {"7": ["text 0"], "12345678": ["text 2"]}
    assert store.manifest["records"] == 3 * len(kinds)
    assert store.manifest["bad_rows"]["missing user"]["count"] == len(kinds)


def test_ids_of_single_precision_are_known_as_such(tmp_path) -> None:
    table = pa.table({"user_id": np.array([7, 16777217, 7.1], np.float32), "text": ["one", "two", "three"]})
    pq.write_table(table, tmp_path / "train.parquet")
    for source, path in (("files", tmp_path / "train.parquet"), ("hub", tmp_path)):
        texts, bad = read_texts(DataConfig(source=source, path=str(path)))
        assert set(texts) == {"7", "7.1"}
        assert [reason for reason in bad if "digits are lost" in reason]


def test_uuids_of_arrow_are_those_of_text(tmp_path) -> None:
    number = uuid.UUID(int=7**40)
    pq.write_table(pa.table({"user_id": pa.array([number.bytes], pa.uuid()), "text": ["one"]}), tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text(f"user_id,text\n{str(number).upper()},two\n")
    texts, bad = read_texts(DataConfig(source="files", path=str(tmp_path)))
    assert (set(texts), bad) == ({str(number)}, {})


def with_missing(path, kind: str) -> DataConfig:
    """A text of ann, and one each of people whose ids went missing; the labels are called as the ids are."""
    ids = ["ann", *MISSING_IDS, " NA "]
    frame = pandas.DataFrame({"user_id": ids, "text": [f"text {n}" for n in range(len(ids))], "label": ids})
    if kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    return DataConfig(source="files", path=str(path))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "hub"])
def test_missing_ids_written_as_text_are_nobody(kind, tmp_path) -> None:
    config = with_missing(tmp_path / f"train.{'parquet' if kind == 'hub' else kind}", kind.replace("hub", "parquet"))
    if kind == "hub":
        config = DataConfig(source="hub", path=str(tmp_path))
    assert read_texts(config) == ({"ann": {"text 0": 1}}, {"missing user": len(MISSING_IDS) + 1})
    texts, bad = read_texts(dataclasses.replace(config, missing_ids=()))
    assert (set(texts), bad) == ({"ann", *MISSING_IDS, " NA "}, {})
    texts, bad = read_texts(dataclasses.replace(config, missing_ids=("ann",)))
    assert (set(texts), bad) == ({*MISSING_IDS, " NA "}, {"missing user": 1})


def test_what_is_missing_is_part_of_a_store_and_labels_are_not_affected(build) -> None:
    records = [{"user_id": user, "text": "some text", "label": "None"} for user in ("ann", "None", "-1", -1)]
    store, other = build(records, label_column="label"), build(records, missing_ids=("-1",), label_column="label")
    assert (sorted(store.user_ids()), store.classes) == (["-1", "ann"], ["None"])
    assert sorted(other.user_ids()) == ["None", "ann"]
    assert store.manifest["recipe"]["key"] != other.manifest["recipe"]["key"]


@pytest.mark.parametrize("kind", [pa.binary(16), pa.binary()])
def test_binary_ids_that_are_no_text_are_called_so(tmp_path, kind) -> None:
    ids = pa.array([bytes(range(240, 256)), b"sixteen letters."], kind)
    pq.write_table(pa.table({"user_id": ids, "text": ["one", "two"]}), tmp_path / "a.parquet")
    texts, bad = read_texts(DataConfig(source="files", path=str(tmp_path)))
    assert set(texts) == {"sixteen letters."}
    assert [reason for reason in bad if "binary ids that are no text" in reason]
