"""From a configuration to an opened user store: built once, found again by what it depends on."""

import dataclasses
import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedsim.cache import default_cache, unwritable
from fedsim.data.chat import REFUSED
from fedsim.data.collect import STATE, Collection
from fedsim.data.config import DataConfig
from fedsim.data.doubts import owner_columns
from fedsim.data.encode import Framed, TextEncoder
from fedsim.data.recipes import resolve
from fedsim.data.records import Tally
from fedsim.data.regroup import write_regrouped
from fedsim.data.sources import Progress, Source, open_source, silent
from fedsim.data.spool import Spooled, refuse_bad_rows, spool
from fedsim.data.store import FORMAT, MANIFEST, UserStore
from fedsim.disk import require_writable
from fedsim.errors import InvalidInput

logger = logging.getLogger(__name__)

NOT_CONTENT = {"memory_limit", "bad_rows"}
"""Fields that do not change what is in a finished store."""
LATER = {"delimiter": None, "encoding": "utf-8", "several_owners": "drop", "regroup": "none", "regroup_share": 1.0}
"""Fields that came later, and the value with which a store is what it was without them: it keeps its key."""
PARTIAL_FORMAT = 4
"""Of what an interrupted build leaves: that of another version is begun anew."""
FULL = ("No space left", "max_temp_directory_size")
"""How Arrow and DuckDB say that a disk is full."""
NO_MEMORY = "Out of Memory Error"
"""How DuckDB says that it needs more than it may take."""


def open_or_build(
    config: DataConfig,
    tokenizer: Any,
    cache: Path | None = None,
    progress: Progress = silent,
    *,
    apart: bool = False,
) -> UserStore:
    """The store of this data with this tokenizer: from the cache, or built there now.

    Args:
        config: Which data, and how it becomes rows.
        tokenizer: See `TextEncoder`.
        cache: Folder of the cache; by default FEDSIM_CACHE or ~/.cache/fedsim.
        progress: Told what is being done.
        apart: An encoder is to read the prompts and a decoder to write the texts.

    Raises:
        InvalidInput: See `build_store`; or a prepared store is of rows of the other kind.
    """
    cache = cache or default_cache()
    config = resolve(config)
    encoder = _encoder(config, tokenizer, apart)
    if config.source == "store":
        return _prepared(Path(str(config.path)), encoder)
    if config.regroup != "none":
        return _regrouped(config, tokenizer, None, cache, progress, apart)
    source = open_source(config, cache, progress)
    recipe = _recipe(config, source, encoder)
    return _build(config, source, encoder, recipe, cache / "stores" / recipe["key"], cache, progress)


def build_store(
    config: DataConfig,
    tokenizer: Any,
    output: str | Path,
    cache: Path | None = None,
    progress: Progress = silent,
    *,
    apart: bool = False,
) -> UserStore:
    """Build the store of this data in a folder of its own, or open it there if it is already that store.

    The work is done beside it, in `output` + ".partial", and moved in one step at the end: a folder with a manifest
    is a finished store. An interrupted build goes on where it stopped when it is called again with the same
    configuration, tokenizer and data. Memory stays within config.memory_limit plus a few hundred MB.

    Args:
        config: Which data, and how it becomes rows.
        tokenizer: See `TextEncoder`.
        output: Folder of the store; must not exist, unless it holds this very store.
        cache: Folder where docstrings are kept; by default FEDSIM_CACHE or ~/.cache/fedsim.
        progress: Told what is being done.
        apart: An encoder is to read the prompts and a decoder to write the texts.

    Raises:
        InvalidInput: If a path, package, data set or column does not exist; if no user has enough text; if rows are
            bad and config.bad_rows is "refuse"; if output holds something else or cannot be written; if rows are to
            be apart and there are no prompts.
    """
    if config.source == "store":
        raise InvalidInput("data.source", "store", "docstrings, files or hub to build a store")
    cache = cache or default_cache()
    config = resolve(config)
    if config.regroup != "none":
        return _regrouped(config, tokenizer, Path(output), cache, progress, apart)
    encoder = _encoder(config, tokenizer, apart)
    source = open_source(config, cache, progress)
    return _build(config, source, encoder, _recipe(config, source, encoder), Path(output), cache, progress)


