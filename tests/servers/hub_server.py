"""The test hub's own process: a Hugging Face hub on one port and its CDN on another. Start it through hub.HubServer.

Plain http.server, a thread per connection and sendfile: faults (bodies cut short, wrong ranges, flipped bytes, silence)
need the socket itself, and multi-gigabyte bodies must not pass through Python. What it answers is what the real client
asks for: model_info, tree with Link paging, HEAD and GET of resolve, the error codes in X-Error-Code, the CDN's signed
addresses. Control: POST /_control on the hub's port, as hub.py sends it.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import datetime
import hashlib
import hmac
import json
import os
import random
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".ot", ".engine")
LFS_SIZE = 10 * 1024 * 1024
_KEY = os.urandom(16)


@dataclasses.dataclass(frozen=True)
class Entry:
    path: str
    real: str
    size: int
    sha1: str
    sha256: str | None


@dataclasses.dataclass
class Repo:
    private: bool = False
    gated: bool = False
    tokens: frozenset[str] = frozenset()
    listers: frozenset[str] = frozenset()
    revisions: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Fault:
    kind: str
    port: str = "any"
    path: str = ""
    method: str = ""
    count: int | None = None
    probability: float = 1.0
    seed: int = 0
    status: int = 503
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    after: int = 0
    seconds: float = 0.0
    rate: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.lifted = threading.Event()


class State:
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, str] = {}
        self.hashes: dict[tuple[int, int, int, int], tuple[str, str]] = {}
        self.tokens: set[str] = set()
        self.faults: list[Fault] = []
        self.log: list[dict[str, Any]] = []
        self.epoch = 0
        self.lifetime = 3600.0
        self.page = 1000
        self.siblings: int | None = None
        self.drop: list[str] = []
        self.hub = ""
        self.cdn = ""

    def publish(
        self,
        repo: str,
        directory: str,
        revision: str,
        private: bool,
        gated: bool,
        tokens: list[str],
        listers: list[str],
    ) -> str:
        files: dict[str, Entry] = {}
        for parent, _, names in os.walk(directory, followlinks=True):
            for name in names:
                real = os.path.join(parent, name)
                relative = os.path.relpath(real, directory)
                files[relative] = self.entry(relative, real)
        return self.publish_entries(repo, files, revision, private, gated, tokens, listers)

    def publish_entries(
        self,
        repo: str,
        files: dict[str, Entry],
        revision: str,
        private: bool,
        gated: bool,
        tokens: list[str],
        listers: list[str],
    ) -> str:
        listing = json.dumps(sorted((entry.path, entry.sha1, entry.size) for entry in files.values()))
        commit = hashlib.sha1(f"{repo} {listing}".encode()).hexdigest()
        with self.lock:
            known = self.repos.setdefault(repo, Repo())
            known.private, known.gated, known.tokens = private, gated, frozenset(tokens)
            known.listers = frozenset(listers)
            known.revisions[revision] = commit
            known.commits[commit] = files
            self.tokens.update(tokens)
            self.tokens.update(listers)
            for entry in files.values():
                if entry.sha256:
                    self.blobs[entry.sha256] = entry.real
        return commit

    def entry(self, relative: str, real: str) -> Entry:
        status = os.stat(real)
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in self.hashes:
            strong = hashlib.sha256()
            git = hashlib.sha1(b"blob %d\0" % status.st_size)
            lfs = real.endswith(LFS_SUFFIXES) or status.st_size >= LFS_SIZE
            with open(real, "rb") as file:
                while block := file.read(1 << 20):
                    strong.update(block)
                    if not lfs:
                        git.update(block)
            if lfs:  # git holds a pointer file
                pointer = (
                    f"version https://git-lfs.github.com/spec/v1\noid sha256:{strong.hexdigest()}\n"
                    f"size {status.st_size}\n"
                ).encode()
                git = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer)
            self.hashes[key] = (git.hexdigest(), strong.hexdigest() if lfs else "")
        sha1, sha256 = self.hashes[key]
        return Entry(relative, real, status.st_size, sha1, sha256 or None)

    def sign(self, path: str, expires: int) -> str:
        message = f"{path}?{expires}#{self.epoch}".encode()
        return base64.urlsafe_b64encode(hmac.digest(_KEY, message, "sha256")).decode().rstrip("=")

    def cdn_url(self, sha256: str) -> str:
        path = f"/repos/{sha256[:2]}/{sha256[2:4]}/{sha256}"
        expires = int(time.time() + self.lifetime)
        return f"{self.cdn}{path}?Expires={expires}&Signature={self.sign(path, expires)}&Key-Pair-Id=TESTHUB"

    def applicable(self, port: str, method: str, path: str) -> dict[str, Fault]:
        """The faults that this request meets, by kind; counts are used up."""
        met: dict[str, Fault] = {}
        with self.lock:
            for fault in self.faults:
                if (
                    fault.kind not in met
                    and fault.port in ("any", port)
                    and fault.method in ("", method)
                    and fault.path in path
                    and fault.count != 0
                    and (fault.probability >= 1.0 or fault.random.random() < fault.probability)
                ):
                    if fault.count is not None:
                        fault.count -= 1
                    met[fault.kind] = fault
        return met

    def control(self, order: dict[str, Any]) -> Any:
        match order.pop("do"):
            case "publish":
                return {"commit": self.publish(**order)}
            case "publish-names":  # a repository with any names at all, hostile ones too; all share one small file
                real = order.pop("real")
                files = {name: dataclasses.replace(self.entry(name, real), path=name) for name in order.pop("names")}
                return {"commit": self.publish_entries(files=files, **order)}
            case "fault":
                with self.lock:
                    self.faults.append(Fault(**order))
            case "clear":
                with self.lock:
                    for fault in self.faults:
                        fault.lifted.set()
                    self.faults.clear()
            case "expire":
                self.epoch += 1
            case "set":
                for name, value in order.items():
                    if name not in ("lifetime", "page", "siblings", "drop"):
                        raise ValueError(name)
                    setattr(self, name, value)
            case "requests":
                with self.lock:
                    return [dict(entry) for entry in self.log]
            case "forget-requests":
                with self.lock:
                    self.log.clear()
            case other:
                raise ValueError(other)
        return {}


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        self.status, self.code, self.text, self.headers = status, code, message, headers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/_control" or self.server.role != "hub":
            return self.reply(404, b"")
        try:
            return self.reply(200, json.dumps(self.server.state.control(json.loads(body))).encode())
        except Exception as error:
            return self.reply(400, f"{type(error).__name__}: {error}".encode())

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def serve(self) -> None:
        state = self.server.state
        url = urlsplit(self.path)
        self.entry: dict[str, Any] = {
            "port": self.server.role,
            "method": self.command,
            "path": unquote(url.path),
            "query": url.query,
            "range": self.headers.get("Range"),
            "token": (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None,
            "status": 0,
            "sent": 0,
        }
        with state.lock:
            state.log.append(self.entry)
        self.faults = state.applicable(self.server.role, self.command, self.entry["path"])
        try:
            if fault := self.faults.get("latency"):
                fault.lifted.wait(fault.seconds)
            if fault := self.faults.get("blackhole"):
                fault.lifted.wait()
                self.close_connection = True
                return None
            if "reset" in self.faults:
                self.close_connection = True
                return None
            if fault := self.faults.get("status"):
                return self.reply(fault.status, b"fault\n", fault.headers)
            if self.server.role == "cdn":
                self.serve_cdn(url.path, parse_qs(url.query))
            else:
                self.serve_hub(url.path, parse_qs(url.query))
        except Refused as refused:
            headers = {name.replace("_", "-"): value for name, value in refused.headers.items()}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            if refused.text:
                headers["X-Error-Message"] = refused.text
            self.reply(refused.status, json.dumps({"error": refused.text or refused.code}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    # -- the hub

    def serve_hub(self, path: str, query: dict[str, list[str]]) -> None:
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            for verb in ("revision", "tree"):
                if verb in parts[3:5]:
                    at = parts.index(verb, 3)
                    repo_id, rest = "/".join(parts[2:at]), parts[at + 1 :]
                    if verb == "tree":
                        return self.tree(repo_id, rest[0], query)
                    return self.info(repo_id, rest[0], query)
            return self.info("/".join(parts[2:]), "main", query)
        if "resolve" in parts[1:3]:
            at = parts.index("resolve", 1)
            return self.resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        raise Refused(404, message="Not Found")

    def open_repo(self, repo_id: str, *, content: bool) -> Repo:
        state, token = self.server.state, self.entry["token"]
        if token and token not in state.tokens:
            raise Refused(401, message="Invalid credentials in Authorization header")
        repo = state.repos.get(repo_id)
        if repo is None or (repo.private and token not in repo.tokens | repo.listers):
            raise Refused(401 if not token else 404, "RepoNotFound", "Repository not found")
        if content and repo.gated and token not in repo.tokens:
            text = f"Access to model {repo_id} is restricted."
            raise Refused(403 if token else 401, "GatedRepo", text)
        if content and token in repo.listers:
            raise Refused(403, message="Forbidden: this token may list the repository, and not read its contents")
        return repo

    def open_commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Entry]]:
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    def info(self, repo_id: str, revision: str, query: dict[str, list[str]]) -> None:
        repo = self.open_repo(repo_id, content=False)
        commit, files = self.open_commit(repo, revision)
        drop, siblings = self.server.state.drop, []
        for entry in list(files.values())[: self.server.state.siblings]:
            sibling: dict[str, Any] = {"rfilename": entry.path}
            if "blobs" in query and "blobs" not in drop:
                sibling |= {"size": entry.size, "blobId": entry.sha1}
                if entry.sha256:
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": 134}
            siblings.append(sibling)
        stamp = datetime.datetime(2024, 5, 6, 7, 8, 9, tzinfo=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        answer = {
            "_id": "0" * 24,
            "id": repo_id,
            "modelId": repo_id,
            "sha": commit,
            "lastModified": stamp,
            "createdAt": stamp,
            "private": repo.private,
            "gated": "auto" if repo.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": siblings,
        }
        self.reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def tree(self, repo_id: str, revision: str, query: dict[str, list[str]]) -> None:
        repo, drop = self.open_repo(repo_id, content=False), self.server.state.drop
        if "tree" in drop:
            raise Refused(404, message="Not Found")
        _, files = self.open_commit(repo, revision)
        items: dict[str, dict[str, Any]] = {}
        for entry in files.values():
            parent = os.path.dirname(entry.path)
            while parent.strip("/"):
                oid = hashlib.sha1(parent.encode()).hexdigest()
                items.setdefault(parent, {"type": "directory", "oid": oid, "size": 0, "path": parent})
                parent = os.path.dirname(parent)
            item: dict[str, Any] = {"type": "file", "oid": entry.sha1, "size": entry.size, "path": entry.path}
            if entry.sha256:
                item["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            if "sizes" in drop:
                item = {"type": "file", "path": entry.path}
            items[entry.path] = item
        names = sorted(items)
        if query.get("recursive", ["false"])[0].lower() != "true":
            names = [name for name in names if "/" not in name]
        start, page = int(query.get("cursor", ["0"])[0]), self.server.state.page
        headers = {"Content-Type": "application/json"}
        if start + page < len(names) and "link" not in drop:
            base = f"{self.server.state.hub}{urlsplit(self.path).path}"
            if "link-host" in drop:  # a mirror that passes on what the hub behind it says
                base = "https://hub.invalid/elsewhere"
            recursive = query.get("recursive", ["false"])[0]
            cursor = 1 if "cursor" in drop else start + page
            headers["Link"] = f'<{base}?recursive={recursive}&expand=false&cursor={cursor}>; rel="next"'
        self.reply(200, json.dumps([items[name] for name in names[start : start + page]]).encode(), headers)

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.open_repo(repo_id, content=True)
        commit, files = self.open_commit(repo, revision)
        entry = files.get(path)
        if entry is None:
            raise Refused(404, "EntryNotFound", "Entry not found", X_Repo_Commit=commit)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry.sha256:
            headers |= {
                "X-Linked-Size": str(entry.size),
                "X-Linked-Etag": f'"{entry.sha256}"',
                "ETag": f'"{entry.sha1}"',
                "Location": self.server.state.cdn_url(entry.sha256),
            }
            return self.reply(302, b"Found. Redirecting\n", headers)
        return self.send_file(entry.real, headers | {"ETag": f'"{entry.sha1}"'})

    # -- the CDN

    def serve_cdn(self, path: str, query: dict[str, list[str]]) -> None:
        state = self.server.state
        expires = int(query.get("Expires", ["0"])[0])
        signature = query.get("Signature", [""])[0]
        if expires <= time.time() or not hmac.compare_digest(signature, state.sign(path, expires)):
            return self.reply(403, b"<Error><Code>AccessDenied</Code><Message>Request has expired</Message></Error>")
        sha256 = path.rpartition("/")[2]
        if sha256 not in state.blobs:
            return self.reply(404, b"<Error><Code>NoSuchKey</Code></Error>")
        return self.send_file(state.blobs[sha256], {"ETag": f'"cdn-{sha256[:16]}"', "Accept-Ranges": "bytes"})

    # -- bodies

    def reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        with contextlib.suppress(AttributeError):
            self.entry["status"] = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_file(self, real: str, headers: dict[str, str]) -> None:
        try:
            file = open(real, "rb")  # noqa: SIM115
        except OSError:
            raise Refused(404, message="blob lost") from None
        with file:
            size = os.fstat(file.fileno()).st_size
            start, stop, status = 0, size, 200
            wanted = self.headers.get("Range")
            if wanted and wanted.startswith("bytes=") and "whole" not in self.faults:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                if first:
                    start, stop = int(first), min(int(last) + 1, size) if last else size
                else:
                    start = max(0, size - int(last))
                status = 206
                if start >= size:
                    return self.reply(416, b"", {"Content-Range": f"bytes */{size}"})
                shown = start + 1 if "range" in self.faults else start
                headers = headers | {"Content-Range": f"bytes {shown}-{stop - 1}/{size}"}
            self.entry["status"] = status
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Type", "application/octet-stream")
            self.send_header("Content-Length", str(stop - start))
            self.end_headers()
            if self.command != "HEAD":
                self.send_body(file.fileno(), start, stop)
        return None

    def send_body(self, descriptor: int, start: int, stop: int) -> None:
        cut, slow, corrupt = self.faults.get("cut"), self.faults.get("bandwidth"), self.faults.get("corrupt")
        stall = self.faults.get("stall")
        if cut or stall:
            stop = min(stop, start + (cut or stall).after)  # type: ignore[union-attr]
        if corrupt is None and slow is None:
            out = self.connection.fileno()
            while start < stop:
                sent = os.sendfile(out, descriptor, start, min(stop - start, 8 << 20))
                if sent == 0:
                    break
                start += sent
                self.entry["sent"] += sent
        else:
            bad = corrupt.random.randrange(start, stop) if corrupt and stop > start else -1
            block_size = max(1, slow.rate // 20) if slow else 1 << 20
            while start < stop:
                block = bytearray(os.pread(descriptor, min(stop - start, block_size), start))
                if start <= bad < start + len(block):
                    block[bad - start] ^= 0xFF
                self.wfile.write(block)
                start += len(block)
                self.entry["sent"] += len(block)
                if slow and not slow.lifted.is_set():
                    slow.lifted.wait(len(block) / slow.rate)
        if stall:
            stall.lifted.wait()
        if cut or stall:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, port: int, role: str, state: State, address: str = "127.0.0.1") -> None:
        self.role, self.state = role, state
        super().__init__((address, port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        import sys

        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hub-port", type=int, required=True)
    parser.add_argument("--cdn-port", type=int, required=True)
    parser.add_argument("--address", default="127.0.0.1")
    chosen = parser.parse_args()
    state = State()
    hub = Server(chosen.hub_port, "hub", state, chosen.address)
    cdn = Server(chosen.cdn_port, "cdn", state, chosen.address)
    state.hub = f"http://{chosen.address}:{chosen.hub_port}"
    state.cdn = f"http://{chosen.address}:{chosen.cdn_port}"
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    hub.serve_forever()


if __name__ == "__main__":
    main()
