"""A session in bf16 is used only if it makes the vectors of float32; texts that run together change nothing."""

from pathlib import Path

import numpy as np
import pytest

from models.retrieval.corpus import read_corpus
from models.text import encoder
from models.text.encoder import MiniLM
from models.text.sessions import Session, open_bf16, open_float32

SHIPPED = Path(__file__).parents[3] / "artifacts" / "lvm" / "retriever"


@pytest.fixture(scope="module")
def files() -> tuple[bytes, bytes]:
    return encoder.GRAPH.read_bytes(), (MiniLM(1).directory / encoder.WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def exact(files: tuple[bytes, bytes]) -> Session:
    return open_float32(*files)


@pytest.fixture(scope="module")
def faster(files: tuple[bytes, bytes], exact: Session) -> Session:
    runtime = pytest.importorskip("models.runtimes.openvino")
    if not runtime.supports_precision("bf16"):
        pytest.skip("this processor does not compute in bf16")
    found = open_bf16(*files, encoder.WEIGHTS, 2, exact)
    assert found
    return found


@pytest.fixture(params=["exact", "faster"])
def session(request: pytest.FixtureRequest) -> Session:
    found: Session = request.getfixturevalue(request.param)
    return found


def test_texts_together_have_the_vectors_that_they_have_alone(session: Session) -> None:
    ids = np.random.default_rng(1).integers(1000, 5000, (session.most, 40))
    together = session.run(ids)
    for row, vector in zip(ids, together, strict=True):
        np.testing.assert_array_equal(session.run(row[None])[0], vector)


def test_bf16_makes_the_vectors_of_float32(faster: Session) -> None:
    shipped = read_corpus(SHIPPED.resolve())
    texts = [str(shipped.chunk(row).text) for row in range(0, len(shipped), 400)]
    minilm = MiniLM(2, may_use_bf16=True)
    assert minilm.uses_bf16
    vectors = minilm.encode(texts)
    assert (vectors * MiniLM(2).encode(texts)).sum(axis=1).min() >= 0.9999


def test_bf16_is_not_used_if_its_vectors_differ(faster: Session, files: tuple[bytes, bytes]) -> None:
    other = Session(lambda ids: np.roll(faster.run(ids), 1, axis=1), 1, "bf16")
    assert open_bf16(*files, encoder.WEIGHTS, 1, other) is None


def test_bf16_is_not_used_if_the_graph_cannot_be_compiled(faster: Session) -> None:
    assert open_bf16(b"no graph", b"", encoder.WEIGHTS, 1, faster) is None
