"""A local web page: choose a video, ask about it, see the scores over time, the frames and the answer.

    python -m tspo_jax.serve --agent=DIR [--videos=FOLDER] [--store=DIR] [--answerer=DIR] [--port=8080]

`--agent` is a TSPO folder, or a plain CLIP folder. A video of the folder is decoded and encoded when it is first asked
about, into the frame store (one for the time of the page if none is named); a second question about it, like any about
a video of the store, reads features and the shown frames from there. Questions are answered one after the other; those
that come in meanwhile wait. The page is for this machine alone (127.0.0.1) unless --host says otherwise.
"""

import contextlib
import dataclasses
import functools
import http.server
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import urllib.parse
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from html import escape
from pathlib import Path

from absl import flags

from tspo_jax.answering import prompts
from tspo_jax.command_line import entry_point
from tspo_jax.data import decode_workers, frame_store, predecoding
from tspo_jax.data.decode import Video, VideoError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.shard import Shard
from tspo_jax.pages import report_page, video_page
from tspo_jax.selection.choosing import picks_of, select_frames
from tspo_jax.selection.scoring import AGENT_METHODS, Scorer, load_scorer
from tspo_jax.selection.video_source import VIDEO_SUFFIXES, Source, stored_source

MAX_FRAMES = 256
MAX_WAITING = 16  # questions
MAX_BODY = 100_000  # bytes of a question
KEPT_JOBS = 64
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class RequestError(ValueError):
    """A request that is refused: an HTTP status and why."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


@dataclasses.dataclass
class Job:
    """A question and how far it is: `waiting`, `decoding`, `encoding`, `answering`, `done` or `failed`."""

    state: str = "waiting"
    share: float = 0.0  # of the video that is decoded or encoded
    html: str = ""  # the result, or why there is none

    def report(self, state: str, share: float) -> None:
        self.state, self.share = state, share


class Library:
    """The videos of a folder and of a frame store. Not to be used by two threads at a time, except `path` and `save`.

    Args:
      folder: of video files; None = those of the store alone.
      store: frame store, made if it is not there; videos of the folder are added when they are asked about.
      scorer: chooses the frames.
      answer: (frames, question) -> text, if any.
    """

    def __init__(
        self, folder: Path | None, store: Path, scorer: Scorer, answer: Callable[[list, str], str] | None = None
    ):
        self.folder = folder and folder.resolve()
        if folder and not (store / "store.json").exists():
            frame_store.open_settings(store, frame_store.StoreSettings())
        frame_store.read_settings(store)
        self.store = store
        self.scorer = scorer
        self.answer = answer

    def names(self) -> list[str]:
        return sorted(self._files() | set(FrameStore(self.store).names()))

    def _files(self) -> set[str]:
        """Names of the videos in the folder; a link out of it is none."""
        files = self.folder.iterdir() if self.folder else ()
        videos = (path for path in files if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
        return {path.name for path in videos if path.resolve().parent == self.folder}

    def path(self, name: str) -> Path | None:
        """The file of a video, None where only the store has it; RequestError for what is in neither."""
        if name in self._files():
            return self.folder / name
        if name not in FrameStore(self.store).names():
            raise RequestError(404, f"there is no video {name!r} here")
        return None

    def ask(self, job: Job, name: str, question: str, num_frames: int, method: str) -> str:
        """HTML of what is found for a question."""
        source, answers = self._source(job, name), {}
        if self.answer:
            job.state = "answering"
            result = select_frames(self.scorer, source.candidates(), question, num_frames, method)
            answers = {method: self.answer(source.pictures(picks_of(result, source)), question)}
        return video_page.section(self.scorer, source, question, num_frames, answers)

    def _source(self, job: Job, name: str) -> Source:
        """A video of the store, which it is added to where its frames or features are not there, or of another file."""
        path, store, clip = self.path(name), FrameStore(self.store), self.scorer.clip
        size = path and path.stat().st_size
        decoded = name in store and size in (None, store.video(name).source_size)
        encoded = decoded and frame_store.features_path(self.store, clip.identity, name).is_file()
        if not encoded or not FrameStore(self.store, clip.identity).has_features(name):
            with predecoding.writing(self.store, Shard()):
                if not decoded:
                    video = decode_workers.Job(str(path), name, size, str(self.store), store.settings, ("auto",))
                    decode_workers.decode_video(video, functools.partial(job.report, "decoding"))
                predecoding.encode_features(self.store, [name], clip, report=functools.partial(job.report, "encoding"))
        return stored_source(FrameStore(self.store, clip.identity), name)

    def save(self, name: str, body: Iterable[bytes]) -> None:
        """A new video of the folder; RequestError unless it is one. Nothing of another file stays."""
        if not self.folder:
            raise RequestError(403, "videos are not taken: the page shows a frame store")
        is_name = Path(name).name == name and not name.startswith(".") and "\0" not in name
        if not is_name or Path(name).suffix.lower() not in VIDEO_SUFFIXES:
            raise RequestError(400, f"{name!r} is not the name of a video ({', '.join(VIDEO_SUFFIXES)})")
        descriptor, partial = tempfile.mkstemp(dir=self.folder, prefix=".upload_")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.writelines(body)
            try:
                Video(partial)
            except VideoError as error:
                raise RequestError(415, f"{name} {error.reason}") from None
            try:
                os.link(partial, self.folder / name)
            except FileExistsError:
                raise RequestError(409, f"there is a video {name} already") from None
        finally:
            os.unlink(partial)


class Server(http.server.ThreadingHTTPServer):
    """Serves a library. Requests are taken at any time; questions are worked on one by one."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], library: Library, max_upload: int = 2**31):
        super().__init__(address, Handler)
        self.library = library
        self.max_upload = max_upload
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._worker = ThreadPoolExecutor(1)

    def submit(self, fields: dict) -> str:
        """Takes a question; its job's name. RequestError for fields that are wrong, or too many questions."""
        name, question = fields.get("video"), fields.get("question")
        num_frames, method = fields.get("num_frames", 8), fields.get("method", self.methods()[0])
        if not isinstance(name, str) or not isinstance(question, str) or not question.strip():
            raise RequestError(400, "video and question are needed, as texts")
        if type(num_frames) is not int or not 1 <= num_frames <= MAX_FRAMES:
            raise RequestError(400, f"num_frames must be a number from 1 to {MAX_FRAMES}")
        if method not in self.methods():
            raise RequestError(400, f"method must be one of {', '.join(self.methods())}")
        self.library.path(name)
        job = Job()
        with self._lock:
            if sum(job.state not in ("done", "failed") for job in self._jobs.values()) >= MAX_WAITING:
                raise RequestError(503, "too many questions are waiting; try again later")
            number = str(next(self._numbers))
            self._jobs[number] = job
            while len(self._jobs) > KEPT_JOBS:
                self._jobs.popitem(last=False)
        self._worker.submit(self._work, job, name, question, num_frames, method)
        return number

    def _work(self, job: Job, *asked) -> None:
        try:
            job.html, job.state = self.library.ask(job, *asked), "done"
        except Exception as error:  # whatever it is, the page says it and the next question is answered
            job.html, job.state = f"<p class='wrong'>{escape(str(error))}</p>", "failed"

    def job(self, number: str) -> Job:
        with self._lock:
            if number not in self._jobs:
                raise RequestError(404, "there is no such question (any more)")
            return self._jobs[number]

    def methods(self) -> list[str]:
        return [m for m in video_page.METHODS if self.library.scorer.agent or m not in AGENT_METHODS]

    def handle_error(self, request, client_address) -> None:
        """A traceback on stderr, but not for a client that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        super().server_close()
        self._worker.shutdown(cancel_futures=True)


class Handler(http.server.BaseHTTPRequestHandler):
    """GET / (the page), GET /videos, POST /questions, GET /questions/N, PUT /videos/NAME; all but / speak JSON."""

    server: Server
    timeout = 60  # seconds without a byte

    def do_GET(self):
        def respond():
            path = urllib.parse.urlsplit(self.path).path
            if path == "/":
                return page(self.server.library, self.server.methods())
            if path == "/videos":
                return {"videos": self.server.library.names()}
            if path.startswith("/questions/"):
                return dataclasses.asdict(self.server.job(path.removeprefix("/questions/")))
            raise RequestError(404, "there is nothing here")

        self._answer(respond)

    def do_POST(self):
        def respond():
            if self.path != "/questions":
                raise RequestError(404, "there is nothing here")
            try:
                fields = json.loads(b"".join(self._body(MAX_BODY)))
            except (ValueError, RecursionError) as error:
                raise error if isinstance(error, RequestError) else RequestError(400, "this is not JSON") from None
            if not isinstance(fields, dict):
                raise RequestError(400, "this is not a JSON object")
            return {"question": self.server.submit(fields)}

        self._answer(respond)

    def do_PUT(self):
        def respond():
            if not self.path.startswith("/videos/"):
                raise RequestError(404, "there is nothing here")
            name = urllib.parse.unquote(self.path.removeprefix("/videos/"))
            self.server.library.save(name, self._body(self.server.max_upload))
            return {"video": name}

        self._answer(respond)

    def _answer(self, respond: Callable[[], dict | str]) -> None:
        try:
            self._check_origin()
            status, content = 200, respond()
        except (ValueError, OSError) as error:  # OSError: the folder is gone, the disk full, the client silent ..
            status, content = getattr(error, "status", 500), {"error": str(error)}
            self.close_connection = True  # the body may not have been read
        is_page = isinstance(content, str)
        data = (content if is_page else json.dumps(content)).encode(errors="replace")  # names may be no UTF-8
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8" if is_page else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def _check_origin(self) -> None:
        """Pages of other sites that the user has open must not ask or upload here, nor read under another name."""
        host = self.headers.get("Host", "")
        if self.server.server_address[0] == "127.0.0.1" and host.rsplit(":", 1)[0] not in LOCAL:
            raise RequestError(403, f"{host!r} is not a name of this machine")
        origin = self.headers.get("Origin")
        if origin and urllib.parse.urlsplit(origin).netloc != host:
            raise RequestError(403, f"requests from {origin} are not taken")

    def _body(self, limit: int) -> Iterable[bytes]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal():
            raise RequestError(411, "Content-Length is missing")
        if int(length) > limit:
            raise RequestError(413, f"more than {limit} bytes")
        left = int(length)
        while left:
            data = self.rfile.read(min(left, 2**20))
            if not data:
                raise RequestError(400, "the request ended early")
            left -= len(data)
            yield data

    def log_message(self, *_) -> None:
        """Nothing: the terminal is for what goes wrong."""


# ---- the page --------------------------------------------------------------------------------------------


def page(library: Library, methods: list[str]) -> str:
    """The form; its script asks and shows the result."""
    video_options = "".join(f"<option>{escape(name)}</option>" for name in library.names())
    method_options = "".join(f"<option value='{m}'>{escape(video_page.METHODS[m][0])}</option>" for m in methods)
    answered = "The answer is given from the frames of" if library.answer else "No answerer is loaded. Method:"
    upload = " <label>or add one <input type='file' id='file' accept='video/*' /></label>" if library.folder else ""
    form = (
        "<form id='form'><p><label>Video <select id='video' required='required'>"
        f"{video_options}</select></label>{upload}</p><p><label>Question, options one a line<br />"
        "<textarea id='question' rows='5' cols='70' required='required'></textarea></label></p>"
        "<p><label>Frames <input id='num_frames' type='number' min='1' "
        f"max='{MAX_FRAMES}' value='8' /></label> <label>{answered} <select id='method'>{method_options}</select>"
        "</label> <button id='ask'>Ask</button></p></form>"
        "<p id='state' role='status'></p><progress id='progress' hidden='hidden'></progress><div id='result'></div>"
    )
    body = ["<h1>Ask a video</h1>", form, f"<script>//<![CDATA[\n{SCRIPT}//]]></script>"]
    return report_page.document("Ask a video", body)


SCRIPT = """
const at = id => document.getElementById(id);
async function call(path, options) {
  const response = await fetch(path, options), content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}
