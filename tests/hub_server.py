"""A small Hugging Face Hub on the loopback interface: what `huggingface_hub` needs to create, fill, list and read repositories.

    with HubServer() as hub:
        hub.add("someone/tiny", {"config.json": b"{}"})
        subprocess.run(command, env=os.environ | hub.environment(home))
        hub.files("someone/tiny")

Everything is kept in memory. One token is known, `HubServer.token`, of the user `HubServer.user`. As on the real Hub, a
repository that does not exist and a private one look alike to those who may not read it: 401 without a token, 404 with one;
an unknown token gives 401 whatever is asked.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".pt", ".png", ".jpg")
REPO = r"(?P<id>[\w.-]+/[\w.-]+)"
API = rf"/api/(?P<kind>model|dataset)s/{REPO}"
FILES = rf"/(?:(?P<kind>dataset)s/)?{REPO}"


@dataclass
class Repository:
    """One repository: a single branch, each commit a mapping of paths to contents."""

    kind: str
    id: str
    private: bool = False
    owner_reads: bool = True  # False: someone else's private repository
    gated: bool = False  # its page can be seen, its files cannot
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], message: str) -> str:
        sha = hashlib.sha1(f"{self.kind}/{self.id}/{len(self.commits)}".encode()).hexdigest()
        self.commits.append((sha, files))
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision in ("main", "HEAD"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def content_id(path: str, content: bytes) -> str:
    """What the Hub calls a file's oid: sha256 in LFS, else git's hash of the blob."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    """A file in a listing."""
    found = {"type": "file", "path": path, "size": len(content), "oid": content_id(path, content)}
    if is_lfs(path):
        found["lfs"] = {"oid": found["oid"], "size": len(content), "pointerSize": 130}
    return found


def listing(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict] | None:
    """Entries of a folder ("" for the root), None where there is none."""
    prefix = f"{folder}/" if folder else ""
    inside = {path: content for path, content in files.items() if path.startswith(prefix)}
    if folder and not inside:
        return None
    folders, entries = set(), []
    for path, content in sorted(inside.items()):
        parts = path[len(prefix) :].split("/")
        depths = range(1, len(parts)) if recursive else range(1, min(len(parts), 2))
        folders |= {prefix + "/".join(parts[:depth]) for depth in depths}
        if recursive or len(parts) == 1:
            entries.append(entry(path, content))
    return [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in sorted(folders)] + entries


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, code: str | None, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: "HubServer"

    def log_message(self, *args):
        pass

    def handle_any(self):
        url = urlsplit(self.path)
        self.url_path, self.query = unquote(url.path), parse_qs(url.query)
        self.body = self.read_body()
        with self.hub.lock:
            self.hub.requests.append((self.command, self.url_path))
        try:
            self.route()
        except Refused as refused:
            headers = {"X-Error-Message": refused.message}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self.answer(json.dumps({"error": refused.message}).encode(), refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, content: bytes, status: int = 200, headers: dict | None = None):
        self.send_response(status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def answer_json(self, value, status: int = 200):
        self.answer(json.dumps(value).encode(), status)

    def route(self):
        known = self.known_user()
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, self.url_path)
            if found and self.command in method.split("|"):
                if self.command == "POST" and action is not Handler.paths_info and not known:
                    raise Refused(401, None, "Invalid username or password.")
                return action(self, **found.groupdict())
        raise Refused(404, None, f"this test server has no {self.command} {self.url_path}")

    def known_user(self) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given != self.hub.token:
            raise Refused(401, None, "Invalid credentials in Authorization header")
        return bool(given)

    def repository(self, kind: str | None, id: str) -> Repository:
        known = self.known_user()
        found = self.hub.repositories.get((kind or "model", id))
        if found is None or (found.private and not (known and found.owner_reads)):
            raise Refused(404 if known else 401, "RepoNotFound", "Repository not found")
        return found

    def tree_at(self, kind: str | None, id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self.repository(kind, id).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def whoami(self):
        if not self.known_user():
            raise Refused(401, None, "Invalid username or password.")
        self.answer_json({"type": "user", "name": self.hub.user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self):
        asked = json.loads(self.body)
        owner = asked.get("organization") or self.hub.user
        if owner != self.hub.user:
            raise Refused(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        key = asked.get("type") or "model", f"{owner}/{asked['name']}"
        exists = key in self.hub.repositories
        if not exists:
            self.hub.add(key[1], {".gitattributes": b"*.safetensors filter=lfs\n"}, key[0], bool(asked.get("private")))
        prefix = "datasets/" if key[0] == "dataset" else ""
        self.answer_json({"url": f"{self.hub.url}/{prefix}{key[1]}", "name": key[1]}, 409 if exists else 200)

    def validate_yaml(self):
        self.answer_json({"errors": [], "warnings": []})

    def info(self, kind, id, revision="main"):
        repository = self.repository(kind, id)
        sha, files = self.tree_at(kind, id, revision or "main")
        self.answer_json(
            {
                "_id": "0" * 24, "id": id, "sha": sha, "private": repository.private, "gated": False, "disabled": False,
                "downloads": 0, "likes": 0, "tags": [], "siblings": [{"rfilename": path} for path in files],
                "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            }
        )  # fmt: skip

    def refs(self, kind, id):
        sha = self.repository(kind, id).commits[-1][0]
        self.answer_json({"branches": [{"name": "main", "ref": "refs/heads/main", "targetCommit": sha}], "tags": [],
                          "converts": []})  # fmt: skip

    def tree(self, kind, id, revision, folder):
        _, files = self.tree_at(kind, id, revision)
        found = listing(files, folder or "", self.query.get("recursive", ["false"])[0].lower() == "true")
        if found is None:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.answer_json(found)

    def paths_info(self, kind, id, revision):
        _, files = self.tree_at(kind, id, revision)
        found = []
        for path in parse_qs(self.body.decode())["paths"]:
            if path in files:
                found.append(entry(path, files[path]))
            elif any(name.startswith(f"{path}/") for name in files):
                found.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
        self.answer_json(found)

    def preupload(self, kind, id, revision):
        _, files = self.tree_at(kind, id, revision)
        asked = [file["path"] for file in json.loads(self.body)["files"]]
        self.answer_json(
            {
                "files": [
                    {
                        "path": path, "shouldIgnore": False, "uploadMode": "lfs" if is_lfs(path) else "regular",
                        "oid": content_id(path, files[path]) if path in files else None,
                    }
                    for path in asked
                ]
            }
        )  # fmt: skip

    def lfs_batch(self, kind, id):
        self.repository(kind, id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            if asked["oid"] not in self.hub.blobs:
                upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}
                asked["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs-verify", "header": {}}}
            objects.append(asked)
        self.answer_json({"transfer": "basic", "objects": objects})

    def put_lfs(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, None, "the content has another sha256")
        self.hub.blobs[oid] = self.body
        self.answer(b"")

    def verify_lfs(self):
        asked = json.loads(self.body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, None, "no such object")
        self.answer_json({"message": "verified"})

    def commit(self, kind, id, revision):
        if self.hub.refuse_commits:
            raise Refused(403, None, "Your storage quota is used up.")
        _, files = self.tree_at(kind, id, revision)
        files, message = dict(files), ""
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
            else:
                raise Refused(400, None, f"this test server has no commit operation {key}")
        sha = self.repository(kind, id).commit(files, message)
        prefix = "datasets/" if kind == "dataset" else ""
        self.answer_json({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{prefix}{id}/commit/{sha}"})

    def resolve(self, kind, id, revision, path):
        if self.repository(kind, id).gated:
            raise Refused(403, "GatedRepo", f"Access to {id} is restricted")
        sha, files = self.tree_at(kind, id, revision)
        if path not in files:
            self.answer(b"Entry not found", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha,
                                                  "X-Error-Message": "Entry not found"})  # fmt: skip
            return
        content = files[path]
        headers = {
            "ETag": f'"{content_id(path, content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }  # fmt: skip
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.answer(content, 200, headers)
        start, stop = int(asked[1]), min(int(asked[2] or len(content) - 1) + 1, len(content))
        if start >= len(content):
            return self.answer(b"", 416, headers | {"Content-Range": f"bytes */{len(content)}"})
        self.answer(content[start:stop], 206, headers | {"Content-Range": f"bytes {start}-{stop - 1}/{len(content)}"})


ROUTES = (
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET|HEAD", rf"{API}(?:/revision/(?P<revision>[^/]+))?", Handler.info),
    ("GET", rf"{API}/refs", Handler.refs),
    ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?", Handler.tree),
    ("POST", rf"{API}/paths-info/(?P<revision>[^/]+)", Handler.paths_info),
    ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put_lfs),
    ("POST", r"/lfs-verify", Handler.verify_lfs),
    ("GET|HEAD", rf"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
)


class HubServer:
    """The server, in a thread of its own. `requests` is what was asked, as (method, path); `refuse_commits`: they get a 403."""

    token, user = "hf_x", "someone"

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.refuse_commits = False
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def add(self, id: str, files, kind: str = "model", private: bool = False, owner_reads: bool = True) -> Repository:
        """A repository with these files: a mapping of paths to bytes, or a folder."""
        if not isinstance(files, dict):
            root = Path(files)
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        repository = self.repositories[kind, id] = Repository(kind, id, private, owner_reads)
        repository.commit(dict(files), "initial commit")
        return repository

    def files(self, id: str, kind: str = "model") -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.repositories[kind, id].commits[-1][1]

    def environment(self, home, token: str | None = None) -> dict[str, str]:
        """What a process needs in its environment, at start, to take this for the Hub; `home` is its HF_HOME."""
        return {
            "HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": self.token if token is None else token,
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1",
        }  # fmt: skip
