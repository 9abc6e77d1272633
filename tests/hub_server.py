"""An HTTP server that speaks what the hub's client asks of the hub to push small files."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "secret" * 6
REPO = "someone/start"


@dataclass
class Hub:
    """What the server was told, and how it answers."""

    url: str = ""
    user: dict[str, Any] = field(
        default_factory=lambda: {
            "type": "user",
            "name": "someone",
            "orgs": [{"name": "company"}],
            "auth": {"accessToken": {"role": "write"}},
        }
    )
    refuses_commits: bool = False
    created: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    num_commits: int = 0

    def answer(self, path: str, headers: Any, body: bytes) -> tuple[int, Any]:
        if headers["authorization"] != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials"}
        if path == "/api/whoami-v2":
            return 200, self.user
        if path == "/api/repos/create":
            self.created.append(json.loads(body)["name"])
            return 200, {"url": f"{self.url}/{REPO}", "name": REPO, "id": "1"}
        if path.startswith(f"/api/models/{REPO}/tree/"):
            return 200, [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in self.files]
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path.startswith(f"/api/models/{REPO}/preupload/"):
            asked = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in asked]
            return 200, {"files": modes}
        if path.startswith(f"/api/models/{REPO}/commit/"):
            if self.refuses_commits:
                return 507, {"error": "storage limit reached"}
            self.num_commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                if line["key"] == "deletedFile":
                    del self.files[line["value"]["path"]]
            return 200, {"commitUrl": f"{self.url}/{REPO}/commit/0", "commitOid": "0" * 40, "pullRequestUrl": None}
        return 404, {"error": f"no {path}"}


@contextmanager
def served() -> Iterator[Hub]:
    """A hub on a free port, as long as the block lasts."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            status, answer = hub.answer(self.path.partition("?")[0], self.headers, body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
