import dataclasses

import datasets
import pytest
from readable_stores import texts_by_user, write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store
from fedsim.data.recipes import RECIPES, resolve
from fedsim.errors import InvalidInput

RECORDS = [{"who": user, "said": f"line {n}", "kind": n % 2} for n, user in enumerate("abcab")]
EXPECTED = {"a": ["line 0", "line 3"], "b": ["line 1", "line 4"], "c": ["line 2"]}


def hub(path, **options) -> DataConfig:
    base = {"user_column": "who", "text_column": "said", "validation_fraction": 0, "test_fraction": 0}
    return DataConfig(source="hub", path=str(path), **(base | options))


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("layout", ["parquet", "jsonl", "saved", "saved splits"])
def test_a_local_data_set(tmp_path, tokenizer, layout) -> None:
    folder = tmp_path / "talk"
    folder.mkdir()
    features = datasets.Features(
        {
            "who": datasets.Value("string"),
            "said": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["x", "y"]),
        }
    )
    data = datasets.Dataset.from_list(RECORDS, features=features)
    if layout == "parquet":
        data.to_parquet(folder / "train-00000-of-00001.parquet")
    elif layout == "jsonl":
        write_jsonl(folder / "train.jsonl", RECORDS)
    elif layout == "saved":
        data.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": data, "dev": data.select([0])}).save_to_disk(folder)
    store = build_store(hub(folder, label_column="kind"), tokenizer, tmp_path / "store")
    assert texts_by_user(store) == EXPECTED
    assert store.classes == (["0", "1"] if layout == "jsonl" else ["x", "y"])
    assert store.manifest["records"] == 5


def test_errors_name_what_to_correct(tmp_path, tokenizer) -> None:
    folder = tmp_path / "talk"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", RECORDS)
    for options, words in (
        ({"user_column": "author"}, r"data\.user-column is 'author'.*who, said, kind"),
        ({"hub_split": "dev"}, r"split.*dev"),
        ({"hub_config": "other"}, r"other"),
    ):
        with pytest.raises(InvalidInput, match=words):
            build_store(hub(folder, **options), tokenizer, tmp_path / "store")
    with pytest.raises(InvalidInput, match=r"data\.path"):
        build_store(hub(tmp_path / "nothing"), tokenizer, tmp_path / "store")


SCHEMAS = {
    # Columns as published, with one post, article or e-mail of two users each, and one without a user.
    "stackoverflow": [
        {
            "Id": 1,
            "PostTypeId": 1,
            "Title": "How?",
            "Body": "How do I?",
            "OwnerUserId": 23,
            "ContentLicense": "CC BY-SA",
        },
        {"Id": 2, "PostTypeId": 2, "Title": None, "Body": "Like so.", "OwnerUserId": 42, "ContentLicense": "CC BY-SA"},
        {
            "Id": 3,
            "PostTypeId": 2,
            "Title": None,
            "Body": "Gone user",
            "OwnerUserId": None,
            "ContentLicense": "CC BY-SA",
        },
    ],
    "cc-news": [
        {
            "title": "A",
            "text": "It rained.",
            "domain": "a.example",
            "date": "",
            "description": "",
            "url": "",
            "image_url": "",
        },
        {
            "title": "B",
            "text": "It shone.",
            "domain": "b.example",
            "date": "",
            "description": "",
            "url": "",
            "image_url": "",
        },
        {"title": "C", "text": "Nowhere.", "domain": "", "date": "", "description": "", "url": "", "image_url": ""},
    ],
    "enron": [
        {
            "message_id": "1",
            "subject": "Hi",
            "from": "ann@enron.com",
            "to": ["b"],
            "cc": [],
            "bcc": [],
            "date": 0,
            "body": "Lunch?",
            "file_name": "x",
        },
        {
            "message_id": "2",
            "subject": "Re",
            "from": "bob@enron.com",
            "to": ["a"],
            "cc": [],
            "bcc": [],
            "date": 0,
            "body": "Gladly",
            "file_name": "y",
        },
        {
            "message_id": "3",
            "subject": "No",
            "from": None,
            "to": [],
            "cc": [],
            "bcc": [],
            "date": 0,
            "body": "Spam",
            "file_name": "z",
        },
    ],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_read_the_published_columns(tmp_path, tokenizer, recipe) -> None:
    write_jsonl(tmp_path / "data.jsonl", SCHEMAS[recipe])
    options = {"recipe": recipe, "validation_fraction": 0, "test_fraction": 0}
    config = DataConfig(source="files", path=str(tmp_path / "data.jsonl"), **options)
    store = build_store(config, tokenizer, tmp_path / "store")
    user, text = RECIPES[recipe]["user_column"], RECIPES[recipe]["text_column"]
    assert texts_by_user(store) == {str(record[user]): [record[text]] for record in SCHEMAS[recipe][:2]}
    assert store.manifest["bad_rows"]["missing user"]["count"] == 1
    (tmp_path / "local").mkdir()
    write_jsonl(tmp_path / "local" / "train.jsonl", SCHEMAS[recipe])
    config = DataConfig(source="hub", path=str(tmp_path / "local"), **options)
    assert texts_by_user(build_store(config, tokenizer, tmp_path / "hub")) == texts_by_user(store)


def test_a_recipe_names_the_data_set_and_gives_way_to_options() -> None:
    assert resolve(DataConfig(source="hub", recipe="cc-news")).path == "vblagoje/cc_news"
    config = resolve(DataConfig(source="hub", recipe="enron", text_column="subject", path="mine"))
    assert (config.path, config.user_column, config.text_column) == ("mine", "from", "subject")


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path, tokenizer, monkeypatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InvalidInput, match=r"data\.path is 'nobody/nothing'.*the hub does not answer"):
        build_store(hub("nobody/nothing"), tokenizer, tmp_path / "store")
    assert waited == []


