# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the deltamem project
"""Addresses of servers to watch, as people write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

_ALLOWED = "allowed: http://HOST[:PORT][/PREFIX] or https://..., with NAME= before it if you like"


class AddressError(ValueError):
    """An address that cannot be watched: what was given, what is allowed."""


@dataclass(frozen=True)
class Address:
    """One server.

    Parameters
    ----------
    name : str
        What people see.
    url : str
        Root of the server, without a slash at the end; the routes lie under `/deltamem`.
    key : str or None
        The server's own API key. Not part of the text form, so that it gets into no log.
    """

    name: str
    url: str
    key: str | None = field(default=None, repr=False)


def parse_address(text: str, key: str | None = None) -> Address:
    """Read `[NAME=]URL`.

    Raises
    ------
    AddressError
        It is no http address, or has a user, a query or a fragment in it.
    """
    name, separator, url = text.partition("=")
    if not separator or "://" in name:
        name, url = "", text
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as error:
        raise AddressError(f"--url: got {text!r} ({error}); {_ALLOWED}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AddressError(f"--url: got {text!r}, which is no address of a server; {_ALLOWED}")
    if parts.username is not None or parts.password is not None:
        # It would be shown in the page and in logs.
        raise AddressError(f"--url: a user or password in the address of {parts.hostname}; give the key on its own")
    if parts.query or parts.fragment:
        raise AddressError(f"--url: got {text!r} with a query or fragment; {_ALLOWED}")
    # People copy what they see in the browser.
    path = parts.path.rstrip("/").removesuffix("/dashboard").removesuffix("/deltamem")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    root = f"{parts.scheme}://{host}{'' if port is None else f':{port}'}{path}"
    return Address(name.strip() or root.partition("://")[2], root, key)


def parse_addresses(texts: Sequence[str], keys: Sequence[str]) -> list[Address]:
    """Read several; one key is for all of them, otherwise there is one for each, in order.

    Raises
    ------
    AddressError
        No address, one that cannot be read, the same one twice, or another number of keys.
    """
    if not texts:
        raise AddressError(f"--url: none was given; {_ALLOWED}")
    if len(keys) > 1 and len(keys) != len(texts):
        raise AddressError(
            f"--server-key: {len(keys)} keys for {len(texts)} servers; give one for all of them, or one for each in "
            "the order of --url"
        )
    each = list(keys) if len(keys) > 1 else [keys[0] if keys else None] * len(texts)
    found = [parse_address(text, key or None) for text, key in zip(texts, each, strict=True)]
    for what in ("name", "url"):
        values = [str(getattr(one, what)) for one in found]
        twice = sorted({value for value in values if values.count(value) > 1})
        if twice:
            raise AddressError(
                f"--url: {', '.join(twice)} is given twice; give each server once, with a name of its own"
            )
    return found
