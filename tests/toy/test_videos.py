import json
import subprocess
import sys

import av
import numpy as np
import pytest

from tspo_jax.toy.scenes import World, make_video_plan, render_frame
from tspo_jax.toy.videos import write_video


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2))


@pytest.mark.parametrize("fps", World().frame_rates, ids=str)
def test_file_shows_the_plan(tmp_path, fps):
    plan = make_video_plan(11, World(duration=(72.0, 75.0), frame_rates=(fps,)))
    path = tmp_path / "video.mp4"
    write_video(plan, path)
    assert [p.name for p in tmp_path.iterdir()] == ["video.mp4"]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        assert stream.average_rate == fps
        frames = list(container.decode(stream))
    assert len(frames) == plan.num_frames
    for number, frame in enumerate(frames):
        assert frame.time == pytest.approx(float(number / fps), abs=1e-4)
        if number % 7 == 0:
            assert _psnr(frame.to_ndarray(format="rgb24"), render_frame(plan, float(number / fps))) > 24
    lookup = plan.event(plan.lookup_things[0])
    number = round(plan.scenes[lookup].start * fps)
    shown = frames[number].to_ndarray(format="rgb24")
    before = render_frame(plan, float((number - 1) / fps))
    assert _psnr(shown, before) < 20 < _psnr(shown, render_frame(plan, plan.scenes[lookup].start))


def _run(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tspo_jax.toy.videos", "--num_train=2", "--num_eval=1", "--workers=2", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def _read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_command_writes_a_set_and_completes_it(tmp_path):
    output = tmp_path / "set"
    first = _run(f"--output={output}")
    assert first.returncode == 0 and first.stdout == "" and "3/3" in first.stderr, first.stderr
    train, held_out, plans = (_read(output / f"{name}.jsonl") for name in ("train", "eval", "plans"))
    assert len(train) == 2 * 11 and len(held_out) == 8 and len(plans) == 3
    assert {row["type"] for row in held_out} == {"general"}
    names = {plan["video"] for plan in plans}
    assert {row["video"] for row in train + held_out} == names
    assert not {row["video"] for row in train} & {row["video"] for row in held_out}
    assert {f"videos/{path.name}" for path in (output / "videos").iterdir()} == names
    assert all(plan["scenes"][-1]["end"] == plan["duration"] for plan in plans)

    lost, *kept = (output / name for name in sorted(names))
    content, times = lost.read_bytes(), [path.stat().st_mtime_ns for path in kept]
    lost.unlink()
    assert _run(f"--output={output}").returncode == 0
    assert lost.read_bytes() == content
    assert [path.stat().st_mtime_ns for path in kept] == times


def test_command_reports_a_folder_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    result = _run(f"--output={tmp_path / 'file'}")
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and str(tmp_path / "file") in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
