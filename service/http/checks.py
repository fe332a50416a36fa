"""Checks of options: each takes a value and its JSON pointer, and returns the value or raises `Invalid`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from lvm.errors import Invalid, TooLarge

Check = Callable[[Any, str], Any]
MAX_FILTER_FIELDS = 16
# in all fields together
MAX_FILTER_VALUES = 1000
# characters of a value
MAX_FILTER_TEXT = 1000


def text(value: Any, pointer: str) -> str:
    """A short string."""
    if not isinstance(value, str) or not 0 < len(value) <= 200 or _plain_text(value) != value:
        raise Invalid("expected a string of 1 to 200 characters", pointer=pointer)
    return value


def passage(most: int) -> Check:
    """A text of at most `most` characters that is not blank."""

    def check(value: Any, pointer: str) -> str:
        if not isinstance(value, str) or not value.strip():
            raise Invalid("expected a string that is not blank", pointer=pointer)
        if _plain_text(value) != value:
            raise Invalid("half of a surrogate pair; expected valid Unicode", pointer=pointer)
        if len(value) > most:
            raise TooLarge(f"{len(value)} characters; expected at most {most}", pointer=pointer)
        return value

    return check


def passages(most: int) -> Check:
    """A list of texts, of at most `most` characters together, none of them blank."""
    each = passage(most)

    def check(value: Any, pointer: str) -> list[str]:
        if not isinstance(value, list) or not value:
            raise Invalid("expected a list of strings that is not empty", pointer=pointer)
        texts = [each(item, f"{pointer}/{at}") for at, item in enumerate(value)]
        each("".join(texts), pointer)
        return texts

    return check


def texts(most: int, each: int, characters: int) -> Check:
    """A list of at most `most` texts of at most `each` characters, `characters` together, none of them blank."""
    one = passage(each)

    def check(value: Any, pointer: str) -> list[str]:
        if not isinstance(value, list) or not value:
            raise Invalid("expected a list of strings that is not empty", pointer=pointer)
        if len(value) > most:
            raise TooLarge(f"{len(value)} texts; expected at most {most}", pointer=pointer)
        found = [one(item, f"{pointer}/{at}") for at, item in enumerate(value)]
        if (count := sum(map(len, found))) > characters:
            raise TooLarge(f"{count} characters; expected at most {characters}", pointer=pointer)
        return found

    return check


def one_of(*choices: str) -> Check:
    """One of a few words."""

    def check(value: Any, pointer: str) -> str:
        if not isinstance(value, str) or value not in choices:
            raise Invalid(f"expected one of {', '.join(choices)}", pointer=pointer)
        return value

    return check


def whole(least: int, most: int) -> Check:
    """A whole number in a range, 10.0 as well as 10, but not a boolean."""

    def check(value: Any, pointer: str) -> int:
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= most:
            raise Invalid(f"expected a whole number from {least} to {most}", pointer=pointer)
        return value

    return check


def wholes(most: int) -> Check:
    """A list of at most `most` whole numbers, not negative."""
    each = whole(0, 2**53)

    def check(value: Any, pointer: str) -> list[int]:
        if not isinstance(value, list) or len(value) > most:
            raise Invalid(f"expected a list of at most {most} ids", pointer=pointer)
        return [each(item, f"{pointer}/{at}") for at, item in enumerate(value)]

    return check


def share(value: Any, pointer: str) -> float:
    """A number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise Invalid("expected a number from 0 to 1", pointer=pointer)
    return float(value)


def search_filter(value: Any, pointer: str) -> dict[str, list[str | int | float | bool]]:
    """An object of fields, each with a value or a list of values; the corpus knows whether it has them."""
    if not isinstance(value, dict) or len(value) > MAX_FILTER_FIELDS:
        raise Invalid(f"expected an object of at most {MAX_FILTER_FIELDS} fields", pointer=pointer)
    wanted = {name: _filter_values(item, f"{pointer}/{escaped(name)}") for name, item in value.items()}
    if (count := sum(map(len, wanted.values()))) > MAX_FILTER_VALUES:
        raise Invalid(f"{count} values; a filter has at most {MAX_FILTER_VALUES}", pointer=pointer)
    return wanted


def _filter_values(value: Any, pointer: str) -> list[str | int | float | bool]:
    if not isinstance(value, list):
        return [_filter_value(value, pointer)]
    if len(value) > MAX_FILTER_VALUES:
        raise Invalid(f"{len(value)} values; a filter has at most {MAX_FILTER_VALUES}", pointer=pointer)
    return [_filter_value(item, f"{pointer}/{at}") for at, item in enumerate(value)]


def _filter_value(value: Any, pointer: str) -> str | int | float | bool:
    if isinstance(value, str) and len(value) <= MAX_FILTER_TEXT and _plain_text(value) == value:
        return value
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else value
    raise Invalid(
        f"expected a string of at most {MAX_FILTER_TEXT} characters, a number, true or false", pointer=pointer
    )


def flag(value: Any, pointer: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise Invalid("expected true or false", pointer=pointer)
    return value


def query_options(given: Mapping[str, str], options: Mapping[str, Check]) -> dict[str, Any]:
    """Return the options of a query string, with the same checks as those of a JSON body.

    Raises:
        Invalid: an option is unknown, of the wrong kind or out of range.
    """
    reject_unknown(given, options, "option")
    return {name: _from_query(options[name], value, f"/{name}") for name, value in given.items()}


def _from_query(check: Check, value: str, pointer: str) -> Any:
    """Check a query option as a word, else as JSON: a number, true, false, a list."""
    try:
        return check(value, pointer)
    except Invalid:
        return check(_json_or_word(value), pointer)


def _json_or_word(value: str) -> Any:
    try:
        return json.loads(value, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("duplicate key")
    return found


def reject_unknown(names: Iterable[str], known: Collection[str], what: str, pointer: str = "") -> None:
    """Raise `Invalid` if one of `names`, which are members of what `pointer` points at, is not `known`."""
    unknown = sorted(name for name in names if name not in known)
    if unknown:
        name = escaped(unknown[0])
        expected = ", ".join(sorted(known)) or "none"
        raise Invalid(f'unknown {what} "{name}"; known: {expected}', pointer=f"{pointer}/{name}")


def escaped(name: str) -> str:
    """Return a name as a JSON pointer has it, at most 100 characters of it."""
    return _plain_text(name[:100]).replace("~", "~0").replace("/", "~1")


def _plain_text(value: str) -> str:
    return value.encode("utf-8", "replace").decode()  # JSON can escape half of a surrogate pair
