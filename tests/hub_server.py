"""A local stand-in for the Hugging Face hub, as far as pushing and loading a model and streaming a dataset goes.

`HubServer` serves on a free port of this machine. Every file is taken within the commit ("regular" upload).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

TOKEN = "hf_test"


class HubServer(ThreadingHTTPServer):
    """`with HubServer() as hub:` - hub.url for HF_ENDPOINT, hub.repositories[name][path] for what was pushed;
    datasets are repositories called datasets/name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.account = {"name": "tester", "orgs": [], "auth": {"accessToken": {"role": "write"}}}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """The tests read what arrived, not a log."""

    def answer(self, code: int, content: Any = None, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content or {}).encode()
        self.send_response(code)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, code: int, kind: str) -> None:
        self.answer(code, {"error": kind}, {"X-Error-Code": kind, "X-Error-Message": kind})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().strip() or b"0", 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def handle_request(self) -> None:
        path, body = unquote(urlparse(self.path).path), self.body()
        repositories = self.server.repositories
        if path.startswith(("/api/datasets/", "/datasets/")):
            return self.dataset_request(path.removeprefix("/api").removeprefix("/"), body)
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.refuse(401, "Unauthorized")
        if path == "/api/whoami-v2":
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.refuse(401, "Unauthorized")
            return self.answer(200, self.server.account)
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
            repositories.setdefault(name, {})
            return self.answer(200, {"url": f"{self.server.url}/{name}", "id": name, "name": name})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": files})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    repositories[found[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            revision = self.revision(found[1])
            return self.answer(
                200,
                {
                    "success": True,
                    "commitOid": revision,
                    "commitUrl": f"{self.server.url}/{found[1]}/commit/{revision}",
                },
            )
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            if found[1] not in repositories:
                return self.refuse(404, "RepoNotFound")
            if found[2] not in repositories[found[1]]:
                return self.refuse(404, "EntryNotFound")
            content = repositories[found[1]][found[2]]
            etag = hashlib.sha1(content).hexdigest()
            return self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.revision(found[1])})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        if found and found[1] in repositories:
            siblings = [{"rfilename": name} for name in repositories[found[1]]]
            return self.answer(200, {"id": found[1], "sha": self.revision(found[1]), "siblings": siblings, "tags": []})
        return self.refuse(404, "RepoNotFound")

    def dataset_request(self, path: str, body: bytes) -> None:
        """Listing files, their sizes, and ranges of them."""
        found = re.fullmatch(r"(datasets/[^/]+/[^/]+)(?:/(revision|tree|paths-info|resolve)/([^/]+)(?:/(.*))?)?", path)
        if not found or found[1] not in self.server.repositories:
            return self.refuse(404, "RepoNotFound")
        name, verb, _, file = found.groups()
        files = self.server.repositories[name]
        if verb == "resolve":
            if file not in files:
                return self.refuse(404, "EntryNotFound")
            headers = {"ETag": f'"{hashlib.sha1(files[file]).hexdigest()}"', "X-Repo-Commit": self.revision(name)}
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                begin, size = int(wanted[1]), len(files[file])
                end = min(int(wanted[2] or size), size - 1)
                headers |= {"Content-Range": f"bytes {begin}-{end}/{size}"}
                return self.answer(206, files[file][begin : end + 1], headers)
            return self.answer(200, files[file], headers)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        if verb == "tree":
            return self.answer(200, entries) if not file else self.refuse(404, "EntryNotFound")  # no folders
        if verb == "paths-info":
            wanted_paths = (
                json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
            )
            return self.answer(200, [entry for entry in entries if entry["path"] in wanted_paths])
        siblings = [{"rfilename": path} for path in files]
        sha = self.revision(name)
        return self.answer(200, {"id": name.removeprefix("datasets/"), "sha": sha, "siblings": siblings, "tags": []})

    def revision(self, name: str) -> str:
        return hashlib.sha1(repr(sorted(self.server.repositories[name].items())).encode()).hexdigest()

    do_GET = do_POST = do_HEAD = handle_request