function say(text) { at('state').textContent = text; }
if (at('file')) at('file').onchange = async () => {
  const file = at('file').files[0];
  if (!file) return;
  say('Adding ' + file.name + ' ...');
  try {
    const { video } = await call('/videos/' + encodeURIComponent(file.name), { method: 'PUT', body: file });
    at('video').add(new Option(video, video, true, true));
    say(video + ' was added.');
  } catch (error) { say(error.message); }
};
at('form').onsubmit = async event => {
  event.preventDefault();
  at('ask').disabled = true; at('result').innerHTML = '';
  try {
    const fields = { video: at('video').value, question: at('question').value,
      num_frames: Number(at('num_frames').value), method: at('method').value };
    const { question } = await call('/questions', { method: 'POST', body: JSON.stringify(fields) });
    for (let job; ; await new Promise(wake => setTimeout(wake, 300))) {
      job = await call('/questions/' + question);
      say(job.state);
      at('progress').hidden = job.state !== 'decoding' && job.state !== 'encoding';
      at('progress').value = job.share;
      if (job.state === 'done' || job.state === 'failed') { at('result').innerHTML = job.html; break; }
    }
  } catch (error) { say(error.message); }
  at('ask').disabled = false; at('progress').hidden = true;
};
"""


# ---- command line ----------------------------------------------------------------------------------------


def load_answer(folder: str, max_new_tokens: int) -> Callable[[list, str], str]:
    """(frames, question) -> text, by the Video-MLLM of a folder."""
    import jax
    import jax.numpy as jnp

    from tspo_jax.answering.given_frames import answer
    from tspo_jax.answering.rollout import Rollout
    from tspo_jax.checkpoints.folders import load_answerer

    answerer = load_answerer(folder, jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16)
    rollout = Rollout.of(answerer, max_new_tokens=max_new_tokens)

    def say(frames: list, question: str) -> str:
        return answer(answerer, rollout, frames, prompts.render(question, answerer.template))["answer"]

    return say


def define_flags() -> None:
    flags.DEFINE_string("videos", "", "Folder of videos.")
    flags.DEFINE_string("store", "", "Frame store: its videos, and where those of the folder are kept.")
    flags.DEFINE_string("agent", None, "Folder of CLIP and the temporal agent, or of CLIP alone.", required=True)
    flags.DEFINE_string("answerer", "", "Folder of the Video-MLLM; without one, frames are chosen only.")
    flags.DEFINE_integer("window", 12, "Frames that a frame attends to: the agent's, as it was trained.", lower_bound=1)
    flags.DEFINE_integer("max_new_tokens", 256, "Length at which an answer is cut.", lower_bound=1)
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; anyone who reaches another one may ask and upload.")
    flags.DEFINE_integer("port", 8080, "Port; 0 = any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer("max_upload_mb", 2048, "Largest video that may be added.", lower_bound=0)


def main() -> None:
    args = flags.FLAGS
    if not args.videos and not args.store:
        raise ValueError("--videos (a folder) or --store (a frame store) is missing")
    if args.videos and not Path(args.videos).is_dir():
        raise ValueError(f"--videos: {args.videos} is no folder")
    folder = Path(args.videos) if args.videos else None
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: a temporary store is removed
    with contextlib.ExitStack() as until_the_end:
        store = args.store or until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="tspo_store_"))
        scorer = load_scorer(args.agent, args.window)
        answer = load_answer(args.answerer, args.max_new_tokens) if args.answerer else None
        library = Library(folder, Path(store), scorer, answer)
        server = until_the_end.enter_context(Server((args.host, args.port), library, args.max_upload_mb * 2**20))
        print(f"http://{args.host}:{server.server_address[1]}/", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
