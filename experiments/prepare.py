"""The `prepare` command: text by user to a user store that training opens at once."""

import json
import sys
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from fedsim.cache import default_cache
from fedsim.data.config import DataConfig
from fedsim.data.doubts import in_words
from fedsim.data.ingest import build_store, open_or_build
from fedsim.data.likeness import diversity_of
from fedsim.data.sources import Progress, public_texts
from fedsim.data.store import SPLITS, UserStore
from fedsim.errors import InvalidInput
from fedsim.models.config import DEFAULT_PATH, ModelConfig
from fedsim.terminal import shown

MOST_MEASURED = 1 << 20
"""Training rows up to which a summary measures how diverse users are: a few seconds."""


@dataclass(frozen=True, kw_only=True)
class Prepare:
    """Build a user store: read, check, encode and group the data by user. Training with the same data and model
    options then opens it at once. An interrupted run goes on where it stopped."""

    data: DataConfig = field(default_factory=DataConfig)
    """Which data, and how it becomes rows of tokens."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model whose tokenizer encodes the text; its task says whether prompt and text are apart."""
    output: str | None = None
    """Folder for the store; by default the cache, where training looks for it. Elsewhere, train on it with
    --data.source store --data.path FOLDER."""
    json: bool = False
    """Print the store's manifest as one JSON object instead of a table."""

    def run(self) -> int:
        try:
            store = self._prepared()
        except KeyboardInterrupt:
            print("go on with the same command: what is read and encoded is kept", file=sys.stderr)
            raise
        if self.json:
            print(json.dumps({"path": str(store.path), **store.manifest}, ensure_ascii=False))
        else:
            _print_summary(store)
        return 0

    def _prepared(self) -> UserStore:
        apart = self.model.reads_apart
        with shown() as progress:
            tokenizer = _tokenizer(self.model, progress)
            if self.output is None:
                return open_or_build(self.data, tokenizer, progress=progress, apart=apart)
            return build_store(self.data, tokenizer, self.output, progress=progress, apart=apart)


def _tokenizer(config: ModelConfig, progress: Progress) -> Any:
    """The model's tokenizer, without the model; the default model's is learnt anew, which takes a second or two."""
    if config.path == DEFAULT_PATH:
        from fedsim.models.tokenizer import train_tokenizer

        return train_tokenizer(public_texts(default_cache(), progress), config.small.vocabulary_size)
    from transformers import AutoTokenizer

    from fedsim.models.refusals import OWN_CODE, reason_of
    from fedsim.models.sources import find_source

    source = find_source(config.path)
    try:
        return AutoTokenizer.from_pretrained(source.tokenizer, local_files_only=source.cached, **OWN_CODE)
    except Exception as error:  # whatever the libraries that read it raise
        allowed = "a folder or a name on the Hugging Face hub with a tokenizer"
        raise InvalidInput("model.path", config.path, allowed, f"It cannot be read: {reason_of(error)}") from error


def _print_summary(store: UserStore) -> None:
    manifest = store.manifest
    console = Console()
    console.print(f"User store {store.path}", soft_wrap=True, markup=False, highlight=False)
    table = Table()
    for column in ("", "users", "rows", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    views = {name: store.split(name) for name in SPLITS} | {"all": store}
    for name, view in views.items():
        table.add_row(name, *(f"{count:,}" for count in (view.num_users, view.num_rows, view.num_tokens)))
    console.print(table)
    console.print("Not private: these counts, and the manifest, are of the users' own data, without noise.")
    train = store.split("train")
    if train.num_rows <= MOST_MEASURED and (share := diversity_of(train).share) == share:
        told = "0 where each user's rows are the same, 1 where they are as different as anybody's"
        console.print(
            f"Diversity of training users, by the words of their rows: {share:.2f} ({told})", highlight=False
        )
    quantiles = ", ".join(f"{name} {count:,}" for name, count in manifest["rows_per_user"].items())
    console.print(f"Rows per user: {quantiles}", highlight=False)
    console.print(
        f"Records read: {manifest['records']:,}; duplicates left out: {manifest['duplicates']:,}", highlight=False
    )
    if manifest["classes"]:
        console.print(f"Classes: {', '.join(manifest['classes'])}", markup=False)
    for reason, entry in manifest["bad_rows"].items():
        first = ", ".join(entry["first"])
        console.print(
            f"Left out: {entry['count']:,} × {reason} (first: {first})", soft_wrap=True, markup=False, highlight=False
        )
    for doubt in in_words(manifest):
        console.print(f"Look at this: {doubt}", soft_wrap=True, markup=False, highlight=False)
