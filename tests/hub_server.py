"""A Hub on loopback: the routes that `huggingface_hub` uses, over repositories made by a test.

    with HubServer() as hub:
        hub.push("owner/name", {"README.md": b"...", "pytorch_lora_weights.safetensors": weights})
        api = HfApi(endpoint=hub.endpoint)

Each push is a commit; older commits stay readable. Large files (`LFS_SUFFIXES`) are kept as the Hub keeps
them: the resolve route redirects to another origin, a "CDN" on a port of its own. `fail` makes a repository
misbehave, `hold` keeps answers back until `release`, and `requests` holds every request in order of arrival.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.hub_faults import CDN, FILE, INFO, TREE, ErrorDetail
from tests.hub_responses import (
    LFS_SUFFIXES,
    blob_facts,
    broken_off,
    card_data,
    git_oid,
    listen,
    ranged,
    refusal,
    sha256,
    slowed,
    texts,
)


@dataclass(frozen=True)
class HubRequest:
    """One request as it arrived; `kind` is INFO, TREE, FILE or CDN, and `range` the Range header."""

    method: str
    kind: str
    repo_id: str
    path: str
    range: str | None
    token: str | None


# What a test sets while the server reads it is one object, so that nobody sees half of it.
@dataclass
class _Trouble:
    fault: ErrorDetail
    left: int | None


@dataclass(frozen=True)
class _Hold:
    released: asyncio.Event
    is_downloads_only: bool


@dataclass
class _Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    allowed_tokens: frozenset[str] = frozenset()
    trouble: _Trouble | None = None
    hold: _Hold | None = None
    tags: tuple[str, ...] = ()


class _Refusal(Exception):
    def __init__(self, response: Response) -> None:
        super().__init__(response.status_code)
        self.response = response


class _Server(uvicorn.Server):
    """Ends when it is told to, where uvicorn's own looks every tenth of a second."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self._closing.wait()


