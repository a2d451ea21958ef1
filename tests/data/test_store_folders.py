"""What the folder of a store is called says nothing of what is in it."""

import pytest
from readable_stores import write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store


@pytest.mark.parametrize(
    "folder",
    [
        "user=bob",
        "label=1",
        "high=3",
        "low=3",
        "ordinal=1",
        "kept=false",
        "prefix=1",
        "v[2]",
        "v?",
        "a*",
        "o'b",
        "ünï",
    ],
)
def test_what_the_folder_of_the_store_is_called_says_nothing_of_the_data(tmp_path, tokenizer, folder) -> None:
    (tmp_path / "v1").mkdir()
    rows = [{"user_id": f"u{n % 5}", "text": f"text {n}", "label": n % 2} for n in range(20)]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    options = {"label_column": "label", "validation_fraction": 0, "test_fraction": 0}
    config = DataConfig(source="files", path=str(path), **options)
    plain = build_store(config, tokenizer, tmp_path / "plain")
    found = build_store(config, tokenizer, tmp_path / folder / "store")
    assert found.fingerprint == plain.fingerprint
    assert found.user_ids() == plain.user_ids()
    assert found.manifest["similar_users"] == {}
