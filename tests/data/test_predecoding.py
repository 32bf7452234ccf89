"""Pre-decoding: nothing stops the run, nothing is done twice, a killed run ends like an undisturbed one."""

import collections
import contextlib
import errno
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import av
import numpy as np
import pytest
from video_files import write_video

from tspo_jax.data.decode import DECODERS, Video
from tspo_jax.data.decode_workers import Job, Limits, decode_video, run_jobs
from tspo_jax.data.frame_store import FrameStore, StoreError, StoreSettings, frames_path, open_settings, write_features
from tspo_jax.data.predecoding import Quarantine, decode_videos, encode_features, find_videos, verify, writing
from tspo_jax.data.shard import Shard

ROOT = Path(__file__).parents[2]


def command(*args):
    return [sys.executable, "-m", "tspo_jax.predecode", *(str(arg) for arg in args)]


def run(*args, **kwargs):
    """Exit status, result (None where there is none) and stderr."""
    done = subprocess.run(command(*args), cwd=ROOT, capture_output=True, text=True, timeout=120, **kwargs)
    return done.returncode, json.loads(done.stdout) if done.stdout else None, done.stderr


def contents(folder):
    """Hash of every file of a store but the locks."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("lock"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class FakeClip:
    """Features are the mean colours."""

    width = 3

    def __init__(self, identity="f" * 16):
        self.identity = identity
        self.calls = []

    def image_features(self, images):
        self.calls.append(len(images))
        return images.mean(axis=(1, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Six good videos, one of them in a subfolder, and three bad ones."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(5):
        write_video(folder / f"v{i}.mp4", 50 + 25 * i, file_options={"movflags": "faststart"})
    write_video(folder / "sub" / "w.mkv", 75)
    whole = (folder / "v4.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video\n" * 20)
    (folder / "notes.txt").write_text("no video either")
    return folder


@pytest.fixture(scope="module")
def store(videos, tmp_path_factory):
    """The store of an undisturbed run."""
    folder = tmp_path_factory.mktemp("store")
    status, result, errors = run(f"--videos={videos}", f"--store={folder}", "--workers=2")
    assert status == 2, errors
    return folder, result


def test_broken_videos_are_listed_and_the_rest_is_stored(videos, store):
    folder, result = store
    assert (result["videos"], result["stored"], result["decoded_now"]) == (9, 6, 6)
    reasons = {row["video"]: row["reason"] for row in result["quarantined"]}
    assert sorted(reasons) == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert "truncated" in reasons["cut.mp4"] and "0 bytes" in reasons["empty.mp4"]
    lines = (folder / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result["quarantined"]
    reader = FrameStore(folder)
    assert reader.names() == ["sub/w.mkv", "v0.mp4", "v1.mp4", "v2.mp4", "v3.mp4", "v4.mp4"]
    assert [reader.video(name).num_frames for name in reader.names()] == [3, 2, 3, 4, 5, 6]
    assert result["frames_decoded_now"] == 23
    assert reader.video("v0.mp4").source_sha256 == hashlib.sha256((videos / "v0.mp4").read_bytes()).hexdigest()


def test_running_again_redoes_nothing(videos, store):
    folder, _ = store
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    status, result, _ = run(f"--videos={videos}", f"--store={folder}")
    assert status == 2 and result["stored"] == 6 and result["decoded_now"] == 0 and len(result["quarantined"]) == 3
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_new_changed_and_repaired_videos_are_decoded(videos, tmp_path):
    source, folder = tmp_path / "videos", tmp_path / "store"
    shutil.copytree(videos, source)
    (source / "v0.mp4").unlink()
    arguments = f"--videos={source}", f"--store={folder}", f"--output={tmp_path / 'result.json'}"
    assert run(*arguments)[:2] == (2, None)
    shutil.copy(videos / "v0.mp4", source)
    shutil.copy(videos / "v1.mp4", source / "cut.mp4")
    shutil.copy(videos / "v1.mp4", source / "v4.mp4")
    (source / "v2.mp4").unlink()
    damaged = frames_path(folder, "v3.mp4")
    damaged.write_bytes(damaged.read_bytes()[:1000])
    assert run(*arguments)[:2] == (2, None)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["decoded_now"] == 4 and result["stored"] == 6  # v0, cut, v4, v3; v2 is not asked for
    assert FrameStore(folder).video("v4.mp4").num_frames == 3 and "v2.mp4" in FrameStore(folder)
    assert not verify(folder, find_videos(source))["problems"]


def test_features(store, tmp_path):
    folder = shutil.copytree(store[0], tmp_path / "store")
    clip, names = FakeClip(), FrameStore(folder).names()
    assert encode_features(folder, names, clip) == 23 and clip.calls == [3, 2, 3, 4, 5, 6]
    reader = FrameStore(folder, clip.identity)
    np.testing.assert_array_equal(reader.features("v4.mp4"), reader.frames("v4.mp4", range(6)).mean(axis=(1, 2)))
    assert encode_features(folder, names, clip) == 0
    other = FakeClip("e" * 16)
    assert encode_features(folder, names[:1], other) == 3
    result = verify(folder, {})
    assert (result["videos"], result["clip_checkpoints"], result["problems"]) == (6, ["e" * 16, "f" * 16], [])


def test_full_disk_for_features(store, tmp_path, monkeypatch):
    folder, written = shutil.copytree(store[0], tmp_path / "store"), []

    def write(store, entry, *rest):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write_features(store, entry, *rest))

    monkeypatch.setattr("tspo_jax.data.predecoding.write_features", write)
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=0))
    with pytest.raises(StoreError, match="features of 1 of 6 videos are stored and readable, about 1 MB more"):
        encode_features(folder, FrameStore(folder).names(), FakeClip())


def test_real_clip_from_the_command_line(golden, tmp_path):
    """CLIP features of the stored frames are close to the original's of the video, which saw no JPEG."""
    (tmp_path / "list.txt").write_text("tspo_agent.mp4\n\n")
    arguments = f"--videos={tmp_path / 'list.txt'}", f"--video_folder={golden}", f"--store={tmp_path / 'store'}"
    assert run(*arguments)[0] == 0
    status, result, errors = run(f"--store={tmp_path / 'store'}", f"--clip={golden / 'tspo_agent'}")
    assert status == 0 and result["frames_encoded_now"] == 40, errors
    numbers = np.load(golden / "tspo_agent.npz")
    features = FrameStore(tmp_path / "store", result["clip"]).features("tspo_agent.mp4")
    expected = numbers["case0/image_features"]
    cosines = (features * expected).sum(1) / np.linalg.norm(features, axis=1) / np.linalg.norm(expected, axis=1)
    assert cosines.min() > 0.995
    np.testing.assert_array_equal(
        FrameStore(tmp_path / "store").video("tspo_agent.mp4").frame_idx, numbers["candidate_idx"]
    )


