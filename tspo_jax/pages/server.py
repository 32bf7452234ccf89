"""The page of `serve` over HTTP: Starlette's routes, uvicorn's loop.

    GET /                    the page; its style and script are below /static/. What the address holds is filled in:
                             ?video=NAME&question=TEXT&num_frames=K&method=M
    GET /videos              {"videos": [names]}
    GET /videos/NAME         the video file, also parts of it (Range)
    GET /previews/NAME       {"seconds": length or null, "picture": data URI}
    GET /stills/NAME?at=S    JPEG of a decoded video S seconds from its start
    PUT /videos/NAME         a new video, as the body
    POST /questions          {"video", "question", "num_frames", "method", "show"} -> {"question": N}; with "show" false
                             only the answer from the frames of the method is wanted, not the curve and the pictures
    GET /questions/N         how far it is and what was found (in rounds: so far): a library.Job

All but the page, its files and pictures speak JSON; a refusal is {"error": why} with a status. Where the server listens
at 127.0.0.1 only requests for a name of this machine are taken, and none that a page of another site makes.
"""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import sys
import threading
import traceback
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import anyio.from_thread
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tspo_jax.answering.backtracking import STRATEGIES
from tspo_jax.data.decode import VideoError
from tspo_jax.pages import templates, video_page
from tspo_jax.pages.library import Job, Library, RequestError
from tspo_jax.selection.methods import SEARCH

NUM_FRAMES, MAX_FRAMES = 8, 256  # of a question: usually, and at most
MAX_WAITING = 16  # questions
MAX_BODY = 100_000  # bytes of a question
KEPT_JOBS = 64
SILENCE = 60.0  # seconds without a byte after which a connection that owes some is closed
HARDENED = (  # on every response: only files of this server are run, and no other site shows them
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    ),
)
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Server:
    """Serves a library. Requests are taken at any time; questions are worked on one by one.

    The port is taken at once (`server_address`), `serve_forever` answers until `shutdown`, and leaving the `with`
    block gives the port back.
    """

    def __init__(self, address: tuple[str, int], library: Library, max_upload: int = 2**31):
        self.library = library
        self.max_upload = max_upload
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._worker = ThreadPoolExecutor(1)
        family, *_, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
        self._socket = socket.create_server(where[:2], family=family, backlog=64)
        self.server_address = self._socket.getsockname()
        config = uvicorn.Config(
            application(self),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",  # the terminal is for what goes wrong: `application` says that
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        self._uvicorn = uvicorn.Server(config)

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.server_close()

    def serve_forever(self) -> None:
        """Answers requests until `shutdown`, or until the process is told to stop (KeyboardInterrupt)."""
        self._uvicorn.run([self._socket])

    def shutdown(self) -> None:
        """Ends `serve_forever`, from any thread."""
        self._uvicorn.should_exit = True

    def server_close(self) -> None:
        self._socket.close()
        self._worker.shutdown(cancel_futures=True)

    def submit(self, fields: dict) -> str:
        """Takes a question; its job's name. RequestError for fields that are wrong, or too many questions."""
        name, question = fields.get("video"), fields.get("question")
        num_frames, method = fields.get("num_frames", NUM_FRAMES), fields.get("method", self.methods()[0])
        if not isinstance(name, str) or not isinstance(question, str) or not question.strip():
            raise RequestError(400, "video and question are needed, as texts")
        if type(num_frames) is not int or not 1 <= num_frames <= MAX_FRAMES:
            raise RequestError(400, f"num_frames must be a number from 1 to {MAX_FRAMES}")
        if method not in self.methods():
            raise RequestError(400, f"method must be one of {', '.join(self.methods())}")
        if type(show := fields.get("show", True)) is not bool:
            raise RequestError(400, "show must be true or false")
        self.library.path(name)
        job = Job()
        with self._lock:
            if sum(job.state not in ("done", "failed") for job in self._jobs.values()) >= MAX_WAITING:
                raise RequestError(503, "too many questions are waiting; try again later")
            number = str(next(self._numbers))
            self._jobs[number] = job
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self._worker.submit(self._work, job, name, question, num_frames, method, show)
        return number

    def _work(self, job: Job, *asked) -> None:
        try:
            job.html, job.state = self.library.ask(job, *asked), "done"
        except Exception as error:  # whatever it is, the page says it and the next question is answered
            job.html, job.state = templates.render("failure.html", reason=str(error)), "failed"

    def job(self, number: str) -> Job:
        with self._lock:
            if number not in self._jobs:
                raise RequestError(404, "there is no such question (any more)")
            return self._jobs[number]

    def methods(self) -> list[str]:
        search = [SEARCH] if self.library.searcher else []
        return [*video_page.methods_of(self.library.scorer), *search, *(STRATEGIES if self.library.in_rounds else ())]


def page(library: Library, methods: list[str], asks_at_once: bool = False) -> str:
    """The videos, the player and the form; the script asks, and shows the result.

    Args:
      methods: that may be chosen.
      asks_at_once: a question in the page's address is asked without a click.
    """
    return templates.render(
        "ask.html",
        title="Ask a video",
        names=library.names(),
        methods={method: video_page.NAMES[method] for method in methods},
        default_frames=NUM_FRAMES,
        max_frames=MAX_FRAMES,
        asks_at_once=asks_at_once,
        has_answerer=library.answer is not None,
        takes_videos=library.folder is not None,
    )


# ---- HTTP ------------------------------------------------------------------------------------------------


def application(server: Server) -> ASGIApp:
    """The routes of a server. Each is a plain function, which Starlette calls in a thread of its own."""

    def show(request: Request) -> Response:
        # A link on another site may fill in a question, but computing starts when the user wants it.
        trusted = request.headers.get("sec-fetch-site") in ("none", "same-origin")
        html = page(server.library, server.methods(), trusted)
        return HTMLResponse(html.encode(errors="replace"))  # names may be no UTF-8

    def list_videos(_: Request) -> Response:
        return _json({"videos": server.library.names()})

    def video(request: Request) -> Response:
        path = server.library.path(request.path_params["name"])
        if path is None:
            raise RequestError(404, "the frame store has the frames of this video, not the file")
        return FileResponse(path, stat_result=path.stat())

    def preview(request: Request) -> Response:
        try:
            return _json(server.library.preview(request.path_params["name"]))
        except VideoError as error:
            raise RequestError(415, error.reason) from None

    def still(request: Request) -> Response:
        try:
            seconds = float(request.query_params.get("at", ""))
        except ValueError:
            raise RequestError(400, "at must be a number of seconds") from None
        return Response(server.library.still(request.path_params["name"], seconds), media_type="image/jpeg")

    def add_video(request: Request) -> Response:
        name = request.path_params["name"]
        with _body(request, server.max_upload) as body:
            server.library.save(name, body)
        return _json({"video": name})

    def ask(request: Request) -> Response:
        with _body(request, MAX_BODY) as body:
            text = b"".join(body)
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError):
            raise RequestError(400, "this is not JSON") from None
        if not isinstance(fields, dict):
            raise RequestError(400, "this is not a JSON object")
        return _json({"question": server.submit(fields)})

    def look(request: Request) -> Response:
        return _json(dataclasses.asdict(server.job(request.path_params["number"])))

    routes = [
        Route("/", show),
        Route("/videos", list_videos),
        Route("/videos/{name:path}", video),
        Route("/videos/{name:path}", add_video, methods=["PUT"]),
        Route("/previews/{name:path}", preview),
        Route("/stills/{name:path}", still),
        Route("/questions", ask, methods=["POST"]),
        Route("/questions/{number}", look),
        Mount("/static", StaticFiles(directory=templates.STATIC)),
    ]
    nothing_here = RequestError(404, "there is nothing here")
    refusals: dict[type[Exception], Callable] = {
        HTTPException: lambda _, error: _refusal(nothing_here if error.status_code in (404, 405) else error),
        # OSError: the folder is gone, the disk full, the client silent ..
        **dict.fromkeys((ValueError, OSError), lambda _, error: _refusal(error)),
        Exception: _unforeseen,
    }
    guard = Middleware(_SameOrigin, only_local=server.server_address[0] == "127.0.0.1")
    return Starlette(routes=routes, exception_handlers=refusals, middleware=[guard])


