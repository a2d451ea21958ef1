"""LEAF's form (Caldas et al. 2018, arXiv 1812.01097): one object of all users, `user_data: {user: {x: […], y: […]}}`.

Each example of x becomes a record of the columns user_id, text, and x, y or whatever lists of that length lie beside.
`text` is x as text: a string as it is; tokens in lists (reddit) with blanks between, without the marks of padding,
beginning and end. A list of several strings is none (sent140's fields, of which the tweet is x.4).
"""

import re
from collections.abc import Collection, Iterator
from typing import Any, BinaryIO

from fedsim.data.json_lines import LineParser
from fedsim.data.json_stream import JsonStream
from fedsim.data.records import Malformed
from fedsim.errors import InvalidInput

BEGINNING = re.compile(
    rb'(?:\xef\xbb\xbf)?\s*\{\s*"(?:(?:users|num_samples|hierarchies)"\s*:\s*\[|user_data"\s*:\s*\{)'
)
"""How such a file may begin; so may JSON lines with a column of that name."""
USERS = "user_data"
BESIDE = ("users", "num_samples", "hierarchies")
MARKS = {"<BOS>", "<EOS>", "<PAD>"}
"""Tokens of LEAF's reddit that are no words of the comment."""
BOTH = (
    "It begins as LEAF's form does, with users in user_data, and has the column {key!r} beside them, as a record has: "
    "rename the column user_data, or write LEAF's files without {key!r}."
)
UNEVEN = Malformed("lists of different lengths for one user")


def users_follow(stream: JsonStream) -> bool:
    """Whether an object of this form begins here: one of users, behind a list of them or with lists called x.

    What only begins alike may be lines of JSON, with a column of that name.
    """
    listed = False
    try:
        if stream.first() != b"{":
            return False
        for key in stream.members():
            if key == USERS:
                return stream.first() == b"{" and (listed or _has_examples(stream))
            if key not in BESIDE:
                return False
            listed = True
            stream.skip()
    except InvalidInput:  # not one value: lines of JSON, perhaps
        return False
    return False


def records_of(stream: BinaryIO, name: str, wanted: Collection[str]) -> Iterator[Any]:
    """The records of a file in this form, user by user; a `Malformed` for a user whose data is none.

    Args:
        stream: From its beginning.
        name: Of the file, for errors.
        wanted: The columns that matter.

    Raises:
        InvalidInput: If the file breaks off or holds more than one such object; if the object has a wanted column
            itself, as a record has; or one user has too much data.
    """
    whole = JsonStream(stream, name)
    parser = LineParser({"x", "y", *wanted})
    for key in whole.members():
        if key != USERS:
            if any(key in (column, column.partition(".")[0]) for column in wanted):
                raise InvalidInput("data.path", name, "LEAF's form, or JSON lines", BOTH.format(key=key))
            whole.skip()
            continue
        for user in whole.members():
            (data,) = parser.parse([whole.value()])
            yield from [data] if isinstance(data, Malformed) else _examples(user, data)
    whole.require_end()


def _has_examples(stream: JsonStream) -> bool:
    """Whether the first user of those that follow has a list of examples."""
    for _ in stream.members():
        if stream.first() != b"{":
            return False
        for key in stream.members():
            if key == "x":
                return stream.first() == b"["
            stream.skip()
        return False
    return False


def _examples(user: str, data: dict[str, Any]) -> Iterator[Any]:
    x = data.get("x")
    if not isinstance(x, list):
        yield {"text": _text(x)} | data | {"user_id": user}
        return
    lists = {name: values for name, values in data.items() if isinstance(values, list)}
    uneven = {name: UNEVEN for name, values in lists.items() if len(values) != len(x)}
    even = {name: values for name, values in lists.items() if name not in uneven}
    for place, example in enumerate(x):
        own = {name: values[place] for name, values in even.items()}
        yield {"text": _text(example), **own, **uneven, "user_id": user}


def _text(example: Any) -> Any:
    """An example as text, where it is one."""
    if isinstance(example, list) and example and all(map(_is_words, example)):
        return " ".join(word for words in example for word in words if word not in MARKS)
    return example


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)
