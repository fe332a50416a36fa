"""Authentication: clients with known bearer tokens (RFC 6750). If no token is set, every client may call."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path

from lvm.errors import Unauthorised
from service.settings import BadSettings, Settings

ENTRY = re.compile(r"(?:([\w.-]+):)?([\w.~+/-]{16,}=*)", re.ASCII)
PROBES = frozenset({"/livez", "/readyz", "/healthz", "/v2/health/live", "/v2/health/ready"})


class Tokens:
    """The known tokens, kept as digests, and the names of their clients."""

    def __init__(self, clients: Mapping[str, str]) -> None:
        """Take `clients`: token to client name."""
        self._known = [(sha256(token.encode()).digest(), client) for token, client in clients.items()]

    def __len__(self) -> int:
        return len(self._known)

    def client_of(self, headers: Mapping[bytes, bytes]) -> str:
        """Return the client whose token `headers` carry.

        Every known token is compared, in constant time, so the duration reveals nothing about them.

        Raises:
            Unauthorised: the token is missing or unknown.
        """
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        digest, found = sha256(token.strip()).digest(), None
        for known, client in self._known:
            if compare_digest(known, digest):
                found = client
        if found is None or scheme.lower() != b"bearer":
            raise Unauthorised("missing or unknown token; expected Authorization: Bearer TOKEN")
        return found


def read_tokens(settings: Settings) -> Tokens:
    """Return the tokens of LVM_TOKENS and LVM_TOKENS_FILE: `name:token`, or a token, named by its position.

    Raises:
        BadSettings: the file cannot be read or is empty, an entry is malformed, a token is repeated.
    """
    entries = _split(settings.tokens.get_secret_value())
    if settings.tokens_file:
        entries += _of_file(settings.tokens_file)
    clients: dict[str, str] = {}
    for place, entry in enumerate(entries, 1):
        match = ENTRY.fullmatch(entry)
        if not match:
            raise BadSettings(
                f"LVM_TOKENS: entry {place} is malformed; expected `token` or `name:token`, 16 characters or more"
            )
        if match[2] in clients:
            raise BadSettings(f"LVM_TOKENS: duplicate token, entry {place}")
        clients[match[2]] = match[1] or f"token-{place}"
    return Tokens(clients)


def _split(text: str) -> list[str]:
    return text.replace(",", " ").split()


def _of_file(path: Path) -> list[str]:
    try:
        entries = _split(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadSettings(f"LVM_TOKENS_FILE: {getattr(error, 'strerror', None) or 'not UTF-8'}") from error
    if not entries:
        raise BadSettings("LVM_TOKENS_FILE: the file holds no token")
    return entries
