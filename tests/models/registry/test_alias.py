"""An alias is the string that is on disk, in labels and on the command line."""

from __future__ import annotations

import json

from models.registry.alias import ALIASES, Alias


def test_an_alias_is_its_string() -> None:
    assert ALIASES == ("primary", "fallback", "candidate", "retriever")
    assert {Alias.PRIMARY: 1}["primary"] == 1
    assert f"{Alias.PRIMARY} {Alias.PRIMARY!r}" == "primary 'primary'"
    assert json.dumps({Alias.PRIMARY: Alias.FALLBACK}) == '{"primary": "fallback"}'
