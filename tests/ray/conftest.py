"""Ray, imported where its own warnings are nobody's errors."""

from __future__ import annotations

import contextlib
import warnings

with warnings.catch_warnings(), contextlib.suppress(ImportError):
    warnings.simplefilter("ignore")
    import ray.serve.schema  # noqa: F401