def test_verify_finds_damage_and_replaced_videos(videos, store, tmp_path):
    folder, source = shutil.copytree(store[0], tmp_path / "store"), shutil.copytree(videos, tmp_path / "videos")
    encode_features(folder, FrameStore(folder).names(), FakeClip())
    path = frames_path(folder, "v3.mp4")
    data = bytearray(path.read_bytes())
    data[200] ^= 255
    path.write_bytes(data)
    (source / "v1.mp4").write_bytes(bytes(reversed((source / "v1.mp4").read_bytes())))
    shutil.copy(frames_path(folder, "v2.mp4"), frames_path(folder, "v4.mp4"))
    status, result, _ = run(f"--store={folder}", "--verify", f"--videos={source}")
    problems = "\n".join(result["problems"])
    assert status == 2 and result["videos"] == 6 and len(result["problems"]) == 4
    assert result["not_stored"] == ["cut.mp4", "empty.mp4", "text.mp4"]
    assert "frames/v3.mp4.array_record: damaged" in problems
    assert "v1.mp4: was replaced after it was decoded" in problems
    assert (
        "v4.mp4: was replaced" in problems and "features/ffffffffffffffff/v4.mp4.array_record: features of" in problems
    )


@pytest.mark.parametrize("moment", range(10))
def test_killed_at_any_moment_then_run_again(videos, store, tmp_path, moment):
    """kill -9 while one of the six videos is decoded; the same command then makes the store of an undisturbed run."""
    folder = tmp_path / "store"
    arguments = command(f"--videos={videos}", f"--store={folder}", "--workers=2")
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(folder.glob("frames/**/*.array_record"))) < moment // 2:
        time.sleep(0.002)
    time.sleep(random.Random(moment).random() * 0.1)
    process.kill()
    process.wait()
    assert run(*arguments[3:])[0] == 2
    assert contents(folder) == contents(store[0])