class _SameOrigin:
    """Pages of other sites that the user has open must not ask or upload here, nor read under another name."""

    def __init__(self, app: ASGIApp, only_local: bool):
        self._app = app
        self._only_local = only_local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HARDENED]
            await send(message)

        try:
            self._check(Request(scope))
        except ValueError as error:
            await _refusal(error)(scope, receive, send_hardened)
        else:
            await self._app(scope, receive, send_hardened)

    def _check(self, request: Request) -> None:
        host = request.headers.get("host", "")
        if self._only_local and host.rsplit(":", 1)[0] not in LOCAL:
            raise RequestError(403, f"{host!r} is not a name of this machine")
        origin = request.headers.get("origin")
        if origin and urllib.parse.urlsplit(origin).netloc != host:
            raise RequestError(403, f"requests from {origin} are not taken")


@contextlib.contextmanager
def _body(request: Request, limit: int) -> Iterator[Iterable[bytes]]:
    """The body piece by piece, for a route's thread; RequestError for one that is too large or of unknown length."""
    stream = aiter(request.stream())

    def pieces() -> Iterator[bytes]:
        try:
            while piece := anyio.from_thread.run(anext, stream, b""):
                yield piece
        except ClientDisconnect:
            raise RequestError(400, "the request ended early") from None

    body = pieces()
    try:
        length = request.headers.get("content-length", "")
        if not length.isdecimal():
            raise RequestError(411, "Content-Length is missing")
        if int(length) > limit:
            raise RequestError(413, f"more than {limit} bytes")
        yield body
    except RequestError:
        for _ in itertools.islice(body, 64):  # a client that sends all before it reads would not hear the refusal
            pass
        raise


def _json(content: dict, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


def _refusal(error: Exception) -> Response:
    status = getattr(error, "status", getattr(error, "status_code", 500))
    # The body may not have been read: no other request can follow it on this connection.
    return _json({"error": str(error)}, status, {"connection": "close"})


def _unforeseen(_: Request, error: Exception) -> Response:
    traceback.print_exception(error, file=sys.stderr)
    return _refusal(error)


class _Protocol(H11Protocol):
    """Uvicorn's HTTP, but a client that is silent in the middle of its request does not keep its connection."""

    _silence: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait()

    def connection_lost(self, error: Exception | None) -> None:
        self._silence.cancel()
        super().connection_lost(error)

    def _wait(self) -> None:
        if self._silence:
            self._silence.cancel()
        self._silence = self.loop.call_later(SILENCE, self._close_if_silent)

    def _close_if_silent(self) -> None:
        is_working = self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete
        if is_working:  # the client waits for us
            self._wait()
        else:
            self.transport.close()
