"""The HTTP server; each method of `_Handler` names the endpoint that it serves."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_server.faults import Fault
from hub_server.store import Blob, Repo

_BLOCK_BYTES = 16 << 10


@dataclass(frozen=True)
class Request:
    """What was asked; `received` counts the bytes of the body that arrived."""

    method: str
    path: str
    headers: Mapping[str, str]
    received: int
    status: int


class HubServer:
    """Serves on a free port of 127.0.0.1 while the `with` block runs.

    `users` maps tokens to names; `chunk_bytes` makes uploads go in parts of that size;
    `before_put` is called at the start of each upload.
    """

    def __init__(self) -> None:
        self.reset()
        self.lock = threading.RLock()
        self._idle = threading.Condition()
        self._connections: frozenset[object] = frozenset()
        self._server = _Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def reset(self) -> None:
        """Without repositories, requests and faults, as at first."""
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {"hf_" + "a" * 34: "ann"}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.chunk_bytes: int | None = None
        self.parts: dict[str, dict[int, bytes]] = {}
        self.before_put: Callable[[], None] = lambda: None

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for fault in self.faults:
            fault.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def token(self) -> str:
        return next(iter(self.users))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Variables with which huggingface_hub talks to this server alone."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN": "0",
            "HF_TOKEN": token or "",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def add(self, name: str, files: Mapping[str, bytes] | None = None, **options: Any) -> Repo:
        """A new repository."""
        repo = self.repos[name] = Repo(name, **options)
        if files:
            repo.upload(files)
        return repo

    def fail(self, pattern: str, **how: Any) -> Fault:
        """Orders a fault; see `Fault`."""
        fault = Fault(pattern, **how)
        self.faults.append(fault)
        return fault

    @contextmanager
    def connection(self) -> Iterator[None]:
        """Counts a connection that is open while the block runs."""
        connection = object()
        with self._idle:
            self._connections |= {connection}
        try:
            yield
        finally:
            with self._idle:
                self._connections -= {connection}
                self._idle.notify_all()

    @property
    def connections(self) -> frozenset[object]:
        """Those that are open."""
        return self._connections

    def wait_until_closed(self, others: frozenset[object]) -> None:
        """Returns when all but `others` are closed: what a killed client sent has arrived."""
        with self._idle:
            assert self._idle.wait_for(lambda: self._connections <= others, timeout=60)

    def log(self, method: str, pattern: str = "") -> list[Request]:
        """The requests so far with that method whose path matches."""
        with self.lock:
            found = [r for r in self.requests if r.method == method]
        return [request for request in found if re.search(pattern, request.path)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, hub: HubServer) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), _Handler)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        with self.hub.connection():
            super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed are part of the tests."""


