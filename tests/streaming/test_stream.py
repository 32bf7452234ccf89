"""Streams of a real answerer: live, saved, asked at any moment, and what is refused."""

import base64
import io
import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_store import SHORT, make_store
from tiny_streams import save_encoder

from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.selection.video_source import stored_source
from tspo_jax.stream import encode, live
from tspo_jax.streaming import folders, stream
from tspo_jax.streaming.stream import Stream

QUESTION = "What is it?\nA. one\nB. two"
RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (7, 40, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def answerer(golden):
    return load_answerer(golden / "llava_video_grid")


@pytest.fixture(scope="module")
def encoder_folder(answerer, tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"), answerer)


@pytest.fixture(scope="module")
def encoder(encoder_folder, answerer):
    return folders.load(encoder_folder, answerer)


@pytest.fixture(scope="module")
def whole(encoder, answerer):
    """The stream of all frames; other tests take its compiled programs."""
    one = Stream(encoder, answerer, max_new_tokens=4)
    for i, frame in enumerate(FRAMES):
        one.add(frame, i * 1.0)
    return one


def like(whole, remembered=None):
    """Another stream with the compiled programs of `whole`."""
    one = Stream(whole.encoder, whole.answerer, max_new_tokens=4, remembered=remembered)
    one._push, one._answer = whole._push, whole._answer
    return one


def test_the_second_question_costs_no_encoding(whole):
    one = like(whole)
    for i, frame in enumerate(FRAMES[:6]):
        assert one.add(frame, i * 1.0) == (i % 2 == 1)
    assert one.num_pushes == 3
    first, second = one.ask(QUESTION), one.ask("Who is it?")
    assert one.num_pushes == 3 and one.ask(QUESTION) == first
    assert first["num_clips"] == 3 and first["seconds_seen"] == 6.0 and len(first["clips"]) == 2
    assert first["clips"] == sorted(first["clips"]) and second["option"] is None
    assert first["num_visual_tokens"] == 3 * 2  # whatever the length


def test_a_stream_that_stops_in_mid_clip(whole):
    """The seventh frame is half a clip: questions see it, the memory only when the stream is over."""
    one = like(whole)
    for i, frame in enumerate(FRAMES):
        one.add(frame, i * 1.0)
    asked = one.ask(QUESTION)
    assert asked["num_clips"] == 4 and len(one.remembered.times) == 3
    assert one.finish() and len(one.remembered.times) == 4 and not one.finish()
    assert {**one.ask(QUESTION), "seconds_seen": 0} == {**asked, "seconds_seen": 0}


def test_saved_and_gone_on_from(whole, tmp_path):
    expected = like(whole)
    part = like(whole)
    for i, frame in enumerate(FRAMES[:6]):
        expected.add(frame, i * 1.0)
        if i < 2:
            part.add(frame, i * 1.0)
    stream.save(tmp_path / "memory", part.remembered, whole.encoder)
    rest = like(whole, stream.load(tmp_path / "memory", whole.encoder))
    for i in range(2, 6):
        rest.add(FRAMES[i], i * 1.0)
    assert rest.num_pushes == 2
    np.testing.assert_array_equal(rest.remembered.last, expected.remembered.last)
    assert rest.ask(QUESTION) == expected.ask(QUESTION)
    empty = like(whole)
    stream.save(tmp_path / "empty", empty.remembered, whole.encoder)
    assert not stream.load(tmp_path / "empty", whole.encoder).times


def test_memories_that_are_refused(whole, answerer, tmp_path):
    other = folders.load(save_encoder(tmp_path / "other", answerer, seed=1), answerer)
    stream.save(tmp_path / "memory", whole.remembered, other)
    with pytest.raises(ValueError, match="another encoder"):
        stream.load(tmp_path / "memory", whole.encoder)
    stream.save(tmp_path / "video", whole.remembered, whole.encoder, "this")
    with pytest.raises(ValueError, match="another video"):
        stream.load(tmp_path / "video", whole.encoder, "that")
    for cut in ("times", "memories", "indicators", "last"):
        stream.save(tmp_path / "cut", whole.remembered, whole.encoder)
        tensors = load_file(tmp_path / "cut")
        save_file(tensors | {cut: tensors[cut][:1]}, tmp_path / "cut", {"encoder": whole.encoder.identity})
        with pytest.raises(ValueError, match="cut: damaged"):
            stream.load(tmp_path / "cut", whole.encoder)
    (tmp_path / "damaged").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="no saved memory"):
        stream.load(tmp_path / "damaged", whole.encoder)
    with pytest.raises(FileNotFoundError, match="absent"):
        stream.load(tmp_path / "absent", whole.encoder)


def test_two_questions_at_once_while_frames_come(whole):
    """Each is answered from the clips that were there when it came."""
    one, found, failed = like(whole), [], []
    for i in range(2):
        one.add(FRAMES[i], i * 1.0)
    alone = {}

    def ask():
        try:
            found.extend(one.ask(QUESTION) for _ in range(3))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(2, 6):
        one.add(FRAMES[i], i * 1.0)
    for thread in threads:
        thread.join()
    assert not failed and len(found) == 6
    again = like(whole)
    for i in range(6):
        again.add(FRAMES[i], i * 1.0)
        alone[again.ask(QUESTION)["seconds_seen"]] = again.ask(QUESTION)
    for answer in found:
        assert answer == alone[answer["seconds_seen"]]


def test_nothing_seen_and_frames_out_of_order(whole):
    one = like(whole)
    with pytest.raises(ValueError, match="nothing was seen"):
        one.ask(QUESTION)
    with pytest.raises(ValueError, match="empty"):
        one.ask(" ")
    one.add(FRAMES[0], 5.0)
    for seconds, message in ((4.0, "in order of time"), (float("nan"), "time is nan"), (-1.0, "time is -1")):
        with pytest.raises(ValueError, match=message):
            one.add(FRAMES[0], seconds)


def test_frames_do_not_go_back_into_a_clip_that_is_encoded(whole, tmp_path):
    one = like(whole)
    one.add(FRAMES[0], 1.0)
    assert one.add(FRAMES[1], 2.0)
    stream.save(tmp_path / "memory", one.remembered, whole.encoder)
    for again in (one, like(whole, stream.load(tmp_path / "memory", whole.encoder))):
        with pytest.raises(ValueError, match="a frame at 1.5 s comes after 2 s"):
            again.add(FRAMES[2], 1.5)
        again.add(FRAMES[2], 2.0)


def line(frame, seconds):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG")
    return json.dumps({"frame": base64.b64encode(buffer.getvalue()).decode(), "time": seconds})


def test_lines_of_standard_input(whole):
    ask = json.dumps({"question": QUESTION})
    lines = [line(FRAMES[0], 0.0), ask, "", line(FRAMES[1], 1.0), line(FRAMES[2], 2.0), ask]
    first, second = live(lines, like(whole), "")
    assert (first["num_clips"], second["num_clips"]) == (1, 2)
    huge, both = line(FRAMES[0], 10**400), json.dumps(json.loads(line(FRAMES[0], 0.0)) | {"question": QUESTION})
    for wrong in (
        *("{", '{"frame": "!", "time": 0}', '{"time": 1}', '{"frame": "AAAA", "time": 0}', ask, "[]", "5"),
        *('{"question": 5}', '{"question": null}', '{"frame": 3, "time": 0}', line(FRAMES[0], "0"), huge, both),
    ):
        with pytest.raises(ValueError, match="standard input, line 1"):
            list(live([wrong], like(whole), ""))


def test_a_stored_video(whole, golden, tmp_path):
    store = FrameStore(make_store(tmp_path, golden))
    one = like(whole)
    encode(stored_source(store, SHORT), one)
    assert len(one.remembered.times) == 3 and one.remembered.times[0] == (0.0, pytest.approx(2.0, abs=0.1))
    path = stream.path_of(store.folder, whole.encoder, SHORT)
    stream.save(path, one.remembered, whole.encoder, "x")
    assert stream.load(path, whole.encoder, "x").times == one.remembered.times


@pytest.mark.slow
def test_frames_from_standard_input_as_they_come(encoder, encoder_folder, golden, tmp_path):
    """A question is answered while the stream is open; what breaks off in mid-clip is remembered and gone on from."""
    command = [sys.executable, "-m", "tspo_jax.stream", "--video=-", "--max_new_tokens=4"]
    command += [f"--answerer={golden / 'llava_video_grid'}", f"--encoder={encoder_folder}"]
    command += [f"--memory={tmp_path / 'memory'}"]
    ask = json.dumps({"question": QUESTION})
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, **pipes) as process:
        for sent in (line(FRAMES[0], 0.0), line(FRAMES[1], 1.0), ask):
            process.stdin.write(sent + "\n")
        process.stdin.flush()
        first = json.loads(process.stdout.readline())  # the stream is not over
        assert (first["num_clips"], first["question"]) == (1, QUESTION)
        out, errors = process.communicate("\n".join([line(FRAMES[2], 2.0), ask, "no JSON"]))
    assert json.loads(out)["num_clips"] == 2
    assert process.returncode == 1 and errors.startswith("error: standard input, line 6") and errors.count("\n") == 1
    remembered = stream.load(tmp_path / "memory", encoder)
    assert [start for start, _ in remembered.times] == [0.0, 2.0]  # the half clip counts up to its last frame
