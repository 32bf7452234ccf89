"""Batches of pairs: every pair once an epoch, shapes that do not change, frames and fits."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny_store import LONG, SHORT, make_store

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo.batches import PairBatches, PairError, rows_of
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.pairs import Pair

PAIRS = [Pair(str(i), (LONG, SHORT)[i % 2], f"Why {i}?" * (i + 1), "Because.", "No" * i + "!") for i in range(5)]


@pytest.fixture(scope="module")
def parts(golden, tmp_path_factory):
    store = FrameStore(make_store(tmp_path_factory.mktemp("world"), golden))
    with ThreadPoolExecutor(2) as pool:
        yield load_answerer(golden / "llava_video_grid"), store, pool


def make(parts, pairs=PAIRS, share=(0, 1), **data):
    config = tpo_config.default()
    config.batch_size = 2
    config.data.update({"num_frames": 3, "answer_buckets": (16, 32)} | data)
    return PairBatches(cfg.read(config, TpoConfig), pairs, "pairs.jsonl", *parts, share)


def test_every_pair_once_an_epoch(parts):
    batches = make(parts)
    order = np.concatenate([batches.order(n, 2) for n in range(5)])
    assert sorted(order[:5]) == sorted(order[5:]) == list(range(5)) and (order[:5] != order[5:]).any()


def test_rows(parts):
    batches = make(parts)
    rows = batches.rows(np.array([0, 3]), fill=1)
    visual = parts[0].config.num_visual_tokens(3, 28, 28)
    assert rows.frames.shape == (3, 3, 28, 28, 3) and rows.weights.tolist() == [1, 1, 0]
    assert (rows.prompt_ids.shape[1] - 1 + visual) % 64 == 0
    assert ((rows.prompt_ids == VIDEO_TOKEN).sum(axis=1) == 1).all()
    end = parts[0].generation.eos_token_ids[0]
    for answers, lengths in zip(rows.answers, rows.answer_lengths, strict=True):
        for ids, length in zip(answers, lengths, strict=True):
            assert ids[length - 1] == end and (ids[: length - 1] != end).all()
    assert rows.answers.shape == (3, 2, 16)
    assert batches.rows(np.array([0, 1])).prompt_ids.shape == rows.prompt_ids[:2].shape


def test_processes_share_a_batch(parts):
    whole = make(parts).rows(np.array([0, 1, 2, 3]))
    shares = [make(parts, share=(i, 2)).rows(np.array([0, 1, 2, 3])) for i in range(2)]
    joined = np.concatenate([share.prompt_ids for share in shares])
    np.testing.assert_array_equal(joined[rows_of(4, 2)], whole.prompt_ids)


def test_frames_that_a_pair_names(parts):
    named = Pair("x", LONG, "Why?", "a", "b", shown=((SHORT, 0), (LONG, 4), (SHORT, 2)))
    batches = make(parts, [named])
    rows = batches.rows(np.array([0]))
    crop, store = parts[0].processor.crop, parts[1]
    np.testing.assert_array_equal(rows.frames[0, 1], crop(store.frames(LONG, [4])[0]))
    np.testing.assert_array_equal(rows.frames[0, 2], crop(store.frames(SHORT, [2])[0]))


def test_frames_of_shared_videos_stay_in_memory(parts):
    batches = make(parts, cached_videos=1)
    once, again = (batches.frames(batches.shown(pair)) for pair in (PAIRS[0], PAIRS[2]))  # of one video
    assert once is again
    np.testing.assert_array_equal(once, make(parts).frames(batches.shown(PAIRS[0])))


def test_whole_video_evenly(parts):
    T = parts[1].video(LONG).num_frames
    assert [frame for _, frame in make(parts).shown(PAIRS[0])] == [0, (T - 1) // 2, T - 1]


def test_pairs_that_do_not_fit_are_left_out_or_end_it(parts):
    batches = make(parts, max_tokens=147)
    assert 0 < len(batches.pairs) < 5 and "frames would fit" in batches.left_out[0]
    with pytest.raises(PairError, match="cannot be trained on"):
        make(parts, max_tokens=147, strict=True)
    with pytest.raises(PairError, match="same tokens"):
        make(parts, [Pair("x", LONG, "Why?", "a", "a")])
