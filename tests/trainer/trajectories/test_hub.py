"""Networks are saved as folders, sent to a hub and fetched from it; the hub is a server on this machine."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from tiny_pipeline import tiny_run

from hierarchy_builder.errors import TrainerError, UsageError
from trainer import TrajectoryPipeline
from trainer.trajectories.hub import folder_of


class Hub(BaseHTTPRequestHandler):
    """The few answers of the hub that sending and fetching a repository need; files are kept in memory."""

    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, body: object, headers: dict[str, str] | None = None, status: int = 200) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/digits"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                for f in json.loads(sent)["files"]
            ]
            self.answer({"files": files})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, sent.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            here = f"http://{self.headers['Host']}/someone/digits/commit/{'0' * 40}"
            self.answer({"commitUrl": here, "commitOid": "0" * 40})
        else:
            self.answer({}, status=404)

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/someone/digits/tree/"):
            self.answer(
                [
                    {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}
                    for name, data in self.files.items()
                ]
            )
        elif self.path.startswith("/api/models/someone/digits"):
            siblings = [{"rfilename": name} for name in self.files]
            self.answer({"id": "someone/digits", "sha": "0" * 40, "siblings": siblings, "private": False})
        elif "/resolve/" in self.path and (data := self.files.get(self.path.split("/", 5)[5])) is not None:
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            self.answer(data, {"ETag": etag, "X-Repo-Commit": "0" * 40})
        else:
            self.answer({"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}, status=404)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_saved_network_draws_the_same(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "run")
    pipe = TrajectoryPipeline.from_pretrained(run)
    folder = pipe.save_pretrained(tmp_path / "saved", license="mit")
    assert not (folder / "optimizer.safetensors").exists()
    again = TrajectoryPipeline.from_pretrained(folder)
    assert torch.equal(pipe("bee", seed=1).levels, again("bee", seed=1).levels)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert 'license: "mit"' in card
    assert "ant, bee, emu" in card
    assert (folder / "samples.png").stat().st_size > 1_000
    raw = TrajectoryPipeline.from_pretrained(run, ema="raw")
    again = TrajectoryPipeline.from_pretrained(raw.save_pretrained(tmp_path / "raw"))
    assert torch.equal(raw("bee", seed=1).levels, again("bee", seed=1).levels)
    with pytest.raises(TrainerError, match="exists, nothing was written there"):
        pipe.save_pretrained(folder)


PROGRAM = """
import sys, torch
from trainer import TrajectoryPipeline
pipe = TrajectoryPipeline.from_pretrained(sys.argv[1])
print(pipe.push_to_hub("someone/digits", token="hf_test"))
for name in ("hf://someone/digits", "someone/digits"):
    again = TrajectoryPipeline.from_pretrained(name)
    assert torch.equal(pipe("bee", seed=1).levels, again("bee", seed=1).levels)
try:
    TrajectoryPipeline.from_pretrained("hf://someone/else")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_network_goes_to_the_hub_and_back(tmp_path: Path, hub: str) -> None:
    run = tiny_run(tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, run],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "HF_ENDPOINT": hub,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        },
    )
    assert done.returncode == 0, done.stderr[-2000:]
    address, refused = done.stdout.strip().splitlines()
    assert address.endswith("/someone/digits")
    assert refused.startswith("UserError hf://someone/else: 404")
    assert {"README.md", "samples.png", "state.json"} <= Hub.files.keys()


def test_local_folders_are_never_looked_for_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert folder_of("runs/missing") == Path("runs/missing")
    assert folder_of(tmp_path / "run") == tmp_path / "run"
    with pytest.raises(UsageError, match="expected hf://owner/name"):
        folder_of("hf://only-one-part")