def test_shards_share_a_store(videos, store, tmp_path):
    for shard in (1, 0):
        environment = os.environ | {"SLURM_ARRAY_TASK_ID": str(5 + shard), "SLURM_ARRAY_TASK_MIN": "5"}
        environment["SLURM_ARRAY_TASK_COUNT"] = "2"
        assert run(f"--videos={videos}", f"--store={tmp_path}", env=environment)[0] in (0, 2)
    frames = {name: digest for name, digest in contents(store[0]).items() if name.startswith("frames/")}
    assert {name: digest for name, digest in contents(tmp_path).items() if name.startswith("frames/")} == frames
    quarantine = [path.name for path in sorted(tmp_path.glob("quarantine*"))]
    assert quarantine == ["quarantine-00000-of-00002.jsonl", "quarantine-00001-of-00002.jsonl"]


def test_two_runs_exclude_each_other(videos, tmp_path):
    with writing(tmp_path, Shard()):
        status, result, errors = run(f"--videos={videos}", f"--store={tmp_path}")
        assert status == 1 and result is None and "another run is writing this store" in errors
        with pytest.raises(StoreError, match="another run"), writing(tmp_path, Shard(0, 2)):
            pass
    with writing(tmp_path, Shard(0, 2)), writing(tmp_path, Shard(1, 2)):
        for same in (Shard(0, 2), Shard(), Shard(2, 3)):  # the last one would share out the same videos
            with pytest.raises(StoreError, match="another run"), writing(tmp_path, same):
                pass


