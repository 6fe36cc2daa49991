"""A small hub on loopback: repositories for huggingface_hub, datasets and transformers.

with HubServer() as hub:
    commit = hub.add("dataset", "owner/name", {"data/test-0.parquet": b"..."})
    os.environ["HF_ENDPOINT"] = hub.url  # for processes that start now: it is read at import
"""

import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qs, unquote, urlsplit

RepoType = Literal["model", "dataset"]

_API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
    r"(?:/(?P<verb>revision|tree|paths-info|refs|auth-check)(?:/(?P<rest>.+))?)?"
)
_RESOLVE = re.compile(r"/(?:(?P<kind>datasets)/)?(?P<repo>[^/]+/[^/]+)/resolve/(?P<rest>.+)")


@dataclass
class Repository:
    """Commits and branches of one repository."""

    kind: RepoType
    repo_id: str
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        """Return the commit of `revision`."""
        if revision in self.commits:
            return revision
        return self.branches.get(revision)

    def split(self, rest: str) -> tuple[str, str] | None:
        """Return the commit and the path of `REVISION/PATH`; branch names may have slashes."""
        parts = rest.split("/")
        for size in range(1, len(parts) + 1):
            commit = self.resolve(unquote("/".join(parts[:size])))
            if commit is not None:
                return commit, unquote("/".join(parts[size:]))
        return None


