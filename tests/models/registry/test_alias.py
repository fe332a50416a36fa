"""An alias is the string that is on disk, in labels and on the command line."""

from __future__ import annotations

import json

from models.registry.alias import ALIASES, EXPECTED, PREDICTORS, Alias, predictors_to_show


def test_an_alias_is_its_string() -> None:
    assert {"primary", "fallback", "fallback-2", "fallback-9", "candidate", "retriever"} < {*ALIASES}
    assert {Alias.PRIMARY: 1}["primary"] == 1
    assert f"{Alias.PRIMARY} {Alias.PRIMARY!r}" == "primary 'primary'"
    assert json.dumps({Alias.PRIMARY: Alias.FALLBACK}) == '{"primary": "fallback"}'


def test_predictors_are_the_primary_and_the_fallbacks_in_their_order() -> None:
    assert ("primary", "fallback", *(f"fallback-{number}" for number in range(2, 10))) == PREDICTORS


def test_further_fallbacks_are_shown_only_if_they_are_present() -> None:
    assert EXPECTED == ("primary", "fallback", "candidate", "retriever")
    assert predictors_to_show([]) == ["primary", "fallback"]
    assert predictors_to_show(["fallback-3", "retriever"]) == ["primary", "fallback", "fallback-3"]
