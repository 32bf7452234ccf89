"""Decoding of many videos into a frame store, and CLIP features of what is stored; resumed, locked, verified.

A video that cannot be decoded, hangs or crashes its decoder is listed with its reason in the store's quarantine file
and costs no other video. Features are computed from the stored frames, so that another checkpoint needs no decoding.
Long work is shown on the `progress` that it is given, one task each.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.progress import Progress

from tspo_jax.data.decode import DECODERS
from tspo_jax.data.decode_workers import Job, Limits, run_jobs
from tspo_jax.data.frame_store import (
    DISK_FULL,
    FEATURE_ROWS,
    FrameStore,
    StoreError,
    StoreSettings,
    VideoEntry,
    frames_path,
    open_settings,
    publish,
    write_features,
)
from tspo_jax.data.questions import video_path
from tspo_jax.data.shard import Shard
from tspo_jax.data.video_files import is_video_name, not_taken, videos_below

# Nothing here imports jax: decode workers import this file.

_CHECKED_AT_ONCE = 32  # files: on a disk behind a network each takes its time
_FILE_OVERHEAD = 128 << 10  # bytes that an ArrayRecord file takes over its records


class Encoder(Protocol):
    """What predecode needs of CLIP (checkpoints.ClipEncoder)."""

    identity: str
    width: int

    def image_features(self, images: np.ndarray) -> np.ndarray: ...


def find_videos(
    videos: Path, video_folder: Path | None = None, note: Callable[[str], None] = lambda text: None
) -> dict[str, Path]:
    """Name in the store -> file, of a folder or a list; raises ValueError naming the line of a bad path.

    `note` is given one line about the files of a folder that are not taken.
    """
    if videos.is_dir():
        found, others = videos_below(videos)
        if text := not_taken(videos, others):
            note(text)
    elif videos.is_file() and not is_video_name(videos):
        root = video_folder or videos.parent
        found = {name: root / name for name in _listed(videos, root)}
        if found and not any(map(os.path.isfile, found.values())):
            raise ValueError(f"--videos: none of the {len(found)} videos of {videos} is in {root}; see --video_folder")
    else:
        raise ValueError(f"--videos: {videos} is neither a folder nor a text file that lists videos")
    if not found:
        raise ValueError(f"--videos: no videos in {videos}")
    return found


def _listed(videos: Path, root: Path) -> Iterator[str]:
    """The names in a list of paths, which are relative to `root` or begin with it."""
    for number, line in enumerate(videos.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            text = line.decode().strip().removeprefix(f"{root.absolute()}/")
        except UnicodeDecodeError:
            raise ValueError(f"{videos}:{number}: is not UTF-8") from None
        if text:
            yield video_path(text, field=f"{videos}:{number}")


class Quarantine:
    """The videos of a shard that could not be decoded, in a jsonl file that a person can read."""

    def __init__(self, path: Path):
        self._path = path
        self.rows = {}
        for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    self.rows[row["video"]] = {key: row[key] for key in ("video", "reason", "source_size")}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{path}:{number}: not a line of predecode ({error}); delete it") from None

    def add(self, sizes: Mapping[str, int | None], reason: str) -> None:
        """`sizes` of the files by the videos' names, None where there is none."""
        new = {name: {"video": name, "reason": reason, "source_size": size} for name, size in sizes.items()}
        self._save(self.rows | new)

    def keep(self, names: Iterable[str]) -> None:
        """Forgets all other videos."""
        self._save({name: self.rows[name] for name in names if name in self.rows})

    def _save(self, rows: dict) -> None:
        if rows != self.rows:
            self.rows = rows
            text = "".join(json.dumps(rows[name]) + "\n" for name in sorted(rows))
            publish(self._path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def writing(store: Path, shard: Shard) -> Iterator[None]:
    """Holds the shard of a store; raises StoreError where another run has it. The system lets go when a run dies."""
    with contextlib.ExitStack() as files:

        def hold(path: Path, kind: int) -> None:
            file = files.enter_context(path.open("a"))
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                raise StoreError(f"{store}: another run is writing this store; wait for it or use another") from None
            except OSError as error:
                raise StoreError(f"{path}: cannot be locked on this file system ({error.strerror})") from error

        # A run without shards excludes all others, a shard only itself and those of another number of shards.
        hold(store / "lock", fcntl.LOCK_EX if shard.count == 1 else fcntl.LOCK_SH)
        if shard.count > 1:
            hold(shard.path(store, "lock"), fcntl.LOCK_EX)
            for path in store.glob("lock-*-of-*"):
                if not path.name.endswith(f"-of-{shard.count:05d}"):
                    hold(path, fcntl.LOCK_SH)
        yield


def decode_videos(
    videos: dict[str, Path],
    folder: Path,
    settings: StoreSettings,
    quarantine: Quarantine,
    num_workers: int,
    limits: Limits,
    progress: Progress | None = None,
) -> dict:
    """Decodes the videos that are not in the store yet or changed since; returns counts for the result.

    Raises StoreError where the disk is full, saying how much is missing.
    """
    store = FrameStore(folder)
    sizes, done = _stored(store, videos)
    todo = _not_in_quarantine(quarantine, sizes, done)
    jobs = [Job(str(videos[name]), name, sizes[name], str(folder), settings, DECODERS) for name in todo]
    start, frames = time.monotonic(), 0
    progress = progress or _unseen()
    todo_bytes, text = sum(job.size for job in jobs), "decoding" if jobs else "nothing to decode"
    bar = progress.add_task(text, total=todo_bytes or 1, completed=0 if jobs else 1)
    shares: dict[str, float] = {}

    def show(job: Job, share: float) -> None:
        before, shares[job.name] = shares.get(job.name, 0.0), share * job.size
        rate = frames / max(time.monotonic() - start, 1e-6)
        count = f"{len(shares)}/{len(jobs)} videos, {len(quarantine.rows)} in quarantine, {rate:.0f} frames/s"
        progress.update(bar, advance=shares[job.name] - before, description=count)

    try:
        for outcome in run_jobs(jobs, num_workers, limits, show):
            frames += outcome.num_frames
            if outcome.reason:
                quarantine.add({outcome.job.name: outcome.job.size}, outcome.reason)
            show(outcome.job, 1.0)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        sizes, done = _stored(store, videos)
        used = sum(frames_path(folder, name).stat().st_size for name in done)
        sources = sum(sizes[name] or 0 for name in done)
        rest = sum(size or 0 for size in sizes.values()) - sources
        needed = rest * (used / sources if sources else 1.0)
        raise _disk_full(error, folder, f"{len(done)} of {len(videos)} videos are stored", needed) from error
    stored = len(videos) - len(quarantine.rows)
    return {
        "videos": len(videos),
        "stored": stored,
        "decoded_now": stored - len(done),
        "frames_decoded_now": frames,
        "decode_seconds": round(time.monotonic() - start, 3),
        "quarantined": [quarantine.rows[name] for name in sorted(quarantine.rows)],
    }


def _stored(store: FrameStore, videos: dict[str, Path]) -> tuple[dict[str, int | None], set[str]]:
    """The size of every file, None where there is none, and the names of those that are in the store.

    A stored video stays valid when its file is gone, not when it has another size.
    """

    def check(name: str) -> tuple[int | None, bool]:
        size = os.path.getsize(videos[name]) if os.path.isfile(videos[name]) else None
        try:
            return size, name in store and size in (None, store.video(name).source_size)
        except (StoreError, OSError):  # damaged: decode again; a name that the file system refuses: the worker says so
            return size, False

    with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
        checked = dict(zip(videos, pool.map(check, videos), strict=True))
    return {name: size for name, (size, _) in checked.items()}, {name for name, (_, there) in checked.items() if there}


def _not_in_quarantine(quarantine: Quarantine, sizes: dict[str, int | None], done: set[str]) -> list[str]:
    """The videos to be decoded. The quarantine keeps those of them whose files are the same, and gets those that no
    worker need look at."""
    left = {name: size for name, size in sizes.items() if name not in done}
    rows = quarantine.rows.items()
    quarantine.keep({name for name, row in rows if name in left and left[name] == row["source_size"]})
    quarantine.add({name: size for name, size in left.items() if size is None}, "no such file")
    not_utf8 = (name for name in left if any("\ud800" <= character <= "\udfff" for character in name))
    quarantine.add({name: left[name] for name in not_utf8}, "its name is not UTF-8")
    return [name for name in left if name not in quarantine.rows]


def _disk_full(error: OSError, folder: Path, done: str, needed: float) -> StoreError:
    if error.errno == errno.ENOSPC:  # else a quota, which does not say what is left of it
        needed -= shutil.disk_usage(folder).free
    return StoreError(
        f"{folder}: the disk is full; {done} and readable, about {max(needed, 1e6) / 1e6:,.0f} MB more are needed; "
        "free them and run the same command again"
    )


def encode_features(
    folder: Path,
    names: Iterable[str],
    encoder: Encoder,
    progress: Progress | None = None,
    report: Callable[[float], None] = lambda share: None,
) -> int:
    """Writes the CLIP features of stored videos that lack them; returns the number of frames encoded.

    `report` is called with the share of them that is done. Raises StoreError where the disk is full, saying how much is
    missing.
    """
    progress = progress or _unseen()
    (folder / "features" / encoder.identity).mkdir(parents=True, exist_ok=True)
    store = FrameStore(folder, encoder.identity)
    names = list(names)
    with ThreadPoolExecutor(_CHECKED_AT_ONCE) as pool:
        missing = pool.map(lambda name: 0 if store.has_features(name) else store.video(name).num_frames, names)
        todo = {name: num_frames for name, num_frames in zip(names, missing, strict=True) if num_frames}
    total = sum(todo.values())
    bar = progress.add_task(f"encoding {total} frames", total=total)
    with ThreadPoolExecutor() as pool, ThreadPoolExecutor(1) as ahead:

        def ranges(num_frames: int) -> Iterator[range]:
            for start in range(0, num_frames, FEATURE_ROWS):
                yield range(start, min(start + FEATURE_ROWS, num_frames))

        def read_ahead() -> Iterator[np.ndarray]:
            """The frames of all videos, block by block; the next is read and decoded while one is encoded."""
            waiting = None
            for name, num_frames in todo.items():
                for idx in ranges(num_frames):
                    following = ahead.submit(store.frames, name, idx, pool)
                    if waiting:
                        yield waiting.result()
                    waiting = following
            if waiting:
                yield waiting.result()

        frames = read_ahead()

        def blocks(entry: VideoEntry) -> Iterator[np.ndarray]:
            for idx in ranges(entry.num_frames):
                yield encoder.image_features(next(frames))
                progress.advance(bar, len(idx))
                done = progress.tasks[bar].completed
                progress.update(bar, description=f"encoding {done:.0f}/{total} frames")
                report(done / total)

        try:
            for name in todo:
                entry = store.video(name)
                write_features(folder, entry, encoder.identity, blocks(entry), encoder.width)
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            rest = [num_frames for name, num_frames in todo.items() if not store.has_features(name)]
            needed = sum(4 * encoder.width * num_frames + _FILE_OVERHEAD for num_frames in rest)
            done = f"features of {len(names) - len(rest)} of {len(names)} videos are stored"
            raise _disk_full(error, folder, done, needed) from error
    return total


def add_videos(
    folder: Path, videos: Path, names: Iterable[str], encoder: Encoder, progress: Progress | None = None
) -> None:
    """Decodes and encodes the named files of a folder into a store, made if it is not there; others are passed over.

    Videos that cannot be decoded go to the store's quarantine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    there = {name: videos / name for name in sorted(names) if (videos / name).is_file()}
    with writing(folder, Shard()):
        if not (folder / "store.json").is_file():
            open_settings(folder, StoreSettings())
        settings, quarantine = FrameStore(folder).settings, Quarantine(folder / "quarantine.jsonl")
        decode_videos(there, folder, settings, quarantine, len(os.sched_getaffinity(0)), Limits(), progress)
        encode_features(folder, there.keys() - quarantine.rows.keys(), encoder, progress)


def verify(folder: Path, videos: dict[str, Path], progress: Progress | None = None) -> dict:
    """Reads the whole store; `problems` lists damaged files, and files of `videos` that are not what was decoded,
    `not_stored` those of `videos` that the store does not have."""
    store = FrameStore(folder)
    clips = sorted(path.name for path in (folder / "features").glob("*"))
    checks = [(store.check_frames, name) for name in store.names()]
    for clip in clips:
        features = FrameStore(folder, clip)
        checks += [(features.check_features, name) for name in features.names_with_features()]
    checks += [(lambda name: _check_source(store, name, videos[name]), name) for name in videos if name in store]
    problems = []
    for check, name in (progress or _unseen()).track(checks, total=len(checks), description="verifying"):
        try:
            check(name)
        except StoreError as error:
            problems.append(str(error))
    absent = sorted(name for name in videos if name not in store)
    return {"videos": len(store.names()), "clip_checkpoints": clips, "problems": problems, "not_stored": absent}


def _check_source(store: FrameStore, name: str, path: Path) -> None:
    entry = store.video(name)
    if path.is_file():
        with path.open("rb") as file:
            same = path.stat().st_size == entry.source_size
            if not same or hashlib.file_digest(file, "sha256").hexdigest() != entry.source_sha256:
                raise StoreError(f"{path}: was replaced after it was decoded; delete {frames_path(store.folder, name)}")


def _unseen() -> Progress:
    return Progress(disable=True)