def _regrouped(
    config: DataConfig, tokenizer: Any, output: Path | None, cache: Path, progress: Progress, apart: bool
) -> UserStore:
    """The store of made-up users: from that of the real ones, which is built or found in the cache."""
    real = open_or_build(
        dataclasses.replace(config, regroup="none", regroup_share=1.0), tokenizer, cache, progress, apart=apart
    )
    dealt = {"regroup": config.regroup, "regroup_share": config.regroup_share}
    recipe = real.manifest["recipe"]
    text = json.dumps([recipe["key"], dealt], sort_keys=True)
    recipe = recipe | {
        "data": recipe["data"] | dealt,
        "key": hashlib.blake2b(text.encode(), digest_size=12).hexdigest(),
    }
    output = output or cache / "stores" / recipe["key"]
    if cache not in output.parents:
        _finished(output, recipe["key"])
        require_writable(output)
    with _alone(output, cache), _room_for(output, cache, config.memory_limit):
        if not _finished(output, recipe["key"]):
            write_regrouped(real, config.regroup, config.regroup_share, config.split_seed, recipe, output, progress)
    return UserStore.open(output)


def _prepared(path: Path, encoder: TextEncoder) -> UserStore:
    """A store that prepare wrote, if its tokens mean the same to this tokenizer."""
    store = UserStore.open(path)
    if store.manifest["tokenizer"] != encoder.fingerprint:
        hint = "Its tokens came from another tokenizer: prepare it again with this model."
        raise InvalidInput("data.path", str(path), "a store of the model's own tokenizer", hint)
    if store.manifest["apart"] != (encoder.framed == "apart"):
        allowed = f"a store prepared {'with' if encoder.framed == 'apart' else 'without'} --model.task seq2seq-lm"
        raise InvalidInput("data.path", str(path), allowed, "Prepare it again with this model and task.")
    return store


def _encoder(config: DataConfig, tokenizer: Any, apart: bool) -> TextEncoder:
    """How texts become tokens.

    Labelled rows are read by a classifier: each needs the special tokens, but for conversations, in which the chat
    template writes them.
    """
    framed: Framed | None = None
    if apart:
        framed = "apart"
        if config.source != "store" and not config.prompt_column:
            hint = "It is what the encoder reads; the decoder learns to write the text."
            raise InvalidInput("data.prompt-column", config.prompt_column, "a column for an encoder–decoder", hint)
    elif config.label_column and not config.messages_column:
        framed = "pair" if config.prompt_column else "text"
    encoder = TextEncoder(
        tokenizer,
        special_tokens=config.special_tokens,
        end_of_text=config.end_of_text,
        framed=framed,
        replies=config.replies,
    )
    least = len(encoder.frame or ()) + (1 if framed == "text" else 2)
    if config.sequence_length < least:
        allowed = f"at least {least}: the tokenizer's special tokens, which every row gets, and some text"
        raise InvalidInput("data.sequence-length", config.sequence_length, allowed)
    return encoder


def _recipe(config: DataConfig, source: Source, encoder: TextEncoder) -> dict[str, Any]:
    """Everything the store's content depends on, and its hash."""
    fields = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in NOT_CONTENT and not (name in LATER and value == LATER[name])
    }
    recipe = {"format": FORMAT, "data": fields, "source": source.identity, "tokenizer": encoder.fingerprint}
    recipe["apart"] = encoder.framed == "apart"
    if encoder.frame is not None:
        recipe["frame"] = dataclasses.asdict(encoder.frame)
    text = json.dumps(recipe, sort_keys=True, default=str)
    return {**json.loads(text), "key": hashlib.blake2b(text.encode(), digest_size=12).hexdigest()}


def _build(
    config: DataConfig,
    source: Source,
    encoder: TextEncoder,
    recipe: dict[str, Any],
    output: Path,
    cache: Path,
    progress: Progress,
) -> UserStore:
    partial = output.with_name(output.name + ".partial")
    if cache not in output.parents:  # what is refused leaves no lock beside it
        _finished(output, recipe["key"])
        require_writable(output)
    with _alone(output, cache), _room_for(output, cache, config.memory_limit):
        if _finished(output, recipe["key"]):
            store = UserStore.open(output)
            refuse_bad_rows(config, store.manifest["bad_rows"])
            return store
        _start(partial, recipe["key"])
        # Named by what they are of: whoever still writes for a build that was killed does not write here.
        spooled = spool(source, config, encoder, partial / "parts" / recipe["key"], progress)
        if (bad := spooled.bad).total:
            counts = f"{bad.total:,} of {spooled.records:,}"
            logger.warning("%s records left out (not private: counted without noise): %s", counts, bad.in_words())
        undeclared = owner_columns(source.beside())
        _write(config, encoder, recipe, partial, spooled, undeclared, progress)
        os.replace(partial / "store", output)
        shutil.rmtree(partial)
    return UserStore.open(output)


