"""A Hugging Face hub on this machine: the few answers that sending and fetching a repository need."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(BaseHTTPRequestHandler):
    """One model, `someone/digits`, and one data set, `someone/set`; files are kept in memory."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, bytes]]
    commits: dict[str, int]
    """Commits of each repository so far."""
    lock = threading.Lock()

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

    def refuse(self, what: str, code: str) -> None:
        self.answer({"error": f"{what} not found"}, {"X-Error-Code": code}, status=404)

    def asked(self) -> tuple[str, dict[str, bytes] | None, str]:
        """The repository that the path names, its files, and the rest of the path."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        parts = parts[1:] if parts[0] == "api" else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name = "/".join([kind, *parts[:2]])
        return name, self.repositories.get(name), "/".join(parts[2:])

    def do_POST(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/someone/digits"})
            return
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
            return
        name, files, rest = self.asked()
        if files is None:
            self.refuse("Repository", "RepoNotFound")
        elif rest.startswith("preupload/"):
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": f["path"], **modes} for f in json.loads(sent)["files"]]})
        elif rest.startswith("paths-info/"):
            paths = [path.strip("/") for path in json.loads(sent)["paths"]]
            self.answer([self.entry(path, files[path]) for path in paths if path in files])
        elif rest == "commit/main":
            lines = [json.loads(line) for line in sent.splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            with self.lock:
                if parent not in (None, self.head(name)):
                    self.answer({"error": "The expected parent commit is another"}, status=412)
                    return
                self.commits[name] += 1
                for line in lines:
                    if line["key"] == "file":
                        files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    elif line["key"] == "deletedFile":
                        del files[line["value"]["path"]]
            here = f"http://{self.headers['Host']}/{name}/commit/{self.head(name)}"
            self.answer({"commitUrl": here, "commitOid": self.head(name)})
        else:
            self.refuse("Page", "EntryNotFound")

    def head(self, name: str) -> str:
        """The newest commit of a repository."""
        return f"{self.commits[name]:040x}"

    @staticmethod
    def entry(name: str, data: bytes) -> dict[str, object]:
        return {"type": "file", "path": name, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}

    def do_GET(self) -> None:
        name, files, rest = self.asked()
        if files is None:
            self.refuse("Repository", "RepoNotFound")
            return
        what, _, path = rest.partition("/")
        path = path.partition("/")[2]  # after the revision
        if what == "tree":
            inside = {own: data for own, data in files.items() if own.startswith(f"{path}/" if path else "")}
            if path and not inside:
                self.refuse("Entry", "EntryNotFound")
            else:
                self.answer([self.entry(*item) for item in inside.items()])
        elif what == "resolve":
            if path not in files:
                self.refuse("Entry", "EntryNotFound")
                return
            etag = f'"{hashlib.sha1(files[path]).hexdigest()}"'
            self.answer(files[path], {"ETag": etag, "X-Repo-Commit": self.head(name)})
        else:
            siblings = [{"rfilename": own} for own in files]
            known = {
                "id": name.partition("/")[2],
                "sha": self.head(name),
                "siblings": siblings,
                "private": False,
            }
            self.answer(known)

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)


@contextlib.contextmanager
def running_hub(*repositories: str) -> Iterator[str]:
    """Serve these repositories, such as `datasets/someone/set`, empty at first; gives the address."""
    Hub.repositories = {name: {} for name in repositories}
    Hub.commits = dict.fromkeys(repositories, 0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def hub_environment(address: str, home: Path) -> dict[str, str]:
    """What makes huggingface_hub of a fresh process talk to that address."""
    return {
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_test",
    }
