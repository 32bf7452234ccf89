"""Chosen frames as a folder of pictures: written, read back, told to a model with their true times."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from video_files import shown_numbers, write_video

from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import read_frames
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.models.video_prompt import VideoOptions
from tspo_jax.selection import frames_folder
from tspo_jax.selection.video_source import file_source

# Milliseconds of 40 frames: 5 a second for 4 s, then one every 3 s and a bit.
TIMES = [200 * i for i in range(20)] + [4000 + 3100 * i for i in range(20)]
PICKS = [1, 2, 5, 6, 11]  # of the candidates


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("videos") / "v.mp4", 40, rate=25, times_ms=TIMES)
    return file_source(path, "v.mp4", None)


@pytest.fixture(scope="module")
def result(source):
    """What `select_frames` says of PICKS."""
    frame_idx, timestamps = source.frame_idx[PICKS].tolist(), source.timestamps[PICKS].tolist()
    fps = len(TIMES) / source.duration
    return dict(frame_idx=frame_idx, timestamps=timestamps, fps=fps, num_video_frames=len(TIMES), method="topk")


def described(name, **video):
    folder = ROOT / "configs" / "architectures"
    return answerer_architecture(weights.read_config(folder, f"{name}.json"), name, video=VideoOptions(**video))


def test_times_are_the_frames_own(source, result):
    """Of a video of variable rate, where they are neither evenly spaced nor frame numbers by the average rate."""
    seconds = np.array(TIMES)[result["frame_idx"]] / 1000
    np.testing.assert_allclose(result["timestamps"], seconds, atol=1e-3)
    wrong = np.array(result["frame_idx"]) / result["fps"]
    assert np.abs(seconds - wrong).max() > 1, "the rule that is not to be used would say something else"
    times = source.times(PICKS)

    qwen3 = described("Qwen3-VL-8B-Instruct")
    told = qwen3.config.write_times(prompts.render("Why?", qwen3.template), times)
    own = times.seconds.tolist()
    pairs = [(own[0] + own[1]) / 2, (own[2] + own[3]) / 2, own[4]]
    assert [f"<{pair:.1f} seconds>" in told for pair in pairs] == [True] * 3
    assert told.count("seconds>") == 3

    qwen2 = described("Qwen2.5-VL-7B-Instruct").config
    per_second = qwen2.vision.tokens_per_second
    expected = np.floor((seconds[[0, 2, 4]] - seconds[0]) * per_second + 1e-6)
    np.testing.assert_array_equal(qwen2.time_steps(times), expected)
    assert described("Qwen2.5-VL-7B-Instruct", second_per_grid=1.0).config.time_steps(times) is None

    llava = described("LLaVA-Video-7B-Qwen2", time_instruction=True)
    told = llava.config.write_times(prompts.render("Why?", llava.template, ""), times)
    listed = ",".join(f"{second:.2f}s" for second in times.seconds)
    sentence = (
        f"The video lasts for {source.duration:.2f} seconds, and 5 frames are uniformly sampled from it. These frames "
        f"are located at {listed}.Please answer the following questions related to this video."
    )
    assert f"<image>\n{sentence}\nWhy?<|im_end|>" in told
    plain = described("LLaVA-Video-7B-Qwen2").config
    assert plain.write_times("<image>\nWhy?", times) == "<image>\nWhy?"
    with pytest.raises(ValueError, match="says how long the video is, but only its frames are known"):
        llava.config.write_times("<image>\nWhy?", times._replace(duration=None))


def test_written_and_read(source, result, tmp_path):
    folder = frames_folder.write(tmp_path / "frames", source, result, "Why?")
    frames, times = read_frames(folder)
    assert shown_numbers(frames) == [i % 60 for i in result["frame_idx"]]
    assert times.seconds.tolist() == result["timestamps"] and times.duration == source.duration
    names = sorted(path.name for path in folder.glob("*.jpg"))
    assert len(names) == 5 and names[0] == f"{result['frame_idx'][0]:08d}_{result['timestamps'][0]:.2f}s.jpg"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [row["file"] for row in manifest["frames"]] == names
    assert manifest["question"] == "Why?" and manifest["num_video_frames"] == 40
    of_processor = manifest["video_metadata"]
    shown = np.array(of_processor["frames_indices"]) / of_processor["fps"]
    np.testing.assert_allclose(shown, result["timestamps"], atol=5e-4)
    assert of_processor["frames_indices"][-1] < of_processor["total_num_frames"]
    frames_folder.write(folder, source, result, "Why?")  # the same again
    fewer = {name: result[name][1:] for name in ("frame_idx", "timestamps")}
    with pytest.raises(ValueError, match="frames_dir: .* holds .*jpg and 1 such files; name a new folder"):
        frames_folder.write(folder, source, result | fewer, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[::-1], "times of frames run backwards: frame 1 is at"),
        (lambda rows: [{"file": "a.jpg"}], "is not a manifest of select_frames"),
        (lambda rows: [], "is not a manifest of select_frames"),
        (lambda rows: [rows[0] | {"file": "gone.jpg"}], "gone.jpg is not a readable picture"),
    ],
)
def test_wrong_manifests(source, result, tmp_path, change, message):
    folder = frames_folder.write(tmp_path / "frames", source, result, "Why?")
    path = Path(folder) / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["frames"] = change(manifest["frames"])
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"--frames: .*{message}"):
        read_frames(folder)