@contextmanager
def _alone(output: Path, cache: Path) -> Iterator[None]:
    """While this lasts no other process builds the store; one that wants to waits and then finds it."""
    lock = FileLock(str(output.with_name(output.name + ".lock")))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if cache in output.parents:
            raise unwritable(cache, error) from None
        raise InvalidInput("output", str(output), "in a folder that can be written", f"{error}.") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _room_for(output: Path, cache: Path, memory_limit: str) -> Iterator[None]:
    """While the store is written.

    Raises:
        InvalidInput: If the disk is full, or the memory that is allowed too little.
    """
    try:
        yield
    except Exception as error:  # DuckDB's are of a class of its own
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            mark in str(error) for mark in FULL
        )
        # While the sorted rows are read, Arrow raises what DuckDB ran into, as an OSError.
        starved = type(error).__name__ == "OutOfMemoryException" or NO_MEMORY in str(error)
        if not full and starved:
            hint = "The same command with more goes on where this one stopped."
            raise InvalidInput("data.memory-limit", memory_limit, "enough to sort what there is", hint) from error
        if not full:
            raise
        hint = "Free some space, or choose a folder elsewhere. The same command goes on where it stopped."
        named, value = ("FEDSIM_CACHE", cache) if cache in output.parents else ("output", output)
        raise InvalidInput(named, str(value), "on a disk with enough space", hint) from error


def _finished(output: Path, key: str) -> bool:
    """Whether the store is there already; anything else there is refused."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    manifest = output / MANIFEST
    if not manifest.is_file():
        raise InvalidInput("output", str(output), "a new folder or a store of the same data")
    if UserStore.open(output).manifest["recipe"]["key"] != key:
        hint = "It holds a store of other data, settings or tokenizer: choose another folder or remove it."
        raise InvalidInput("output", str(output), "a new folder or a store of the same data", hint)
    return True


def _start(partial: Path, key: str) -> None:
    """Keep what an interrupted build of the same store left; begin anew otherwise."""
    mark, begun = partial / "key", f"{key} {PARTIAL_FORMAT}"
    if partial.exists() and not (mark.is_file() and mark.read_text() == begun):
        shutil.rmtree(partial)
    partial.mkdir(exist_ok=True)
    mark.write_text(begun)
    unfinished = ["scratch"] if (partial / STATE).is_file() else ["scratch", "store", "names"]
    for folder in unfinished:
        shutil.rmtree(partial / folder, ignore_errors=True)
    for folder in ("scratch", "store"):
        (partial / folder).mkdir(exist_ok=True)


def _write(
    config: DataConfig,
    encoder: TextEncoder,
    recipe: dict[str, Any],
    partial: Path,
    spooled: Spooled,
    undeclared_owners: list[str],
    progress: Progress,
) -> None:
    """Second pass: group, cut and write."""
    records, bad = spooled.records, spooled.bad
    if not spooled.examples:
        raise _no_user(config, records, bad)
    collection = Collection(partial, spooled, config, encoder)
    collection.run(progress)
    if collection.splits["train"][1] == 0:
        raise _no_user(config, records, bad)
    manifest = {
        "records": records,
        "bad_rows": bad.to_json(),
        "duplicates": collection.done.duplicates,
        "doubtful_rows": spooled.doubtful.to_json(),
        "undeclared_owners": undeclared_owners,
        **(collection.done.doubts or {}),
        "classes": collection.done.classes,
        "vocabulary_size": encoder.vocabulary_size,
        "tokenizer": encoder.fingerprint,
        "apart": encoder.framed == "apart",
        "recipe": recipe,
    }
    progress("Writing the store", 0, 1)
    collection.writer.finish(collection.names.kept(), collection.splits, manifest)
    progress("Writing the store", 1, 1)


def _no_user(config: DataConfig, records: int, bad: Tally) -> InvalidInput:
    refused = {reason: count for reason, count in bad.counts.items() if reason.startswith(REFUSED)}
    if refused and bad.total == records:
        allowed = "conversations as the tokenizer's chat template takes them"
        hint = f"{sum(refused.values()):,} of {records:,} records: {bad.in_words()}."
        return InvalidInput("data.messages-column", config.messages_column, allowed, hint)
    where = config.path or ", ".join(config.packages)
    hint = (
        f"It has {records} records ({bad.in_words() or 'none bad'}); no user is left for training with "
        f"{config.minimum_rows} row(s) of {config.minimum_tokens} tokens: lower data.minimum-tokens or "
        "data.minimum-rows, or bring more text."
    )
    named = "data.path" if config.path else "data.packages"
    return InvalidInput(named, where, "data in which a user has enough text", hint)
