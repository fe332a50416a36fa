"""How a command ends: exit statuses that scripts can rely on, and a sentence of what to do next."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

OK, FAILED, USAGE, BAD_DATA, CANNOT_CREATE, CANNOT_WRITE, LOCKED, BAD_CONFIG, STOPPED = 0, 1, 2, 65, 73, 74, 75, 78, 130
_REMAKE = "nothing has moved; make or import it anew, or name another: `lvm models` lists what there is"
_DATA = "a data set is a directory that `lvm data` made, or a corpus of the registry, as artifacts/lvm/retriever"
_LINE = 'a line of .jsonl is {"title": ..., "text": ...} or {"title": ..., "chunks": [...]}'
_DEVICE = "say cpu, which is always there, or install what it needs: `make dev`"
_GROUP = "`ls -ld` shows whose it is; a group shares a registry that it may write: chmod -R g+rwX, g+s for directories"
ENDS: Mapping[str, tuple[int, str]] = {  # by the name of an error's class, for most are not imported: status, what next
    "RegistryLocked": (LOCKED, "somebody else is moving an alias; try again in a moment"),
    "AliasMoved": (LOCKED, "look at `lvm models`, then promote again if you still want to"),
    "BrokenAlias": (FAILED, "`lvm models` lists versions, and the aliases that lost their links"),
    "UnknownVersion": (FAILED, "`lvm models` lists versions and aliases; `lvm promote ALIAS VERSION` sets an alias"),
    "NothingToRollBack": (FAILED, "`lvm promote ALIAS VERSION` moves it instead; `lvm models` lists what there is"),
    "BadName": (USAGE, "lower-case letters, digits, `-`, `_` and `.`, at most 64, name a model"),
    "RegistryError": (FAILED, "set LVM_REGISTRY to the directory of versions and aliases"),
    "PromotionRejected": (
        BAD_DATA,
        "mend what it objects to; or, knowing better, --force --why TEXT, which the ledger keeps",
    ),
    "BadCheckpoint": (BAD_DATA, _REMAKE),
    "Corrupt": (BAD_DATA, _REMAKE),
    "BadCard": (BAD_DATA, _REMAKE),
    "BadCorpus": (BAD_DATA, _DATA),
    "NoWindows": (BAD_DATA, "articles need more chunks than a context has; --context-length shortens it"),
    "BadIndex": (BAD_DATA, "--index flat searches exactly"),
    "BadArticles": (BAD_DATA, f"name a .jsonl, .jsonl.gz or .txt file, a directory of .txt, or - for a pipe; {_LINE}"),
    "NothingToRank": (FAILED, "`lvm train` or `lvm import` makes nets; `lvm models` lists those there are"),
    "NotAsTrained": (FAILED, "report it: the net that would be served is not the one that was trained"),
    "AnotherRun": (FAILED, "--resume wants the very options it was begun with; without it, the run begins anew"),
    "BadSettings": (BAD_CONFIG, "docs/settings.md has every setting with its unit and default"),
    "CannotListen": (BAD_CONFIG, "--host 127.0.0.1 keeps it on this machine, --port 0 picks a free port"),
    "NoSuchDevice": (BAD_CONFIG, _DEVICE),
    "EncoderError": (BAD_CONFIG, "`make text` installs all-MiniLM-L6-v2; others want `pip install -e '.[data]'`"),
    "ImportError": (
        BAD_CONFIG,
        "`make dev` installs it; `pip install -c constraints.txt -e '.[data]'` for encoders, '.[ray]' for --ray",
    ),
    "IndexUnavailable": (FAILED, "see that the Milvus of --uri or LVM_MILVUS_URI runs; the same command then goes on"),
    "BadCollection": (FAILED, "--anew drops that collection and makes another; searches are done here meanwhile"),
    "BadCosts": (
        FAILED,
        "`python -m bench.capacity measure` measures this machine; --cores and --memory-gb describe others",
    ),
    "NoKnee": (FAILED, "allow more milliseconds, fewer --rows, or a quicker --net"),
    "BadConfig": (USAGE, "`lvm train --help` names the nets; --config takes their sizes as JSON"),
    "UnfitTeacher": (USAGE, "`lvm models` says which T and D versions have"),
    "FileExistsError": (CANNOT_CREATE, "name another place, or remove what is there"),
    "UnsupportedRemote": (
        BAD_CONFIG,
        "`pip install -c constraints.txt -e '.[fsspec]'`, and s3fs for s3://, gcsfs for gs://",
    ),
    "RemoteUnavailable": (
        LOCKED,
        "look at the network, the credentials and the URL; what was mirrored before serves without",
    ),
    "BadAliasRecord": (BAD_DATA, "`lvm push URL` publishes the aliases anew"),
    "PermissionError": (CANNOT_WRITE, _GROUP),
    "OSError": (CANNOT_WRITE, "look at the path, its rights and the disk; what was there is as it was"),
}


def end_of(error: Exception) -> tuple[int, str] | None:
    """Return the exit status of an expected error and what to do next, None for one that nobody expected."""
    return next((ENDS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in ENDS), None)


def plain(text: str) -> str:
    """Return a text with what a terminal would obey, or cannot show, escaped; lines stay lines."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def run(command: Callable[[], object]) -> NoReturn:
    """Run a command and exit with its status; an expected error is two lines on stderr."""
    _hold_standard_descriptors()
    try:
        command()
    except Exception as error:
        end = end_of(error)
        if end is None:
            raise
        status, hint = end
        with suppress(OSError):  # the status says it as well
            print(plain(f"lvm: {error}\nnext: {hint}"), file=sys.stderr)
        sys.exit(status)
    sys.exit(OK)


def _hold_standard_descriptors() -> None:
    """Keep the numbers 0, 1 and 2 from connections and files if they were closed.

    What is opened there cannot be written, so that lines that go there are dropped, and counted.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # takes the lowest number that is free
            os.set_inheritable(number, True)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # else `print` would say it on stdout
