"""Where a model is read from: a plain model, or LoRA adapters and the base that they belong to."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME

from fedsim.errors import InvalidInput
from fedsim.hugging_face import hub_failure

BASE = "base"
"""Sub-folder of exported adapters with their base, where nobody else has it."""
EXPORT = "model"
"""Sub-folder of a run with what it exported."""
RUN_FILES = ("ledger.jsonl", "privacy.json")
"""What tells the folder of a run, whose config.json is none of a model, from others without weights."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a path stands for.

    Attributes:
        base: Name or folder of the model, or of the one under the adapters.
        adapters: Name or folder of LoRA adapters on it; None for a plain model.
        revision: Of the base on the hub, where its adapters name one.
        carried: Whether the base is found nowhere else, so that exports of adapters take it along.
        cached: Whether names stand for what the hub's client has on this machine, for the hub does not answer.
    """

    base: str
    adapters: str | None = None
    revision: str | None = None
    carried: bool = False
    cached: bool = False

    @property
    def tokenizer(self) -> str:
        """Name or folder of the tokenizer: what lies beside the adapters, for they may have added tokens."""
        if self.adapters is not None and file_of(self.adapters, "tokenizer_config.json", self.cached):
            return self.adapters
        return self.base


def find_source(path: str) -> Source:
    """What a path stands for: a model or PEFT's adapters, by folder or by name on the hub, or the folder of a run.

    Args:
        path: As `ModelConfig.path`, but for the default model.

    Raises:
        InvalidInput: There is no such folder; or it holds adapters of another kind than LoRA, or such whose base is
            not there; or it is the folder of a run that has exported no model yet.
    """
    place = _place(path)
    cached = not Path(place).is_dir() and hub_failure(place, "model") is not None
    try:
        settings = adapter_settings(place, cached)
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error).strip().splitlines()[0]) from error
    if settings is None:
        return Source(base=place, cached=cached)
    kind = str(settings.get("peft_type"))
    if kind != "LORA":
        hint = f"{ADAPTER_CONFIG_NAME} says {kind}. Merge such adapters into their base by PEFT and name the result."
        raise InvalidInput("model.path", path, "a model, or adapters of PEFT's kind LORA", hint)
    beside = Path(place) / BASE
    if beside.is_dir():
        return Source(base=str(beside), adapters=place, carried=True)
    base = _base_named(path, place, settings.get("base_model_name_or_path"))
    cached = cached or (not Path(base).is_dir() and hub_failure(base, "model") is not None)
    return Source(base=base, adapters=place, revision=settings.get("revision"), cached=cached)


def adapter_settings(place: str, cached: bool = False) -> dict[str, Any] | None:
    """adapter_config.json of a folder or name; None where it has none."""
    found = file_of(place, ADAPTER_CONFIG_NAME, cached)
    if found is None:
        return None
    settings = json.loads(Path(found).read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{ADAPTER_CONFIG_NAME} holds no object")
    return settings


def adapter_weights(source: Source) -> str:
    """File with the weights of adapters, of the one format that runs no code when it is read.

    Raises:
        InvalidInput: There is none.
    """
    found = file_of(source.adapters or "", ADAPTER_SAFE_WEIGHTS_NAME, source.cached)
    if found is None:
        hint = f"It has no {ADAPTER_SAFE_WEIGHTS_NAME}; pickled weights can run code and are not read: convert them."
        raise InvalidInput("model.path", source.adapters, "adapters with safetensors weights", hint)
    return found


def file_of(place: str, name: str, cached: bool, revision: str | None = None) -> str | None:
    """A file of a folder, or of a name on the hub (at a revision) or in its client's cache; None where it has none."""
    if Path(place).is_dir():
        found = Path(place) / name
        return str(found) if found.is_file() else None
    file: str | None = cached_file(
        place,
        name,
        local_files_only=cached,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return file


def _place(path: str) -> str:
    """The folder, that within a run's, or the name on the hub."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise _unreadable(path, f"there is no folder {folder}.")
        return path
    if _is_run(folder) and not _holds_model(folder / EXPORT):
        hint = f"Finish it first: train --resume {path}"
        raise InvalidInput("model.path", path, "the folder of a run that has exported its model", hint)
    return str((folder / EXPORT if _is_run(folder) else folder).resolve())


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES) and not any(folder.glob("*.safetensors"))


def _holds_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG_NAME))


def _base_named(path: str, adapters: str, name: Any) -> str:
    """Name or folder of the base that adapters name.

    Relative folders are PEFT's, from where the program runs, or from where the adapters lie.
    """
    allowed = "adapters whose base can be read"
    if not isinstance(name, str) or not name:
        raise InvalidInput("model.path", path, allowed, f"Set base_model_name_or_path in {ADAPTER_CONFIG_NAME}.")
    hint = f"They belong to {name}"
    for folder in (Path(name).expanduser(), Path(adapters) / name):
        if folder.is_dir():
            if not (folder / "config.json").is_file() or (folder / ADAPTER_CONFIG_NAME).is_file():
                raise InvalidInput("model.path", path, allowed, f"{hint}, which is no plain model.")
            return str(folder.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        where = f"put it there, into {Path(adapters) / BASE}, or set base_model_name_or_path in {ADAPTER_CONFIG_NAME}"
        raise InvalidInput("model.path", path, allowed, f"{hint}, and there is no such folder: {where}.")
    return name


def _unreadable(path: str, reason: str) -> InvalidInput:
    allowed = "a model with safetensors weights and a tokenizer, or LoRA adapters: a folder, or a name on the hub"
    return InvalidInput("model.path", path, allowed, f"Loading it said: {reason}")
