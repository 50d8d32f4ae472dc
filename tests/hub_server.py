"""As much of the Hub as its client needs to write and read models, on loopback: repositories, commits, LFS, cards."""

import base64
import hashlib
import http.server
import json
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.repocard_data import model_index_to_eval_results
from huggingface_hub.utils import validate_repo_id

OWNER, READER = "hf_owner", "hf_reader"
"""A token that may write, and one that may only read."""


@dataclass
class Repository:
    """Branches by name, each a list of commits; a commit is its files by name."""

    private: bool
    branches: dict[str, list[dict[str, bytes]]] = field(default_factory=lambda: {"main": [{".gitattributes": b""}]})
    messages: list[str] = field(default_factory=list)

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """A commit by a branch or its own id, and its id."""
        for commits in self.branches.values():
            for commit in commits:
                if identify(commit) == revision:
                    return revision, commit
        if revision in self.branches:
            return identify(self.branches[revision][-1]), self.branches[revision][-1]
        return None


def identify(commit: dict[str, bytes]) -> str:
    """Its id; Python remembers the hash of bytes, so that large files cost it once."""
    return hashlib.sha1(repr(sorted((name, hash(data)) for name, data in commit.items())).encode()).hexdigest()


def is_large(path: str) -> bool:
    """Whether the Hub keeps it in LFS."""
    return path.endswith((".safetensors", ".bin"))


