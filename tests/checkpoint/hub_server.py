"""A small Hugging Face Hub for tests: the part of its HTTP interface that downloads and uploads of models use."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

WRITER, READER = "hf_writer", "hf_reader"  # tokens
_REPO = r"(?P<repo>[^/]+/[^/]+)"


class Hub:
    """A server at `url` for the life of the `with` block.

    Attributes:
        repos: by name and revision (a commit or "main"), the content of each file by its path.
        gated: names of repositories that nobody may read.
        requests: what came in, "METHOD /path".
        status: answer everything with this HTTP status.
        cuts: for a file's path, after how many bytes the connection breaks, for each time that it is asked for.
        damaged: paths of files that arrive with a wrong byte.
    """

    def __init__(self):
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.status: int | None = None
        self.cuts: dict[str, list[int]] = {}
        self.damaged: set[str] = set()
        self.stored: dict[str, bytes] = {}  # large files by their SHA-256
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, repo: str, files: dict[str, bytes], revision: str = "main") -> str:
        """Commit these files; returns the commit."""
        commit = hashlib.sha1(repr((repo, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(repo, {}).update({revision: files, commit: files})
        return commit

    def commit(self, repo: str, revision: str) -> str:
        revisions = self.repos[repo]
        return next(name for name, files in revisions.items() if files is revisions[revision] and len(name) == 40)

    def downloaded(self) -> set[str]:
        """The paths of the files that were asked for."""
        return {request.rsplit("/", 1)[1] for request in self.requests if "/resolve/" in request}


def hashes(path: str, data: bytes) -> dict:
    """What the Hub says of a file: git's hash of it; of a large one, that of its pointer and the SHA-256."""
    if not path.endswith((".safetensors", ".bin", ".pt", ".model")) and "streaming" not in path:
        return {"oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
    sha256 = hashlib.sha256(data).hexdigest()
    return {
        "oid": hashlib.sha1(sha256.encode()).hexdigest(),
        "lfs": {"oid": sha256, "size": len(data), "pointerSize": 134},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub

    def log_message(self, *_) -> None:
        pass

    def answer(self, status: int, body: object = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        body = self.read_body()
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.status is not None:
            return self.answer(self.hub.status, {"error": "the Hub has a bad day"})
        for method, pattern, action in self.routes:
            if self.command in method and (match := re.fullmatch(pattern, path)):
                return action(
                    self, body, **{name: value and unquote(value) for name, value in match.groupdict().items()}
                )
        return self.answer(404, {"error": f"no {self.command} {path} here"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def files(self, repo: str, revision: str) -> dict[str, bytes] | None:
        """A revision's files, or an answer that there are none."""
        if repo not in self.hub.repos:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif revision not in self.hub.repos[repo]:
            self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
        else:
            return self.hub.repos[repo][revision]
        return None

    def may_write(self) -> bool:
        if self.token() != WRITER:
            self.answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        return self.token() == WRITER

    # ------------------------------------------------------------------------------------------------- reading

    def info(self, _, repo: str, revision: str | None = None) -> None:
        if (files := self.files(repo, revision or "main")) is not None:
            sha = self.hub.commit(repo, revision or "main")
            self.answer(200, {"id": repo, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def tree(self, _, repo: str, revision: str) -> None:
        if (files := self.files(repo, revision)) is not None:
            entries = [
                {"type": "file", "path": path, "size": len(data)} | hashes(path, data) for path, data in files.items()
            ]
            self.answer(200, entries)

    def resolve(self, _, repo: str, revision: str, path: str) -> None:
        files = self.files(repo, revision)
        if files is None:
            return
        if repo in self.hub.gated:  # the list of its files is public all the same
            return self.answer(403, {"error": "Access is restricted"}, X_Error_Code="GatedRepo")
        if path not in files:
            return self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        data, found = files[path], hashes(path, files[path])
        etag = found["lfs"]["oid"] if "lfs" in found else found["oid"]
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        more = {"Content_Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        if path in self.hub.damaged:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_file(path, data[start:], ETag=f'"{etag}"', X_Repo_Commit=self.hub.commit(repo, revision), **more)

    def send_file(self, path: str, data: bytes, **headers: str) -> None:
        cuts = self.hub.cuts.get(path)
        if not cuts or self.command == "HEAD":
            return self.answer(206 if "Content_Range" in headers else 200, data, **headers)
        self.send_response(206 if "Content_Range" in headers else 200)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data[: cuts.pop(0)])
        self.close_connection = True

    # ------------------------------------------------------------------------------------------------- writing

    def create(self, body: bytes) -> None:
        if self.may_write():
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            if repo in self.hub.repos:
                return self.answer(
                    409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"}
                )
            self.hub.add(repo, {".gitattributes": b""})
            self.answer(200, {"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo})

    def validate(self, body: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, body: bytes, repo: str) -> None:
        def mode(path: str) -> str:
            return "lfs" if path.endswith((".safetensors", ".model")) else "regular"

        files = [file["path"] for file in json.loads(body)["files"]]
        self.answer(200, {"files": [{"path": p, "uploadMode": mode(p), "shouldIgnore": False} for p in files]})

    def batch(self, body: bytes, repo: str) -> None:
        def upload(file: dict) -> dict:
            return file | {"actions": {"upload": {"href": f"{self.hub.url}/store/{file['oid']}"}}}

        self.answer(200, {"transfer": "basic", "objects": [upload(file) for file in json.loads(body)["objects"]]})

    def store(self, body: bytes, oid: str) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.stored[oid] = body
        self.answer(200)

    def commit(self, body: bytes, repo: str) -> None:
        if not self.may_write():
            return
        files = dict(self.hub.repos[repo]["main"])
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        commit = self.hub.add(repo, files)
        self.answer(200, {"commitOid": commit, "commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "success": True})

    routes = (
        ("GET", rf"/api/models/{_REPO}", info),
        ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>[^/]+)", info),
        ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", tree),
        ("GET HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", resolve),
        ("POST", "/api/repos/create", create),
        ("POST", "/api/validate-yaml", validate),
        ("POST", rf"/api/models/{_REPO}/preupload/main", preupload),
        ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", batch),
        ("PUT", "/store/(?P<oid>[0-9a-f]{64})", store),
        ("POST", rf"/api/models/{_REPO}/commit/main", commit),
    )
