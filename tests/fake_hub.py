"""A Hugging Face hub on 127.0.0.1: answers what huggingface_hub 2 asks when it lists, downloads, creates and commits.

Large files (.safetensors) lie behind a redirect and are sent by the LFS protocol, as on the hub. Every request is recorded.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = (".safetensors", ".bin", ".ckpt", ".onnx", ".msgpack")
TOKEN = "hf_thisIsNoRealTokenButItMustNotLeak"


class Model(NamedTuple):
    """A repository with one commit on `main`."""

    files: dict[str, bytes]
    private: bool
    gated: bool

    @property
    def commit(self) -> str:
        """Changes with the contents, as git's does."""
        state = hashlib.sha1()
        for path, content in sorted(self.files.items()):
            state.update(path.encode() + b"\0" + hashlib.sha1(content).digest())
        return state.hexdigest()


class Request(NamedTuple):
    """One request as it came in."""

    method: str
    path: str
    token: str | None
    body: bytes


class FakeHub:
    """The server. `models` is what it holds, `requests` what it was asked; `down` is the status it gives to everybody."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self.commits: list[dict[str, bytes]] = []
        self.created: list[dict] = []
        self.down = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def store(self) -> str:
        """Where large files lie: for a client another host, to which it sends no token."""
        return f"http://localhost:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """From here on connections are refused."""
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: Mapping[str, bytes], private: bool = False, gated: bool = False) -> Model:
        """A model of these files."""
        self.models[repo] = Model(dict(files), private, gated)
        return self.models[repo]

    def add_folder(self, repo: str, folder: Path) -> Model:
        """A model of the files of a folder."""
        return self.add(repo, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})

    def fetched(self, repo: str) -> list[str]:
        """Files of the repository whose content was asked for, sorted."""
        start = f"/{repo}/resolve/"
        asked = [request.path for request in self.requests if request.method == "GET" and request.path.startswith(start)]
        behind = {f"/cdn/{digest(content)}": path for path, content in self.models[repo].files.items()}
        large = [behind[request.path] for request in self.requests if request.method == "GET" and request.path in behind]
        return sorted({*large, *(path.removeprefix(start).partition("/")[2] for path in asked)})


def digest(content: bytes) -> str:
    """What LFS calls a file."""
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0, so that no connection outlives `stop`."""

    hub: FakeHub

    def log_message(self, *words: object) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def answer(self) -> None:
        """Records the request and finds who answers it."""
        path, body = unquote(urlsplit(self.path).path), self.content()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        with self.hub.lock:
            self.hub.requests.append(Request(self.command, path, token, body))
            if self.hub.down:
                return self.send(self.hub.down, {"error": "out of order"})
            for pattern, reply in ROUTES:
                if found := re.fullmatch(pattern, f"{self.command} {path}"):
                    return reply(self, token, body, **found.groupdict())
        return self.send(404, {"error": f"the fake hub knows no {self.command} {path}"})

    def content(self) -> bytes:
        """The body, whole or in chunks."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, status: int, content: object, **headers: str) -> None:
        """JSON, or bytes as they are; an underscore in a header's name is a dash."""
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content_Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def fail(self, status: int, code: str) -> None:
        """An error as the hub words it."""
        self.send(status, {"error": f"{code},\nso says the fake hub"}, X_Error_Code=code)

    def model(self, token: str | None, repo: str, revision: str = "main") -> Model | None:
        """The model, or None when an error was sent: what may not be seen does not exist."""
        found = self.hub.models.get(repo)
        if found is None or (found.private and token != TOKEN):
            return self.fail(404 if token == TOKEN else 401, "RepoNotFound")
        if revision not in ("main", found.commit):
            return self.fail(404, "RevisionNotFound")
        return found

    def info(self, token: str | None, _: bytes, repo: str, revision: str | None = None) -> None:
        if found := self.model(token, repo, revision or "main"):
            siblings = [{"rfilename": path} for path in found.files]
            self.send(200, {"id": repo, "sha": found.commit, "private": found.private, "siblings": siblings, "tags": []})

    def tree(self, token: str | None, _: bytes, repo: str, revision: str) -> None:
        if found := self.model(token, repo, revision):
            folders = sorted({path.rpartition("/")[0] for path in found.files} - {""})
            rows = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders]
            for path, content in found.files.items():
                row = {"type": "file", "path": path, "size": len(content), "oid": git_id(content)}
                if path.endswith(LARGE):
                    row["lfs"] = {"oid": digest(content), "size": len(content), "pointerSize": 130}
                rows.append(row)
            self.send(200, rows)

    def resolve(self, token: str | None, _: bytes, repo: str, revision: str, path: str) -> None:
        found = self.model(token, repo, revision)
        if found is None:
            return None
        if found.gated:
            return self.fail(403 if token == TOKEN else 401, "GatedRepo")
        if path not in found.files:
            return self.fail(404, "EntryNotFound")
        content = found.files[path]
        if not path.endswith(LARGE):
            return self.send(200, content, X_Repo_Commit=found.commit, ETag=f'"{git_id(content)}"')
        linked = {"X_Linked_Size": str(len(content)), "X_Linked_ETag": f'"{digest(content)}"'}
        return self.send(302, b"", X_Repo_Commit=found.commit, Location=f"{self.hub.store}/cdn/{digest(content)}", **linked)

    def cdn(self, token: str | None, _: bytes, oid: str) -> None:
        held = {digest(content): content for model in self.hub.models.values() for content in model.files.values()}
        self.send(200, held[oid], ETag=f'"{oid}"')

    def create(self, token: str | None, body: bytes) -> None:
        if token != TOKEN:
            return self.send(401, {"error": "Invalid username or password."})
        wanted = json.loads(body)
        repo = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != "me":
            return self.send(403, {"error": "You don't have the rights\nto create a model under this namespace"})
        if repo in self.hub.models:
            return self.send(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{repo}"})
        self.hub.created.append(wanted)
        self.hub.add(repo, {}, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return self.send(200, {"url": f"{self.hub.url}/{repo}"})

    def preupload(self, token: str | None, body: bytes, repo: str, revision: str) -> None:
        if self.model(token, repo, revision):
            mode = lambda path: "lfs" if path.endswith(LARGE) else "regular"
            asked = [file["path"] for file in json.loads(body)["files"]]
            self.send(200, {"files": [{"path": path, "uploadMode": mode(path), "shouldIgnore": False} for path in asked]})

    def batch(self, token: str | None, body: bytes, repo: str) -> None:
        objects = json.loads(body)["objects"]
        to = lambda oid: {"upload": {"href": f"{self.hub.url}/upload/{oid}"}}
        self.send(200, {"transfer": "basic", "objects": [{**entry, "actions": to(entry["oid"])} for entry in objects]})

    def put(self, token: str | None, body: bytes, oid: str) -> None:
        self.hub.uploads[oid] = body
        self.send(200 if digest(body) == oid else 400, {})

    def commit(self, token: str | None, body: bytes, repo: str, revision: str) -> None:
        if token != TOKEN:
            return self.send(401, {"error": "Invalid username or password."})
        new = {}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.hub.uploads[value["oid"]]
        self.hub.commits.append(new)
        self.hub.models[repo].files.update(new)
        oid = self.hub.models[repo].commit
        return self.send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def validate(self, token: str | None, _: bytes) -> None:
        self.send(200, {"errors": [], "warnings": []})

    def whoami(self, token: str | None, _: bytes) -> None:
        self.send(200, {"name": "me", "type": "user"}) if token == TOKEN else self.send(401, {"error": "Unauthorized"})


REPO = r"(?P<repo>[^/]+/[^/]+?)"
ROUTES = (
    (rf"GET /api/models/{REPO}(/revision/(?P<revision>.+))?", Handler.info),
    (rf"GET /api/models/{REPO}/tree/(?P<revision>.+)", Handler.tree),
    (rf"(GET|HEAD) /{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
    (r"(GET|HEAD) /cdn/(?P<oid>\w+)", Handler.cdn),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate),
    (r"GET /api/whoami-v2", Handler.whoami),
    (rf"POST /api/models/{REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /upload/(?P<oid>\w+)", Handler.put),
    (rf"POST /api/models/{REPO}/commit/(?P<revision>.+)", Handler.commit),
)


def connect(patch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = None) -> None:
    """Points huggingface_hub, which read its environment when it was imported, at `url` with everything it keeps in `home`."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        patch.delenv(name, raising=False)
    if token:
        patch.setenv("HF_TOKEN", token)
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        patch.setattr(constants, name, value)


def environment(url: str, home: Path) -> dict[str, str]:
    """The same for another process, by huggingface_hub's own variables."""
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
