"""What a configuration names, opened: the model with its tokenizer and objective, and the user store.

Server and clients call the same function with the same configuration; what one of them had to build is found in the
cache by the others.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from fedsim.cache import default_cache
from fedsim.config import RunConfig
from fedsim.data.config import DataConfig
from fedsim.data.frame import Frame
from fedsim.data.ingest import open_or_build
from fedsim.data.recipes import resolve
from fedsim.data.sources import Progress, open_source, public_texts, silent
from fedsim.data.store import UserStore
from fedsim.engine.same_inputs import Inputs
from fedsim.errors import InvalidInput
from fedsim.gradients import SequenceClassification
from fedsim.models.classes import name_classes, without_labels
from fedsim.models.config import DEFAULT_PATH
from fedsim.models.fingerprint import model_fingerprint, weights_fingerprint
from fedsim.models.load import LoadedModel, load_model
from fedsim.models.sources import Source, file_of
from fedsim.privacy.earlier import Earlier, accounting_beside, mark_of

SHORTEST_ROW = 2
"""Tokens of a row of which a language model predicts anything."""


def computing_device() -> torch.device:
    """Where the workers of this process compute: its GPU, if it has one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Resources:
    """An opened configuration.

    Attributes:
        loaded: Model, tokenizer and objective.
        store: The user store, with its training, validation and test users.
    """

    loaded: LoadedModel
    store: UserStore

    @cached_property
    def weights(self) -> str:
        """Hash of the model's weights as they are when first asked for: ask before training. 1.7 GB a second."""
        return weights_fingerprint(self.loaded.model)

    @cached_property
    def row_tokens(self) -> int:
        """Tokens of the longest row there is: a prepared store was cut by other options than the run's."""
        return max(SHORTEST_ROW, self.store.longest_row)

    @property
    def classes_from_data(self) -> bool:
        """Whether a classifier's classes are those that the data happens to have, and nobody named them."""
        named = self.store.manifest["recipe"]["data"].get("label_names")
        return self.loaded.config.task == "sequence-classification" and not named

    @property
    def made_up_users(self) -> bool:
        """Whether the users' rows were dealt out anew, so that no user is a person."""
        return bool(self.store.manifest["recipe"]["data"].get("regroup", "none") != "none")

    @cached_property
    def inputs(self) -> Inputs:
        """What server and workers compare, of the same moment."""
        return Inputs(data=self.store.fingerprint, model=model_fingerprint(self.loaded.model, self.weights))


def open_resources(config: RunConfig, progress: Progress = silent) -> Resources:
    """Load the model and open the store, building and caching what is not there yet.

    Args:
        config: What to open.
        progress: Told what is being built.

    Raises:
        InvalidInput: When the model or the data cannot be had as configured.
    """
    cache = default_cache()
    _look_at(config, cache)
    loaded = load_model(
        config.model,
        public_texts=lambda: public_texts(cache, progress),
        cache=cache,
        progress=progress is not silent,
    )
    resources = open_data(config.data, loaded, progress)
    if config.release and resources.made_up_users:  # of a prepared store nobody knew before it was opened
        hint = "Its users are made up (--data.regroup): ε would be of no person."
        raise InvalidInput("data.path", config.data.path, "a store of real users with --release", hint)
    return resources


def earlier_runs(config: RunConfig, source: Source) -> Earlier:
    """The runs that a run goes on from, by the model that it begins with and what that stands on.

    Args:
        config: The run's.
        source: Where its model is read from.

    Raises:
        InvalidInput: As `RunConfig.earlier_runs`.
    """
    if config.model.path == DEFAULT_PATH:
        return config.earlier_runs()
    bases = (source.base,) if source.adapters else ()
    return config.earlier_runs(*bases, marks=_marks(source), cached=source.cached, revision=source.revision)


def accounting_of(source: Source) -> tuple[Path, ...]:
    """Ledger and statement of adapters on their base, as `accounting_beside`."""
    return accounting_beside(
        source.adapters or "", source.base, marks=_marks(source), cached=source.cached, revision=source.revision
    )


def _marks(source: Source) -> dict[str, str | None]:
    """What adapters and base say of their ledgers, on the hub too."""
    files = {
        source.base: file_of(source.base, CONFIG_NAME, source.cached, source.revision),
        source.adapters: file_of(source.adapters or "", ADAPTER_SAFE_WEIGHTS_NAME, source.cached),
    }
    return {place: mark_of(Path(file).parent) for place, file in files.items() if place and file}


def open_data(data: DataConfig, loaded: LoadedModel, progress: Progress = silent) -> Resources:
    """Open the store of this data for a model, building and caching what is not there yet.

    Returns:
        Both, the model with an objective that knows the special tokens around the data's rows.

    Raises:
        InvalidInput: When the data cannot be had as configured, its rows are longer than the model can read, or it has
            other classes than a classifier.
    """
    ready = data.source == "store"
    if loaded.context and not ready and data.sequence_length > loaded.context:
        allowed = f"at most the {loaded.context} tokens that the model can read"
        raise InvalidInput("data.sequence-length", data.sequence_length, allowed)
    apart = loaded.config.reads_apart
    store = open_or_build(data, loaded.tokenizer, default_cache(), progress, apart=apart)
    longest = store.longest_row if ready else 0
    if loaded.context and longest > loaded.context:
        allowed = f"a store whose rows have at most the {loaded.context} tokens that the model can read"
        hint = f"One has {longest}: prepare it again with --data.sequence-length {loaded.context}."
        raise InvalidInput("data.path", str(data.path), allowed, hint)
    name_classes(loaded.model, loaded.config, store.classes)
    return Resources(loaded=_knowing_frame(loaded, store.frame), store=store)


def _knowing_frame(loaded: LoadedModel, frame: Frame | None) -> LoadedModel:
    """The same, where a classifier reads its answer at end tokens, of rows that may have some within."""
    objective = loaded.objective
    if frame is None or not isinstance(objective, SequenceClassification) or objective.end_token is None:
        return loaded
    within = (*frame.before, *frame.between).count(objective.end_token)
    return replace(loaded, objective=replace(objective, ends=1 + within))


def _look_at(config: RunConfig, cache: Path) -> None:
    """Find a wrong path or column before a model is pre-trained for it."""
    data = config.data
    if data.source == "store":
        UserStore.open(str(data.path))
        return
    if config.model.task == "sequence-classification" and resolve(data).label_column is None:
        raise without_labels()
    source = open_source(resolve(data), cache)
    if data.source != "docstrings":
        next(source.read(), None)
