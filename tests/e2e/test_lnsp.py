"""LVM_COMPAT=lnsp in real processes: one service for each model on its own port, workers, and the device worker."""

from __future__ import annotations

import httpx
import numpy as np
import pytest

from models.registry.registry import Registry
from tests.conftest import PATIENCE_S, SHIPPED
from tests.e2e.test_workers import Start

CONTEXT = np.random.default_rng(0).standard_normal((5, 384)).astype(np.float32)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_one_service_answers_with_its_primary(process: Start, workers: str) -> None:
    server = process(LVM_COMPAT="lnsp", LVM_WORKERS=workers, LVM_OWNER="on" if workers == "2" else "off")
    golden = Registry(SHIPPED).resolve("primary")
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as client:
        assert client.get("/health").json() == {"status": "healthy", "model_loaded": True}
        info = client.get("/info").json()
        assert (info["model_type"], info["version"], info["parameters"]) == ("amn", golden.version, 822_400)
        assert (info["architecture"], info["dim"], info["device"]) == ("amn", 384, "cpu")
        answer = client.post("/infer", json={"context_vectors": CONTEXT.tolist()}).json()
        ours = client.post("/predict", json={"context": CONTEXT.tolist()}).json()
        assert answer["predicted_vector"] == ours["vector"]
        batch = client.post("/infer/batch", json={"context_vectors": [CONTEXT.tolist()] * 3}).json()
        np.testing.assert_allclose(batch["predicted_vectors"], [ours["vector"]] * 3, atol=1e-6)
    assert server.stop() == 0
