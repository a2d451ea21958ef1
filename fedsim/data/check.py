"""Which records are good enough to train on, and why the others are not."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedsim.data.records import BadRows, Malformed, Records

Render = Callable[[list[dict[str, str]]], tuple[str, str]]
"""A conversation as (what is read, what is to be predicted)."""


def good_records(
    part: Sequence[Records], columns: Mapping[str, str], render: Render, bad: BadRows
) -> dict[str, list[str]]:
    """The good records of a part.

    Args:
        part: Records in order.
        columns: The column of each role ("user", "text" or "messages", …).
        render: Turns a conversation into text.
        bad: Counts those left out.

    Returns:
        For each of the roles "user", "text", and where the data has them "prompt" and "label", one string a record.
    """
    roles = [role for role in columns if role not in ("owners", "messages")]
    if "messages" in columns:
        roles += ["prompt", "text"]
    good: dict[str, list[str]] = {role: [] for role in roles}
    for records in part:
        values = {role: records.columns[column] for role, column in columns.items()}
        if values.keys() <= {"user", "text"} and _all_good(values["user"], values["text"]):
            good["user"] += map(str, values["user"])
            good["text"] += values["text"]
            continue
        for place, row in enumerate(zip(*values.values(), strict=True)):
            try:
                record = _check(dict(zip(values, row, strict=True)), render)
            except _Bad as reason:
                bad.add(str(reason), f"{records.origin}:{records.first + place}")
                continue
            for role in roles:
                good[role].append(record[role])
    return good


def _all_good(users: Sequence[Any], texts: Sequence[Any]) -> bool:
    """Whether every record passes `_check`: no loop in Python for the data that most people have."""
    kinds = set(map(type, users))
    if not (kinds <= {int} or (kinds <= {str} and all(map(str.strip, users)) and _is_unicode(users))):
        return False
    return set(map(type, texts)) <= {str} and all(map(str.strip, texts)) and _is_unicode(texts)


def _is_unicode(values: Sequence[str]) -> bool:
    """Whether none holds a lone surrogate (bytes that were not UTF-8, or half a character escaped in JSON)."""
    if all(map(str.isascii, values)):
        return True
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


class _Bad(Exception):
    """Why a record is left out."""


def _check(record: dict[str, Any], render: Render) -> dict[str, str]:
    if whole := next((value for value in record.values() if isinstance(value, Malformed)), None):
        raise _Bad(whole.reason)
    owners = record.pop("owners", None)
    if owners is not None and len(set(owners if isinstance(owners, list) else [owners])) > 1:
        raise _Bad("several owners")
    good = {"user": _name(record.pop("user"), "user")}
    if "label" in record:
        good["label"] = _name(record.pop("label"), "label")
    if "messages" in record:
        good["prompt"], good["text"] = render(_messages(record.pop("messages")))
    for role, value in record.items():
        if value is None and role == "prompt":
            value = ""
        if value is None:
            raise _Bad(f"missing {role}")
        if not isinstance(value, str):
            raise _Bad(f"{role} of the wrong type ({type(value).__name__})")
        good[role] = value
    if not good["text"].strip():
        raise _Bad("empty text")
    if not _is_unicode(list(good.values())):
        raise _Bad("invalid UTF-8")
    return good


def _name(value: Any, role: str) -> str:
    """A user or label as a string; whole numbers are written alike whether stored as integer or float."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise _Bad(f"missing {role}")
    if isinstance(value, str):
        if not value or value.isspace():
            raise _Bad(f"missing {role}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _Bad(f"{role} of the wrong type ({type(value).__name__})")
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _messages(value: Any) -> list[dict[str, str]]:
    if value is None or value == []:
        raise _Bad("missing messages")
    fits = isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )
    if not fits:
        raise _Bad("messages of the wrong type")
    return list(value)
