"""Worker processes that decode videos into a frame store and are killed when a decoder hangs.

A decoder may crash, or loop in native code that holds the GIL and ignores signals: only the kill of its process ends
that. Each job says how far it is, so that a hang is noticed early in a long video, and has a limit of memory, so that
a file that claims huge pictures costs itself alone. Nothing here imports jax.
"""

import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tspo_jax.data.decode import Video, VideoError
from tspo_jax.data.frame_store import (
    NAME_REFUSED,
    StoreSettings,
    VideoEntry,
    encode_jpeg,
    frames_path,
    partial_path,
    write_frames,
)

_JOBS_PER_PROCESS = 50  # decord leaks: a worker is replaced after this many videos
_START_LIMIT = 120.0  # seconds for a worker process to import its modules
# Once glibc has seen a large block freed, such as FFmpeg's index of a long MP4, it keeps such blocks in its heap, where
# they grow by copies. These limits in bytes (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) give them back to the system, but keep
# the memory of pictures.
_MALLOC_LIMITS = {-3: 4 << 20, -1: 16 << 20}


@dataclasses.dataclass(frozen=True)
class Job:
    """A video to decode: `name` in the store, the file and its size, and the decoders to try in turn."""

    path: str
    name: str
    size: int
    store: str
    settings: StoreSettings
    decoders: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a job may take with each decoder.

    Attributes:
      seconds: in all.
      stall_seconds: without a new frame.
      megabytes: of memory, over what the process has when the job starts (Linux).
    """

    seconds: float = 7200.0
    stall_seconds: float = 60.0
    megabytes: int = 4096


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a job: the number of stored frames, or why there are none."""

    job: Job
    num_frames: int = 0
    reason: str = ""


Progress = Callable[[float], None]  # called with the share of a job that is done


