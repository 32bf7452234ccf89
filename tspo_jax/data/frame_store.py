"""The frame store: what is left of the videos after pre-decoding, readable frame by frame.

    STORE/store.json                             settings: fps, short_side, jpeg_quality and the format's version
    STORE/frames/VIDEO.array_record              one JPEG per record; the last record describes the video (json)
    STORE/features/CLIP/VIDEO.array_record       CLIP features in blocks of rows; the last record describes them (json)

VIDEO is the video's path below the video folder, CLIP the identity of the checkpoint that made the features. One file
per video: it appears complete under its name or not at all, a video can be added or replaced without touching others,
and any number of processes may read. Measured (benchmarks/data_pipeline.py): opening 100 files and reading 128 random
frames takes 13 ms, against 4 ms from one large file and 37 ms with 16 frames per chunk; decoding these pictures takes
100 ms.
"""

import contextlib
import dataclasses
import errno
import hashlib
import io
import itertools
import json
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image

VERSION = 1
SUFFIX = ".array_record"
FEATURE_ROWS = 256  # per record: a needle sample reads 50 rows of a video, not all of a long one
_OPEN_FILES = 128
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What file systems say of a name that they cannot hold: the fault of one video, not of the store.
NAME_REFUSED = (errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR, errno.ENOTDIR)
# One record per chunk, so that a frame is read alone; JPEG does not get smaller by compression.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
READ_TOGETHER = 16  # frames per task of a thread pool


class StoreError(ValueError):
    """A frame store that cannot be used, naming the file and what to do."""


@dataclasses.dataclass(frozen=True)
class StoreSettings:
    """How the frames of a store were made; one store has one of these.

    Attributes:
      fps: candidate frames per second.
      short_side: the shorter side was reduced to this many pixels where it was larger; 0 = kept.
      jpeg_quality: Pillow's scale.
    """

    fps: float = 1.0
    short_side: int = 384
    jpeg_quality: int = 95


@dataclasses.dataclass(frozen=True)
class VideoEntry:
    """What the store knows about a video with T stored frames.

    Attributes:
      fps: average frame rate of the source.
      num_video_frames: frames of the source.
      timestamps: float64 [T] presentation times in seconds.
      frame_idx: int64 [T] frame numbers in the source.
      width, height: pixels of the stored frames.
      decoder: name and version.
      source_size, source_sha256: of the video file.
      crc32: uint32 [T] of the JPEG records.
    """

    name: str
    fps: float
    num_video_frames: int
    timestamps: np.ndarray
    frame_idx: np.ndarray
    width: int
    height: int
    decoder: str
    source_size: int
    source_sha256: str
    crc32: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint32))

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)

    @property
    def duration(self) -> float:
        """Seconds, as the original counts them: frames of the source by its average frame rate."""
        return self.num_video_frames / self.fps

    def to_json(self) -> bytes:
        fields = dataclasses.asdict(self)
        return json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields.items()}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "VideoEntry":
        fields = json.loads(text)
        for name, dtype in (("timestamps", np.float64), ("frame_idx", np.int64), ("crc32", np.uint32)):
            fields[name] = np.array(fields[name], dtype)
        return cls(**fields)


# ---- writing -----------------------------------------------------------------------------------------------


def open_settings(folder: str | Path, settings: StoreSettings) -> None:
    """Makes a store with these settings, or checks that the store there has them; raises StoreError."""
    path = Path(folder) / "store.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, **dataclasses.asdict(settings)}, indent=1) + "\n"
        publish(path, lambda partial: partial.write_text(text))
    found = read_settings(folder)
    for field in dataclasses.fields(settings):
        there, wanted = getattr(found, field.name), getattr(settings, field.name)
        if there != wanted:
            raise StoreError(f"{path}: {field.name} is {there}, not {wanted}; use another --store or --{field.name}")