@pytest.mark.parametrize("name", ["train.csv", "train.tsv"])
def test_csv_files_are_left_to_the_reader_that_checks_quotes(tmp_path, tokenizer, name) -> None:
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / name).write_text('who,said\na,hello\nb,"never closed\nc,words of c\n'.replace(",", "\t"))
    with pytest.raises(InvalidInput, match=r"another kind than CSV.*--data\.source files"):
        build_store(hub(tmp_path / "talk"), tokenizer, tmp_path / "store")


@pytest.mark.parametrize(
    "lines",
    [
        '{"who": "a", "who": "b", "said": "x"}\n',
        '{"who": "a", "said": "x"}\nno json\n',
        '{"who": 1, "said": "x"}\n{"who"',
    ],
)
def test_files_that_the_library_cannot_read_are_named_in_one_sentence(tmp_path, tokenizer, lines) -> None:
    (tmp_path / "talk").mkdir()
    (tmp_path / "talk" / "train.jsonl").write_text(lines)
    with pytest.raises(InvalidInput, match=r"data\.path.*datasets library.*--data\.source files"):
        build_store(hub(tmp_path / "talk"), tokenizer, tmp_path / "store")


def test_hidden_files_of_a_local_folder_are_no_data(tmp_path, tokenizer) -> None:
    (tmp_path / "talk" / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("train.jsonl", ".x.jsonl", ".ipynb_checkpoints/train.jsonl"):
        write_jsonl(tmp_path / "talk" / name, RECORDS)
    store = build_store(hub(tmp_path / "talk"), tokenizer, tmp_path / "store")
    assert store.manifest["records"] == 5


@pytest.mark.parametrize("splits", [False, True])
def test_what_was_saved_from_csv_files_is_sent_back_to_them(tmp_path, tokenizer, splits) -> None:
    (tmp_path / "talk.csv").write_text("who,said\na,hello there\nb,good bye\n")
    loaded = datasets.load_dataset(
        "csv", data_files=str(tmp_path / "talk.csv"), split="train", cache_dir=str(tmp_path)
    )
    saved = tmp_path / "saved"
    (datasets.DatasetDict({"train": loaded}) if splits else loaded).save_to_disk(saved)
    for source in ("hub", "files"):
        with pytest.raises(InvalidInput, match=r"those CSV files with --data\.source files.*to_parquet") as error:
            build_store(dataclasses.replace(hub(saved), source=source), tokenizer, tmp_path / "store")
        assert "--data.source hub" not in str(error.value)
    loaded.to_parquet(tmp_path / "talk.parquet")
    for path in ("talk.csv", "talk.parquet"):
        config = dataclasses.replace(hub(tmp_path / path), source="files")
        assert build_store(config, tokenizer, tmp_path / f"store of {path}").num_users == 2