def decode_video(job: Job, progress: Progress) -> int:
    """Decodes the candidates of a video into the store with the first decoder of the job; returns their number.

    One picture is in memory at a time. Raises VideoError, and OSError where the store cannot be written.
    """
    video = Video(job.path, job.decoders[0], threads=1)
    candidates = video.candidates(job.settings.fps)
    try:
        with open(job.path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:  # such as a bad sector: this video's fault, not the store's
        raise VideoError(job.path, f"cannot be read ({error.strerror})") from error

    def jpegs() -> Iterator[bytes]:
        for i, frame in enumerate(video.frames(candidates, job.settings.short_side)):
            progress(i / len(candidates))
            yield encode_jpeg(frame, job.settings.jpeg_quality)

    width, height = video.info.scaled_size(job.settings.short_side)
    times = video.info.times(candidates)
    entry = VideoEntry(
        job.name, video.fps, video.num_frames, times, candidates, width, height, video.decoder, job.size, digest
    )
    write_frames(job.store, entry, jpegs())
    return len(candidates)


def run_jobs(
    jobs: Iterable[Job],
    num_workers: int,
    limits: Limits,
    on_progress: Callable[[Job, float], None] = lambda job, share: None,
    work: Callable[[Job, Progress], int] = decode_video,
) -> Iterator[Outcome]:
    """Runs jobs in worker processes; one outcome per job, in the order in which they end.

    A job that fails, crashes or reaches one of its limits is tried again with its next decoder. Raises OSError as soon
    as one cannot write its results. Closing the iterator ends all workers.
    """
    queue = deque(jobs)
    reasons: dict[str, list[str]] = {job.name: [] for job in queue}
    workers = [_Worker(work, limits) for _ in range(min(num_workers, len(queue)))]
    try:
        while queue or any(worker.job for worker in workers):
            for worker in workers:
                if worker.idle and queue:
                    worker.start(queue.popleft())
            _wait_for_news(workers)
            for i, worker in enumerate(workers):
                for kind, value in worker.news():
                    if kind == "progress":
                        on_progress(worker.job, value)
                        continue
                    job, worker.job = worker.job, None
                    if kind == "unwritable":
                        raise OSError(*value)
                    if kind == "lost" or worker.num_jobs == _JOBS_PER_PROCESS:
                        worker.kill()
                        workers[i] = _Worker(work, limits)
                    if job is None:  # lost while it had nothing to do
                        break
                    if kind == "done":
                        yield Outcome(job, num_frames=value)
                        break
                    with contextlib.suppress(OSError):  # a name that the file system refuses
                        partial_path(frames_path(job.store, job.name)).unlink(missing_ok=True)
                    if value not in reasons[job.name]:
                        reasons[job.name].append(value)
                    if len(job.decoders) > 1:
                        queue.appendleft(dataclasses.replace(job, decoders=job.decoders[1:]))
                    else:
                        yield Outcome(job, reason="; ".join(reasons[job.name]))
                    break
    finally:
        for worker in workers:
            worker.kill()


def _wait_for_news(workers: list["_Worker"]) -> None:
    wait = min(worker.deadline for worker in workers) - time.monotonic()
    multiprocessing.connection.wait([worker.pipe for worker in workers], max(0.0, wait) if wait < 1e6 else None)


class _Worker:
    """The parent's side of a worker process."""

    def __init__(self, work: Callable[[Job, Progress], int], limits: Limits):
        # Fresh processes: forking one that runs threads (as any that imported jax does) can hang.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, limits.megabytes), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None
        self.num_jobs = 0
        self._ready = False
        self._limits = limits
        self._ends = ((time.monotonic() + _START_LIMIT, "did not start"),)

    @property
    def idle(self) -> bool:
        return self._ready and self.job is None

    @property
    def deadline(self) -> float:
        """Monotonic time at which the process is given up."""
        return float("inf") if self.idle else min(self._ends)[0]

    def start(self, job: Job) -> None:
        self.job = job
        self.num_jobs += 1
        self._end = time.monotonic() + self._limits.seconds, f"took longer than {self._limits.seconds:g} s"
        self._alive()
        with contextlib.suppress(OSError):  # it has died: news() finds out
            self.pipe.send(job)

    def news(self) -> Iterator[tuple[str, object]]:
        """What happened since: ("progress", share), and at most one of ("done", frames), ("failed", reason),
        ("lost", reason) when the process must be replaced, and ("unwritable", (errno, text, file))."""
        try:
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "ready":
                    self._ready = True
                    continue
                self._alive()
                yield kind, value
        except (EOFError, OSError):
            self.process.join()
            status = self.process.exitcode
            if not self._ready:
                raise ChildProcessError(
                    f"a decode worker did not start (status {status}); is there memory for it?"
                ) from None
            yield "lost", f"the {self.job.decoders[0] if self.job else 'idle'} process crashed (status {status})"
            return
        if time.monotonic() >= self.deadline:
            if self.job is None:
                raise ChildProcessError(f"a decode worker did not start within {_START_LIMIT:g} s; fewer --workers may")
            yield "lost", f"{self.job.decoders[0]} {min(self._ends)[1]}"

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()

    def _alive(self) -> None:
        seconds = self._limits.stall_seconds
        self._ends = self._end, (time.monotonic() + seconds, f"showed no progress for {seconds:g} s")


def _limit_memory(megabytes: int) -> None:
    """Allocations fail once this process has that much more than now."""
    if sys.platform == "linux":
        data = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = data + (megabytes << 20)
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
        )


def _serve(pipe: multiprocessing.connection.Connection, work: Callable[[Job, Progress], int], megabytes: int) -> None:
    """The worker process: jobs in, progress and one result per job out."""
    if sys.platform == "linux":  # die with the parent, however it dies
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGKILL)
        for limit, value in _MALLOC_LIMITS.items():
            libc.mallopt(limit, value)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends this process
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # FFmpeg inside decord prints its own messages
    pipe.send(("ready", None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        _limit_memory(megabytes)
        sent = time.monotonic()

        def progress(share: float) -> None:
            nonlocal sent
            if time.monotonic() > sent + 0.2:
                sent = time.monotonic()
                pipe.send(("progress", share))

        try:
            pipe.send(("done", work(job, progress)))
        except VideoError as error:
            pipe.send(("failed", error.reason))
        except OSError as error:  # of the store: the decoders' own become VideoError
            if error.errno == errno.ENAMETOOLONG:
                pipe.send(("failed", "its name is too long for a store"))
            elif error.errno in NAME_REFUSED:
                pipe.send(("failed", f"the store cannot have a file of its name ({error.strerror})"))
            else:
                pipe.send(("unwritable", error.args[:3]))
        except MemoryError:
            pipe.send(("failed", f"{job.decoders[0]} needs more than {megabytes} MB of memory"))
        except Exception as error:  # one odd video must not end the run
            pipe.send(("failed", f"{type(error).__name__}: {error}"))