def read_settings(folder: str | Path) -> StoreSettings:
    path = Path(folder) / "store.json"
    if not path.is_file():
        raise StoreError(f"{folder} is no frame store (no store.json); make one with python -m tspo_jax.predecode")
    try:
        fields = json.loads(path.read_text())
        version = fields.pop("version")
        if version > VERSION:
            raise StoreError(f"{path}: version {version} is newer than this program's ({VERSION}); update tspo_jax")
        return StoreSettings(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise error if isinstance(error, StoreError) else StoreError(f"{path}: damaged ({error})") from error


def check_side(folder: str | Path, settings: StoreSettings, wanted: int) -> None:
    """Raises StoreError for a store whose frames are smaller than the square of `wanted` pixels that a model sees."""
    side = settings.short_side  # 0 = as large as the videos
    if side and side < wanted:
        raise StoreError(
            f"{folder}: its frames have a shorter side of {side} pixels, the model sees {wanted}; "
            f"make a store with python -m tspo_jax.predecode --short_side={wanted}"
        )


def frames_path(folder: str | Path, name: str) -> Path:
    return Path(folder) / "frames" / (name + SUFFIX)


def features_path(folder: str | Path, identity: str, name: str) -> Path:
    return Path(folder) / "features" / identity / (name + SUFFIX)


def partial_path(path: Path) -> Path:
    """Where a file is written before it is published: the next run overwrites what a killed one left there."""
    return path.with_name(path.name + ".partial")


def encode_jpeg(frame: np.ndarray, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_frames(folder: str | Path, entry: VideoEntry, jpegs: Iterable[bytes]) -> VideoEntry:
    """Writes a video's frames, one in memory at a time; the entry comes back with their checksums.

    Raises ValueError unless there are entry.num_frames of them, OSError where the disk is full or refuses.
    """
    checksums = []

    def write(partial: Path):
        def records():
            for jpeg in jpegs:
                checksums.append(zlib.crc32(jpeg))
                yield jpeg
            if len(checksums) != entry.num_frames:
                raise ValueError(f"{entry.name}: {len(checksums)} frames were decoded, not {entry.num_frames}")
            yield with_checksums().to_json()

        _write_records(partial, records())

    def with_checksums():
        return dataclasses.replace(entry, crc32=np.array(checksums, np.uint32))

    publish(frames_path(folder, entry.name), write)
    return with_checksums()


def write_features(
    folder: str | Path, entry: VideoEntry, identity: str, blocks: Iterable[np.ndarray], width: int
) -> None:
    """Writes the CLIP features of a video: `blocks` [n, width] in order, FEATURE_ROWS rows in all but the last."""
    header = {"name": entry.name, "clip": identity, "width": width, "frames_crc32": zlib.crc32(entry.crc32.tobytes())}

    def write(partial: Path):
        records = (np.ascontiguousarray(block, "<f4").tobytes() for block in blocks)
        _write_records(partial, itertools.chain(records, [json.dumps(header).encode()]))

    publish(features_path(folder, identity, entry.name), write)


def publish(path: Path, write: Callable[[Path], None]) -> None:
    """`write(partial path)`, then the file appears whole under its name; nothing is left where that fails."""
    partial = partial_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_records(path: Path, records: Iterable[bytes]) -> None:
    with _disk_errors(path):
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
    try:
        for record in records:
            with _disk_errors(path):
                writer.write(record)
    finally:
        with _disk_errors(path):
            writer.close()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all that the writer raises, whatever the disk said
        code = next((code for code in (*DISK_FULL, *NAME_REFUSED) if os.strerror(code) in str(error)), errno.EIO)
        raise OSError(code, os.strerror(code), str(path)) from error


# ---- reading -----------------------------------------------------------------------------------------------


class FrameStore:
    """Reads a frame store; one object may be used by many threads and travels to other processes by pickle.

    With `clip_identity`, also the features of that checkpoint. Raises StoreError for a folder that is no store, one of
    a newer version, and one that lacks the features of the checkpoint.
    """

    def __init__(self, folder: str | Path, clip_identity: str | None = None):
        self.folder = Path(folder)
        self.clip_identity = clip_identity
        self.settings = read_settings(folder)
        there = sorted(path.name for path in (self.folder / "features").glob("*"))
        if clip_identity is not None and clip_identity not in there:
            have = f"features of the CLIP checkpoints {', '.join(there)}" if there else "no CLIP features"
            raise StoreError(
                f"{folder} has {have}, not of checkpoint {clip_identity}; "
                f"make them with python -m tspo_jax.predecode --store={folder} --clip=DIR"
            )
        self._clear()

    def _clear(self):
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, tuple[ArrayRecordReader, bytes]] = OrderedDict()

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k not in ("_lock", "_open")}

    def __setstate__(self, state):
        vars(self).update(state)
        self._clear()

    def names(self) -> list[str]:
        """The videos of the store, sorted."""
        return _names(self.folder / "frames")

    def names_with_features(self) -> list[str]:
        """The videos that have features of the checkpoint, sorted."""
        return _names(self.folder / "features" / (self.clip_identity or ""))

    def __contains__(self, name: str) -> bool:
        return frames_path(self.folder, name).is_file()

    def video(self, name: str) -> VideoEntry:
        path = frames_path(self.folder, name)
        try:
            return VideoEntry.from_json(self._reader(path)[1])
        except (ValueError, KeyError, TypeError) as error:
            raise error if isinstance(error, StoreError) else _damaged(path, error) from error

    def jpegs(self, name: str, idx: Sequence[int] | np.ndarray) -> Iterator[bytes]:
        """The JPEG files of stored frames, each read when it is asked for: the decoder finds it in the cache."""
        return self._records(frames_path(self.folder, name), idx, name)

    def frames(self, name: str, idx: Sequence[int] | np.ndarray, pool: Executor | None = None) -> np.ndarray:
        """Stored frames uint8 [n, H, W, 3], read and decoded by the threads of `pool` where there is one."""
        if not len(idx):
            return np.zeros((0, 0, 0, 3), np.uint8)
        height, width, *_ = simplejpeg.decode_jpeg_header(next(self.jpegs(name, idx[:1])))
        frames = np.empty((len(idx), height, width, 3), np.uint8)

        def read(start: int) -> None:
            for i, jpeg in enumerate(self.jpegs(name, idx[start : start + READ_TOGETHER]), start):
                simplejpeg.decode_jpeg(jpeg, buffer=frames[i])  # straight into its place

        for _ in (pool.map if pool else map)(read, range(0, len(idx), READ_TOGETHER)):  # raises what a thread raised
            pass
        return frames

    def features(self, name: str, idx: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """CLIP features float32 [n, D] of stored frames (all in order without `idx`), which may repeat."""
        path = features_path(self.folder, self.clip_identity or "", name)
        header = self.features_header(name)
        num_blocks = self._reader(path)[0].num_records() - 1
        blocks = np.arange(num_blocks) if idx is None else np.unique(np.asarray(idx, np.int64) // FEATURE_ROWS)
        records = self._records(path, blocks, name)
        parts = [np.frombuffer(record, "<f4").reshape(-1, header["width"]) for record in records]
        rows = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if idx is None:
            return rows
        # Every block but the last has FEATURE_ROWS rows: where a frame's block starts among those that were read.
        idx = np.asarray(idx, np.int64)
        return rows[np.searchsorted(blocks, idx // FEATURE_ROWS) * FEATURE_ROWS + idx % FEATURE_ROWS]

    def features_header(self, name: str) -> dict:
        """What made the features of a video: `clip`, `width` and `frames_crc32`, to tell frames that changed since."""
        path = features_path(self.folder, self.clip_identity or "", name)
        return json.loads(self._reader(path)[1])

    def has_features(self, name: str) -> bool:
        """Whether there are features of the video's present frames."""
        if name not in self or not features_path(self.folder, self.clip_identity or "", name).is_file():
            return False
        return self.features_header(name)["frames_crc32"] == zlib.crc32(self.video(name).crc32.tobytes())

    def features_sha256(self, names: Iterable[str]) -> str:
        """Tells the frames of these videos, and so their features, from others; those without features do not count."""
        digest = hashlib.sha256()
        for name in sorted(names):
            if self.has_features(name):
                digest.update(f"{name} {self.features_header(name)['frames_crc32']}".encode())
        return digest.hexdigest()[:16]

    def frames_sha256(self, names: Iterable[str]) -> str:
        """Tells the frames of these videos from others, whatever features they have."""
        digest = hashlib.sha256()
        for name in sorted(set(names)):
            digest.update(f"{name} {zlib.crc32(self.video(name).crc32.tobytes())}".encode())
        return digest.hexdigest()[:16]

    def check_frames(self, name: str) -> None:
        """Reads every frame of a video; raises StoreError where one is not what was written."""
        crc32 = self.video(name).crc32
        for i, jpeg in enumerate(self.jpegs(name, range(len(crc32)))):
            if zlib.crc32(jpeg) != crc32[i]:
                raise _damaged(frames_path(self.folder, name), f"frame {i} has another checksum")

    def check_features(self, name: str) -> None:
        """Reads all features of a video; raises StoreError unless they belong to its frames and are finite."""
        path = features_path(self.folder, self.clip_identity or "", name)
        if name not in self:
            raise StoreError(f"{path}: features of a video that has no frames here; delete it")
        if not self.has_features(name):
            raise StoreError(f"{path}: features of other frames than the store has; run predecode again with --clip")
        features = self.features(name)
        if len(features) != self.video(name).num_frames or not np.isfinite(features).all():
            raise _damaged(path, f"{len(features)} rows, finite: {bool(np.isfinite(features).all())}")

    def _records(self, path: Path, idx: Sequence[int] | np.ndarray, name: str) -> Iterator[bytes]:
        idx = [int(i) for i in idx]
        reader = self._reader(path)[0]
        if idx and not 0 <= min(idx) <= max(idx) < reader.num_records() - 1:
            raise IndexError(
                f"{name} has {reader.num_records() - 1} records in {path}, asked for {min(idx)}-{max(idx)}"
            )
        try:
            for i in idx:
                # A list of numbers would be read by other threads, at a cost that grows with the video's length.
                yield reader.read(i, i + 1)[0]
        except RuntimeError as error:
            raise _damaged(path, error) from error

    def _reader(self, path: Path) -> tuple[ArrayRecordReader, bytes]:
        """An open file and its last record; the least recently used ones are closed."""
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        if not path.is_file():
            what = "frames" if path.is_relative_to(self.folder / "frames") else "CLIP features"
            raise StoreError(f"{path}: the store has no {what} of this video; run python -m tspo_jax.predecode")
        try:
            reader = ArrayRecordReader(str(path), _READER_OPTIONS)
            if not reader.num_records():
                raise RuntimeError("no records: not a whole ArrayRecord file")
            opened = reader, reader.read(reader.num_records() - 1, reader.num_records())[0]
        except RuntimeError as error:
            raise _damaged(path, error) from error
        with self._lock:
            self._open[path] = opened
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)
        return opened


def decode_jpeg(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return simplejpeg.decode_jpeg(data)


def _names(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix().removesuffix(SUFFIX) for path in root.rglob("*" + SUFFIX))


def _damaged(path: Path, error: Exception | str) -> StoreError:
    return StoreError(f"{path}: damaged ({str(error).splitlines()[0][:120]}); delete it and run predecode again")
