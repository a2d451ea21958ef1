from pathlib import Path

import pytest
from readable_stores import LetterTokenizer, write_jsonl

from fedsim.data.config import DataConfig
from fedsim.data.ingest import build_store


@pytest.fixture
def tokenizer() -> LetterTokenizer:
    return LetterTokenizer()


@pytest.fixture
def build(tmp_path: Path, tokenizer):
    """Build a store from records written as JSONL, with options of DataConfig."""

    def build(records: list[dict], **options):
        path = write_jsonl(tmp_path / "data.jsonl", records)
        config = DataConfig(
            source="files", path=str(path), **({"validation_fraction": 0, "test_fraction": 0} | options)
        )
        number = len(list(tmp_path.glob("store*")))
        return build_store(config, tokenizer, tmp_path / f"store{number}", cache=tmp_path / "cache")

    return build
