"""What makes it doubtful that a user is a person, and a person's text that person's: pointed out, never decided.

The guarantee is for one user as the data has it. Where one person writes under two ids, or two people wrote one text,
it covers each a part; only who brings the data can tell.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.data.group import MANY_USERS
from fedsim.data.records import JOINED

OWNERS = re.compile(
    r"(co)?(owner|author|writer|editor|contributor|committer|participant|collaborator|member|speaker|signer|sender"
    r"|creator|person|user)s?|people"
)
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
LIST_AS_TEXT = re.compile(r"\s*\[.*\]\s*|[^;|]+[;|][^;|].*", re.DOTALL)


def owner_columns(columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """Columns that may list the owners of an example: named like it, and with lists among their values.

    Args:
        columns: A few values of each column; in text formats a list is a JSON list or words around semicolons or bars.
    """
    return [
        name
        for name, values in columns.items()
        if any(OWNERS.fullmatch(word.lower()) for word in WORDS.findall(name))
        and any(isinstance(v, list | tuple) or (isinstance(v, str) and LIST_AS_TEXT.fullmatch(v)) for v in values)
    ]


def doubtful_owners(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences about text that may be another's than the store has it, said again whenever training begins."""
    return joined_rows(manifest) + undeclared_owners(manifest)


def joined_rows(manifest: Mapping[str, Any]) -> list[str]:
    """A sentence about rows of CSV files that two stray quotes may have made out of several."""
    found = manifest.get("doubtful_rows", {}).get(JOINED)
    if not found:
        return []
    return [
        f"Records of several lines of which {JOINED}: {found['count']:,} (first: {', '.join(found['first'])}). By the "
        "format each is one user's, with line breaks in its text; but where its quotes are stray ones, the lines are "
        "several users', and all their text counts as one's. Look at these lines, and mend the file if so, or use "
        "--data.quotes none where quotes are letters like others."
    ]


def undeclared_owners(manifest: Mapping[str, Any]) -> list[str]:
    """Sentences about columns that may list owners and were not named when the store was built."""
    return [
        f"The column {name!r} looks as if it listed the owners of each example, and was not read: what several people "
        f"own is protected for one of them alone. Name it with --data.owners-column {name}, which leaves such "
        "examples out, or make sure that it says something else."
        for name in manifest.get("undeclared_owners", [])
    ]


def in_words(manifest: Mapping[str, Any]) -> list[str]:
    """Everything doubtful about a store's users, a sentence or two each."""
    sentences = doubtful_owners(manifest)
    similar = manifest.get("similar_users", {})
    if found := similar.get("blanks or accents"):
        sentences.append(
            f"{_groups(found)} that differ only by blanks at the ends or by how accented letters are composed: "
            f"{_pairs(found)}. Each counts as a user of its own; --data.user-ids normalised makes them one."
        )
    if found := similar.get("case or leading zeros"):
        sentences.append(
            f"{_groups(found)} that differ only by case, leading zeros or the like: {_pairs(found)}. Each counts as a "
            "user of its own: where they are one person, write them alike in the data."
        )
    if found := manifest.get("joint_users"):
        sentences.append(
            f"User ids that hold another user's between separators: {found['users']:,} "
            f"({', '.join(map(repr, found['examples']))}). Each counts as a user of its own: where they are joint "
            "owners, leave those examples out or list the owners in a column for --data.owners-column; where they are "
            "one person by another name, write them alike in the data."
        )
    if found := manifest.get("shared_texts"):
        sentences.append(
            f"Longer texts that {MANY_USERS} users or more have word for word: {found['texts']:,} "
            f"({found['examples']:,} examples; at most {found['most_users']:,} users share one). Each user's copy is "
            "protected, what many hold is not: leave out what was forwarded, quoted or copied."
        )
    return sentences


def _groups(found: Mapping[str, Any]) -> str:
    return f"{found['users']:,} user ids in {found['groups']:,} group{'s' if found['groups'] > 1 else ''}"


def _pairs(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{one!r} and {another!r}" for one, another in found["examples"])