class _Dropped(Exception):
    """The connection is to end without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        """The log is `HubServer.requests`."""

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        hub = self.server.hub
        self._received, self._status, self._fault = 0, 0, None
        target = urlsplit(self.path)
        self._query = parse_qs(target.query)
        request = f"{self.command} {unquote(target.path)}"
        with hub.lock:
            self._fault = next((f for f in hub.faults if f.takes(request)), None)
        try:
            if self._fault is not None and self._fault.drop == "before":
                raise _Dropped
            if self.command == "PUT":
                hub.before_put()
            body = self._body()
            if self._fault is not None and self._fault.meanwhile is not None:
                self._fault.meanwhile()
            if self._fault is not None and self._fault.status is not None:
                self._send(self._fault.status, self._fault.body.encode())
                return
            self._route(unquote(target.path), body)
        except _Dropped:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        finally:
            entry = Request(
                self.command, self.path, dict(self.headers), self._received, self._status
            )
            with hub.lock:
                hub.requests.append(entry)

    # Bodies and answers

    def _body(self) -> bytes:
        fault = self._fault
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            return b"".join(self._chunks())
        length = int(self.headers.get("Content-Length") or 0)
        data = bytearray()
        while len(data) < length:
            block = self.rfile.read(min(_BLOCK_BYTES, length - len(data)))
            if not block:
                raise _Dropped
            data += block
            self._received = len(data)
            if fault is not None and len(data) * 2 >= length:
                if fault.hold:
                    fault.held.set()
                    fault.release.wait()
                if fault.drop == "inside":
                    raise _Dropped
        return bytes(data)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self._received += size
            self.rfile.readline()
        self.rfile.readline()

    def _send(
        self, status: int, data: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        fault = self._fault
        if fault is not None and fault.drop == "after":
            raise _Dropped
        self._status = status
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if "Content-Length" not in (headers or {}):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is not None and fault.drop == "inside" and self.command == "GET":
            self.wfile.write(data[: len(data) // 2])
            raise _Dropped
        self.wfile.write(data)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode())

    def _refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    # Who asks, and what may they see

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        return self.server.hub.users.get(token)

    def _repo(self, name: str, *, write: bool = False) -> Repo | None:
        """The repository, or None when the refusal has been sent."""
        repo, user = self.server.hub.repos.get(name), self._user()
        if self.headers.get("Authorization") and user is None:
            self._refuse(401, "", "Invalid credentials in Authorization header")
            return None
        sees = repo is not None and (not repo.private or user in {repo.owner, *repo.readers})
        if repo is None or not sees:
            self._refuse(404 if user else 401, "RepoNotFound", "Repository not found")
            return None
        if write and user != repo.owner:
            what = "You don't have the rights to create a model under this namespace"
            self._refuse(403 if user else 401, "", what)
            return None
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str | None:
        commit = repo.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # Endpoints

    def _route(self, path: str, body: bytes) -> None:
        for method, pattern, endpoint in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match is not None and self.command in method.split():
                endpoint(self, body, **match.groupdict())
                return
        self._refuse(404, "", f"no such endpoint: {self.command} {path}")

    def whoami(self, body: bytes) -> None:
        user = self._user()
        if user is None:
            self._refuse(401, "", "Invalid username or password.")
        else:
            self._json({"type": "user", "name": user, "orgs": [], "auth": {}})

    def create(self, body: bytes) -> None:
        hub, user, wanted = self.server.hub, self._user(), json.loads(body)
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if user is None:
            self._refuse(401, "", "Invalid username or password.")
        elif owner != user:
            self._refuse(403, "", f"You don't have the rights to create a model under {owner}")
        elif name in hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"},
                       409)  # fmt: skip
        else:
            private = wanted.get("private") is True or wanted.get("visibility") == "private"
            hub.add(name, private=private)
            self._json({"url": f"{hub.url}/{name}", "name": name})

    def validate_yaml(self, body: bytes) -> None:
        import yaml

        content = json.loads(body)["content"]
        errors = []
        match = re.match(r"\s*---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            values = yaml.safe_load(match[1]) if match else {}
            if not isinstance(values, dict):
                errors.append({"message": "must be an object"})
            elif not isinstance(values.get("license", ""), str):
                errors.append({"message": '"license" must be a string'})
        except yaml.YAMLError as error:
            errors.append({"message": str(error)})
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def model(self, body: bytes, repo: str, revision: str | None = None) -> None:
        found = self._repo(repo)
        commit = found and self._commit_of(found, revision or "main")
        if found is None or not commit:
            return
        names = [{"rfilename": name} for name in found.files(commit)]
        self._json({
            "_id": "1", "id": found.name, "modelId": found.name, "author": found.owner,
            "sha": commit, "private": found.private, "gated": "auto" if found.gated else False,
            "disabled": False, "tags": [], "downloads": 0, "likes": 0, "siblings": names,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
        })  # fmt: skip

    def tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        found = self._repo(repo)
        commit = found and self._commit_of(found, revision)
        if found is None or not commit:
            return
        inside = f"{folder.strip('/')}/" if folder and folder.strip("/") else ""
        deep = self._query.get("recursive", ["false"])[0].lower() == "true"
        entries: dict[str, dict[str, Any]] = {}
        for name, blob in sorted(found.files(commit).items()):
            rest = name.removeprefix(inside)
            if not name.startswith(inside):
                continue
            if "/" in rest and not deep:
                path = inside + rest.partition("/")[0]
                entries[path] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
                continue
            entries[name] = self._entry(name, blob)
        self._json(list(entries.values()))

    @staticmethod
    def _entry(name: str, blob: Blob) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "type": "file", "oid": blob.oid, "size": len(blob.data), "path": name
        }  # fmt: skip
        if blob.lfs:
            entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
        return entry

    def paths_info(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo)
        commit = found and self._commit_of(found, revision)
        if found is None or not commit:
            return
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        files = found.files(commit)
        entries = [self._entry(name, files[name]) for name in wanted if name in files]
        for name in wanted:
            if name not in files and any(path.startswith(f"{name}/") for path in files):
                entries.append({"type": "directory", "oid": "0" * 40, "size": 0, "path": name})
        self._json(entries)

    def refs(self, body: bytes, repo: str) -> None:
        found = self._repo(repo)
        if found is not None:
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
                for name, commit in found.branches.items()
            ]
            self._json({"branches": branches, "converts": [], "tags": []})

    def branch(self, body: bytes, repo: str, name: str) -> None:
        found = self._repo(repo, write=True)
        if found is None:
            return
        if name in found.branches:
            self._refuse(409, "", "Reference already exists")
            return
        found.branches[name] = found.branches["main"]
        self._json({})

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        commit = found and self._commit_of(found, revision)
        if found is None or not commit:
            return
        there = found.files(commit)
        answer = []
        for file in json.loads(body)["files"]:
            name = file["path"]
            large = found.is_large(name, file["size"])
            entry = {
                "path": name,
                "uploadMode": "lfs" if large else "regular",
                "shouldIgnore": found.is_ignored(name),
            }
            if name in there:
                entry["oid"] = there[name].etag
            answer.append(entry)
        self._json({"files": answer, "commitOid": commit})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        found = self._repo(repo, write=True)
        if found is None:
            return
        hub = self.server.hub
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(body)["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in found.objects:
                base = f"{hub.url}/storage/{quote(repo, safe='')}/{oid}"
                upload: dict[str, Any] = {"href": base}
                if hub.chunk_bytes is not None:
                    parts = range(1, -(-size // hub.chunk_bytes) + 1)
                    header = {f"{part:05d}": f"{base}/{part}" for part in parts}
                    upload = {
                        "href": f"{base}/complete",
                        "header": {"chunk_size": str(hub.chunk_bytes), **header},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(entry)
        transfer = "basic" if hub.chunk_bytes is None else "multipart"
        self._json({"transfer": transfer, "objects": objects})

    def store(self, body: bytes, repo: str, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, "", "another content than announced")
            return
        self.server.hub.repos[unquote(repo)].objects[oid] = body
        self._send(200)

    def store_part(self, body: bytes, repo: str, oid: str, part: str) -> None:
        self.server.hub.parts.setdefault(oid, {})[int(part)] = body
        self._send(200, headers={"ETag": hashlib.sha256(body).hexdigest()})

    def complete(self, body: bytes, repo: str, oid: str) -> None:
        parts = self.server.hub.parts.pop(oid)
        listed = [part["partNumber"] for part in json.loads(body)["parts"]]
        assert listed == sorted(parts)
        self.store(b"".join(parts[part] for part in listed), repo, oid)

    def verify(self, body: bytes, repo: str, oid: str) -> None:
        if oid in self.server.hub.repos[unquote(repo)].objects:
            self._json({})
        else:
            self._refuse(404, "", "no such object")

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        found = self._repo(repo, write=True)
        head = found and self._commit_of(found, revision)
        if found is None or not head:
            return
        lines = [json.loads(line) for line in body.splitlines()]
        with self.server.hub.lock:
            parent = lines[0]["value"].get("parentCommit")
            if parent is not None and parent != found.branches[revision]:
                self._refuse(412, "", "A commit has happened since. Please refresh and try again.")
                return
            try:
                commit = found.commit(revision, lines)
            except KeyError as error:
                self._refuse(400, "", f"LFS pointer pointed to a file that does not exist: {error}")
                return
        url = f"{self.server.hub.url}/{repo}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, body: bytes, repo: str, revision: str, name: str) -> None:
        found = self._repo(repo)
        if found is None:
            return
        if found.gated and self._user() not in {found.owner, *found.readers}:
            self._refuse(403 if self._user() else 401, "GatedRepo", "Access to it is restricted")
            return
        commit = self._commit_of(found, revision)
        if not commit:
            return
        blob = found.files(commit).get(name)
        if blob is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        data, status = blob.data, 200
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{blob.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(data))}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span is not None:
            first, last = int(span[1]), int(span[2] or len(data) - 1)
            if first >= len(data):
                self._refuse(416, "", "no such range")
                return
            last = min(last, len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        headers["Content-Length"] = str(len(data))
        self._send(status, data, headers)


_MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_STORAGE = r"/storage/(?P<repo>[^/]+/[^/]+|[^/]+)/(?P<oid>[0-9a-f]{64})"
_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate_yaml),
    ("GET", _MODEL, _Handler.model),
    ("GET", rf"{_MODEL}/revision/{_REVISION}", _Handler.model),
    ("GET", rf"{_MODEL}/tree/{_REVISION}(?P<folder>/.*)?", _Handler.tree),
    ("POST", rf"{_MODEL}/paths-info/{_REVISION}", _Handler.paths_info),
    ("GET", rf"{_MODEL}/refs", _Handler.refs),
    ("POST", rf"{_MODEL}/branch/(?P<name>[^/]+)", _Handler.branch),
    ("POST", rf"{_MODEL}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"{_MODEL}/commit/{_REVISION}", _Handler.commit),
    ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", _STORAGE, _Handler.store),
    ("PUT", rf"{_STORAGE}/(?P<part>\d+)", _Handler.store_part),
    ("POST", rf"{_STORAGE}/complete", _Handler.complete),
    ("POST", rf"{_STORAGE}/verify", _Handler.verify),
    ("GET HEAD", rf"/(?P<repo>[^/]+/[^/]+)/resolve/{_REVISION}/(?P<name>.+)", _Handler.resolve),
)