def oid_of(path: str, data: bytes) -> str:
    """A file's name in LFS, or in git."""
    if is_large(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def complaints(card: str) -> list[str]:
    """What the Hub's documentation rules out in a card's metadata."""
    if not card.startswith("---\n"):
        return ["no metadata"]
    described = yaml.safe_load(card[4:].partition("\n---\n")[0])
    found = []
    for name in [described["base_model"]] if "base_model" in described else []:
        try:
            validate_repo_id(name)
        except HFValidationError:
            found.append(f'"base_model" with value "{name}" is not valid. Use a model id from https://hf.co/models.')
    for key in ("license", "pipeline_tag", "library_name"):
        if not isinstance(described.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    if described.get("license") == "other" and not described.get("license_name"):
        found.append('"license_name" is required for license other')
    if not all(isinstance(tag, str) for tag in described.get("tags", [])):
        found.append('"tags" must be strings')
    if "model-index" in described:
        _, results = model_index_to_eval_results(described["model-index"])
        found += [
            f"a result without a {name}"
            for r in results
            for name in ("dataset_type", "metric_value")
            if not getattr(r, name)
        ]
    return found


class Hub:
    """The server and what it holds.

    Attributes:
        repositories: by id.
        objects: what arrived through LFS, by repository and SHA-256.
        uploads: how many files have arrived through LFS, by repository.
        breaks_after: by repository, the upload at which the connection breaks, then and whenever it is tried again.
        requests: `METHOD path` of all that was asked.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[tuple[str, str], bytes] = {}
        self.uploads: Counter[str] = Counter()
        self.breaks_after: dict[str, int] = {}
        self.admitted: dict[str, set[str]] = defaultdict(set)
        self.lock = threading.Lock()
        self.requests: list[str] = []
        self.endpoint = ""

    def admits(self, repository: str, oid: str) -> bool:
        """Whether an upload may arrive; the client sends several at once."""
        with self.lock:
            admitted = self.admitted[repository]
            if len(admitted) < self.breaks_after.get(repository, sys.maxsize):
                admitted.add(oid)
            return oid in admitted


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(b"")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

    def do_PUT(self) -> None:
        _, owner, name, oid = self.path.strip("/").split("/")
        length = int(self.headers["Content-Length"])
        if not self.hub.admits(f"{owner}/{name}", oid):
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        data = self.rfile.read(length)
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.objects[f"{owner}/{name}", oid] = data
        with self.hub.lock:
            self.hub.uploads[f"{owner}/{name}"] += 1
        self.reply(200, b"")

    def answer(self, body: bytes) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} {path}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in (OWNER, READER):
            return self.refuse(401, "Invalid username or password.")
        if path == "api/validate-yaml":
            found = complaints(json.loads(body)["content"])
            return self.say({"errors": [{"message": each} for each in found], "warnings": []}, 400 if found else 200)
        if path == "api/repos/create":
            return self.create(json.loads(body), token)
        api = path.startswith("api/models/")
        owner, name, *rest = path.removeprefix("api/models/").split("/")
        name, dot_git, _ = name.partition(".git")
        repository = self.hub.repositories.get(f"{owner}/{name}")
        if repository is None or (repository.private and not token):
            code = 404 if token else 401
            return self.refuse(code, "Repository not found", **{"X-Error-Code": "RepoNotFound"})
        if self.command == "POST" and token != OWNER and not (rest and rest[0] == "paths-info"):
            return self.refuse(403, "You don't have the rights to write to it: your token is read-only")
        if dot_git:
            return self.batch(json.loads(body), f"{owner}/{name}")
        kind, *where = rest or ["revision"]
        if kind == "branch":
            return self.branch(repository, "/".join(where))
        revision = where[0] if where else "main"
        found = repository.find(revision)
        if found is None:
            return self.refuse(404, "Invalid rev id", **{"X-Error-Code": "RevisionNotFound"})
        commit, files = found
        if api and kind == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            listed = [
                {"path": each, "uploadMode": "lfs" if is_large(each) else "regular", "shouldIgnore": False}
                | ({"oid": oid_of(each, files[each])} if each in files else {})
                for each in asked
            ]
            return self.say({"files": listed})
        if api and kind == "commit":
            return self.commit(repository, f"{owner}/{name}", revision, body)
        if api and kind == "tree":
            below = "/".join(where[1:])
            return self.say([self.entry(each, data) for each, data in files.items() if each.startswith(below)])
        if api:
            siblings = [{"rfilename": each} for each in files]
            return self.say(
                {"id": f"{owner}/{name}", "sha": commit, "private": repository.private, "siblings": siblings}
            )
        return self.resolve(commit, files, "/".join(where[1:]))

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": oid_of(path, data)}
        if is_large(path):
            entry["lfs"] = {"oid": oid_of(path, data), "size": len(data), "pointerSize": 134}
        return entry

    def create(self, asked: dict, token: str) -> None:
        if token != OWNER:
            return self.refuse(403 if token else 401, "You don't have the rights to create a model")
        name = f"{asked['organization']}/{asked['name']}"
        known = name in self.hub.repositories
        if not known:
            private = asked.get("private") or asked.get("visibility") == "private"
            self.hub.repositories[name] = Repository(bool(private))
        self.say({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if known else 200)

    def branch(self, repository: Repository, name: str) -> None:
        known = name in repository.branches
        if not known:
            repository.branches[name] = list(repository.branches["main"])
        self.say({}, 409 if known else 200)

    def batch(self, asked: dict, name: str) -> None:
        assert asked["operation"] == "upload"
        objects = []
        for each in asked["objects"]:
            action = {"upload": {"href": f"{self.hub.endpoint}/lfs/{name}/{each['oid']}"}}
            objects.append(each | ({} if (name, each["oid"]) in self.hub.objects else {"actions": action}))
        self.say({"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, name: str, revision: str, body: bytes) -> None:
        header, *operations = map(json.loads, body.splitlines())
        files = dict(repository.branches[revision][-1])
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.objects[name, value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        repository.branches[revision].append(files)
        repository.messages.append(header["value"]["summary"])
        oid = identify(files)
        self.say({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def resolve(self, commit: str, files: dict[str, bytes], path: str) -> None:
        if path not in files:
            return self.refuse(404, "Entry not found", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        etag = hashlib.sha256(files[path]).hexdigest()
        self.reply(200, files[path], **{"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    def say(self, content: object, code: int = 200) -> None:
        self.reply(code, json.dumps(content).encode(), **{"Content-Type": "application/json"})

    def refuse(self, code: int, message: str, **headers: str) -> None:
        self.reply(code, json.dumps({"error": message}).encode(), **{"X-Error-Message": message}, **headers)

    def reply(self, code: int, body: bytes, **headers: str) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...
