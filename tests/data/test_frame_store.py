"""The frame store: what goes in comes out, damage and mismatches are named."""

import concurrent.futures
import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from tspo_jax.data.frame_store import (
    FEATURE_ROWS,
    FrameStore,
    StoreError,
    StoreSettings,
    VideoEntry,
    decode_jpeg,
    encode_jpeg,
    features_path,
    frames_path,
    open_settings,
    write_features,
    write_frames,
)

CLIP = "0123456789abcdef"


def entry_of(name, num_frames):
    times = np.arange(num_frames) * 1.001
    return VideoEntry(name, 29.97, 30 * num_frames, times, np.arange(num_frames) * 30, 40, 24, "decord 0.6.0", 99, "ab")


def picture(i):
    return np.full((24, 40, 3), i % 250, np.uint8)


def add_video(folder, name, num_frames, width=8):
    entry = write_frames(folder, entry_of(name, num_frames), (encode_jpeg(picture(i), 95) for i in range(num_frames)))
    features = np.random.default_rng(num_frames).normal(size=(num_frames, width)).astype(np.float32)
    blocks = [features[i : i + FEATURE_ROWS] for i in range(0, num_frames, FEATURE_ROWS)]
    write_features(folder, entry, CLIP, blocks, width)
    return entry, features


@pytest.fixture
def store(tmp_path):
    open_settings(tmp_path, StoreSettings())
    add_video(tmp_path, "a/short.mp4", 5)
    add_video(tmp_path, "long.mp4", 2 * FEATURE_ROWS + 7)
    return FrameStore(tmp_path, CLIP)


def test_round_trip(tmp_path):
    open_settings(tmp_path, StoreSettings(fps=2))
    entry, features = add_video(tmp_path, "x.mp4", FEATURE_ROWS + 30)
    store = FrameStore(tmp_path, CLIP)
    assert store.names() == ["x.mp4"] and "x.mp4" in store and store.settings.fps == 2
    for field in dataclasses.fields(entry):
        np.testing.assert_array_equal(getattr(store.video("x.mp4"), field.name), getattr(entry, field.name))
    np.testing.assert_array_equal(store.features("x.mp4"), features)
    idx = [FEATURE_ROWS + 29, 0, 0, FEATURE_ROWS - 1, FEATURE_ROWS]
    np.testing.assert_array_equal(store.features("x.mp4", idx), features[idx])
    np.testing.assert_array_equal(store.features("x.mp4", [FEATURE_ROWS + 3]), features[[FEATURE_ROWS + 3]])
    frames = store.frames("x.mp4", [200, 3])
    assert frames.shape == (2, 24, 40, 3) and [f.mean() for f in frames] == [200, 3]
    assert not list(tmp_path.rglob("*.partial"))


def test_same_frames_make_the_same_file(tmp_path):
    for folder in ("one", "two"):
        add_video(tmp_path / folder, "x.mp4", 9)
    for path in (frames_path, lambda folder, name: features_path(folder, CLIP, name)):
        assert path(tmp_path / "one", "x.mp4").read_bytes() == path(tmp_path / "two", "x.mp4").read_bytes()


def test_only_the_wanted_feature_blocks_are_read(store, monkeypatch):
    read = []
    records = store._records
    monkeypatch.setattr(store, "_records", lambda path, idx, name: read.append(list(idx)) or records(path, idx, name))
    store.features("long.mp4", [2 * FEATURE_ROWS + 6, 3])
    assert read == [[0, 2]]


def test_frames_of_a_pool_are_in_order(store):
    idx = np.arange(2 * FEATURE_ROWS)[::-7]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        frames = store.frames("long.mp4", idx, pool)
    assert [frame.mean() for frame in frames] == [i % 250 for i in idx]
    assert len(store.frames("long.mp4", [])) == 0


def test_many_threads_and_pickle(store, monkeypatch):
    monkeypatch.setattr("tspo_jax.data.frame_store._OPEN_FILES", 1)
    copy = pickle.loads(pickle.dumps(store))

    def read(i):
        name = ["a/short.mp4", "long.mp4"][i % 2]
        return copy.frames(name, [i % 5])[0].mean() == i % 5 and len(copy.features(name, [i % 5])) == 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(400)))


def test_clip_of_another_checkpoint(store):
    with pytest.raises(StoreError, match=f"CLIP checkpoints {CLIP}, not of checkpoint ffff; make them with"):
        FrameStore(store.folder, "ffff")


def test_missing_video_or_frame(store):
    with pytest.raises(StoreError, match="no frames of this video; run python -m tspo_jax.predecode"):
        store.frames("other.mp4", [0])
    features_path(store.folder, CLIP, "long.mp4").unlink()
    with pytest.raises(StoreError, match=r"long\.mp4.*no CLIP features of this video"):
        store.features("long.mp4")
    for wrong in ([5], [-1]):
        with pytest.raises(IndexError, match=r"a/short\.mp4 has 5 records"):
            store.frames("a/short.mp4", wrong)
    assert store.has_features("a/short.mp4")
    frames_path(store.folder, "a/short.mp4").unlink()
    assert not store.has_features("a/short.mp4")


@pytest.mark.parametrize("damage", ["half", "empty", "flip"])
def test_damaged_file_is_named(store, damage):
    path = frames_path(store.folder, "long.mp4")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes({"half": data[: len(data) // 2], "empty": b"", "flip": data}[damage])
    with pytest.raises(StoreError, match=r"frames/long\.mp4\.array_record: damaged .*; delete it and run predecode"):
        store.frames("long.mp4", range(2 * FEATURE_ROWS))


def test_settings_are_those_of_the_store(tmp_path):
    open_settings(tmp_path, StoreSettings())
    open_settings(tmp_path, StoreSettings())
    with pytest.raises(StoreError, match="fps is 1.0, not 2.0"):
        open_settings(tmp_path, StoreSettings(fps=2.0))
    with pytest.raises(StoreError, match="is no frame store"):
        FrameStore(tmp_path / "other")
    (tmp_path / "store.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(StoreError, match="version 99 is newer"):
        FrameStore(tmp_path)
    (tmp_path / "store.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        FrameStore(tmp_path)


def test_nothing_stays_of_a_failed_write(tmp_path):
    with pytest.raises(ValueError, match="1 frames were decoded, not 3"):
        write_frames(tmp_path, entry_of("x.mp4", 3), [encode_jpeg(picture(0), 95)])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_error_of_the_decoder_is_none_of_the_disk(tmp_path):
    def jpegs():
        yield encode_jpeg(picture(0), 95)
        raise RuntimeError("surprise")

    with pytest.raises(RuntimeError, match="surprise"):
        write_frames(tmp_path, entry_of("x.mp4", 3), jpegs())
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_jpeg():
    noise = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    jpeg = encode_jpeg(noise, 95)
    assert np.abs(decode_jpeg(jpeg).astype(int) - noise).mean() < 12
    np.testing.assert_array_equal(decode_jpeg(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))
