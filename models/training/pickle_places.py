"""Finds where a pickle names a class or function. Nothing that the pickle names is imported, made or called."""

from __future__ import annotations

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import IO, Any

# values yet to be looked at: the way to a value, as (the way to its parent, step), and the value
_Way = tuple[Any, str] | None
# a legacy file of torch has its magic number, its protocol and its system before the value
_PICKLES = 4


class _Named:
    """Replaces a class or function, and each value made by it; keeps what the value was made of, and its parts."""

    name = ""
    parts: list[tuple[str, Any]]

    def __new__(cls, *arguments: object, **_: object) -> _Named:
        made = super().__new__(cls)
        made.parts = [("", argument) for argument in arguments]
        return made

    def __init__(self, *_: object, **__: object) -> None:
        """Accept the arguments."""

    def __setstate__(self, state: object) -> None:
        self.parts.append(("", state))

    def __setitem__(self, key: object, value: object) -> None:
        self.parts.append((f".{key}" if isinstance(key, str | int) else "", value))

    def append(self, item: object) -> None:
        """Keep an item of a list."""
        self.parts.append((f"[{len(self.parts)}]", item))

    add = append


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Named]:
        """Return a replacement that knows its name in Python 3."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return type("_Named", (_Named,), {"name": f"{module}.{name}"})

    def persistent_load(self, pid: object) -> object:
        """Return the replacement of the class that an id of torch has, if it has one."""
        parts = pid if isinstance(pid, tuple) else ()
        return next((part for part in parts if _name_of(part)), None)


def place_of(file: IO[bytes], name: str) -> str | None:
    """Return the place of the first value made by the class or function `name`, as `a.b[0]`; None if none is found.

    The place of the outermost value is "". `file` may hold several pickles in a row.
    """
    # a damaged pickle raises anything
    with suppress(Exception):
        for _ in range(_PICKLES):
            way = _way_to(name, _Reader(file, encoding="bytes").load())
            if way is not None:
                return way
    return None


def _way_to(name: str, value: object) -> str | None:
    pending: list[tuple[_Way, Any]] = [(None, value)]
    seen: set[int] = set()
    while pending:
        way, value = pending.pop()
        if _name_of(value) == name:
            return _shown(way)
        if id(value) not in seen:
            seen.add(id(value))
            pending += reversed([((way, step), part) for step, part in _parts(value)])
    return None


def _name_of(value: object) -> str:
    """Return the name of a replacement, or of the replacement that made a value; "" for any other value."""
    kind = value if isinstance(value, type) else type(value)
    return kind.name if issubclass(kind, _Named) else ""


def _parts(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, _Named):
        yield from value.parts
    elif isinstance(value, Mapping):
        yield from ((f".{key}" if isinstance(key, str | int) else "", each) for key, each in value.items())
    elif isinstance(value, list | tuple | set | frozenset):
        yield from ((f"[{number}]", each) for number, each in enumerate(value))


def _shown(way: _Way) -> str:
    steps: list[str] = []
    while way is not None:
        way, step = way
        steps.append(step)
    return "".join(reversed(steps)).lstrip(".")