class HubServer:
    """Serves repositories until it is closed."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[str] = []
        """`METHOD path` of every request, in order."""
        self.failing: dict[str, int] = {}
        """Path suffix -> HTTP status of its requests, instead of an answer."""
        self.gated: set[str] = set()
        """Repositories that are visible, but whose files are refused."""
        self.hangs = False
        """Whether requests get no answer at all."""
        self._closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """Return the endpoint, without a final slash."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(self, kind: RepoType, repo_id: str, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Commit `files` as the whole content of `branch`; return the commit."""
        digest = hashlib.sha1(usedforsecurity=False)
        for part in (kind, repo_id, branch, *(p for name in sorted(files) for p in (name, files[name]))):
            digest.update(part.encode() if isinstance(part, str) else part)
        commit = digest.hexdigest()
        repository = self.repositories.setdefault((kind, repo_id), Repository(kind, repo_id))
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        return commit

    def add_folder(self, kind: RepoType, repo_id: str, folder: Path, *, branch: str = "main") -> str:
        """Commit the files of a folder; return the commit."""
        files = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        return self.add(kind, repo_id, files, branch=branch)

    def close(self) -> None:
        """Stop serving."""
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def wait_if_hanging(self) -> None:
        """If the hub hangs, let a request wait until the end."""
        if self.hangs:
            self._closing.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def nowhere() -> str:
    """Return the endpoint of a hub that refuses connections."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(_Handler):
        server_hub = hub

    return Handler


class _Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that clients use for reading."""

    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_POST(self) -> None:
        self._answer(body=True)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 -- the base class names it
        """Keep the test's output clean."""

    def _answer(self, *, body: bool) -> None:
        path = urlsplit(self.path).path
        self._body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server_hub.requests.append(f"{self.command} {path}")
        self.server_hub.wait_if_hanging()
        for suffix, status in self.server_hub.failing.items():
            if path.endswith(suffix):
                self._send(status, b"{}", body=body)
                return
        if match := _API.fullmatch(path):
            self._api(match, body=body)
        elif match := _RESOLVE.fullmatch(path):
            self._file(match, body=body)
        else:
            self._send(404, b'{"error": "no such page"}', body=body)

    def _repository(self, match: re.Match[str], *, body: bool) -> Repository | None:
        kind = "dataset" if match["kind"] == "datasets" else "model"
        repository = self.server_hub.repositories.get((kind, match["repo"]))
        if repository is None:
            self._send(404, b'{"error": "Repository not found"}', body=body, code="RepoNotFound")
        return repository

    def _api(self, match: re.Match[str], *, body: bool) -> None:
        repository = self._repository(match, body=body)
        if repository is None:
            return
        verb, rest = match["verb"] or "revision", match["rest"] or "main"
        if verb == "auth-check":
            if not self._is_gated(repository, body=body):
                self._json({}, body=body)
            return
        if verb == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in repository.branches.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": []}, body=body)
            return
        found = repository.split(rest)
        if found is None:
            self._send(404, b'{"error": "Invalid rev id"}', body=body, code="RevisionNotFound")
            return
        commit, path = found
        files = repository.commits[commit]
        if verb == "revision":
            gated = "manual" if repository.repo_id in self.server_hub.gated else False
            self._json({**_info(repository, commit, files), "gated": gated}, body=body)
        elif verb == "tree":
            query = parse_qs(urlsplit(self.path).query)
            recursive = query.get("recursive", ["false"])[0].lower() in {"true", "1"}
            entries = _tree(files, path, recursive=recursive)
            if entries:
                self._json(entries, body=body)
            else:
                self._send(404, b'{"error": "Entry not found"}', body=body, code="EntryNotFound")
        else:
            self._json(_paths_info(files, self._asked_paths()), body=body)

    def _is_gated(self, repository: Repository, *, body: bool) -> bool:
        """Return whether a repository's files are refused; if so, refuse the request."""
        is_gated = repository.repo_id in self.server_hub.gated
        if is_gated:
            self._send(403, b'{"error": "Access is restricted"}', body=body, code="GatedRepo")
        return is_gated

    def _asked_paths(self) -> list[str]:
        if "json" in (self.headers.get("Content-Type") or ""):
            asked = json.loads(self._body or b"{}").get("paths", [])
            return [asked] if isinstance(asked, str) else list(asked)
        return parse_qs(self._body.decode()).get("paths", [])

    def _file(self, match: re.Match[str], *, body: bool) -> None:
        repository = self._repository(match, body=body)
        if repository is None or self._is_gated(repository, body=body):
            return
        found = repository.split(match["rest"])
        if found is None:
            self._send(404, b"", body=body, code="RevisionNotFound")
            return
        commit, path = found
        content = repository.commits[commit].get(path)
        if content is None:
            self._send(404, b"", body=body, code="EntryNotFound", commit=commit)
            return
        self._send_content(content, commit, body=body)

    def _send_content(self, content: bytes, commit: str, *, body: bool) -> None:
        headers = {
            "ETag": f'"{_oid(content)}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        status = 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked and content:
            first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, body=body, commit=commit, headers=headers)

    def _json(self, data: Any, *, body: bool) -> None:
        self._send(200, json.dumps(data).encode(), body=body, headers={"Content-Type": "application/json"})

    def _send(
        self,
        status: int,
        content: bytes,
        *,
        body: bool,
        code: str | None = None,
        commit: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        if code is not None:
            self.send_header("X-Error-Code", code)
        if commit is not None:
            self.send_header("X-Repo-Commit", commit)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _info(repository: Repository, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    return {
        "_id": _oid(repository.repo_id.encode())[:24],
        "id": repository.repo_id,
        "author": repository.repo_id.split("/")[0],
        "sha": commit,
        "lastModified": "2025-01-01T00:00:00.000Z",
        "createdAt": "2025-01-01T00:00:00.000Z",
        "private": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [{"rfilename": name} for name in sorted(files)],
    }


def _file_entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}


def _folders(files: Mapping[str, bytes]) -> set[str]:
    return {name[:place] for name in files for place in range(len(name)) if name[place] == "/"}


def _folder_entry(path: str) -> dict[str, Any]:
    return {"type": "directory", "oid": _oid(path.encode()), "size": 0, "path": path}


def _tree(files: Mapping[str, bytes], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder}/" if folder else ""
    entries = [_folder_entry(path) for path in sorted(_folders(files))]
    entries += [_file_entry(path, files[path]) for path in sorted(files)]
    return [
        entry
        for entry in entries
        if entry["path"].startswith(prefix) and (recursive or "/" not in entry["path"][len(prefix) :])
    ]


def _paths_info(files: Mapping[str, bytes], asked: list[str]) -> list[dict[str, Any]]:
    folders = _folders(files)
    return [
        _file_entry(path, files[path]) if path in files else _folder_entry(path)
        for path in asked
        if path in files or path in folders
    ]
