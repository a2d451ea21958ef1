"""Models that are given as objects, kept in a folder of the cache, for every process that computes to open.

A model of transformers is kept in its own format. Any other module is pickled, with the code of its class where that
is of a script or notebook; so is an objective of one's own. Pickles run code when they are read: they are read from
the cache alone, where this user's own processes wrote them.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import tokenizers
import torch
from safetensors.torch import load_model, save_model
from transformers import PretrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fedsim.cache import default_cache, written_to
from fedsim.errors import InvalidInput
from fedsim.models.fingerprint import tokenizer_fingerprint, weights_fingerprint
from fedsim.models.lora import has_adapters
from fedsim.models.quiet import quiet_transformers

FOLDER = "given"
"""Sub-folder of the cache."""
SAID = "said_by_fedsim"
"""Attribute of a module without a configuration of transformers, for what config.json says of it."""
MODULE, OBJECTIVE, WEIGHTS, DESCRIPTION = "module.pkl", "objective.pkl", "model.safetensors", "config.json"


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a folder of the cache keeps.

    Attributes:
        module: A module of one's own; None for a model of transformers.
        objective: What it is trained by, where that is one's own.
    """

    module: torch.nn.Module | None
    objective: Any | None

    @classmethod
    def read(cls, path: str) -> "Given":
        """What was kept at a path; nothing of a folder that lies elsewhere than in the cache."""
        folder = Path(path)
        if folder.parent.resolve() != (default_cache() / FOLDER).resolve():
            return cls(module=None, objective=None)
        return cls(module=_unpickled(folder / MODULE), objective=_unpickled(folder / OBJECTIVE))


def keep_model(
    model: torch.nn.Module,
    tokenizer: Any,
    objective: Any | None,
    cache: Path,
    accounting: tuple[Path, ...] = (),
) -> Path:
    """The folder that holds a model, its tokenizer, and the objective where it is one's own.

    Args:
        model: A model of transformers, PEFT's adapters on one whose base lies in a folder or on the hub, or any module
            that maps what the objective gives it to what the objective reads.
        tokenizer: Of transformers, or a `tokenizers.Tokenizer`.
        objective: See `fedsim.gradients.Objective`; None takes the one of the model's task.
        cache: Folder of the cache.
        accounting: Ledger and statement of the run that the model comes from: they go along.

    Raises:
        InvalidInput: The tokenizer is none of these, or the module cannot be pickled or written.
    """
    from transformers import PreTrainedModel  # here, because a worker need not import it: it takes seconds

    own = not (isinstance(model, PreTrainedModel) or has_adapters(model)) or _of_own_code(model)
    kept_tokenizer = _tokenizer(tokenizer)
    pickles = {OBJECTIVE: _pickled("objective", objective)} if objective is not None else {}
    if own:
        pickles[MODULE] = _pickled("model", model)
    key = _key(model, kept_tokenizer, [*pickles.values(), *(file.read_bytes() for file in accounting)])
    folder = cache / FOLDER / f"model-{key}"
    if folder.is_dir():
        return folder

    def write(unfinished: Path) -> None:
        for name, content in pickles.items():
            (unfinished / name).write_bytes(content)
        with quiet_transformers():
            if own:
                save_own(model, unfinished)
            else:
                model.save_pretrained(unfinished)  # type: ignore[operator]
            kept_tokenizer.save_pretrained(unfinished)
        for file in accounting:
            shutil.copy(file, unfinished)

    _made(folder, cache, write)
    return folder


def say_of(model: Any, name: str, value: Any) -> None:
    """Let a model's config.json say something of it, wherever the model is saved from now on."""
    if isinstance(config := getattr(model, "config", None), PretrainedConfig):
        setattr(config, name, value)
    else:
        setattr(model, SAID, said_of(model) | {name: value})


def said_of(model: Any) -> dict[str, Any]:
    """What config.json says, or would say, of a model."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):  # a module of one's own may call anything its config
        return dict(getattr(model, SAID, {}))
    said: dict[str, Any] = config.to_dict()
    return said


def save_own(model: torch.nn.Module, folder: Path, **said: str) -> None:
    """Write the weights of a module of one's own, and what is said of it now and was before."""
    with torch.no_grad():
        save_model(model, str(folder / WEIGHTS))
    described = {"module": _name(model)} | getattr(model, SAID, {}) | said
    (folder / DESCRIPTION).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def load_own(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Put the weights that save_own wrote into a module of the same shape, in place."""
    load_model(model, str(folder / WEIGHTS))
    return model


def _tokenizer(tokenizer: Any) -> PreTrainedTokenizerBase:
    if isinstance(tokenizer, tokenizers.Tokenizer):
        made: Any = PreTrainedTokenizerFast
        tokenizer = made(tokenizer_object=tokenizer)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        hint = "A model that is given as an object does not say how text becomes its tokens."
        raise InvalidInput(
            "tokenizer",
            tokenizer if tokenizer is None else type(tokenizer).__name__,
            "the model's: one of transformers, or a tokenizers.Tokenizer",
            hint,
        )
    return tokenizer


def _of_own_code(model: Any) -> bool:
    """Whether transformers' own classes cannot read what it saves: its class is somebody's own."""
    return not type(model).__module__.startswith(("transformers.", "peft."))


def _name(model: torch.nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _key(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, further: Iterable[bytes]) -> str:
    config: Any = getattr(model, "config", None)
    digest = hashlib.blake2b(digest_size=12)
    parts = [_name(model), weights_fingerprint(model), tokenizer_fingerprint(tokenizer)]
    parts += [config.to_json_string()] if hasattr(config, "to_json_string") else []
    for part in [*(part.encode() for part in parts), *further]:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _pickled(what: str, value: Any) -> bytes:
    try:
        pickled: bytes = cloudpickle.dumps(value)
    except Exception as error:  # whatever the object's own code raises
        hint = f"Pickling it said: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        raise InvalidInput(what, type(value).__name__, "an object that other processes can be sent", hint) from error
    return pickled


def _unpickled(file: Path) -> Any | None:
    return cloudpickle.loads(file.read_bytes()) if file.is_file() else None


def _made(folder: Path, cache: Path, write: Callable[[Path], None]) -> None:
    """Make a folder, complete or not at all, that its owner alone can read."""
    with written_to(cache):
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".model-", dir=folder.parent))
    try:
        try:
            write(unfinished)
        except (RuntimeError, ValueError, NotImplementedError) as error:
            hint = f"Saving it said: {str(error).splitlines()[0]}"
            raise InvalidInput("model", folder.name, "a model that can be saved", hint) from error
        if not folder.exists():
            os.replace(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
