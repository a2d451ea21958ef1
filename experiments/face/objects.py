"""Models, rows and objectives that are given as objects, as options of a configuration that every process can read."""

import re
from pathlib import Path
from typing import Any

from experiments.face.outcomes import FOLDER_MARK, FineTuned
from fedsim.cache import default_cache
from fedsim.data.given import keep_rows
from fedsim.data.sources import ROLES
from fedsim.data.store import MANIFEST, UserStore
from fedsim.errors import InvalidInput
from fedsim.models.given import keep_model, said_of
from fedsim.privacy.earlier import LEDGER, MARK, STATEMENT, digest_of


def model_options(model: Any, tokenizer: Any, objective: Any) -> dict[str, Any]:
    """Options that name a model.

    Args:
        model: A name or path; a module, of transformers or of one's own; or what an earlier fine_tune returned.
        tokenizer: The module's.
        objective: One's own, or None.

    Raises:
        InvalidInput: It is none of these, or a tokenizer or objective is given beside a path.
    """
    import torch

    if isinstance(model, FineTuned):
        model = model.folder
    if isinstance(model, str | Path):
        if tokenizer is not None:
            hint = "A model that is named brings its tokenizer along."
            raise InvalidInput("tokenizer", type(tokenizer).__name__, "left out beside a model's name or path", hint)
        if objective is None:
            return {"model_path": str(model)}
        hint = "Load the model, and give it with its tokenizer as objects."
        raise InvalidInput("objective", type(objective).__name__, "left out beside a model's name or path", hint)
    if not isinstance(model, torch.nn.Module):
        raise InvalidInput("model", type(model).__name__, "a name, a path, a torch.nn.Module, or a fine-tuned result")
    folder = keep_model(model, tokenizer, objective, default_cache(), _accounting(model))
    asking = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    frozen = 0 < len(asking) < len(list(model.parameters()))
    return {"model_path": str(folder)} | ({"model_trainable": tuple(map(_exactly, asking))} if frozen else {})


def _exactly(name: str) -> str:
    """What fits this parameter's name alone; the name itself fits those that it is a part of, too."""
    return f"^{re.escape(name)}$"


def rows_options(rows: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Options that name the users' rows.

    Args:
        rows: A path of files or of a prepared store, an opened store, or rows as `keep_rows` takes them.
        options: The other keywords: which columns are asked for.

    Raises:
        InvalidInput: Rows are none of these, or are given beside another source.
    """
    if rows is None:
        return {}
    for name in ("source", "data_source", "recipe", "data_recipe", "data_path"):
        if options.get(name) is not None:
            raise InvalidInput(name, options[name], "left out beside rows")
    if isinstance(rows, UserStore):
        return {"data_source": "store", "data_path": str(rows.path)}
    if isinstance(rows, str | Path):
        prepared = (Path(rows).expanduser() / MANIFEST).is_file()
        return {"data_source": "store" if prepared else "files", "data_path": str(rows)}
    file = keep_rows(rows, default_cache(), _columns(options))
    return {"data_source": "files", "data_path": str(file)}


def _columns(options: dict[str, Any]) -> set[str]:
    named = {role: options.get(f"{role}_column") or options.get(f"data_{role}_column") for role in ROLES}
    return {named["user"] or "user_id", named["text"] or "text", *filter(None, named.values())}


def _accounting(model: Any) -> tuple[Path, ...]:
    """Ledger and statement of the run that a model in memory comes from, wherever they lie.

    Raises:
        InvalidInput: The model says that it comes from a run, whose ledger is in none of these places. What would be
            written of it need not say so: adapters do not, nor modules with a configuration of transformers.
    """
    mark = said_of(model).get(MARK)
    places = [getattr(model, FOLDER_MARK, None), getattr(getattr(model, "config", None), "_name_or_path", None)]
    for place in (Path(place) for place in places if place):
        files = (place / LEDGER, place / STATEMENT)
        if all(file.is_file() for file in files) and mark in (None, digest_of(files[0])):
            return files
    if mark is not None:
        hint = "Give the run's result or its folder, or put the file back: without it nothing can be stated."
        raise InvalidInput("model", type(model).__name__, f"a model of a run with its {LEDGER} and {STATEMENT}", hint)
    return ()
