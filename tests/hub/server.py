"""A small Hub on 127.0.0.1: the part of its HTTP interface that a download uses.

``HEAD`` and ``GET`` of ``/{org}/{name}/resolve/{revision}/{path}`` answer with the file, its ``ETag`` and its
``X-Repo-Commit``; what is absent is a 404 with the Hub's ``X-Error-Code``.
"""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote


def commit_of(number: int) -> str:
    """A well-formed commit hash."""
    return f"{number:040x}"


@dataclass
class Repository:
    """Folders by commit, and branches or tags by name. A branch may be a list: each look moves it on."""

    commits: dict[str, Path]
    refs: dict[str, str | list[str]]
    token: str | None = None  # needed to see the repository
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        target = self.refs.get(revision, revision if revision in self.commits else None)
        if isinstance(target, list):
            return target.pop(0) if len(target) > 1 else target[0]
        return target


@dataclass
class Hub:
    """What is served, and what was asked for."""

    repositories: dict[str, Repository]
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve until the block ends."""
    hub = Hub(repositories)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = answer(hub, self.path, self.headers.get("Authorization"))
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(hub: Hub, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of one request."""
    repo_id, found, rest = path.lstrip("/").partition("/resolve/")
    repository = hub.repositories.get(repo_id)
    if not found or repository is None or (repository.token and authorization != f"Bearer {repository.token}"):
        return 401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, b""
    if repository.gated:
        return 403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted"}, b""
    revision, _, name = rest.partition("/")  # a slash inside a branch's name comes as %2F
    commit = repository.commit(unquote(revision))
    if commit is None:
        return 404, {"X-Error-Code": "RevisionNotFound"}, b""
    file = repository.commits[commit] / name
    if not file.is_file():
        return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
    body = file.read_bytes()
    return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": commit}, body
