import pytest

from fedsim.data import ingest
from fedsim.data.config import DataConfig
from fedsim.errors import InvalidInput


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"source": "web"}, "data.source"),
        ({"source": "files"}, "data.path"),
        ({"source": "hub"}, "data.path"),
        ({"source": "store"}, "data.path"),
        ({"source": "hub", "recipe": "reddit"}, "data.recipe"),
        ({"path": "x"}, "data.path"),
        ({"recipe": "enron"}, "data.recipe"),
        ({"packages": ()}, "data.packages"),
        ({"sequence_length": 1}, "data.sequence-length"),
        ({"minimum_tokens": 1}, "data.minimum-tokens"),
        ({"minimum_tokens": 65}, "data.minimum-tokens"),
        ({"minimum_rows": 0}, "data.minimum-rows"),
        ({"long_texts": "drop"}, "data.long-texts"),
        ({"user_ids": "normalized"}, "data.user-ids"),
        ({"quotes": "single"}, "data.quotes"),
        ({"source": "hub", "path": "x", "quotes": "none"}, "data.quotes"),
        ({"source": "store", "path": "x", "user_ids": "normalised"}, "data.user-ids"),
        ({"source": "files", "path": "x", "long_texts": "pack", "label_column": "y"}, "data.long-texts"),
        ({"source": "files", "path": "x", "messages_column": "m", "text_column": "t"}, "data.messages-column"),
        ({"validation_fraction": 1.0}, "data.validation-fraction"),
        ({"test_fraction": -0.1}, "data.test-fraction"),
        ({"validation_fraction": 0.5, "test_fraction": 0.5}, "data.validation-fraction + data.test-fraction"),
        ({"bad_rows": "ignore"}, "data.bad-rows"),
        ({"memory_limit": "much"}, "data.memory-limit"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(options, field) -> None:
    with pytest.raises(InvalidInput) as error:
        DataConfig(**options)
    assert error.value.field == field


def test_sensible_configurations_are_accepted() -> None:
    DataConfig()
    DataConfig(source="hub", recipe="stackoverflow", memory_limit="1.5 GiB")
    DataConfig(source="files", path="x", label_column="y", validation_fraction=0, test_fraction=0)


def test_options_that_came_later_leave_stores_their_names(tmp_path, tokenizer) -> None:
    """Whoever has prepared a store before there was an option finds it again."""
    path = tmp_path / "d.csv"
    path.write_text("user_id,text\na,some text\n")

    def recipe(name: str, **options) -> dict:
        config = DataConfig(source="files", path=str(path), **options)
        return ingest.build_store(config, tokenizer, tmp_path / name).manifest["recipe"]["data"]

    earlier = recipe("store")
    assert not ingest.LATER.keys() & earlier.keys()
    assert recipe("other", encoding="latin-1") == earlier | {"encoding": "latin-1"}
