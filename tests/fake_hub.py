"""A Hugging Face Hub on the loopback interface, for data sets only.

It answers what ``datasets`` and ``huggingface_hub`` ask when a data set is loaded, and it is
the HTTP proxy of the process under test besides: whatever that process asks of another host
(``datasets`` builds the name of its viewer from ``HF_ENDPOINT``) comes here, is refused and is
kept in ``strays``, so nothing is looked up or sent beyond this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from helpers import LoopbackHandler, LoopbackServer

Files = Mapping[str, bytes]

_API = re.compile(r"/api/datasets/(.+?)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/datasets/(.+?)/resolve/([^/]+)/(.+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_MISSING = {
    "RepoNotFound": "Repository not found",
    "RevisionNotFound": "Invalid rev id",
    "EntryNotFound": "Entry not found",
}


class FakeHub:
    """``repositories``: the files of each revision of each data set, by name.

    A revision answers to its name and to its commit hash. ``requests`` holds the paths asked
    of the Hub, unquoted and without their queries; ``strays`` what was meant for other hosts.
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, Files]]) -> None:
        self.requests: list[str] = []
        self.strays: list[str] = []
        self._revisions: dict[str, dict[str, tuple[str, Files]]] = {}
        for name, revisions in repositories.items():
            known = self._revisions[name] = {}
            for revision, files in revisions.items():
                state = repr((name, revision, sorted(files.items())))
                commit = hashlib.sha1(state.encode()).hexdigest()
                known[revision] = known[commit] = commit, files

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | os.PathLike[str]) -> dict[str, str]:
        """The environment of a process that knows this Hub only and keeps its cache in ``home``."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith(("HF_", "HUGGING")) and "PROXY" not in name.upper()
        }
        proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), self.url)
        return {
            **kept,
            **proxies,
            "no_proxy": "127.0.0.1",  # an exact address: the viewer's name isn't covered by it
            "HOME": str(Path(home).absolute()),
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(Path(home).absolute() / "hf"),
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # or each load asks a counter at Amazon
        }

    def commit(self, name: str, revision: str = "main") -> str:
        """The commit hash that ``revision`` of the data set ``name`` stands for."""
        return self.find(name, revision)[0]

    def find(self, name: str, revision: str) -> tuple[str, Files]:
        """A revision's commit hash and files; else LookupError with the Hub's code for it."""
        if name not in self._revisions:
            raise LookupError("RepoNotFound")
        if revision not in self._revisions[name]:
            raise LookupError("RevisionNotFound")
        return self._revisions[name][revision]


class _Server(LoopbackServer):
    hub: FakeHub


class _Handler(LoopbackHandler):
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_CONNECT(self) -> None:
        self.server.hub.strays.append(self.path)
        self.close_connection = True
        self._send(502, b"", {})

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if not self.path.startswith("/"):  # the form in which a proxy is asked
            self.server.hub.strays.append(self.path)
            self._send(502, b"", {})
            return
        path = urlsplit(self.path).path
        self.server.hub.requests.append(unquote(path))
        try:
            if found := _API.fullmatch(path):
                name, kind, revision, rest = map(unquote, found.groups(""))
                self._send_json(200, self._describe(name, kind, revision, rest, body))
            elif found := _FILE.fullmatch(path):
                name, revision, rest = map(unquote, found.groups())
                self._send_file(name, revision, rest)
            else:
                self._send_json(404, {"error": "Not found"})
        except LookupError as missing:
            self._send_missing(str(missing.args[0]))

    def _describe(self, name: str, kind: str, revision: str, path: str, body: bytes) -> Any:
        commit, files = self.server.hub.find(name, revision or "main")
        entries = _entries(files)
        if kind == "paths-info":
            wanted = _wanted_paths(body, self.headers.get("Content-Type", ""))
            return [entry for place, entry in entries.items() if place in wanted]
        if kind == "tree":
            prefix = path and path + "/"
            below = {p: e for p, e in entries.items() if p.startswith(prefix)}
            if not below and path:
                raise LookupError("EntryNotFound")
            query = parse_qs(urlsplit(self.path).query)
            deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
            return [e for p, e in below.items() if deep or "/" not in p.removeprefix(prefix)]
        return {
            "_id": commit[:24],
            "id": name,
            "sha": commit,
            "private": False,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": place} for place in files],
        }

    def _send_file(self, name: str, revision: str, path: str) -> None:
        commit, files = self.server.hub.find(name, revision)
        headers = {"X-Repo-Commit": commit}
        if path not in files:
            self._send_missing("EntryNotFound", headers)
            return
        content = files[path]
        headers |= {"ETag": f'"{_blob_id(content)}"', "Accept-Ranges": "bytes"}
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is None or asked.groups() == ("", ""):
            self._send(200, content, headers)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= end:
            self._send(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"})
            return
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self._send(206, content[start:end], headers)

    def _send_missing(self, code: str, headers: Mapping[str, str] | None = None) -> None:
        text = _MISSING[code]
        codes = {"X-Error-Code": code, "X-Error-Message": text}
        self._send_json(404, {"error": text}, {**codes, **(headers or {})})

    def _send_json(
        self, status: int, value: object, headers: Mapping[str, str] | None = None
    ) -> None:
        kind = {"Content-Type": "application/json; charset=utf-8"}
        self._send(status, json.dumps(value).encode(), {**kind, **(headers or {})})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entries(files: Files) -> dict[str, dict[str, Any]]:
    """The rows of the Hub's tree by path: every file, and every folder that holds one."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(files.items()):
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = _blob_id(folder.encode())
            entries[folder] = {"type": "directory", "oid": oid, "size": 0, "path": folder}
        oid = _blob_id(content)
        entries[path] = {"type": "file", "oid": oid, "size": len(content), "path": path}
    return entries


def _blob_id(content: bytes) -> str:
    """Git's name for a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _wanted_paths(body: bytes, kind: str) -> set[str]:
    if kind.startswith("application/json"):
        return set(json.loads(body)["paths"])
    return set(parse_qs(body.decode())["paths"])
