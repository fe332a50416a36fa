"""Output of the commands: data on stdout, as tables or JSON; messages and progress on stderr."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import typer

from lvm.cli.arguments import as_utf8
from lvm.cli.exit_codes import STOPPED, printable
from models.registry import disk
from models.registry.registry import Version

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Progress = Callable[[int, int], None]
# the head and the rows of a table; a cell may have several lines
TableData = tuple[Sequence[str], Sequence[Sequence[str]]]

# a number with its unit, or a dash instead of one
_NUMBER = re.compile(r"-|[-+]?\d[\d,.]*( x| kB| MB| GB)?")
_UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
# characters
_FILE_WIDTH = 160
_UNLIMITED = 10_000
NOTHING_STORED = "nothing was stored; the same command starts over"


def print_message(message: str) -> None:
    """Print a message to stderr."""
    typer.echo(printable(message), err=True)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))


def check_place(path: Path) -> None:
    """Raise `OSError` if no file can be written at `path`; called before the work whose result goes there."""
    place = path.parent if _is_replaceable(path) else path
    code = errno.EISDIR if path.is_dir() else 0 if place.exists() else errno.ENOENT
    if not (code or os.access(place, os.W_OK)):
        code = errno.EACCES
    if code:
        raise OSError(code, os.strerror(code), str(place))


def write_file(path: Path, text: str) -> None:
    """Write a text to `path`, whole or not at all; a device, a pipe or a link is written to as it is."""
    if not _is_replaceable(path):
        path.write_text(text, encoding="utf-8")
        return
    with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
        made = Path(file.name)
        try:
            file.write(text)
            file.flush()
            disk.inherit_permissions(made, path.parent)
            made.replace(path)
        except BaseException:
            made.unlink(missing_ok=True)
            raise


def _is_replaceable(path: Path) -> bool:
    return not path.is_symlink() and (path.is_file() or not path.exists())


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], is_message: bool = False, padding: int = 1) -> None:
    """Print a table to stdout, or a message to stderr; numbers are aligned to the right.

    In a file or a pipe it is 160 characters wide, or so wide that no word is broken. `padding` is the number of spaces
    beside each cell.
    """
    console, table = _console(is_message), _table(head, rows, padding)
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table).minimum)
    console.print(table)


def fits(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether a table fits the terminal without line breaks; in a file or a pipe there is room for any."""
    console = _console()
    wanted = console.options.update(width=_UNLIMITED)
    return not console.is_terminal or console.measure(_table(head, rows), options=wanted).maximum <= console.width


def size_text(size: int) -> str:
    """Return a number of bytes in kB, MB or GB, with one decimal."""
    unit, factor = next((each for each in _UNITS if size >= each[1]), _UNITS[-1])
    return f"{size / factor:.1f} {unit}"


def _console(is_message: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if is_message else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else _FILE_WIDTH, markup=False, emoji=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], padding: int = 1) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, padding))
    for at, title in enumerate(head):
        is_numeric = bool(rows) and all(_NUMBER.fullmatch(line) for row in rows for line in row[at].splitlines())
        table.add_column(title, justify="right" if is_numeric else "left", no_wrap=is_numeric, overflow="fold")
    for row in rows:
        table.add_row(*map(printable, row))
    return table


def print_version(version: Version, as_json: bool, more: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Print the version that was stored; as JSON with the members `more`."""
    if as_json:
        print_json({"version": version.version, "id": version.id, "path": str(version.path), **more})
    else:
        typer.echo(version.id)


def command_line() -> str:
    """Return the running command, for the card of what it makes, without options that do not change the result."""
    words = [as_utf8(word) for word in sys.argv[1:] if word not in ("--resume", "--json")]
    return shlex.join(["lvm", *words])


@contextmanager
def long_work(what: str, when_stopped: Callable[[], str], shows_rate: bool = False) -> Iterator[Progress]:
    """Yield a function of (steps done, steps in all) that shows progress on stderr if it is a terminal.

    The rate, in steps a second, and the time left are those of the last 30 seconds. Ctrl-C ends the command with exit
    code 130 and the text of `when_stopped`.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    rate = TextColumn("{task.fields[rate]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), rate, TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    try:
        with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task(what, total=None, rate="")

            def show(done: int, total: int) -> None:
                speed = bar.tasks[0].speed if shows_rate else None
                bar.update(task, completed=done, total=total, rate=f"{speed:,.0f}/s" if speed else "")

            yield show
    except KeyboardInterrupt:
        print_message(f"lvm: stopped: {when_stopped()}")
        raise typer.Exit(STOPPED) from None


def how_to_continue(target: Path) -> str:
    """Return how to continue the work that would have written `target`."""
    from models.training.work_cache import cache_next_to

    cache = cache_next_to(target).directory
    return f"finished work is in {cache}; the same command continues after it" if cache.exists() else NOTHING_STORED
