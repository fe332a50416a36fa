"""The aliases: the names under which versions are deployed. Standard library only."""

from __future__ import annotations

from enum import StrEnum


class Alias(StrEnum):
    """A name that points at one version: what the service loads, and how callers address it."""

    PRIMARY = "primary"
    FALLBACK = "fallback"
    # answers no caller: the shadow compares it with what answers
    CANDIDATE = "candidate"
    # the corpus that is searched; the others are nets
    RETRIEVER = "retriever"

    # messages quote an alias as they quote a string
    __repr__ = str.__repr__


ALIASES = tuple(Alias)
PREDICTORS = (Alias.PRIMARY, Alias.FALLBACK)
NET_ALIASES = (*PREDICTORS, Alias.CANDIDATE)
