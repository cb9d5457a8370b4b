"""The studio answers its own page alone: not other names, other sites, or requests without bound."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from trainer.studio import guard
from trainer.studio.guard import Guard, clear_served, kept_bytes


def asked(
    middleware: Guard,
    headers: dict[str, str],
    body: list[bytes] | None = None,
    path: str = "/",
    method: str = "GET",
) -> tuple[int, str]:
    """Status and text of the answer to a request."""
    sent: list[dict[str, Any]] = []
    parts = [{"type": "http.request", "body": part, "more_body": True} for part in body or [b""]]

    async def receive() -> dict[str, Any]:
        return parts.pop(0) if parts else {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": encoded}
    asyncio.run(middleware(scope, receive, send))
    return sent[0]["status"], b"".join(each.get("body", b"") for each in sent).decode()


async def page(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads the whole request and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"page"})


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", {"host": "127.0.0.1:7860"}, 200),
        ("127.0.0.1", {"host": "localhost:7860", "origin": "http://localhost:7860"}, 200),
        ("127.0.0.1", {"host": "[::1]:7860"}, 200),
        ("127.0.0.1", {"host": "Proxy.example"}, 200),
        ("0.0.0.0", {"host": "192.168.3.4:7860", "origin": "http://192.168.3.4:7860"}, 200),
        ("127.0.0.1", {"host": "evil.example:7860"}, 403),
        ("127.0.0.1", {"host": "192.168.3.4:7860"}, 403),
        ("127.0.0.1", {"host": "127.0.0.1.evil.example"}, 403),
        ("127.0.0.1", {"host": "[::1"}, 403),
        ("127.0.0.1", {}, 403),
        ("0.0.0.0", {"host": "evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost:7860", "origin": "http://evil.example"}, 403),
        ("127.0.0.1", {"host": "localhost:7860", "origin": "http://localhost:9999"}, 403),
        ("127.0.0.1", {"host": "localhost:7860", "origin": "null"}, 403),
        ("127.0.0.1", {"host": "localhost:7860", "sec-fetch-site": "cross-site"}, 403),
    ],
)
def test_names_and_sites(host: str, headers: dict[str, str], status: int) -> None:
    found, text = asked(Guard(page, host, ["proxy.example"]), headers)
    assert (found, text == "page") == (status, status == 200)


def test_a_link_of_another_site_may_lead_here_and_its_form_may_not() -> None:
    visit = {"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert [asked(Guard(page), visit, method=method)[0] for method in ("GET", "POST")] == [200, 403]


def test_large_requests_end_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_BYTES", 100)
    own = {"host": "localhost"}
    assert asked(Guard(page), own, [b"x" * 60] * 1)[0] == 200
    assert asked(Guard(page), own, [b"x" * 60] * 2)[0] == 413
    assert asked(Guard(page), {**own, "content-length": "101"})[0] == 413


def test_a_request_that_the_page_never_sends_gets_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError(99999)

    line = "a request to /gradio_api/queue/join failed: KeyError: 99999"
    assert asked(Guard(fails), {"host": "localhost"}, path="/gradio_api/queue/join") == (400, line)
    assert capsys.readouterr().err == f"warning: {line}\n"


def test_uploads_are_bounded_and_old_ones_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SERVED_BYTES", 100)
    for name in ("0" * 64, "f" * 64, "mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(b"x" * 60)
    middleware = Guard(page, served=tmp_path)
    status, text = asked(middleware, {"host": "localhost"}, path="/gradio_api/upload")
    assert (status, "uploads take more than 100 bytes" in text) == (507, True)
    assert asked(middleware, {"host": "localhost"}, path="/gradio_api/queue/join")[0] == 200
    (tmp_path / "mine" / "empty").touch()
    assert kept_bytes(tmp_path) == 7 * guard.FILE_BYTES
    for name in ("0" * 64, "mine"):
        os.utime(tmp_path / name, (1, 1))
    clear_served(tmp_path, 100.0)
    assert {path.name for path in tmp_path.iterdir()} == {"f" * 64, "mine"}  # what Gradio did not write stays
