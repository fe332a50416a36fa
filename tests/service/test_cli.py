"""The command line: help everywhere, data on stdout, exit codes that scripts can rely on."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from models.card import Card
from models.registry import Registry
from tests.conftest import LVM

COMMANDS = ("serve", "smoke", "models", "promote", "rollback", "import", "data", "train", "corpus", "evaluate")


def lvm(*words: str, registry: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "LVM_REGISTRY": str(registry), **environment}
    return subprocess.run([LVM, *words], capture_output=True, text=True, env=env, check=False, timeout=120)


def test_help_lists_every_command_and_every_command_has_help(tmp_path: Path) -> None:
    text = lvm("--help", registry=tmp_path).stdout
    assert all(f" {command} " in text for command in COMMANDS)
    for command in ("train", "import"):
        assert "--json" in lvm(command, "--help", registry=tmp_path, TERMINAL_WIDTH="120").stdout


def test_promote_and_rollback_move_the_alias_and_tell(shipped: Path) -> None:
    registry = Registry(shipped)
    amn, gmn = registry.resolve("primary"), next(v for v in registry.versions() if v.name == "gmn")
    done = lvm("promote", "primary", gmn.version, "--why", "test", registry=shipped)
    assert (done.returncode, done.stdout) == (0, f"primary: {amn.id} -> {gmn.id}\n")
    back = lvm("rollback", "primary", registry=shipped)
    assert (back.returncode, back.stdout) == (0, f"primary: {gmn.id} -> {amn.id}\n")
    assert [move.why for move in registry.ledger()][-2:] == ["test", ""]


def test_models_prints_a_table_or_json(shipped: Path) -> None:
    report = json.loads(lvm("models", "--json", registry=shipped).stdout)
    assert report["aliases"]["primary"].startswith("amn/")
    assert {version["kind"] for version in report["versions"]} == {"net", "corpus"}
    assert report["aliases"]["primary"] in lvm("models", registry=shipped).stdout


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
        (("promote", "retriever", "primary"), 65),
        (("promote", "primary", "retriever"), 65),
        (("promote", "primary", "fallback", "--force"), 2),
        (("promote", "primary", "fallback", "--data", "/nowhere"), 65),
        (("promote",), 2),
        (("nonsense",), 2),
        (("evaluate", "primary", "--data", "/nowhere"), 65),
    ],
)
def test_what_cannot_be_done_says_so_on_stderr_and_in_its_status(
    shipped: Path, words: tuple[str, ...], code: int
) -> None:
    done = lvm(*words, registry=shipped)
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


def test_a_setting_that_means_nothing_is_a_configuration_error(shipped: Path) -> None:
    done = lvm("serve", registry=shipped, LVM_MAX_BATCH="none")
    assert (done.returncode, "LVM_MAX_BATCH" in done.stderr) == (78, True)


def test_serve_refuses_an_address_that_others_reach_without_a_token(shipped: Path) -> None:
    done = lvm("serve", "--host", "0.0.0.0", "--port", "0", registry=shipped)
    assert done.returncode == 78
    assert "will not listen on 0.0.0.0: others reach it, and no token is set. Set LVM_TOKENS" in done.stderr
    assert "Traceback" not in done.stderr


def test_serve_without_a_primary_says_what_is_missing(tmp_path: Path) -> None:
    done = lvm("serve", "--port", "0", registry=tmp_path)
    assert done.returncode == 1
    *_, said, hint = done.stderr.splitlines()
    assert "'primary' is not set" in said
    assert "`lvm promote ALIAS VERSION` sets an alias" in hint
    assert "Traceback" not in done.stderr


def test_objections_are_overridden_with_a_reason_and_both_stand_in_the_ledger(shipped: Path) -> None:
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
    assert report["checked"]["scores"]["wiki/val"]["cosine"] == pytest.approx(0.5862, abs=1e-4)


def test_a_registry_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    done = lvm("models", registry=tmp_path / "nowhere")
    assert (done.returncode, "no registry at" in done.stderr) == (1, True)


def test_a_device_that_is_not_here_is_a_configuration_error(shipped: Path) -> None:
    done = lvm("serve", "--port", "0", registry=shipped, LVM_DEVICE="mps")
    assert (done.returncode, done.stderr.splitlines()[-2]) == (78, "lvm: torch sees no mps here")


def test_scores_come_from_the_runtime_asked_for_and_stand_beside_the_cards(shipped: Path) -> None:
    words = ("evaluate", "primary", "--data", str(shipped / "retriever"), "--precision", "bf16", "--json")
    done = lvm(*words, registry=shipped)
    if done.returncode == 78:
        assert "bf16" in done.stderr  # neither this processor nor an extra has it
        return
    report = json.loads(done.stdout)
    assert (done.returncode, report["runtime"], report["card"]["data"]) == (0, "openvino-bf16", "wiki/val")
    assert abs(report["card"]["difference"]) < report["card"]["tolerance"] == 0.001


def test_a_score_worse_than_the_card_promises_fails(shipped: Path) -> None:
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


def test_the_version_is_told(tmp_path: Path) -> None:
    assert lvm("--version", registry=tmp_path).stdout.startswith("0.")


def test_a_corpus_is_stored_with_the_index_asked_for_and_can_be_promoted(shipped: Path) -> None:
    data = str(shipped / "retriever")
    made = lvm("corpus", "wiki", "--data", data, "--index", "ivf", "--json", registry=shipped)
    assert (made.returncode, made.stderr) == (0, "")  # no bar where nobody watches
    version = json.loads(made.stdout)["version"]
    assert lvm("promote", "retriever", version, registry=shipped).returncode == 0
    card = (shipped / "retriever" / "README.md").read_text()
    assert "index: ivf" in card
    assert "Search is approximate: recall@10 " in card


def test_an_index_that_there_is_not_is_a_usage_error(shipped: Path) -> None:
    done = lvm("corpus", "wiki", "--data", str(shipped / "retriever"), "--index", "tree", registry=shipped)
    assert (done.returncode, "'tree' is not one of" in done.stderr) == (2, True)
