"""Where the users' text comes from and how it becomes rows of tokens. Plain data, checked on construction."""

import codecs
import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

from fedsim.errors import InvalidInput
from fedsim.validation import require_at_least, require_probability

Source = Literal["docstrings", "files", "hub", "store"]
Recipe = Literal["stackoverflow", "cc-news", "enron"]
LongTexts = Literal["split", "truncate", "pack"]
UserIds = Literal["as-is", "normalised"]
Quotes = Literal["double", "none"]
SeveralOwners = Literal["drop", "keep"]
Replies = Literal["last", "all"]
Regroup = Literal["none", "mixed", "alike"]

MISSING_IDS = ("nan", "NaN", "NA", "N/A", "None", "NULL", "null", "<NA>", "\\N", "#N/A")
"""How pandas, R, spreadsheets and databases write a missing value into text."""
MEMORY_LIMIT = re.compile(r"\d+(\.\d+)?\s*(KB|MB|GB|KiB|MiB|GiB)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The users, their text, and how it is cut into rows. Every example belongs to exactly one user, or to those named
    who own it together."""

    source: Source = "docstrings"
    """docstrings: the modules of installed packages are users, their docstrings the examples. files: JSON, CSV or
    Parquet. hub: a Hugging Face data set. store: a folder that prepare wrote, as it is."""
    path: str | None = None
    """files: a file, folder or pattern ("logs/*.jsonl.gz"); folders named user=ann make a column, user. hub: a data
    set's name, or a local folder. store: the folder."""
    recipe: Recipe | None = None
    """A known data set: fills in the name and the columns that are not given. With --data.source files it reads a
    local copy of the same columns from --data.path."""
    user_column: str | None = None
    """Column that says whose the example is (strings or numbers); "user_id" when not given. As for every column, a
    path names what is inside one: author.id."""
    text_column: str | None = None
    """Column with the text; "text" when not given."""
    prompt_column: str | None = None
    """Column with a prompt that is put before the text and not counted in the loss; with labels, the first text of
    a pair."""
    messages_column: str | None = None
    """Column with a conversation (a list of {"role", "content"}), used in place of the text through the tokenizer's
    chat template."""
    replies: Replies = "last"
    """Conversations. last: the last message alone counts in the loss where the assistant wrote it, else everything.
    all: every message of the assistant counts, to the token that ends its turn, and nothing else."""
    label_column: str | None = None
    """Column with the class, for classification (strings or whole numbers)."""
    label_names: tuple[str, ...] = ()
    """Names of all classes, in the order of the model's outputs; any other label is refused. By default those that the
    data has, sorted: the exported model then names them, and the statement says that they were read from the data."""
    user_ids: UserIds = "as-is"
    """as-is: ids are compared letter by letter (7, 7.0 and "7" are one all the same). normalised: ids that differ only
    by blanks or invisible characters at their ends, or by how accented letters are composed, are one user."""
    missing_ids: tuple[str, ...] = MISSING_IDS
    """What stands for a missing user or owner where a program wrote it as text; such records are bad rows. Empty:
    nothing, because these are people's names. Labels are not affected."""
    owners_column: str | None = None
    """Column that lists all owners of an example (a list of ids; in text formats a JSON list). Where the user is not
    among them, or they cannot be read, it is a bad row; and where there is more than one, but for
    --data.several-owners. An empty list names nobody beside the user."""
    several_owners: SeveralOwners = "drop"
    """Examples with several owners, by --data.owners-column. drop: left out. keep: kept as theirs, for els under
    --plan.adjacency fixed-graph, which claims less: who owns which example is treated as public."""
    owners_separator: str | None = None
    """What stands between the owners where the owners' column is text ("u0;u1")."""
    quotes: Quotes = "double"
    """CSV and TSV. double: a field may stand in double quotes, which are doubled within it (RFC 4180). none: a quote
    is a letter like others, and every line is a record."""
    delimiter: str | None = None
    """CSV and TSV: the character between fields, where it is another than the file's name says (";", "|"; \\t is the
    tab)."""
    encoding: str = "utf-8"
    """Text files: what they are written in, by Python's names (latin-1, cp1252, utf-16, shift_jis)."""
    packages: tuple[str, ...] = ("torch", "transformers", "numpy", "scipy")
    """docstrings: the installed packages whose modules are the users. They are read, not imported."""
    hub_config: str | None = None
    """hub: configuration (subset) of the data set."""
    hub_split: str = "train"
    """hub: split of the data set to read; our own splits are made from its users."""
    hub_revision: str | None = None
    """hub: git revision of the data set."""
    sequence_length: int = 64
    """Most tokens in a row."""
    long_texts: LongTexts = "split"
    """A longer text is split into rows, or truncated to one; pack joins a user's texts end to end and cuts them into
    full rows."""
    minimum_tokens: int = 4
    """Rows with fewer tokens are dropped."""
    minimum_rows: int = 1
    """Users with fewer rows are dropped."""
    deduplicate: bool = True
    """Keep one of the identical examples of a user."""
    special_tokens: bool = True
    """Let the tokenizer add its own special tokens (Llama's beginning-of-text; GPT-2 has none): where an example
    begins, and around every row of a labelled one ([CLS], [SEP])."""
    end_of_text: bool = False
    """End every example with the tokenizer's end-of-text token."""
    validation_fraction: float = 0.1
    """Share of the users held out for validation while training."""
    test_fraction: float = 0.1
    """Share of the users held out for the final test."""
    split_seed: int = 0
    """Key of the hash that assigns users to train, validation and test."""
    regroup: Regroup = "none"
    """For studies of how diverse users are: deal the rows of a split out anew, as many to each user as before. mixed:
    by lot, so that a user's are as different as anybody's. alike: by the words in them, so that a user's resemble each
    other. The users are made up then, and ε is of no person: --release is refused."""
    regroup_share: float = 1.0
    """Share of the rows that regroup moves, drawn by lot under the split's seed; the others stay with their users."""
    bad_rows: Literal["skip", "refuse"] = "skip"
    """Rows of which it is not certain whose they are (no user, quotes or fields that do not match, owners that cannot
    be read), with invalid UTF-8, with empty text, of the wrong type, and conversations that the chat template
    refuses: count and skip, or stop."""
    memory_limit: str = "1GB"
    """Memory that grouping by user may take before it spills to disk."""

    def __post_init__(self) -> None:
        choices = {
            "source": Source,
            "recipe": Recipe,
            "long_texts": LongTexts,
            "user_ids": UserIds,
            "quotes": Quotes,
            "several_owners": SeveralOwners,
            "replies": Replies,
            "regroup": Regroup,
        }
        for name, values in choices.items():
            value, allowed = getattr(self, name), get_args(values)
            if value not in allowed and not (name == "recipe" and value is None):
                raise InvalidInput(f"data.{name.replace('_', '-')}", value, "one of " + ", ".join(allowed))
        if self.bad_rows not in ("skip", "refuse"):
            raise InvalidInput("data.bad-rows", self.bad_rows, "skip or refuse")
        self._check_source()
        require_at_least("data.sequence-length", self.sequence_length, 2)
        require_at_least("data.minimum-tokens", self.minimum_tokens, 2)
        require_at_least("data.minimum-rows", self.minimum_rows, 1)
        require_at_least("data.split-seed", self.split_seed, 0)
        if self.minimum_tokens > self.sequence_length:
            raise InvalidInput("data.minimum-tokens", self.minimum_tokens, f"at most {self.sequence_length}, the row")
        self._check_splits()
        self._check_regroup()
        if not MEMORY_LIMIT.fullmatch(self.memory_limit.strip()):
            raise InvalidInput("data.memory-limit", self.memory_limit, 'a size such as "1GB" or "500MB"')

    def _check_source(self) -> None:
        for role in ("user", "text", "prompt", "messages", "label", "owners"):
            if getattr(self, f"{role}_column") == "":
                raise InvalidInput(f"data.{role}-column", "", "a column's name")
        if self.user_column is not None and self.user_column in (self.text_column, self.prompt_column):
            hint = "Name the column that says whose each text is."
            raise InvalidInput("data.user-column", self.user_column, "another column than the text's", hint)
        if self.source == "files" and not self.path:
            raise InvalidInput("data.path", self.path, "a file, folder or pattern when data.source is files")
        if self.source == "store":
            self._check_store()
        if self.source == "hub" and not (self.path or self.recipe):
            raise InvalidInput("data.path", self.path, "a data set's name or folder when data.source is hub")
        if self.source == "docstrings":
            if not self.packages:
                raise InvalidInput("data.packages", self.packages, "at least one installed package")
            for name in ("path", "recipe", "user_column", "text_column", "prompt_column", "messages_column"):
                if getattr(self, name) is not None:
                    flag = f"data.{name.replace('_', '-')}"
                    hint = "Add --data.source files (or hub) to read your own data."
                    raise InvalidInput(flag, getattr(self, name), "left out when data.source is docstrings", hint)
        if self.replies != "last" and not self.messages_column:
            hint = "Name the conversations with --data.messages-column."
            raise InvalidInput("data.replies", self.replies, "left out without conversations", hint)
        if self.messages_column and (self.prompt_column or self.text_column):
            raise InvalidInput("data.messages-column", self.messages_column, "given without a text or prompt column")
        if self.label_names and len(set(self.label_names)) < max(2, len(self.label_names)):
            raise InvalidInput("data.label-names", self.label_names, "two names or more, each once")
        if self.label_names and not self.label_column and not self.recipe:
            hint = "Name the column with --data.label-column."
            raise InvalidInput("data.label-names", self.label_names, "left out without labels", hint)
        if self.owners_separator is not None and not self.owners_column:
            hint = "Name the column with --data.owners-column."
            raise InvalidInput("data.owners-separator", self.owners_separator, "left out without owners", hint)
        if self.several_owners == "keep":
            if not self.owners_column:
                hint = "Name the column with --data.owners-column."
                raise InvalidInput("data.several-owners", "keep", "drop without owners", hint)
            if self.minimum_rows > 1:
                hint = "Those of users who own an example together count apart from those of each alone."
                raise InvalidInput("data.minimum-rows", self.minimum_rows, "1 with --data.several-owners keep", hint)
        if self.owners_separator == "":
            raise InvalidInput("data.owners-separator", "", "at least one character")
        self._check_text()
        if self.long_texts == "pack" and (self.prompt_column or self.messages_column or self.label_column):
            raise InvalidInput("data.long-texts", "pack", "split or truncate with prompts, messages or labels")

    @property
    def field_delimiter(self) -> str | None:
        """The delimiter itself; None where each file's name tells."""
        return "\t" if self.delimiter in ("\\t", "tab") else self.delimiter

    @property
    def text_encoding(self) -> str:
        """Python's own name of the encoding."""
        return known_encoding(self.encoding) or self.encoding

    def _check_text(self) -> None:
        for name, default in (("quotes", "double"), ("delimiter", None), ("encoding", "utf-8")):
            if getattr(self, name) != default and self.source not in ("files", "store"):
                raise InvalidInput(f"data.{name}", getattr(self, name), "left out unless data.source is files")
        mark = self.field_delimiter
        if mark is not None and (len(mark) != 1 or mark in '"\r\n\0\ufeff'):
            raise InvalidInput("data.delimiter", self.delimiter, 'one character, no quote or line end (";")')
        if known_encoding(self.encoding) is None:
            hint = "docs.python.org lists them under “Standard Encodings”."
            raise InvalidInput(
                "data.encoding", self.encoding, "a text encoding that Python knows, such as cp1252", hint
            )

    def _check_store(self) -> None:
        if not self.path:
            raise InvalidInput("data.path", self.path, "a folder that prepare wrote when data.source is store")
        for item in fields(self):
            if item.name not in ("source", "path") and getattr(self, item.name) != item.default:
                flag = f"data.{item.name.replace('_', '-')}"
                hint = "A store is used as it was prepared: prepare another to change this."
                raise InvalidInput(flag, getattr(self, item.name), "left out when data.source is store", hint)

    def _check_splits(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise InvalidInput(f"data.{name.replace('_', '-')}", getattr(self, name), "at least 0 and below 1")
        if self.validation_fraction + self.test_fraction >= 1:
            total = self.validation_fraction + self.test_fraction
            raise InvalidInput("data.validation-fraction + data.test-fraction", total, "below 1")

    def _check_regroup(self) -> None:
        require_probability("data.regroup-share", self.regroup_share)
        if self.regroup == "none" and self.regroup_share != 1:
            hint = "It does nothing without --data.regroup; name mixed or alike, or leave it out."
            raise InvalidInput("data.regroup-share", self.regroup_share, "1 without data.regroup", hint)
        if self.regroup != "none" and self.several_owners == "keep":
            hint = "Whose an example is would no longer be true."
            raise InvalidInput("data.regroup", self.regroup, "none with --data.several-owners keep", hint)


def known_encoding(name: str) -> str | None:
    """Python's own name of a text encoding; None where there is none of that name."""
    try:
        "".encode(name)  # unlike a look-up, this leaves out what is no encoding of text, as "hex" is not
        codecs.getincrementaldecoder(name)
        return codecs.lookup(name).name
    except (LookupError, ValueError, UnicodeError):
        return None
