"""What the server of the studio lets in: requests of its own page, under names that lead to it, of bounded size.

A page of somebody else, open in the same browser, can send requests to a server on the loopback interface; and a name
of somebody else can be made to lead there (DNS rebinding). Both are refused by the headers `Host` and `Origin`, which a
page cannot choose.
"""

from __future__ import annotations

import ipaddress
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hierarchy_builder.terminal import say

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
BODY_BYTES = 16 * 2**20
"""Largest request."""
SERVED_BYTES = 256 * 2**20
"""Uploads are refused while the pictures and uploads that are kept take more than this."""
FILE_BYTES = 4096
"""Each file and folder counts as at least this, as it does on disk."""
KEPT_SECONDS = 3600.0
"""Pictures and uploads are removed after this time."""
SWEEP_SECONDS = 60.0
OWN_NAME = re.compile(r"[0-9a-f]{20,}")
"""Gradio names the folder of each file by a hash."""


class TooLargeError(Exception):
    """A request has more bytes than BODY_BYTES."""


class Guard:
    """ASGI middleware around the studio, see the module."""

    def __init__(
        self, app: ASGIApp, host: str = "127.0.0.1", allowed: Iterable[str] = (), served: Path | None = None
    ) -> None:
        """host: the address that is served on. allowed: more names of this server, such as that of a proxy.

        served: the folder of temporary files, whose content is the studio's alone.
        """
        self.app, self.served = app, served
        self.names = {*LOOPBACK_NAMES, host.lower(), *(name.lower() for name in allowed)}
        self.is_public = host not in LOOPBACK_NAMES
        if self.is_public:
            self.names.add(socket.gethostname().lower())
        self._swept = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        received, began = 0, False

        async def answer(status: int, text: str) -> None:
            await PlainTextResponse(text, status)(scope, receive, send)

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body") or b"")
            if received > BODY_BYTES:
                raise TooLargeError
            return message

        async def noted(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        headers = Headers(scope=scope)
        if refusal := self.refusal(headers, scope.get("method", "GET")):
            await answer(403, refusal)
            return
        self._sweep()
        is_upload = str(scope.get("path", "")).rstrip("/").endswith("/upload")
        if is_upload and self.served is not None and kept_bytes(self.served) > SERVED_BYTES:
            await answer(507, f"uploads take more than {SERVED_BYTES:,} bytes: try again in an hour")
            return
        try:
            length = headers.get("content-length", "")
            if length.isdecimal() and int(length) > BODY_BYTES:
                raise TooLargeError
            await self.app(scope, counted, noted)
        except TooLargeError:
            if not began:
                await answer(413, f"a request has at most {BODY_BYTES:,} bytes")
        except Exception as error:  # whatever a request leads Gradio to that its own page never sends
            failed = f"a request to {scope['path']} failed: {type(error).__name__}: {error}"
            say(f"warning: {failed}")
            if not began:
                await answer(400, failed)

    def refusal(self, headers: Mapping[str, str], method: str = "GET") -> str | None:
        """Why a request with these headers is refused, or None. A form of another site is no visit, a link is."""
        host = headers.get("host", "")
        if not self._is_own(_hostname(host)):
            return (
                f"the studio is not known as {host!r}; open it at the address that it printed, or start it with "
                "--allow-host NAME"
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "this request comes from a page of another site"
        is_visit = headers.get("sec-fetch-mode") == "navigate" and method in ("GET", "HEAD")
        if headers.get("sec-fetch-site") == "cross-site" and not is_visit:
            return "this request comes from a page of another site"
        return None

    def _is_own(self, name: str) -> bool:
        """Whether a name leads to this server whoever asks: one of its own, or a plain address of a public server."""
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.is_public

    def _sweep(self) -> None:
        now = time.time()
        if self.served is not None and now - self._swept > SWEEP_SECONDS:
            self._swept = now
            clear_served(self.served, now - KEPT_SECONDS)


def kept_bytes(folder: Path) -> int:
    """Bytes that the temporary pictures and uploads take; a million of empty files is not nothing."""
    return sum(max(path.lstat().st_size, FILE_BYTES) for path in folder.rglob("*"))


def clear_served(folder: Path, before: float) -> None:
    """Remove the temporary pictures and uploads that were written before a time."""
    for path in folder.iterdir() if folder.is_dir() and not folder.is_symlink() else ():
        is_own = OWN_NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
        if is_own and path.stat().st_mtime < before:
            shutil.rmtree(path, ignore_errors=True)


def _hostname(host: str) -> str:
    """The name in a Host header, without port and brackets."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
