"""An S3 server on loopback, which can be told to fail: moto behind a door that a test may close."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/nonexistent",
    "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
}
ERROR = (
    '<?xml version="1.0"?><Error><Code>{code}</Code><Message>{code} was asked for</Message>'
    "<RequestId>0</RequestId></Error>"
)
Fault = Callable[[dict[str, Any]], tuple[str, str] | None]
"""From the WSGI environment of a request to status and error code, or text, of an answer; None lets it through."""


class Door:
    """The application in front of the store: it counts requests, and answers those that `fault` names itself."""

    def __init__(self, store: Any) -> None:
        self.store, self.fault, self.requests = store, no_fault, list[tuple[str, str]]()
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            found = self.fault(environ)
        if found is None:
            return self.store(environ, start)
        status, code = found
        if length := int(environ.get("CONTENT_LENGTH") or 0):  # half of an upload, then an error: it is torn
            environ["wsgi.input"].read(length // 2)
        start(status, [("Content-Type", "application/xml"), ("Connection", "close")])
        text = code if code.startswith("<") else ERROR.format(code=code)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [text.encode()]


def no_fault(environ: dict[str, Any]) -> None:
    """Let every request through."""


class Store:
    """A running server. url: its bucket; door: what stands in front of it."""

    def __init__(self, door: Door, endpoint: str) -> None:
        self.door, self.endpoint = door, endpoint

    def bucket(self, name: str) -> str:
        """Make a bucket and return its URL."""
        import s3fs

        s3fs.S3FileSystem(use_listings_cache=False).mkdir(name)
        return f"s3://{name}"

    @contextmanager
    def failing(self, fault: Fault) -> Iterator[None]:
        """Ask `fault` about every request inside the block."""
        self.door.fault = fault
        try:
            yield
        finally:
            self.door.fault = no_fault


@contextmanager
def served() -> Iterator[Store]:
    """A server with nothing in it; the environment of this process and of those it starts leads to it."""
    pytest.importorskip("upath", reason="needs the extra remote")
    pytest.importorskip("s3fs", reason="needs the extra remote")
    pytest.importorskip("moto", reason="needs moto[server]")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *words: Any, **more: Any) -> None:
            """Print nothing."""

    door = Door(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, door, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield Store(door, endpoint)
        s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    thread.join()
