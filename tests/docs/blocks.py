"""The fenced blocks of the documents, and whether an answer is what a block shows, `...` standing for anything."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REST = "..."


class Block(NamedTuple):
    """A fenced block: where it begins, its language, what it holds, and the block that follows it at once, if any."""

    where: str
    language: str
    text: str
    shown: str = ""  # language and text of what comes of it, "" where the document does not say


def read(document: Path) -> Iterator[Block]:
    """Yield the blocks of a document; `json` or `text` behind a command or program is what comes of it."""
    found, text = list(FENCE.finditer(document.read_text())), document.read_text()
    for match, after in zip(found, [*found[1:], None], strict=True):
        where = f"{document.name}:{text.count(chr(10), 0, match.start()) + 1}"
        follows = after is not None and not text[match.end() : after.start()].strip()
        is_outcome = after is not None and follows and after[1] in ("json", "text") and match[1] in ("sh", "python")
        yield Block(where, match[1], match[2], after[2] if after is not None and is_outcome else "")


def parse(shown: str) -> Any:
    """Return JSON where `...` may stand for a value, or the rest of a string, of a list (`... 10 in all`) or object."""
    text = re.sub(r":\s*\.\.\.", f': "{REST}"', shown)
    text = re.sub(r"(?<=[\[,])\s*\.\.\.([^\]},]*)(?=\])", lambda match: f'"{REST}{match[1]}"', text)
    return json.loads(re.sub(r",\s*\.\.\.(?=\s*\})", f', "{REST}": 0', text))


def fault_of_output(shown: str, output: str, errors: str) -> str | None:
    """Return where what a command printed differs from what is shown: JSON on stdout, or lines of either stream."""
    if shown.lstrip().startswith(("{", "[")):
        return fault(parse(shown), last_document(output))
    printed = output + errors
    missing = (line for line in shown.splitlines() if not re.search(pattern(line), printed))
    return next((f"{line!r} is not in {printed!r}" for line in missing), None)


def pattern(line: str) -> str:
    """Return the regular expression of a line in which `...` stands for anything."""
    return ".*".join(map(re.escape, line.split(REST)))


def last_document(text: str) -> Any:
    """Return the last of the JSON documents that follow each other in a text."""
    decoder, found, at = json.JSONDecoder(), None, 0
    while at < len(text):
        found, at = decoder.raw_decode(text, at)
        at += len(text[at:]) - len(text[at:].lstrip())
    return found


def fault(shown: Any, found: Any, place: str = "") -> str | None:
    """Return where `found` is not what was `shown`, None where it is."""
    if isinstance(shown, dict) and isinstance(found, dict):
        return _fault_of_object(shown, found, place)
    if isinstance(shown, list) and isinstance(found, list):
        return _fault_of_list(shown, found, place)
    if isinstance(shown, str) and isinstance(found, str) and shown.endswith(REST):
        return None if found.startswith(shown.removesuffix(REST)) else f"{place}: {found!r}"
    if isinstance(shown, float) and isinstance(found, float):
        return None if math.isclose(shown, found, abs_tol=1e-4) else f"{place}: {found}"
    return None if shown in (REST, found) else f"{place}: {found!r}, shown is {shown!r}"


def _fault_of_object(shown: dict[str, Any], found: dict[str, Any], place: str) -> str | None:
    names = shown.keys() - {REST}
    if not names <= found.keys() or (names != found.keys() and REST not in shown):
        return f"{place}: {', '.join(found)}; shown are {', '.join(names)}"
    faults = (fault(shown[name], found[name], f"{place}/{name}") for name in names)
    return next(filter(None, faults), None)


def _fault_of_list(shown: list[Any], found: list[Any], place: str) -> str | None:
    is_cut = bool(shown) and isinstance(shown[-1], str) and shown[-1].startswith(REST)
    count = re.search(r"\d+", shown[-1]) if is_cut else None
    items = shown[:-1] if is_cut else shown
    if len(found) < len(items) or (not is_cut and len(found) > len(items)) or (count and int(count[0]) != len(found)):
        return f"{place}: {len(found)} items"
    faults = (fault(item, found[at], f"{place}/{at}") for at, item in enumerate(items))
    return next(filter(None, faults), None)
