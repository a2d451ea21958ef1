from pathlib import Path

import pytest
from tiny_models import TINY, public_texts, shared_data

from fedsim.models.config import ModelConfig
from fedsim.models.load import load_model


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def load(cache: Path):
    """load(**fields of ModelConfig): a model, by default the tiny default one, pre-trained once for all tests."""
    return lambda **fields: load_model(
        ModelConfig(small=TINY, **fields), public_texts=public_texts, cache=cache, progress=False
    )


@pytest.fixture(scope="session")
def story_llama() -> str:
    """Folder of a real Llama of 260,032 parameters trained on children's stories."""
    return str(shared_data("model_stories260k").resolve())
