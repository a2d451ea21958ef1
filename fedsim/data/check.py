"""Which records are good enough to train on, and why the others are not."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

from fedsim.data.chat import Conversation
from fedsim.data.config import MISSING_IDS
from fedsim.data.records import JOINED, Astray, BadRecord, Malformed, Records, Tally
from fedsim.data.user_ids import canonical_id

Render = Callable[[list[dict[str, str]]], Conversation]
"""A conversation as text."""
Join = Callable[[Collection[str]], str]
"""One name for the owners of an example."""

BINARY_USER = (
    "user whose bytes are no text in UTF-8 (binary ids that are no text: write them as UUIDs or in hexadecimal)"
)
NO_TEXT = "invalid UTF-8 (or another encoding: data.encoding)"
OWNERS_UNREAD = "owners that cannot be read (not a list of ids, nor a JSON list as text; see data.owners-separator)"


def good_records(
    part: Sequence[Records],
    columns: Mapping[str, str],
    render: Render,
    bad: Tally,
    *,
    doubtful: Tally | None = None,
    normalised: bool = False,
    missing_ids: Collection[str] = MISSING_IDS,
    owners_separator: str | None = None,
    join: Join | None = None,
) -> dict[str, list[Any]]:
    """The good records of a part.

    Args:
        part: Records in order.
        columns: The column of each role ("user", "text" or "messages", …).
        render: Turns a conversation into text; raises BadRecord for one that it cannot.
        bad: Counts those left out.
        doubtful: Counts those of the good ones that may be several.
        normalised: See `canonical_id`.
        missing_ids: See `canonical_id`; for users and owners. A class may well be called "none".
        owners_separator: What stands between the owners where they are text; without one a text must be a JSON list.
        join: Makes one name of the owners of an example, which then is its user; raises BadRecord where they cannot
            own one together. Without it an example of several owners is left out.

    Returns:
        For each of the roles "user", "text" or "messages", and where the data has them "prompt" and "label", one
        string a record (a Conversation for "messages"); users and labels as `canonical_id` writes them.
    """
    roles = [role for role in columns if role != "owners"]
    good: dict[str, list[Any]] = {role: [] for role in roles}
    identify = partial(canonical_id, normalised=normalised, missing=frozenset(missing_ids))
    doubtful = Tally() if doubtful is None else doubtful
    for records in part:
        joined = set(records.joined)
        values = {role: records.columns[column] for role, column in columns.items()}
        if values.keys() <= {"user", "text"} and (names := _all_good(values["user"], values["text"], identify)):
            good["user"] += map(names.__getitem__, values["user"])
            good["text"] += values["text"]
            for place in sorted(joined):
                doubtful.add(JOINED, records.position(place))
            continue
        for place, row in enumerate(zip(*values.values(), strict=True)):
            try:
                record = _check(dict(zip(values, row, strict=True)), render, identify, owners_separator, join)
            except BadRecord as reason:
                bad.add(str(reason), records.position(place))
                continue
            if place in joined:
                doubtful.add(JOINED, records.position(place))
            for role in roles:
                good[role].append(record[role])
    return good


def _all_good(users: Sequence[Any], texts: Sequence[Any], identify: Callable[..., str]) -> dict[Any, str] | None:
    """The id of each user where every record is good: no loop over records for the data that most people have."""
    kinds = set(map(type, users))
    if not (kinds <= {int} or kinds <= {str}) or not set(map(type, texts)) <= {str}:
        return None
    if not (all(map(str.strip, texts)) and _is_unicode(texts)):
        return None
    try:
        names = {user: identify(user) for user in set(users)}
    except BadRecord:
        return None
    return names if _is_unicode(list(names.values())) else None


def _is_unicode(values: Sequence[str]) -> bool:
    """Whether none holds a lone surrogate (bytes that were not UTF-8, or half a character escaped in JSON)."""
    if all(map(str.isascii, values)):
        return True
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(
    record: dict[str, Any],
    render: Render,
    identify: Callable[..., str],
    owners_separator: str | None,
    join: Join | None,
) -> dict[str, Any]:
    """A record's strings by role, and its conversation.

    Raises:
        BadRecord: Why it is left out.
    """
    if whole := next((value for value in record.values() if isinstance(value, Malformed)), None):
        raise BadRecord(whole.reason)
    owners = record.pop("owners", None)
    if isinstance(owners, Astray):
        raise BadRecord(OWNERS_UNREAD)
    record = {role: None if isinstance(value, Astray) else value for role, value in record.items()}
    good: dict[str, Any] = {"user": identify(record.pop("user"))}
    if not _is_unicode([good["user"]]):
        raise BadRecord(BINARY_USER)
    names = {good["user"]}
    if owners is not None:
        named = {identify(owner, "owner") for owner in _listed(owners, owners_separator)}
        if len(named) > 1 and join is None:
            raise BadRecord("several owners")
        if named and good["user"] not in named:
            # A text that is no list may name several people ("u0;u1"), unless it is the user's own id.
            unread = owners_separator is None and named == {owners if isinstance(owners, str) else None}
            raise BadRecord(OWNERS_UNREAD if unread else "owners without the user")
        names |= named
    if join is not None:
        if not _is_unicode(list(names)):
            raise BadRecord(BINARY_USER)
        good["user"] = join(names)
    if "label" in record:
        good["label"] = canonical_id(record.pop("label"), "label")
    if "messages" in record:
        good["messages"] = render(_messages(record.pop("messages")))
    for role, value in record.items():
        if value is None and role == "prompt":
            value = ""
        if value is None:
            raise BadRecord(f"missing {role}")
        if not isinstance(value, str):
            raise BadRecord(f"{role} of the wrong type ({type(value).__name__})")
        good[role] = value
    texts = [value.text if isinstance(value, Conversation) else value for value in good.values()]
    if not (good["messages"].text if "messages" in good else good["text"]).strip():
        raise BadRecord("empty text")
    if not _is_unicode(texts):
        raise BadRecord(NO_TEXT)
    return good


def _listed(owners: Any, separator: str | None) -> list[Any]:
    """The owners one by one, from a list, a JSON list as text, text with separators, or an id alone; none where it
    names nobody, as in an empty cell."""
    if isinstance(owners, str) and not owners.strip():
        return []
    if isinstance(owners, str) and separator is not None:
        return [part.strip() for part in owners.split(separator) if part.strip()]
    if isinstance(owners, str) and owners.lstrip().startswith("["):
        try:
            owners = json.loads(owners)
        except (ValueError, RecursionError):
            raise BadRecord(OWNERS_UNREAD) from None
    listed = list(owners) if isinstance(owners, list | tuple) else [owners]
    if any(isinstance(owner, list | tuple | dict | bool) for owner in listed):
        raise BadRecord(OWNERS_UNREAD)
    return listed


def _messages(value: Any) -> list[dict[str, str]]:
    if value is None or value == []:
        raise BadRecord("missing messages")
    fits = isinstance(value, list) and all(
        isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
        for item in value
    )
    if not fits:
        raise BadRecord("messages of the wrong type")
    return list(value)
