"""What a configuration names, opened: the model with its tokenizer and objective, and the user store.

Server and clients call the same function with the same configuration; what one of them had to build is found in the
cache by the others.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedsim.config import RunConfig
from fedsim.data.sources import public_texts
from fedsim.data.store import UserStore

if TYPE_CHECKING:
    from fedsim.models.load import LoadedModel


def cache_folder() -> Path:
    """Where built stores and pre-trained models are kept: FEDSIM_CACHE, else ~/.cache/fedsim."""
    return Path(os.environ.get("FEDSIM_CACHE") or Path.home() / ".cache" / "fedsim")


@dataclass(frozen=True)
class Resources:
    """An opened configuration.

    Attributes:
        loaded: Model, tokenizer and objective.
        store: The user store, with its training, validation and test users.
    """

    loaded: "LoadedModel"
    store: UserStore


def open_resources(config: RunConfig) -> Resources:
    """Load the model and open the store, building and caching what is not there yet.

    Raises:
        InvalidInput: When the model or the data cannot be had as configured.
    """
    from fedsim.data.build import open_or_build
    from fedsim.models.load import load_model

    loaded = load_model(config.model, public_texts=lambda: public_texts(config.data), cache=cache_folder())
    store = open_or_build(config.data, loaded.tokenizer, cache_folder())
    return Resources(loaded=loaded, store=store)
