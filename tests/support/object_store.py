"""An S3 server on loopback, which can be told to fail: moto behind a door that a test may close."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hierarchy_builder.files import remote

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_MAX_ATTEMPTS": "1",  # of the client below s3fs, which asks five times itself
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
        self.writers = Counter[str]()
        """Addresses that sent objects."""
        self.lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Any:
        with self.lock:
            self.requests.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
            self.writers[environ["REMOTE_ADDR"]] += environ["REQUEST_METHOD"] == "PUT"
            found = self.fault(environ)
        if found is None:
            return self.store(environ, start)
        return refused(environ, start, *found)


def refused(environ: dict[str, Any], start: Callable[..., Any], status: str, code: str) -> Any:
    """Answer a request by an error of the store, an upload in its middle."""
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

    @contextmanager
    def also_at(self, listening: socket.socket) -> Iterator[str]:
        """Serve the same objects on another socket, which may be in another network; yields that endpoint."""
        host, port = listening.getsockname()[:2]
        with listening, _serving(self.door, host, port, listening.fileno()):
            yield f"http://{host}:{port}"

    @contextmanager
    def also_through(self, door: Door) -> Iterator[str]:
        """Serve the same objects through another door; yields that endpoint."""
        with _serving(door, "127.0.0.1") as port:
            yield f"http://127.0.0.1:{port}"

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

    door = Door(DomainDispatcherApplication(create_backend_app))
    with _serving(door, "127.0.0.1") as port, pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{port}"
        for name, value in {**ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        import s3fs

        s3fs.S3FileSystem.clear_instance_cache()
        yield Store(door, endpoint)
        s3fs.S3FileSystem.clear_instance_cache()


@contextmanager
def _serving(door: Door, host: str, port: int = 0, descriptor: int | None = None) -> Iterator[int]:
    """Answer requests until the block ends; yields the port."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, *words: Any, **more: Any) -> None:
            """Print nothing."""

    server = make_server(host, port, door, threaded=True, request_handler=Quiet, fd=descriptor)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.port
    finally:
        server.shutdown()
        thread.join()


def sent(folder: Path, place: Path) -> Path:
    """Copy a local folder to a URL; returns it."""
    for path in folder.rglob("*"):
        if path.is_file():
            remote.put(place / path.relative_to(folder), path.read_bytes())
    return place


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a build but those that hold times or paths."""
    if remote.is_remote(root):
        files = list(remote.files_below(root))
    else:
        files = [path for path in root.rglob("*") if path.is_file()]
    names = {path.relative_to(root).as_posix(): path for path in files}
    kept = ("features.zarr/", "regions.zarr/", "shards/", "index.parquet", "class_map.json")
    return {name: path.read_bytes() for name, path in names.items() if name.startswith(kept)}
