"""The loader: shapes, references, needle masks, slices per process, exact resume, and the picked frames."""

import concurrent.futures
import dataclasses
import itertools
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from absl import flags

from tspo_jax.data.frame_store import (
    FEATURE_ROWS,
    FrameStore,
    StoreError,
    StoreSettings,
    VideoEntry,
    encode_jpeg,
    features_path,
    open_settings,
    write_features,
    write_frames,
)
from tspo_jax.data.loader import Loader, LoaderConfig, candidate_frames, fetch_frames
from tspo_jax.data.needle import NeedleConfig
from tspo_jax.data.questions import Question

ROOT = Path(__file__).parents[2]  # not from conftest: what workers import may not import jax
CLIP = "c" * 16
LENGTHS = {"a.mp4": 60, "b.mp4": 200, "c.mp4": 30, "d.mp4": 100, "e.mp4": 80}
CONFIG = LoaderConfig(batch_size=4, picks={"general": 8, "specific": 16}, buckets=(64, 128, 800))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Feature 0 is the video's number, feature 1 the frame's; the pictures show both."""
    folder = tmp_path_factory.mktemp("store")
    open_settings(folder, StoreSettings())
    for v, (name, T) in enumerate(LENGTHS.items()):
        entry = VideoEntry(name, 1.0, T, np.arange(T) * 1.0, np.arange(T), 16, 8, "decord", 1, "x")
        pictures = (np.full((8, 16, 3), (40 * v, i, 0), np.uint8) for i in range(T))
        entry = write_frames(folder, entry, (encode_jpeg(picture, 100) for picture in pictures))
        features = np.stack([np.full(T, v), np.arange(T), np.ones(T)], axis=1)
        blocks = [features[i : i + FEATURE_ROWS] for i in range(0, T, FEATURE_ROWS)]
        write_features(folder, entry, CLIP, blocks, 3)
    return FrameStore(folder, CLIP)


def question(index, video, kind):
    return Question(index, video, "q", "q\nA. x\nB. y", ("x", "y"), "A", kind, f"q.jsonl:{index + 1}")


def some_questions(general=12, specific=6):
    kinds = ["general"] * general + ["specific"] * specific
    return [question(i, name, kind) for i, (name, kind) in enumerate(zip(itertools.cycle(LENGTHS), kinds))]


def take(count, *args, state=None, **kwargs):
    with Loader(*args, **kwargs) as loader:
        if state:
            loader.set_state(state)
        return list(itertools.islice(loader, count)), loader.get_state()


def assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            np.testing.assert_array_equal(x[name], y[name], err_msg=name)


@pytest.mark.parametrize("num", [1, 3, 7])
def test_copies_of_a_question_in_a_batch_are_told_apart(store, num):
    questions = [question(i, sorted(LENGTHS)[i % 3], "general") for i in range(num)]
    batches, _ = take(12, store, questions, CONFIG, seed=1)
    for batch in batches:
        rows = list(zip(batch["index"].tolist(), batch["copy"].tolist(), strict=True))
        assert len(set(rows)) == len(rows) and (batch["copy"] >= 0).all() and batch["copy"].min() == 0


def test_groups_that_are_smaller_than_a_batch_are_told(store):
    video = min(LENGTHS, key=LENGTHS.get)
    questions = [question(i, video, "general" if i < 4 else "specific") for i in range(7)]
    with Loader(store, questions[:4], CONFIG, seed=1) as loader:
        assert loader.repeated == []
    with Loader(store, questions, CONFIG, seed=1) as loader:
        (line,) = loader.repeated
    assert line.startswith("3 specific questions (with up to 800 candidates) are fewer than a batch of 4")


def test_candidates_of_the_original():
    assert list(candidate_frames(50, 50, 128)) == list(range(50))
    np.testing.assert_array_equal(candidate_frames(128, 50, 128), np.arange(128))
    np.testing.assert_array_equal(candidate_frames(300, 50, 128), np.linspace(0, 299, 128, dtype=int))
    assert len(candidate_frames(30, 50, 128)) == 128 and len(candidate_frames(30, 0, 128)) == 30


def test_batches(store):
    questions = some_questions()
    text = np.arange(len(questions) * 3, dtype=np.float32).reshape(-1, 3)
    batches, _ = take(30, store, questions, CONFIG, seed=1, per_question={"text_features": text})
    names = sorted(LENGTHS)
    assert {(b["kind"], b["mask"].shape[1]) for b in batches} == {("general", 64), ("general", 128), ("specific", 800)}
    for batch in batches:
        B, T = batch["mask"].shape
        assert B == 4 and batch["features"].shape == (4, T, 3) and batch["features"].dtype == np.float32
        assert batch["k"] == CONFIG.picks[batch["kind"]] and batch["index"].dtype == np.int32
        np.testing.assert_array_equal(batch["text_features"], text[batch["index"]])
        np.testing.assert_array_equal(batch["features"][..., 2], batch["mask"])
        np.testing.assert_array_equal(batch["video"] < 0, ~batch["mask"])
        for b in range(B):
            asked, valid = questions[batch["index"][b]], batch["mask"][b]
            assert asked.kind == batch["kind"]
            assert np.all(np.diff(valid.astype(int)) <= 0)
            video, frame = batch["video"][b][valid], batch["frame"][b][valid]
            np.testing.assert_array_equal(batch["features"][b][valid][:, :2], np.stack([video, frame], 1))
            is_target = batch["video"][b] == names.index(asked.video)
            if asked.kind == "specific":
                np.testing.assert_array_equal(batch["needle_mask"][b], is_target)
                assert 50 <= is_target.sum() <= 200
            else:
                assert not batch["needle_mask"][b].any() and is_target[valid].all()
                np.testing.assert_array_equal(frame, candidate_frames(LENGTHS[asked.video], 50, 128))


def test_every_question_once_per_epoch_and_new_needles(store):
    questions = [question(i, name, "specific") for i, name in enumerate(itertools.islice(itertools.cycle(LENGTHS), 8))]
    batches, _ = take(4, store, questions, CONFIG, seed=1)
    first, second = (np.concatenate([b["index"] for b in batches[i : i + 2]]) for i in (0, 2))
    assert sorted(first) == sorted(second) == list(range(8)) and list(first) != list(second)
    row = {int(b["index"][i]): b["frame"][i] for b in batches[:2] for i in range(4)}
    again = {int(b["index"][i]): b["frame"][i] for b in batches[2:] for i in range(4)}
    assert all(not np.array_equal(row[i], again[i]) for i in range(8))


def test_mixture(store):
    questions = some_questions(12, 6)
    natural, _ = take(60, store, questions, CONFIG, seed=0)
    share = np.mean([b["kind"] == "specific" for b in natural])
    assert abs(share - 1 / 3) < 0.05
    config = dataclasses.replace(CONFIG, mixture={"general": 0.2, "specific": 0.8})
    mixed, _ = take(60, store, questions, config, seed=0)
    assert abs(np.mean([b["kind"] == "specific" for b in mixed]) - 0.8) < 0.05
    only, _ = take(10, store, questions, dataclasses.replace(CONFIG, mixture={"general": 1}), seed=0)
    assert {b["kind"] for b in only} == {"general"}
    for wrong in ({"other": 1}, {"general": -1, "specific": 2}):
        with pytest.raises(ValueError, match="shares of batches .* kinds that the questions have: general, specific"):
            Loader(store, questions, dataclasses.replace(CONFIG, mixture=wrong), 0)


def test_same_seed_same_batches(store):
    questions = some_questions()
    a, _ = take(8, store, questions, CONFIG, seed=3)
    b, _ = take(8, store, questions, CONFIG, seed=3)
    c, _ = take(8, store, questions, CONFIG, seed=4)
    assert_equal(a, b)
    assert any(not np.array_equal(x["index"], y["index"]) for x, y in zip(a, c, strict=True))


def test_resume_in_the_middle(store):
    questions = some_questions()
    whole, _ = take(9, store, questions, CONFIG, seed=3)
    first, state = take(4, store, questions, CONFIG, seed=3)
    rest, _ = take(5, store, questions, CONFIG, seed=3, state=state)
    assert_equal(first + rest, whole)


@pytest.fixture
def parsed_flags():
    """Grain's worker processes want absl's flags parsed, as they are in an entry point."""
    flags.FLAGS.mark_as_parsed()
    yield
    flags.FLAGS.unparse_flags()


def test_resume_with_worker_processes(store, parsed_flags):
    """Two processes go on where the threads were, and threads where the processes were."""
    questions = some_questions()
    whole, _ = take(7, store, questions, CONFIG, seed=3)
    _, state = take(2, store, questions, CONFIG, seed=3)
    workers = dataclasses.replace(CONFIG, num_workers=2)
    middle, state = take(3, store, questions, workers, seed=3, state=state)
    last, _ = take(2, store, questions, CONFIG, seed=3, state=state)
    assert_equal(middle + last, whole[2:])


def test_workers_leave_the_devices_alone(store):
    """Grain imports jax; that no backend is started shows where there is none of the name."""
    program = textwrap.dedent(f"""
        import sys; sys.path[:0] = {[str(ROOT), str(ROOT / "tests" / "data")]!r}
        from absl import flags
        from test_loader import CLIP, CONFIG, dataclasses, some_questions, take
        from tspo_jax.data.frame_store import FrameStore
        if __name__ == "__main__":
            flags.FLAGS.mark_as_parsed()
            workers = dataclasses.replace(CONFIG, num_workers=1)
            (batch,), _ = take(1, FrameStore({str(store.folder)!r}, CLIP), some_questions(), workers, seed=0)
            print(batch["features"].shape[0])
        """)
    environment = os.environ | {"JAX_PLATFORMS": "none_of_this_name"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_processes_share_the_batch(store):
    """The rows of two processes together are those of one, with the same kind and shape at every step."""
    questions = some_questions()
    whole, _ = take(6, store, questions, CONFIG, seed=3)
    parts = [take(6, store, questions, CONFIG, seed=3, process_index=p, process_count=2)[0] for p in range(2)]
    for batch, *shares in zip(whole, *parts, strict=True):
        assert {share["kind"] for share in shares} == {batch["kind"]}
        rows = np.stack([share["frame"] for share in shares], axis=1).reshape(batch["frame"].shape)
        np.testing.assert_array_equal(rows, batch["frame"])
    with pytest.raises(ValueError, match="not a multiple of the 3 processes"):
        Loader(store, questions, CONFIG, 0, process_count=3)


def test_errors_name_the_question(store):
    few = dataclasses.replace(CONFIG, min_frames=0, picks={"general": 31, "specific": 16})
    with pytest.raises(ValueError, match=r"q.jsonl:3: general question about c.mp4: 31 frames .* only 30 candidates"):
        Loader(store, some_questions(), few, 0)
    narrow = dataclasses.replace(CONFIG, buckets=(128,))
    with pytest.raises(ValueError, match=r"q.jsonl:13: specific .*up to 800 candidates, more than the largest of"):
        Loader(store, some_questions(), narrow, 0)
    small = dataclasses.replace(CONFIG, needle=NeedleConfig(group_frames=1, distractor_groups=0))
    with pytest.raises(ValueError, match="16 frames are to be picked, but there may be only 1"):
        Loader(store, some_questions(), small, 0)
    with pytest.raises(StoreError, match=r"1 video\(s\) are not ready\nq.jsonl:1: video: .*gone.mp4.*has no frames"):
        Loader(store, [question(0, "gone.mp4", "general"), question(1, "a.mp4", "general")], CONFIG, 0)
    with pytest.raises(ValueError, match="text has 3 rows for 18 questions"):
        Loader(store, some_questions(), CONFIG, 0, {"text": np.zeros(3)})


def test_stale_features_are_refused(store, tmp_path):
    path = features_path(store.folder, CLIP, "a.mp4")
    fresh = path.read_bytes()
    other = dataclasses.replace(store.video("a.mp4"), crc32=np.zeros(60, np.uint32))
    try:
        write_features(store.folder, other, CLIP, [np.zeros((60, 3))], 3)
        with pytest.raises(StoreError, match="features of a.mp4 are missing or of older frames"):
            Loader(FrameStore(store.folder, CLIP), some_questions(), CONFIG, 0)
    finally:
        path.write_bytes(fresh)


def test_fetch_reads_every_picture_once(store, monkeypatch):
    names = sorted(LENGTHS)
    video = np.array([[0, 1, 1], [1, 4, 4]])
    frame = np.array([[5, 9, 9], [9, 79, 0]])
    read = []
    jpegs = store.jpegs
    monkeypatch.setattr(store, "jpegs", lambda name, idx: read.append((name, *idx)) or jpegs(name, idx))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        frames = fetch_frames(store, names, video, frame, lambda picture: picture[:4, :4], pool)
    assert frames.shape == (2, 3, 4, 4, 3) and frames.dtype == np.uint8
    shown = frames.mean(axis=(2, 3))
    np.testing.assert_allclose(shown[..., 0], 40 * video, atol=2)
    np.testing.assert_allclose(shown[..., 1], frame, atol=2)
    assert sorted(read) == [("a.mp4", 5), ("b.mp4", 9), ("e.mp4", 0, 79)]
    with pytest.raises(ValueError, match="padded frame"):
        fetch_frames(store, names, -np.ones((1, 1), int), np.zeros((1, 1), int), lambda x: x, None)


def test_examples_are_of_every_shape(store):
    """Two kinds, of which one has two buckets: the share of each is that of its batches."""
    with Loader(store, some_questions(), CONFIG, 0) as loader:
        shares = {(rows["kind"], rows["mask"].shape[1]): share for share, rows in loader.examples()}
        batches = [(rows["kind"], rows["mask"].shape[1]) for rows in itertools.islice(loader, 90)]
    assert shares.keys() == set(batches) and len(shares) == 3
    for shape, share in shares.items():
        assert batches.count(shape) == pytest.approx(90 * share, abs=2)
