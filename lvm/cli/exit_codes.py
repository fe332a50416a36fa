"""Exit codes that scripts can rely on, and the next step after each expected error."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import NoReturn

OK, FAILED, USAGE, BAD_DATA, CANNOT_CREATE, CANNOT_WRITE, LOCKED, BAD_CONFIG, STOPPED = 0, 1, 2, 65, 73, 74, 75, 78, 130
_REMAKE = "nothing has changed; make or import the version again, or choose another from `lvm models`"
_DATA = "a data set is a directory made by `lvm data`, or a corpus of the registry such as artifacts/lvm/retriever"
_LINE = 'a line of .jsonl is {"title": ..., "text": ...} or {"title": ..., "chunks": [...]}'
_DEVICE = (
    "cpu and float32 always work; bf16 and int8 on a CPU need `pip install 'lvm-serve[openvino]'`, "
    "cuda and mps `pip install torch`"
)
_GROUP = "`ls -ld` shows the owner; to share a registry in a group: chmod -R g+rwX, and g+s on directories"
_FSSPEC = "`pip install 'lvm-serve[fsspec]'`, and s3fs for s3:// or gcsfs for gs://"

# the extra that installs a module, by its name
EXTRAS: Mapping[str, str] = {
    "torch": "train",
    "onnx": "train",
    "onnxscript": "train",
    "matplotlib": "load",
    "psutil": "load",
    "ray": "ray",
}
# exit code and next step, by the name of an error's class: most of these classes are not imported
EXITS: Mapping[str, tuple[int, str]] = {
    "RegistryLocked": (LOCKED, "another command is moving an alias; try again in a moment"),
    "AliasMoved": (LOCKED, "look at `lvm models`, then promote again if you still want to"),
    "BrokenAlias": (FAILED, "`lvm models` lists versions, and aliases that are not links"),
    "AmbiguousVersion": (FAILED, "name one of these versions in full, as NAME/VERSION"),
    "UnknownVersion": (FAILED, "`lvm models` lists versions and aliases; `lvm promote ALIAS VERSION` sets an alias"),
    "NothingToRollBack": (FAILED, "`lvm models` lists versions; `lvm promote ALIAS VERSION` points the alias at one"),
    "AliasInUse": (
        FAILED,
        "`lvm promote` points the alias at another version; --force --why TEXT removes all but primary",
    ),
    "BadName": (USAGE, "a name has at most 64 lower-case letters, digits, `-`, `_` and `.`"),
    "RegistryError": (FAILED, "set LVM_REGISTRY to the directory of versions and aliases"),
    "PromotionRejected": (
        BAD_DATA,
        "remove the objections, or override them with --force --why TEXT, which the ledger keeps",
    ),
    "BadOnnx": (
        BAD_DATA,
        "export the net with one float32 input (B, T, D) and one output (B, D), in eval mode; nothing was stored",
    ),
    "BadCheckpoint": (BAD_DATA, _REMAKE),
    "Corrupt": (BAD_DATA, _REMAKE),
    "BadCard": (BAD_DATA, _REMAKE),
    "BadCorpus": (BAD_DATA, _DATA),
    "BadFields": (BAD_DATA, _DATA),
    "BadTensors": (BAD_DATA, _DATA),
    "UnknownField": (USAGE, "a filter names `article`, or a field that `lvm data --metadata` kept"),
    "NoWindows": (BAD_DATA, "use articles with more chunks than a context, or a smaller --context-length"),
    "OtherDimension": (BAD_DATA, "use vectors that the encoder of the model made; `lvm models` shows T and D"),
    "BadIndex": (BAD_DATA, "use --index flat, which searches exactly"),
    "BadArticles": (BAD_DATA, f"name a .jsonl, .jsonl.gz or .txt file, a directory of .txt, or - for a pipe; {_LINE}"),
    "BadArrays": (BAD_DATA, "docs/data.md has the arrays that are read, and how to name others"),
    "NothingToRank": (FAILED, "make nets with `lvm train` or `lvm import`; `lvm models` lists those that exist"),
    "NotAsTrained": (
        FAILED,
        "this is a bug, please report it: the exported net scores differently from the trained one; nothing was stored",
    ),
    "AnotherRun": (FAILED, "--resume needs the options that the run was started with; without it, the run starts over"),
    "BadSettings": (BAD_CONFIG, "docs/settings.md has every setting with its unit and default"),
    "CannotListen": (BAD_CONFIG, "--host 127.0.0.1 keeps it on this machine, --port 0 picks a free port"),
    "NoSuchDevice": (BAD_CONFIG, _DEVICE),
    "EncoderError": (
        BAD_CONFIG,
        "vectors need no encoder; LVM_ENCODER, or --encoder, names another one: `pip install 'lvm-serve[data]'`",
    ),
    "ImportError": (BAD_CONFIG, "in a checkout, `make dev` installs what all commands need"),
    "IndexUnavailable": (
        FAILED,
        "start the Milvus of --uri or LVM_MILVUS_URI; the same command then continues",
    ),
    "BadCollection": (
        FAILED,
        "--anew replaces the collection with a new one; until it is complete, the service searches its own index",
    ),
    "BadCosts": (
        FAILED,
        "`python -m bench.capacity measure` measures this machine; --cores and --memory-gb describe others",
    ),
    "NoKnee": (FAILED, "allow more milliseconds, fewer --rows, or a faster --net"),
    "BadConfig": (USAGE, "`lvm train --help` lists the nets; --config takes their sizes as JSON"),
    "UnfitTeacher": (USAGE, "`lvm models` shows T and D of each version"),
    "FileExistsError": (CANNOT_CREATE, "choose another path, or remove what is there"),
    "UnsupportedRemote": (BAD_CONFIG, _FSSPEC),
    "RemoteUnavailable": (
        LOCKED,
        "check the network, the credentials and the URL; versions that were copied here before can still be served",
    ),
    "BadAliasRecord": (BAD_DATA, "`lvm push URL` publishes the aliases again"),
    "PermissionError": (CANNOT_WRITE, _GROUP),
    "OSError": (CANNOT_WRITE, "check the path, its permissions and the disk; existing files are unchanged"),
}


def exit_of(error: Exception) -> tuple[int, str] | None:
    """Return exit code and next step for an expected error; None for any other."""
    if type(error) is OSError and error.errno in (errno.ENOSPC, errno.EDQUOT):
        places = f"where the result goes, or in {tempfile.gettempdir()} (TMPDIR), where temporary files go"
        return CANNOT_WRITE, f"make room {places}; existing files are unchanged"
    if isinstance(error, ModuleNotFoundError) and (extra := EXTRAS.get((error.name or "").partition(".")[0])):
        return BAD_CONFIG, f"`pip install 'lvm-serve[{extra}]'` installs it"
    return next((EXITS[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in EXITS), None)


def printable(text: str) -> str:
    """Return a text with control and other unprintable characters escaped, except line ends."""
    return "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in text)


def run(command: Callable[[], object]) -> NoReturn:
    """Run a command and exit with its code; an expected error is two lines on stderr."""
    _open_standard_descriptors()
    try:
        command()
    except Exception as error:
        expected = exit_of(error)
        if expected is None:
            raise
        status, hint = expected
        # stderr may be closed; the exit code is enough then
        with suppress(OSError):
            print(printable(f"lvm: {error}\nnext: {hint}"), file=sys.stderr)
        sys.exit(status)
    sys.exit(OK)


def _open_standard_descriptors() -> None:
    """Open descriptors 0, 1 and 2 if they are closed, so that no connection or file gets their numbers.

    They cannot be written to, so the log counts lines for them as dropped.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # opens the lowest free descriptor
            os.open(os.devnull, os.O_RDONLY)
            os.set_inheritable(number, True)
    if sys.stderr is None:
        # without stderr, `print` would write to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
