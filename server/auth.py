# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""The API key, for the routes that show single requests: vLLM asks for its own under `/v1` and the like only."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

UNAUTHORIZED = "this route shows requests and needs the server's API key; send it as 'Authorization: Bearer KEY'"


class ApiKeys:
    """The keys that a server was started with; without any, everyone may ask.

    Parameters
    ----------
    keys: in plain text. Only digests are kept.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    def allows(self, authorization: str | None) -> bool:
        """Whether the value of an ``Authorization`` header carries one of the keys.

        Takes the same time for every wrong key: digests are compared, in constant time, and with each key in turn.
        """
        if not self._digests:
            return True
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = _digest(given)
        found = False
        for own in self._digests:
            found |= hmac.compare_digest(digest, own)
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
