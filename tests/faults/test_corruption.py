"""Spoiled versions by the thousand: refused with the reason, nothing run, and the old version goes on answering."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from models.predictor import load_predictor
from models.registry import manifest
from models.registry.card import CARD_FILE
from models.registry.checkpoint import GOLDEN_FILE, GRAPH_FILE, WEIGHTS_FILE, BadCheckpoint
from models.registry.registry import Registry
from models.retrieval.retriever import load_retriever
from tests.conftest import ROOT, until
from tests.fakes import D, T, card, contexts, octets_of
from tests.faults.conftest import Injected, Target, lvm, sizes
from tests.faults.versions import corpus_files, corrupted, files, graph, write_version

OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
LOADERS: dict[str, tuple[Callable[[], dict[str, bytes]], Callable[[Path], Any]]] = {
    "net": (files, lambda path: load_predictor(path, device="cpu")),
    "corpus": (corpus_files, load_retriever),
}


@sizes(200, 2_000)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_version_that_was_altered_is_refused_whatever_was_altered(
    count: int, kind: str, tmp_path: Path, injected: Injected
) -> None:
    make, load = LOADERS[kind]
    whole = write_version(tmp_path / "20260101-000000000000", make())
    load(whole)
    random, names = Random(0), sorted(path.name for path in whole.iterdir())
    for _ in range(count):
        file = whole / random.choice(names)
        before = file.read_bytes()
        way, after = corrupted(random, before)
        file.write_bytes(after)
        with pytest.raises(BadCheckpoint):
            load(whole)
        file.write_bytes(before)
        injected(f"{kind}: {way}", "refused by its sums")


@pytest.mark.parametrize("kind", LOADERS)
def test_files_that_changed_places_are_refused(kind: str, tmp_path: Path, injected: Injected) -> None:
    make, load = LOADERS[kind]
    whole = make()
    for number, (one, other) in enumerate((a, b) for a in whole for b in whole if a != b):
        path = write_version(tmp_path / str(number), whole)
        (path / one).write_bytes(whole[other])
        (path / other).write_bytes(whole[one])
        with pytest.raises(BadCheckpoint):
            load(path)
        with pytest.raises(BadCheckpoint):
            load(write_version(tmp_path / f"sealed-{number}", {**whole, one: whole[other], other: whole[one]}))
        injected(f"{kind}: two files changed places, sealed or not", "refused", 2)


def read(kind: str, given: dict[str, bytes], tmp_path: Path, count: int, injected: Injected) -> None:
    """Read spoiled copies in a process of its own: it must end well, and have met nothing but refusals."""
    source = tmp_path / "source"
    source.mkdir()
    for name, data in given.items():
        (source / name).write_bytes(data)
    command = [sys.executable, "-m", "tests.faults.reader", kind, source, tmp_path / "spoiled", "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    broken = {what: number for what, number in found.items() if not what.endswith((": refused", ": harmless"))}
    assert not broken
    for end in ("refused", "harmless"):
        held = {"refused": "refused with the reason", "harmless": "answers as its golden vectors say"}[end]
        injected(f"{kind}: spoiled, then sealed anew", held, sum(n for what, n in found.items() if what.endswith(end)))


@sizes(300, 4_000)
@pytest.mark.parametrize("kind", LOADERS)
def test_what_was_spoiled_before_it_was_sealed_is_refused_or_harmless(
    count: int, kind: str, tmp_path: Path, injected: Injected
) -> None:
    read(kind, LOADERS[kind][0](), tmp_path, count, injected)


def wrong_versions() -> dict[str, dict[str, bytes]]:
    """Return nets whose sums fit and whose content must not be served, by what is wrong."""
    good = files()
    scale, golden = np.ones(D, np.float32), contexts(8)
    answer = golden.mean(axis=1)

    def weights(**tensors: Any) -> dict[str, bytes]:
        return {WEIGHTS_FILE: save({name: np.asarray(tensor) for name, tensor in tensors.items()})}

    def goldens(context: Any, vector: Any) -> dict[str, bytes]:
        return {GOLDEN_FILE: save({"context": np.asarray(context), "vector": np.asarray(vector)})}

    changes = {
        "a NaN weight": weights(scale=np.full(D, np.nan, np.float32)),
        "an infinite weight": weights(scale=np.full(D, -np.inf, np.float32)),
        "weights of another shape": weights(scale=np.ones((D, 2), np.float32)),
        "weights of another type": weights(scale=scale.astype(np.float64)),
        "weights of whole numbers": weights(scale=scale.astype(np.int32)),
        "a weight's name missing": weights(other=scale),
        "no weights": weights(),
        "other weights": weights(scale=np.arange(D, dtype=np.float32) - 4),
        "weights elsewhere": {GRAPH_FILE: graph(0, "/etc/passwd"), **weights(other=scale)},
        "weights up there": {GRAPH_FILE: graph(0, "../../weights"), **weights(other=scale)},
        "golden vectors of NaN": goldens(golden, answer * np.float32(np.nan)),
        "golden vectors of another T": goldens(golden[:, 1:], answer),
        "golden vectors of another D": goldens(golden[..., 1:], answer[:, 1:]),
        "golden vectors of another type": goldens(golden.astype(np.float64), answer),
        "no golden vectors": goldens(golden[:0], answer[:0]),
        "fewer golden answers": goldens(golden, answer[:-1]),
        "a graph of nothing": {GRAPH_FILE: b""},
        "a graph of text": {GRAPH_FILE: b"import os; os.system('true')"},
        "a card of another D": {CARD_FILE: card(dim=D + 1).to_markdown().encode()},
        "a card of another T": {CARD_FILE: card(context_length=T + 1).to_markdown().encode()},
        "a card that would run": {CARD_FILE: b"---\nlvm: !!python/object/apply:os.system ['true']\n---\n"},
        "a card of nothing": {CARD_FILE: b""},
        "a card of bombs": {CARD_FILE: b"---\nlvm: &a [&b [*a, *a], *b]\n---\n"},
    }
    gone = {f"{name} missing": {n: data for n, data in good.items() if n != name} for name in good}
    return {**{what: {**good, **change} for what, change in changes.items()}, **gone}


def test_what_is_wrong_with_a_version_is_refused_by_the_server_too_and_the_old_one_answers(
    target: Callable[..., Target], injected: Injected
) -> None:
    server = target(environment={"LVM_RELOAD_S": "0.05"})
    old, random = server.registry.resolve("primary"), Random(1)
    wrong = wrong_versions()
    for number in range(20):
        name = random.choice(sorted(files()))
        way, data = corrupted(random, files()[name])
        wrong[f"{way} in {name} ({number})"] = {**files(2), name: data}
    golden = load_predictor(old.path, device="cpu")
    before = len(server.opened())
    for number, (what, given) in enumerate(wrong.items()):
        spoil = server.registry.root / "models" / "amn" / f"20270101-{number:012d}"
        write_version(spoil, given)
        if "(" in what:
            (spoil / manifest.CHECKSUMS_FILE).write_bytes((old.path / manifest.CHECKSUMS_FILE).read_bytes())
        move(server.registry, spoil)
        until(lambda at=spoil: refused(server) == f"amn/{at.name}", f"{what} to be refused")
        rows = golden._golden[:2]
        answer = server.http.post("/predict", content=rows.tobytes(), headers=octets_of(rows))
        assert (answer.status_code, answer.headers["x-model-version"]) == (200, old.version), what
        injected("a spoiled version promoted under a running server", "refused, the old one answers")
    assert [line for line in server.opened(before) if not line.startswith(("open", "os.scandir", "os.listdir"))] == []


def move(registry: Registry, version: Path) -> None:
    """Point `primary` at a version without asking whether it is one."""
    link = registry.root / ".part-test"
    link.symlink_to(version.relative_to(registry.root))
    os.replace(link, registry.root / "primary")


def refused(server: Target) -> str | None:
    found = server.http.get("/models").json()["aliases"]["primary"]["refused"]
    return found and str(found["id"])


def bombs(directory: Path, mark: Path) -> Iterator[tuple[str, bytes]]:
    """Yield files that would do something, or be something huge, to whoever reads them carelessly."""
    run = b"cos\nsystem\n(S'touch %s'\ntR." % str(mark).encode()
    calls = {
        "os.system": run,
        "builtins.exec": b"cbuiltins\nexec\n(S'open(%r, \"w\")'\ntR." % str(mark).encode(),
        "os.system by BUILD": b"(ios\nsystem\nS'touch %s'\no." % str(mark).encode(),
        "torch.load again": b"ctorch\nload\n(S'%s'\ntR." % str(mark).encode(),
        "a laugh of lists": b"".join(
            [b"(lp0\n", *(b"(lp%d\ng%d\nag%d\na" % (n, n - 1, n - 1) for n in range(1, 60)), b"."]
        ),
        "a string of gigabytes": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"x.",
        "a long of gigabytes": b"\x80\x04\x8b" + (1 << 30).to_bytes(4, "little") + b"x.",
        "100,000 lists in each other": b"(l" * 100_000 + b".",
    }
    for what, data in calls.items():
        yield what, data
        yield f"{what} in an archive", archive({"archive/data.pkl": data, "archive/version": b"3\n"})
    for name in ("../evil", "/tmp/evil", "archive/../../evil", "a\\..\\evil"):
        yield f"an archive with {name}", archive({name: run, "archive/data.pkl": run, "archive/version": b"3\n"})
    yield "an archive of zeros, a thousand times its size", archive({"archive/data.pkl": bytes(1 << 28)}, packed=True)


def archive(entries: dict[str, bytes], *, packed: bool = False) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        for name, data in entries.items():
            made.writestr(name, data)
    return file.getvalue()


@pytest.mark.faults
def test_no_bomb_goes_off(tmp_path: Path, injected: Injected) -> None:
    """`lvm import` refuses each with 65, in a gigabyte or two of memory, and runs and writes nothing."""
    mark, registry = tmp_path / "mark", tmp_path / "registry"
    found = dict(bombs(tmp_path, mark))
    for number, data in enumerate(found.values()):
        (tmp_path / f"{number}.pt").write_bytes(data)
    commands = [["import", str(tmp_path / f"{number}.pt"), "--name", "amn"] for number in range(len(found))]
    told = lvm(commands, {"LVM_REGISTRY": str(registry)}, grow_mb=1024)
    for what, command, (code, heard, said) in zip(found, commands, told, strict=True):
        assert (code, set(heard) - {f"open {command[1]!r}"}) == (65, set()), (what, said)
        injected("bombs and climbing archives for lvm import", "refused with 65, nothing run")
    assert not mark.exists()
    assert not registry.exists()
    assert not list(tmp_path.parent.rglob("evil"))


@pytest.mark.faults
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_a_damaged_checkpoint_of_a_customer_is_refused_or_harmless(
    form: str, tmp_path: Path, injected: Injected
) -> None:
    torch = pytest.importorskip("torch")
    from models.nets import build

    net = build("amn", {"dim": 8, "context_length": 3, "key_dim": 4, "hidden_dim": 4})
    torch.save({"model_state_dict": net.state_dict()}, tmp_path / "x.pt", _use_new_zipfile_serialization=form == "zip")
    read("foreign", {"checkpoint.pt": (tmp_path / "x.pt").read_bytes()}, tmp_path, 1_500, injected)
