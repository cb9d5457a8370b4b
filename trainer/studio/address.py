"""The address that the studio is served on: checked before anything is loaded, and reached without a proxy."""

from __future__ import annotations

import os
import socket

from hierarchy_builder.errors import UsageError


def check_host(host: str) -> None:
    """Raise UsageError if `host` is no address of this machine; the server would wait for itself for ever."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as tried:
            tried.bind(address)
    except OSError as error:
        raise UsageError(
            f"--host {host}: {error.strerror or error}; expected an address of this machine: 127.0.0.1 for "
            "this machine alone, 0.0.0.0 for every network it is in"
        ) from None


def bypass_proxy(host: str) -> None:
    """Reach the studio itself directly, where `http_proxy` names a proxy: Gradio asks its own server at the start."""
    own = dict.fromkeys([host, "localhost", "127.0.0.1", "0.0.0.0", "::1"])
    for name in ("no_proxy", "NO_PROXY"):
        given = [each for each in os.environ.get(name, "").split(",") if each.strip()]
        os.environ[name] = ",".join(dict.fromkeys([*given, *own]))
