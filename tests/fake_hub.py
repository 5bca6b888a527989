"""A Hugging Face hub on loopback: what of its HTTP API models and datasets need.

with hub() as server:               # HF_ENDPOINT=server.url
    server.put("owner/repo", {"model.safetensors": data}, private=True)
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlparse

TOKEN = "hf_secretsecretsecret"
LARGE = 1000  # bytes from which on a file is one of Git LFS


class Hub:
    """Repositories: files by path, of every commit; `asked` are the requests so far."""

    def __init__(self, url: str):
        self.url = url
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.heads: dict[str, str] = {}
        self.private: set[str] = set()
        self.asked: list[str] = []

    def put(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        """A new commit with exactly these files; its name."""
        name = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits.setdefault(repo, {})[name] = dict(files)
        self.heads[repo] = name
        if private:
            self.private.add(repo)
        return name

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        commit = self.heads.get(repo, "") if revision == "main" else revision
        return self.commits.get(repo, {}).get(commit)


def entry(path: str, data: bytes) -> dict:
    """A file as the hub lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    found = {"type": "file", "path": path, "size": len(data), "oid": blob}
    if len(data) >= LARGE:
        sha256 = hashlib.sha256(data).hexdigest()
        found["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def _answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _missing(self, what: str) -> None:
        self._answer(404 if what != "RepoNotFound" else 401, {"error": what}, X_Error_Code=what)

    def _any(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.asked.append(f"{self.command} {path}")
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            return self._create(json.loads(body), known)
        found = re.fullmatch(
            r"/(?:api/models/|api/datasets/|datasets/)?(?P<repo>[^/]+/[^/]+)"
            r"(?:/(?P<what>resolve|revision|tree|preupload|commit)/(?P<rev>[^/]+)/?(?P<file>.*))?",
            path,
        )
        repo = found["repo"] if found else ""
        if repo not in self.hub.heads or (repo in self.hub.private and not known):
            return self._missing("RepoNotFound")
        if (files := self.hub.files(repo, found["rev"] or "main")) is None:
            return self._missing("RevisionNotFound")
        if found["what"] == "resolve":
            return self._resolve(repo, files, found["file"], found["rev"])
        if found["what"] == "tree":
            return self._answer(200, [entry(p, d) for p, d in files.items()])
        if found["what"] in ("preupload", "commit") and not known:
            return self._answer(403, {"error": "a token that may write is needed"})
        if found["what"] == "preupload":
            asked = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._answer(200, {"files": [{"path": f["path"], **modes} for f in asked]})
        if found["what"] == "commit":
            return self._commit(repo, dict(files), body)
        sha = self.hub.heads[repo] if (found["rev"] or "main") == "main" else found["rev"]
        siblings = [{"rfilename": name} for name in files]
        return self._answer(200, {"id": repo, "sha": sha, "siblings": siblings, "tags": []})

    def _create(self, asked: dict, known: bool) -> None:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if not known:
            return self._answer(401, {"error": "Invalid username or password."})
        if repo not in self.hub.heads:
            self.hub.put(repo, {".gitattributes": b""})
        return self._answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo})

    def _resolve(self, repo: str, files: dict[str, bytes], name: str, revision: str) -> None:
        if name not in files:
            return self._missing("EntryNotFound")
        data, at = files[name], entry(name, files[name])
        etag = at["lfs"]["oid"] if "lfs" in at else at["oid"]
        sha = self.hub.heads[repo] if revision == "main" else revision
        headers = {"X_Repo_Commit": sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            data = data[int(match[1]) : int(match[2]) + 1 if match[2] else None]
            return self._answer(206, data, **headers)
        return self._answer(200, data, **headers)

    def _commit(self, repo: str, files: dict[str, bytes], body: bytes) -> None:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                files.pop(value["path"])
            elif line["key"] == "deletedFolder":
                files = {n: d for n, d in files.items() if not fnmatch(n, f"{value['path']}*")}
        oid = self.hub.put(repo, files)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    do_GET = do_POST = do_HEAD = do_PUT = _any

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def hub() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    server.daemon_threads = True
    made = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass.hub = made
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
