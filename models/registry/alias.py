"""The aliases: the names under which versions are deployed. Standard library only."""

from __future__ import annotations

from collections.abc import Container
from enum import StrEnum


class Alias(StrEnum):
    """A name that points at one version: what the service loads, and how callers address it."""

    PRIMARY = "primary"
    # asked one after another if the primary does not answer
    FALLBACK = "fallback"
    FALLBACK_2 = "fallback-2"
    FALLBACK_3 = "fallback-3"
    FALLBACK_4 = "fallback-4"
    FALLBACK_5 = "fallback-5"
    FALLBACK_6 = "fallback-6"
    FALLBACK_7 = "fallback-7"
    FALLBACK_8 = "fallback-8"
    FALLBACK_9 = "fallback-9"
    # answers no caller: the shadow compares it with what answers
    CANDIDATE = "candidate"
    # the corpus that is searched; the others are nets
    RETRIEVER = "retriever"

    # messages quote an alias as they quote a string
    __repr__ = str.__repr__


ALIASES = tuple(Alias)
FALLBACKS = tuple(alias for alias in Alias if alias.startswith(Alias.FALLBACK))
PREDICTORS = (Alias.PRIMARY, *FALLBACKS)
NET_ALIASES = (*PREDICTORS, Alias.CANDIDATE)
# reports leave these out until they are set, and always show the others
_EXTRA = FALLBACKS[1:]
EXPECTED = tuple(alias for alias in ALIASES if alias not in _EXTRA)


def predictors_to_show(present: Container[str]) -> list[Alias]:
    """Return the aliases of predictors that a report shows: primary, fallback, and of the others those `present`."""
    return [alias for alias in PREDICTORS if alias in EXPECTED or alias in present]
