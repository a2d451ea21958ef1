"""One person, one id: what a user is called, whatever the file format and whoever wrote the file.

Two mistakes are possible. Two people under one id are protected as one: their text counts less than it could, and the
guarantee holds for both. One person under two ids is protected as two: the ε that is stated is too small. So every
doubt about a number's notation ends in one id, and an id whose digits are lost ends in a bad row; text that is no
number is taken as it stands.
"""

import math
import re
import unicodedata
from collections.abc import Collection
from decimal import Decimal
from typing import Any
from uuid import UUID

import numpy as np

from fedsim.data.records import MARK, BadRecord

WHOLE_FLOATS = 2**53
"""From here on a double stands for several whole numbers."""

NUMBER = re.compile(r"\s*([+-]?)(?=\.?[0-9])(0|[1-9][0-9]*|)(?:(\.)([0-9]*))?(?:([eE])([+-]?)([0-9]{1,3}))?\s*")
ROUNDED = re.compile(r"[+-]?[1-9](\.[0-9]{1,5})?E\+[0-9]{2}")
"""How spreadsheets show, and save, a number of twelve digits or more: six of them are left."""
UUID_LIKE = re.compile(r"\{?([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})\}?")
UUID_TEXT = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
SHOWS_NOTHING = "\\s\u200b\u200c\u200d\u2060\ufeff"
BLANK_ENDS = re.compile(f"^[{SHOWS_NOTHING}]+|[{SHOWS_NOTHING}]+$")
LEADING_ZEROS = re.compile(r"^0+(?=[0-9])")


def canonical_id(
    value: Any, role: str = "user", *, normalised: bool = False, missing: Collection[str] = frozenset()
) -> str:
    """The id that a value stands for: equal for equal ids from CSV, JSON, Parquet, Arrow and the hub.

    Numbers are equal by value: 7, 7.0, "7", "7.00", "+7", " 7", "7e0", Decimal("7.0") and numpy's or Arrow's integers
    of any width are all "7" (a column of integers becomes one of floats, written with ".0", as soon as one id is
    missing, and exponents come from Java, R and spreadsheets). -0 is 0. Fractions are equal as doubles; .5 is 0.5.

    Texts that are no number in this sense stay as they are: leading zeros ("007" is a code, not 7), digits of other
    scripts, "123e4567" (a hash: nothing writes a float without a point, a sign or a mantissa of one digit). A UUID is
    written in small letters. Byte-order marks at the ends are dropped.

    Refused, because several people may have had this id before digits were lost: fractional notation from 2**53 on
    (2**24 for single precision), where a double is the image of several whole numbers, what spreadsheets round to six
    digits (1.23457E+11), and what a double takes for zero (1.0e-400). Whole numbers as such are exact at any size.

    Args:
        value: What the data holds.
        role: What it is the name of, for the reason ("user", "label").
        normalised: Also take texts as one that differ only by blanks at their ends or by how accented letters are
            composed (`normal_form`).
        missing: What stands for a missing one ("nan", "NULL"), as it is written, blanks at its ends aside, or as id.

    Raises:
        BadRecord: If it is missing (None, NaN, nothing but blanks, or in `missing`), of another type (truth values,
            lists, dates), not finite, or one whose digits are lost.
    """
    found = _identified(value, role, normalised)
    if missing and (found in missing or (isinstance(value, str) and normal_form(value) in missing)):
        raise BadRecord(f"missing {role}")
    return found


def _identified(value: Any, role: str, normalised: bool) -> str:
    if isinstance(value, str):
        return _of_text(normal_form(value) if normalised else value.strip(MARK), role)
    if value is None:
        raise BadRecord(f"missing {role}")
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return str(int(value))
    if isinstance(value, Decimal):
        return _of_decimal(value, role)
    if isinstance(value, float | np.floating):
        return _of_float(value, role)
    if isinstance(value, UUID):
        return str(value)
    raise BadRecord(f"{role} of the wrong type ({type(value).__name__})")


def normal_form(text: str) -> str:
    """A text without blanks or invisible characters at its ends, accented letters composed (Unicode NFC)."""
    if text.isascii():
        return text.strip()
    return BLANK_ENDS.sub("", unicodedata.normalize("NFC", text))


def loose_form(text: str) -> str:
    """What ids have in common that somebody may have meant as one: also without case, width of letters, leading zeros,
    and the signs that may stand in a UUID."""
    folded = unicodedata.normalize("NFKC", normal_form(text)).casefold()
    uuid = UUID_LIKE.fullmatch(folded)
    return "".join(uuid.groups()) if uuid else LEADING_ZEROS.sub("", folded)


def _of_text(text: str, role: str) -> str:
    if not text or text.isspace():
        raise BadRecord(f"missing {role}")
    number = NUMBER.fullmatch(text)
    if number is None:
        return text.lower() if UUID_TEXT.fullmatch(text) else text
    sign, digits, point, fraction, exponent, exponent_sign, power = number.groups()
    digits = digits or "0"
    if exponent is None and not (fraction or "").strip("0"):
        return _whole(sign, digits, role, exact=point is None)
    written_by_floats = point or exponent_sign
    if exponent and not written_by_floats and (len(digits) > 1 or int(power) > 15):
        return text
    if exponent and ROUNDED.fullmatch(text.strip()) and int(power) > 10:
        raise BadRecord(f"{role} rounded by a spreadsheet")
    value = Decimal(text.strip())
    if value == value.to_integral_value():
        if abs(value) >= WHOLE_FLOATS:
            raise _digits_lost(role)
        return str(int(value))
    return _as_double(value, role)


def _whole(sign: str, digits: str, role: str, *, exact: bool) -> str:
    if not exact and (len(digits) > 16 or int(digits) >= WHOLE_FLOATS):
        raise _digits_lost(role)
    return f"-{digits}" if sign == "-" and digits != "0" else digits


def _of_decimal(value: Decimal, role: str) -> str:
    if value.is_nan():
        raise BadRecord(f"missing {role}")
    if not value.is_finite():
        raise BadRecord(f"{role} that is not finite")
    if value.adjusted() < 1000 and value == value.to_integral_value():
        return str(int(value))
    return _as_double(value, role)


def _as_double(value: Decimal, role: str) -> str:
    double = float(value)
    if value and not double:
        raise BadRecord(f"{role} too near to zero for a float")
    return _of_float(double, role)


def _of_float(value: Any, role: str) -> str:
    if math.isnan(value):
        raise BadRecord(f"missing {role}")
    if not math.isfinite(value):
        raise BadRecord(f"{role} that is not finite")
    limit = WHOLE_FLOATS if isinstance(value, float) else 2 ** (np.finfo(type(value)).nmant + 1)
    if not float(value).is_integer():
        # The shortest text that gives a single-precision number back, as it would stand in a text file.
        return repr(value if type(value) is float else float(str(value)))
    if abs(value) >= limit:
        raise _digits_lost(role)
    return str(int(value))


def _digits_lost(role: str) -> BadRecord:
    return BadRecord(f"{role} of which digits are lost (a whole number kept as a float)")
