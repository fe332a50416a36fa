"""Names that mean harm, over HTTP and on the command line: unknown, and no file was opened to find that out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from models.registry.registry import Registry
from models.retrieval.corpus import ARTICLES_FILE, INDEX_FILE
from tests.fakes import T, contexts
from tests.faults.conftest import Injected, Target, lvm
from tests.faults.versions import files, tiny_registry

Start = Callable[..., Target]
EVIL = [
    *("../secret", "..", ".", "../../etc/passwd", "/etc/passwd", "amn/../../secret", "..\\secret", "models/../secret"),
    *("linked", "linked/20260101-000000000000", "./amn", "amn/", "//amn", "primary/../amn", "file:///etc/passwd"),
    *("%2f", "..%2f..%2fetc%2fpasswd", "AMN", "~root", "-rf", "$HOME"),
]
EVIL += ["\0", "amn\0", "amn\0.txt", " amn", "amn ", "amn\n", "\uff41mn"]
PATHS = (
    """/../../etc/passwd /v2/models/../../../etc/passwd /%2e%2e/%2e%2e/etc/passwd //etc/passwd /..%00 /models/..%5c.."""
)
ROUTES = ["/v2/models/{}", "/v2/models/{}/ready", "/v2/models/amn/versions/{}", "/v2/models/amn/versions/{}/ready"]


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry with a model and a version that are links to the outside, where there is a secret."""
    known = Registry(tiny_registry(tmp_path / "registry"))
    other = Registry(tmp_path / "other")
    version = other.add("linked", files())
    (tmp_path / "secret").write_bytes(b"secret")
    (known.root / "models" / "linked").symlink_to(version.path.parent)
    (known.root / "models" / "amn" / version.version.replace("-", "-f")).symlink_to(version.path)
    return known


def encoded(name: str) -> str:
    """Return a name as one segment of a path that no client takes for more than one."""
    return "".join(f"%{byte:02x}" for byte in name.encode())


def test_an_evil_name_over_http_is_unknown_and_opens_nothing(
    registry: Registry, target: Start, injected: Injected
) -> None:
    server = target(registry.root)
    body = {"context": contexts()[0].tolist()}
    infer = {"inputs": [{"name": "context", "datatype": "FP32", "shape": [1, T, 8], "data": contexts().tolist()}]}
    sent: list[Callable[[str], int]] = [
        *(lambda name, r=route: server.http.get(r.format(encoded(name))).status_code for route in ROUTES),
        lambda name: server.http.post(f"/v2/models/{encoded(name)}/infer", json=infer).status_code,
        lambda name: server.http.post(f"/v2/models/amn/versions/{encoded(name)}/infer", json=infer).status_code,
        lambda name: server.http.post("/predict", json={**body, "model": name}).status_code,
        lambda name: (
            server.http.post("/predict", params={"model": name}, content=b"\0" * 160, headers=OCTETS).status_code
        ),
    ]
    for send in sent:
        send("unknown")  # so that what is imported once is imported
    before = len(server.opened())
    for name in EVIL:
        for number, send in enumerate(sent):
            assert send(name) == 404, (name, number)
            injected("a name that means harm, over HTTP", "404, no file opened")
    for path in PATHS.split():
        for method in (b"GET", b"POST"):
            said = server.exchange(b"%s %s HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n" % (method, path.encode()))
            assert said.startswith(b"HTTP/1.1 404"), (path, said[:100])
            injected("a path out of the tree, on the wire", "404, no file opened")
    assert server.opened(before) == []
    server.http.get("/models")
    assert server.opened(before), "the listener is deaf"


OCTETS = {"content-type": "application/octet-stream"}


@pytest.mark.faults
def test_an_evil_name_on_the_command_line_is_refused_and_opens_nothing(
    registry: Registry, injected: Injected, tmp_path: Path
) -> None:
    names = [name for name in EVIL if not name.startswith("-") and "\0" not in name]
    commands = [
        command
        for name in names
        for command in (
            ["promote", "primary", name],
            ["promote", name, "amn"],
            ["rollback", name],
            ["evaluate", name, "--data", "/nowhere"],
            ["import", str(tmp_path / "secret"), "--name", name],
            ["corpus", name, "--data", "/nowhere"],
        )
    ]
    given = [f"/nowhere/{name}" for name in (INDEX_FILE, ARTICLES_FILE)]
    before = sorted(registry.root.rglob("*"))
    for command, (code, heard, said) in zip(commands, lvm(commands, {"LVM_REGISTRY": str(registry.root)}), strict=True):
        assert code in (1, 2, 65), (command, code, said)
        opened = {line for line in heard if str(registry.root) not in line or "secret" in line}
        assert opened <= {f"open {name!r}" for name in (command[1], *given)}, command
        injected("a name that means harm, to lvm", "refused, nothing opened or written")
    assert sorted(registry.root.rglob("*")) == before


def test_an_alias_that_leads_out_of_the_registry_is_not_followed(
    registry: Registry, target: Start, injected: Injected
) -> None:
    server = target(registry.root, environment={"LVM_RELOAD_S": "0.05"})
    linked = next((registry.root / "models" / "linked").iterdir()).name
    for aim in (
        f"models/linked/{linked}",
        "../other",
        "/etc",
        "models/amn/..",
        "models/../../secret",
        "primary",
        "candidate",
    ):
        link = registry.root / "candidate"
        link.unlink(missing_ok=True)
        link.symlink_to(aim)
        server.http.get("/readyz").raise_for_status()
        said = server.http.get("/models").json()
        assert set(said["aliases"]) == {"primary", "fallback"}, aim
        injected("an alias that leads out of the registry", "not followed")