class HubServer:
    """A running Hub; a context manager. `down()` closes its doors for good."""

    def __init__(self, ports: tuple[int, int] = (0, 0)) -> None:
        """Listen, for the Hub and its CDN; on ports of an earlier Hub this is that one, back again."""
        self.requests: list[HubRequest] = []
        self._repositories: dict[str, _Repository] = {}
        self._renamed: dict[str, str] = {}
        self._arrived = threading.Condition()
        self._hub_socket, self._cdn_socket = (listen(port) for port in ports)
        self.ports = (self._hub_socket.getsockname()[1], self._cdn_socket.getsockname()[1])
        self.endpoint = f"http://127.0.0.1:{self._hub_socket.getsockname()[1]}"
        self.cdn = f"http://127.0.0.1:{self._cdn_socket.getsockname()[1]}"
        self._closing = asyncio.Event()
        # Clients keep a connection for 5 s, as uvicorn does: it would close one at the moment at which it is used.
        config = uvicorn.Config(
            self._app(), log_level="critical", lifespan="off", ws="none",
            timeout_keep_alive=600, timeout_graceful_shutdown=1, date_header=False,  # it would stay: one tick
        )  # fmt: skip
        self._server = _Server(config, self._closing)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="hub-server", daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    def down(self) -> None:
        """Stop answering: connections are refused from now on."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join()

    # What it holds

    def push(
        self,
        repo_id: str,
        files: Mapping[str, bytes | Path],
        *,
        branch: str = "main",
        tags: tuple[str, ...] = (),
    ) -> str:
        """Make these files the newest commit of a branch and return the commit's hash."""
        contents = {name: value.read_bytes() if isinstance(value, Path) else value for name, value in files.items()}
        repository = self._repositories.setdefault(repo_id, _Repository())
        digest = hashlib.sha1(f"{repo_id} {len(repository.commits)}".encode())
        for name in sorted(contents):
            digest.update(name.encode() + contents[name])
        commit = digest.hexdigest()
        repository.commits[commit] = contents
        repository.tags = tags
        repository.refs[branch] = commit  # last: who sees the commit sees all of it
        return commit

    def push_folder(self, repo_id: str, folder: Path) -> str:
        """Push every file of a Hub-shaped folder."""
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.push(repo_id, files)

    def push_root(self, root: Path) -> None:
        """Push every `<root>/<owner>/<name>/`."""
        for folder in sorted(root.glob("*/*")):
            if folder.is_dir():
                self.push_folder(folder.relative_to(root).as_posix(), folder)

    def delete(self, repo_id: str) -> None:
        """Forget a repository."""
        del self._repositories[repo_id]

    def rename(self, old: str, new: str) -> None:
        """Move a repository; the old id redirects, as on the Hub."""
        self._repositories[new] = self._repositories.pop(old)
        self._renamed[old] = new

    def gate(self, repo_id: str, *, tokens: frozenset[str] = frozenset()) -> None:
        """Let everybody see a repository, but only these tokens read its files."""
        self._repositories[repo_id].gated = True
        self._repositories[repo_id].allowed_tokens = tokens

    def hide(self, repo_id: str, *, tokens: frozenset[str] = frozenset()) -> None:
        """Make a repository private: to all but these tokens it does not exist."""
        self._repositories[repo_id].private = True
        self._repositories[repo_id].allowed_tokens = tokens

    def revoke(self, repo_id: str, token: str) -> None:
        """Take a token's access to a gated or private repository away."""
        self._repositories[repo_id].allowed_tokens -= {token}

    # How it misbehaves

    def fail(self, repo_id: str, fault: ErrorDetail | None) -> None:
        """Make a repository misbehave, or behave again; it need not exist."""
        repository = self._repositories.setdefault(repo_id, _Repository())
        repository.trouble = _Trouble(fault, fault.times) if fault else None

    def hold(self, repo_id: str, *, is_downloads_only: bool = False) -> None:
        """Keep back every answer about a repository, or only those with a whole large file, until `release`."""
        self._repositories[repo_id].hold = _Hold(asyncio.Event(), is_downloads_only)

    def release(self, repo_id: str) -> None:
        """Let the answers go that were held."""
        hold, self._repositories[repo_id].hold = self._repositories[repo_id].hold, None
        if hold is not None:
            self._loop.call_soon_threadsafe(hold.released.set)

    # What it saw

    def count(self, repo_id: str | None = None, kind: str | None = None, method: str | None = None) -> int:
        """Return how many requests came that fit."""
        return sum(
            (repo_id is None or request.repo_id == repo_id)
            and (kind is None or request.kind == kind)
            and (method is None or request.method == method)
            for request in self.requests
        )

    def wait_for(self, is_so: Callable[[HubServer], bool], timeout_s: float = 120.0) -> None:
        """Block until a request has made a condition true."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: is_so(self), timeout_s), "the Hub was not asked"

    # Inside

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._server.serve(sockets=[self._hub_socket, self._cdn_socket]))
        self._loop.close()

    def _app(self) -> Starlette:
        methods = ["GET", "HEAD"]
        return Starlette(
            routes=[
                Route("/api/agent-harnesses", self._harnesses),
                Route("/api/models/{rest:path}", self._model, methods=methods),
                Route("/cdn/{owner}/{name}/{commit}/{path:path}", self._blob, methods=methods),
                Route("/{owner}/{name}/resolve/{revision}/{path:path}", self._resolve, methods=methods),
            ]
        )

    async def _harnesses(self, request: Request) -> Response:
        return JSONResponse({"standardEnvVars": [], "harnesses": {}})

    async def _model(self, request: Request) -> Response:
        parts = request.path_params["rest"].split("/")
        repo_id, rest = "/".join(parts[:2]), parts[2:]
        if rest[:1] == ["tree"]:
            return await self._guarded(request, TREE, repo_id, "/".join(rest[1:]) or "main", self._tree)
        revision = "/".join(rest[1:]) if rest[:1] == ["revision"] else "main"
        return await self._guarded(request, INFO, repo_id, revision, self._info)

    async def _resolve(self, request: Request) -> Response:
        repo_id = f"{request.path_params['owner']}/{request.path_params['name']}"
        return await self._guarded(request, FILE, repo_id, request.path_params["revision"], self._file)

    async def _blob(self, request: Request) -> Response:
        repo_id = f"{request.path_params['owner']}/{request.path_params['name']}"
        return await self._guarded(request, CDN, repo_id, request.path_params["commit"], self._cdn_file)

    async def _guarded(
        self,
        request: Request,
        kind: str,
        repo_id: str,
        revision: str,
        answer: Callable[[Request, str, str], Response],
    ) -> Response:
        token = (request.headers.get("authorization") or "").removeprefix("Bearer ") or None
        with self._arrived:
            self.requests.append(
                HubRequest(request.method, kind, repo_id, request.url.path, request.headers.get("range"), token)
            )
            self._arrived.notify_all()
        try:
            if repo_id in self._renamed:
                return self._moved(request, repo_id)
            repository = self._repositories.get(repo_id)
            fault = await self._misbehave(repository, kind, is_download=kind == CDN and "range" not in request.headers)
            self._authorise(repository, kind, token)
            answered = answer(request, repo_id, revision)
            if fault is None:
                return answered
            if fault.alters_bytes and answered.body:
                answered.body = answered.body[:-1] + bytes([answered.body[-1] ^ 1])
            if fault.claimed_bytes is not None and "x-linked-size" in answered.headers:
                answered.headers["x-linked-size"] = str(fault.claimed_bytes)
            return broken_off(slowed(answered, fault.bytes_per_s), fault.cut_after_bytes)
        except _Refusal as refused:
            return refused.response

    def _moved(self, request: Request, old: str) -> Response:
        return RedirectResponse(str(request.url).replace(old, self._renamed[old], 1), status_code=307)

    async def _misbehave(self, repository: _Repository | None, kind: str, *, is_download: bool) -> ErrorDetail | None:
        if repository is None:
            return None
        hold = repository.hold
        if hold is not None and (is_download or not hold.is_downloads_only):
            await self._until(hold.released.wait())
        trouble = repository.trouble
        if trouble is None or kind not in (fault := trouble.fault).kinds or trouble.left == 0:
            return None
        if trouble.left is not None:
            trouble.left -= 1
        if fault.delay_s:
            await self._until(asyncio.sleep(fault.delay_s))
        if fault.status is not None:
            body = {"error": f"status {fault.status}, on purpose"}
            raise _Refusal(JSONResponse(body, fault.status, headers=dict(fault.headers)))
        return fault

    async def _until(self, awaited: object) -> None:
        """Wait for something, or for the server's end."""
        waits = {asyncio.ensure_future(awaited), asyncio.ensure_future(self._closing.wait())}  # type: ignore[arg-type]
        _, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in pending:
            wait.cancel()

    def _authorise(self, repository: _Repository | None, kind: str, token: str | None) -> None:
        if repository is None or not repository.commits:
            # Without a token the Hub does not say whether it is missing or private.
            raise _Refusal(refusal(404 if token else 401, "RepoNotFound", "Repository not found"))
        is_allowed = token is not None and token in repository.allowed_tokens
        if repository.private and not is_allowed and kind != CDN:
            raise _Refusal(refusal(404 if token else 401, "RepoNotFound", "Repository not found"))
        if repository.gated and not is_allowed and kind == FILE:
            raise _Refusal(refusal(403 if token else 401, "GatedRepo", "Access to model is restricted"))

    def _commit(self, repo_id: str, revision: str) -> str:
        repository = self._repositories[repo_id]
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refusal(refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}"))
        return commit

    def _info(self, request: Request, repo_id: str, revision: str) -> Response:
        commit = self._commit(repo_id, revision)
        repository = self._repositories[repo_id]
        files = repository.commits[commit]
        card = card_data(files.get("README.md", b""))
        with_blobs = request.query_params.get("blobs", "").lower() == "true"
        siblings = [
            {"rfilename": name} | (blob_facts(name, files[name]) if with_blobs else {}) for name in sorted(files)
        ]
        info = {
            "_id": commit[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [*texts(card.get("tags")), *repository.tags],
            "cardData": card,
            "siblings": siblings,
            "spaces": [],
        }
        return JSONResponse(info)

    def _tree(self, request: Request, repo_id: str, revision: str) -> Response:
        commit = self._commit(repo_id, revision)
        entries = []
        for name, content in sorted(self._repositories[repo_id].commits[commit].items()):
            entry = {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
            if name.endswith(LFS_SUFFIXES):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return JSONResponse(entries)

    def _file(self, request: Request, repo_id: str, revision: str) -> Response:
        commit = self._commit(repo_id, revision)
        path = request.path_params["path"]
        content = self._repositories[repo_id].commits[commit].get(path)
        if content is None:
            raise _Refusal(refusal(404, "EntryNotFound", "Entry not found", {"x-repo-commit": commit}))
        headers = {"x-repo-commit": commit, "accept-ranges": "bytes"}
        if not path.endswith(LFS_SUFFIXES):
            return ranged(request, content, headers | {"etag": f'"{git_oid(content)}"'})
        headers |= {
            "location": f"{self.cdn}/cdn/{repo_id}/{commit}/{path}",
            "etag": f'"{git_oid(content)}"',
            "x-linked-etag": f'"{sha256(content)}"',
            "x-linked-size": str(len(content)),
        }
        return Response(status_code=302, headers=headers)

    def _cdn_file(self, request: Request, repo_id: str, commit: str) -> Response:
        content = self._repositories[repo_id].commits[commit][request.path_params["path"]]
        trouble = self._repositories[repo_id].trouble
        if trouble is not None and trouble.fault.ignores_range:
            return Response(content)
        return ranged(request, content, {"etag": f'"{sha256(content)}"', "accept-ranges": "bytes"})
