"""Worker processes: hangs, crashes and errors each cost one video, nothing else."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from video_files import shown_numbers, write_video

from tspo_jax.data.decode import VideoError
from tspo_jax.data.decode_workers import Job, Limits, decode_video, run_jobs
from tspo_jax.data.frame_store import FrameStore, StoreSettings, open_settings

ROOT = Path(__file__).parents[2]  # not from conftest: what workers import may not import jax


def job(name, tmp_path, decoders=("decord", "pyav")):
    return Job(str(tmp_path / name), name, 1, str(tmp_path / "store"), StoreSettings(), decoders)


def behave(job, progress):
    """Does what the name of the job says."""
    what, _, decoder = job.name.partition("-")
    if decoder and job.decoders[0] != decoder:
        return 7
    if what == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
        time.sleep(1000)
    if what == "crawl":
        for i in range(1000):
            time.sleep(0.25)
            progress(i / 1000)
    if what == "crash":
        os.abort()
    if what == "damaged":
        raise VideoError(job.path, f"{job.decoders[0]} gave up")
    if what == "odd":
        raise KeyError("surprise")
    if what == "full":
        raise OSError(28, "No space left on device", job.name)
    if what == "large":
        return len(bytearray(200 << 20))
    if what == "slow":
        time.sleep(0.3)
    if what == "pid":
        return os.getpid()
    if what == "jax":
        return int("jax" in sys.modules)
    return 3


def test_one_outcome_per_job_whatever_happens(tmp_path):
    names = ["ok1", "hang", "crash", "damaged", "odd", "crawl", "large", "hang-decord", "crash-decord", "ok2", "jax"]
    jobs = [job(name, tmp_path) for name in names]
    start = time.monotonic()
    outcomes = {o.job.name: o for o in run_jobs(jobs, 2, Limits(2.0, 0.8, megabytes=100), work=behave)}
    assert time.monotonic() - start < 30
    assert sorted(outcomes) == sorted(names)
    frames = {name: o.num_frames for name, o in outcomes.items() if not o.reason}
    assert frames == {"ok1": 3, "ok2": 3, "hang-decord": 7, "crash-decord": 7, "jax": 0}
    reasons = {name: o.reason for name, o in outcomes.items() if o.reason}
    assert reasons["hang"] == "decord showed no progress for 0.8 s; pyav showed no progress for 0.8 s"
    assert reasons["crawl"] == "decord took longer than 2 s; pyav took longer than 2 s"
    assert "the pyav process crashed (status -6)" in reasons["crash"]
    assert reasons["damaged"] == "decord gave up; pyav gave up"
    assert reasons["large"] == "decord needs more than 100 MB of memory; pyav needs more than 100 MB of memory"
    assert reasons["odd"] == "KeyError: 'surprise'"


def test_full_disk_ends_the_run(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught:
        list(run_jobs([job("full", tmp_path)], 1, Limits(), work=behave))
    assert caught.value.errno == 28


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_worker_that_dies_between_jobs_is_replaced(tmp_path, num_workers):
    outcomes = run_jobs([job("pid", tmp_path), job("slow", tmp_path)], num_workers, Limits(), work=behave)
    os.kill(next(outcomes).num_frames, signal.SIGKILL)
    assert [(o.num_frames, o.reason) for o in outcomes] == [(3, "")]


def test_no_process_stays(tmp_path):
    outcomes = run_jobs([job("good", tmp_path), job("hang", tmp_path)], 2, Limits(), work=behave)
    next(outcomes)
    outcomes.close()
    assert not [p for p in Path("/proc").glob("[0-9]*/stat") if f" {os.getpid()} " in _parent(p)]


def _parent(stat):
    try:
        fields = stat.read_text().rsplit(")", 1)[1].split()
        return f" {fields[1]} " if "spawn_main" in (stat.parent / "cmdline").read_text() else ""
    except OSError:
        return ""


def test_workers_die_with_their_parent(tmp_path):
    program = textwrap.dedent(f"""
        import sys; sys.path[:0] = {[str(ROOT / "tests" / "data"), str(ROOT / "tests"), str(ROOT)]!r}
        from test_decode_workers import behave, job
        from tspo_jax.data.decode_workers import Limits, run_jobs
        from pathlib import Path
        def told(job, progress): Path(job.path).write_text(str(__import__("os").getpid())); return behave(job, progress)
        if __name__ == "__main__":
            list(run_jobs([job("hang", Path({str(tmp_path)!r}))], 1, Limits(), work=told))
        """)
    (tmp_path / "parent.py").write_text(program)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"])
    try:
        worker = _await(lambda: (tmp_path / "hang").exists() and (tmp_path / "hang").read_text())
    finally:
        parent.kill()
        parent.wait()
    _await(lambda: not _running(int(worker)))


def _running(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _await(condition):
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return value


def test_a_source_that_cannot_be_read_is_its_own_fault(tmp_path, monkeypatch):
    def bad_sector(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    write_video(tmp_path / "v.mp4", 10)
    monkeypatch.setattr("hashlib.file_digest", bad_sector)
    with pytest.raises(VideoError, match=r"v.mp4: cannot be read \(Input/output error\)"):
        decode_video(job("v.mp4", tmp_path), lambda share: None)


def test_decoding_into_the_store(tmp_path):
    video = write_video(tmp_path / "v.mp4", 130, size=(96, 64))
    settings = StoreSettings(fps=5, short_side=40)
    open_settings(tmp_path / "store", settings)
    work = dataclasses.replace(job("v.mp4", tmp_path), settings=settings, size=video.stat().st_size)
    shares = []
    assert decode_video(work, shares.append) == 26
    assert shares == [i / 26 for i in range(26)]
    store = FrameStore(tmp_path / "store")
    entry = store.video("v.mp4")
    np.testing.assert_array_equal(entry.frame_idx, np.arange(0, 130, 5))
    np.testing.assert_allclose(entry.timestamps, np.arange(26) / 5)
    assert (entry.width, entry.height, entry.fps, entry.num_video_frames) == (60, 40, 25, 130)
    assert entry.source_size == video.stat().st_size and len(entry.source_sha256) == 64
    frames = store.frames("v.mp4", [1, 10])
    assert frames.shape == (2, 40, 60, 3)
    np.testing.assert_allclose(shown_numbers(frames), [5, 50], atol=1)