def test_full_disk(videos, store, tmp_path):
    """The run ends with a message; what is stored stays readable, and the next run goes on."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))

    write_video(tmp_path / "videos" / "large.mp4", 400, size=(320, 240))
    for name in ("v0.mp4", "v1.mp4"):
        shutil.copy(videos / name, tmp_path / "videos")
    arguments = f"--videos={tmp_path / 'videos'}", f"--store={tmp_path / 'store'}", "--workers=1"
    status, result, errors = run(*arguments, preexec_fn=limit)
    assert status == 1 and result is None
    assert "error: " in errors and "the disk is full; " in errors and "MB more are needed" in errors
    assert not verify(tmp_path / "store", {})["problems"]
    assert run(*arguments)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "error: missing --store\n"),
        (["--store={tmp}/s"], "--videos is missing"),
        (["--store={tmp}/s", "--videos={tmp}/none"], "is neither a folder nor a text file"),
        (["--store={tmp}/s", "--videos={tmp}/empty"], "no videos in"),
        (
            ["--store={tmp}/s", "--videos={tmp}/bad.txt"],
            "bad.txt:2: '/etc/x.mp4' must be a path below",
        ),
        (["--store={tmp}/s", "--videos={tmp}/latin.txt"], "latin.txt:2: is not UTF-8"),
        (["--store={tmp}/s", "--videos={tmp}/good.txt", "--clip={tmp}"], "config.json"),
        (["--store={tmp}/none", "--verify"], "is no frame store"),
        (["--store={tmp}/none", "--clip={tmp}"], "is no frame store"),
        (["--store={tmp}/s", "--videos={tmp}/good.txt", "--speed=9"], "speed"),
    ],
)
def test_mistakes_are_one_line(tmp_path, arguments, message):
    (tmp_path / "bad.txt").write_text("a.mp4\n/etc/x.mp4\n")
    (tmp_path / "latin.txt").write_bytes(b"a.mp4\n\xe4.mp4\n")
    (tmp_path / "good.txt").write_text("a.mp4\n")
    (tmp_path / "a.mp4").touch()
    (tmp_path / "empty").mkdir()
    status, result, errors = run(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert status == 1 and result is None and message in errors and "Traceback" not in errors


def test_names_of_videos(videos, tmp_path):
    assert len(find_videos(videos)) == 9 and "sub/w.mkv" in find_videos(videos)
    lines = f"\ufeffsub/w.mkv\r\nsub//w.mkv\r\n\r\n v0.mp4 \r\n{videos / 'v1.mp4'}"
    (tmp_path / "list.txt").write_bytes(lines.encode())
    found = find_videos(tmp_path / "list.txt", videos)
    assert found == {name: videos / name for name in ("sub/w.mkv", "v0.mp4", "v1.mp4")}


def test_folders_behind_links(videos, tmp_path):
    for name, target in {"all": videos, "circle": tmp_path, "gone.mp4": tmp_path / "none", "x.mp4": "x.mp4"}.items():
        (tmp_path / name).symlink_to(target)
    assert set(find_videos(tmp_path)) == {f"all/{name}" for name in find_videos(videos)} | {"gone.mp4", "x.mp4"}


def test_missing_videos_of_a_list(videos, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4\n" for i in range(3)))
    with pytest.raises(ValueError, match="none of the 3 videos .* is in .*; see --video_folder"):
        find_videos(tmp_path / "list.txt", videos)
    open_settings(tmp_path, StoreSettings())
    quarantine = Quarantine(tmp_path / "q.jsonl")
    names = {"missing.mp4": "no such file", "not \udcff.mp4": "its name is not UTF-8"}
    (tmp_path / "not \udcff.mp4").touch()
    result = decode_videos({n: tmp_path / n for n in names}, tmp_path, StoreSettings(), quarantine, 1, Limits())
    assert result["stored"] == 0 and {n: row["reason"] for n, row in quarantine.rows.items()} == names


def test_quarantine_file(tmp_path):
    path = tmp_path / "q.jsonl"
    quarantine = Quarantine(path)
    quarantine.add({"b.mp4": None}, "no such file")
    quarantine.add({"a.mp4": 3}, "odd")
    path.write_text("\n" + path.read_text())  # as an editor may leave it
    assert list(Quarantine(path).rows) == ["a.mp4", "b.mp4"]
    quarantine.keep(["b.mp4"])
    assert Quarantine(path).rows == {"b.mp4": {"video": "b.mp4", "reason": "no such file", "source_size": None}}
    for bad in ("{bad", "[]", '{"video": "a.mp4"}'):
        path.write_text(bad)
        with pytest.raises(ValueError, match=r"q.jsonl:1: not a line of predecode .*; delete it"):
            Quarantine(path)


def mutated(data: bytes, other: bytes, rng: random.Random) -> bytes:
    data, kind = bytearray(data), rng.randrange(8)
    if kind == 0:
        return bytes(data[: rng.randrange(len(data))])
    if kind == 1:
        return b"words, not pictures\n" * rng.randrange(50)
    if kind == 2:  # the header is where sizes, durations and offsets are
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(min(len(data), 1500))] = rng.choice([0, 1, 127, 255])
    if kind == 3:
        for _ in range(rng.randint(1, 40)):
            data[rng.randrange(len(data))] = rng.randrange(256)
    if kind == 4:
        start, length = rng.randrange(len(data)), rng.randint(1, 400)
        data[start : start + length] = data[:length] if rng.random() < 0.5 else b""
    if kind == 5:  # the header of another container
        length = rng.choice([8, 40, 200, 1000])
        data[:length] = other[:length]
    if kind == 6 and b"mvhd" in data:  # a claim of 49 days, of a second in the track, or both
        for box, skip in rng.sample([(b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20)], 2):
            at = data.index(box) + skip
            data[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\0\0\0\1"])
    if kind == 7:
        return b""
    return bytes(data)


def decoded_and_compared(job, progress):
    """Stores a video; its pictures must be those that FFmpeg shows at the same times when it reads from the start."""
    num_frames = decode_video(job, progress)
    info = Video(job.path, job.decoders[0]).info
    with av.open(job.path) as container, contextlib.suppress(av.error.FFmpegError):
        shown, stream = collections.defaultdict(list), container.streams[info.stream]
        stream.codec_context.thread_count = 1  # as in the worker: what is made of damage depends on it
        for picture in container.decode(stream):
            shown[picture.pts].append(picture.to_ndarray(format="rgb24").mean())
        if len(info.clocks) == 1:
            store = FrameStore(job.store)
            entry = store.video(job.name)
            for frame, picture in zip(entry.frame_idx, store.frames(job.name, range(num_frames)), strict=True):
                means = shown[info.own_time(int(frame))]
                assert any(abs(picture.mean() - mean) < 1.5 for mean in means), f"picture {frame} is another one"
    return num_frames


@pytest.mark.parametrize(
    ("names", "work"),
    [
        ((("v.mp4", "libx264"), ("v.mkv", "libx264"), ("v.avi", "mpeg4"), ("v.webm", "libvpx-vp9")), decode_video),
        (
            (("v.ts", "libx264"), ("v.mpg", "mpeg2video"), ("v.h264", "libx264"), ("v.m2ts", "libx265")),
            decoded_and_compared,
        ),
    ],
    ids=["files", "streams"],
)
@pytest.mark.slow
def test_mutated_videos_are_decoded_or_quarantined(tmp_path, names, work):
    """300 damaged files: no crash, no hang beyond the limit, no wrong picture, every one accounted for."""
    hevc = {"x265-params": "log-level=none"}
    sources = [
        write_video(tmp_path / name, 50, codec=codec, codec_options=hevc if codec == "libx265" else None)
        for name, codec in names
    ]
    store, settings, jobs, rng = tmp_path / "store", StoreSettings(fps=5.0), [], random.Random(0)
    open_settings(store, settings)
    for i in range(300):
        source = sources[i % len(sources)]
        path = tmp_path / f"{i}{source.suffix}"
        path.write_bytes(mutated(source.read_bytes(), sources[(i + 1) % len(sources)].read_bytes(), rng))
        decoders = DECODERS[:: 1 if i % 2 or work is not decode_video else -1]
        jobs.append(Job(str(path), path.name, path.stat().st_size, str(store), settings, decoders))
    outcomes = list(run_jobs(jobs, 2, Limits(20.0, 4.0), work=work))
    assert sorted(o.job.name for o in outcomes) == sorted(job.name for job in jobs)
    assert not [o for o in outcomes if "AssertionError" in o.reason]
    stored = {o.job.name for o in outcomes if not o.reason}
    assert stored == set(FrameStore(store).names())
    assert 30 < len(stored) < 270 and all(o.num_frames > 0 for o in outcomes if not o.reason)
    assert not verify(store, {})["problems"]
    assert not list((store).rglob("*.partial"))
    assert not multiprocessing.active_children()


def test_a_folder_says_what_it_leaves_out(videos, tmp_path):
    shutil.copytree(videos, tmp_path / "all")
    (tmp_path / "all" / "notes.docx").write_text("x")
    (tmp_path / "all" / "no_suffix").write_text("x")
    write_video(tmp_path / "all" / "00001.MTS", 25)
    notes = []
    found = find_videos(tmp_path / "all", note=notes.append)
    assert "00001.MTS" in found and len(notes) == 1
    assert "not taken for videos" in notes[0] and "notes.docx" in notes[0] and "no_suffix" in notes[0]
    status, _, errors = run(f"--videos={tmp_path / 'all'}", f"--store={tmp_path / 'store'}")
    assert status == 0 or "quarantine" in errors
    assert errors.count("not taken for videos") == 1


def test_a_name_that_a_store_cannot_have_costs_that_video_alone(tmp_path):
    for name in ("a", "y", "m" * 240, "\u7247" * 80):
        write_video(tmp_path / "videos" / f"{name}.mp4", 25)
    for _ in range(2):
        status, result, _ = run(f"--videos={tmp_path / 'videos'}", f"--store={tmp_path / 'store'}", "--workers=1")
        assert status == 2 and result["stored"] == 2
        assert {row["reason"] for row in result["quarantined"]} == {"its name is too long for a store"}
    assert FrameStore(tmp_path / "store").names() == ["a.mp4", "y.mp4"]
