"""A stand-in of the Hugging Face hub on this machine, for the real huggingface_hub client.

It has what a client needs to make a repository, to commit to it and to read it: the HTTP interface
of https://huggingface.co/docs/hub/api, with uploads by Git LFS (HF_HUB_DISABLE_XET).
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

OWNER, TOKENS = "me", {"hf_writes": "write", "hf_reads": "read"}
_ID = r"(?P<repo>[\w.-]+/[\w.-]+)"
_REPO = f"/api/models/{_ID}"


@dataclass
class Repo:
    """A repository: the files of each commit, the newest commit of each branch."""

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def add(self, branch: str, files: dict[str, bytes], message: str) -> str:
        """Puts a commit on a branch; its name."""
        self.log.append(message)
        name = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        return name

    def files(self, revision: str) -> dict[str, bytes]:
        """The files of a branch or a commit."""
        return self.commits[self.branches.get(revision, revision)]


class Refused(Exception):
    """A status, the headers that the hub explains it with, and the content."""

    def __init__(self, status: int, headers: dict[str, str], content: Any = None) -> None:
        self.status, self.headers, self.content = status, headers, content or {}


class Hub:
    """What the server answers; `repos` and `blobs` are what it holds.

    Every answer is made by one method, whose name and pattern are in `ROUTES`.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[Any, dict[str, str]]:
        if token not in TOKENS:
            raise Refused(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        for wanted, pattern, name in ROUTES:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                if method in ("POST", "PUT") and TOKENS[token] != "write":
                    raise Refused(403, {"X-Error-Message": "The token has no write permission"})
                parts = {key: unquote(value) for key, value in found.groupdict().items()}
                if "repo" in parts and parts["repo"] not in self.repos:
                    raise Refused(404, {"X-Error-Code": "RepoNotFound"})
                repo = self.repos.get(parts.get("repo", ""))
                if repo and "at" in parts and parts["at"] not in {*repo.branches, *repo.commits}:
                    raise Refused(404, {"X-Error-Code": "RevisionNotFound"})
                found = getattr(self, name)(body, **parts)
                return found if isinstance(found, tuple) else (found, {})
        raise Refused(404, {"X-Error-Message": f"no such address: {method} {path}"})

    def create(self, body: bytes) -> Any:
        asked = json.loads(body)
        if asked["organization"] not in (OWNER, None):
            raise Refused(403, {"X-Error-Message": f"Not a member of {asked['organization']}"})
        name = f"{OWNER}/{asked['name']}"
        if name in self.repos:
            raise Refused(409, {}, {"url": f"{self.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.repos[name] = Repo(bool(private))
        self.repos[name].add("main", {".gitattributes": b"*.safetensors lfs\n"}, "initial commit")
        return {"url": f"{self.url}/{name}"}

    def check_card(self, body: bytes) -> Any:
        card = json.loads(body)["content"]
        base = re.search(r"^base_model: '?(.*?)'?$", card.split("---")[1], re.MULTILINE)
        if base and not re.fullmatch(r"([\w.-]+/)?[\w.-]+", base[1]):
            error = {"message": f'"base_model" with value "{base[1]}" is not valid.'}
            raise Refused(400, {}, {"errors": [error]})
        return {"warnings": []}

    def info(self, body: bytes, repo: str, at: str = "main") -> Any:
        its = self.repos[repo]
        files = [{"rfilename": name} for name in its.files(at)]
        sha = its.branches.get(at, at)
        return {"id": repo, "sha": sha, "private": its.private, "siblings": files}

    def tree(self, body: bytes, repo: str, at: str) -> Any:
        return [
            {"type": "file", "path": name, "size": len(x), "oid": _name_of(x)}
            for name, x in self.repos[repo].files(at).items()
        ]

    def preupload(self, body: bytes, repo: str, at: str) -> Any:
        names = [each["path"] for each in json.loads(body)["files"]]
        modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
        every = zip(names, modes, strict=True)
        return {"files": [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in every]}

    def lfs(self, body: bytes, repo: str) -> Any:
        objects = [
            {**each, "actions": {"upload": {"href": f"{self.url}/blobs/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        return {"transfer": "basic", "objects": objects}

    def store(self, body: bytes, blob: str) -> Any:
        assert hashlib.sha256(body).hexdigest() == blob
        self.blobs[blob] = body
        return {}

    def branch(self, body: bytes, repo: str, name: str) -> Any:
        its = self.repos[repo]
        if name in its.branches:
            raise Refused(409, {})
        its.branches[name] = its.branches["main"]
        return {}

    def commit(self, body: bytes, repo: str, at: str) -> Any:
        changes = [json.loads(line) for line in body.splitlines()]
        its, message = self.repos[repo], changes[0]["value"]["summary"]
        files = dict(its.files(at))
        for key, value in ((x["key"], x["value"]) for x in changes[1:]):
            if key == "deletedFile":
                del files[value["path"]]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                files[value["path"]] = self.blobs[value["oid"]]
        name = its.add(at, files, message)
        return {"commitUrl": f"{self.url}/{repo}/commit/{name}", "commitOid": name}

    def download(self, body: bytes, repo: str, at: str, name: str) -> Any:
        content = self.repos[repo].files(at)[name]
        commit = self.repos[repo].branches.get(at, at)
        return content, {"X-Repo-Commit": commit, "ETag": f'"{_name_of(content)}"'}


_AT = r"(?P<at>[^/]+)"
ROUTES = (
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "check_card"),
    ("GET", _REPO, "info"),
    ("GET", f"{_REPO}/revision/{_AT}", "info"),
    ("GET", f"{_REPO}/tree/{_AT}", "tree"),
    ("POST", f"{_REPO}/preupload/{_AT}", "preupload"),
    ("POST", f"{_REPO}/branch/(?P<name>[^/]+)", "branch"),
    ("POST", f"{_REPO}/commit/{_AT}", "commit"),
    ("POST", f"/{_ID}.git/info/lfs/objects/batch", "lfs"),
    ("PUT", "/blobs/(?P<blob>[0-9a-f]+)", "store"),
    ("GET", f"/{_ID}/resolve/{_AT}/(?P<name>.+)", "download"),
    ("HEAD", f"/{_ID}/resolve/{_AT}/(?P<name>.+)", "download"),
)


def _name_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that listens on a port of this machine while the block runs."""
    its = Hub()

    class Handler(BaseHTTPRequestHandler):
        def respond(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            # A file is put to an address that needs no token, as on the real hub.
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            token = "hf_writes" if self.command == "PUT" else token
            path, status = urlsplit(self.path).path, 200
            try:
                content, headers = its.answer(self.command, path, token, body)
            except Refused as refused:
                status, headers, content = refused.status, refused.headers, refused.content
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_HEAD = do_POST = do_PUT = respond

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    its.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield its
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
