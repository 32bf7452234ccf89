"""Stored log-probabilities: computed once, bound to what they depend on."""

import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_store import LONG, make_store

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import reference
from tspo_jax.tpo.batches import PairBatches
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.losses import AnswerLogProbs
from tspo_jax.tpo.pairs import Pair

MESH = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])


@pytest.fixture(scope="module")
def parts(golden, tmp_path_factory):
    store = FrameStore(make_store(tmp_path_factory.mktemp("world"), golden))
    with ThreadPoolExecutor(1) as pool:
        yield load_answerer(golden / "llava_video_grid"), store, pool


class Computed:
    """Stands for the program: minus the sums of the tokens; counts the pairs that it was given."""

    def __init__(self):
        self.pairs = 0

    def __call__(self, rows):
        self.pairs += int(rows.weights.sum())
        counts = jnp.arange(rows.answers.shape[-1]) < rows.answer_lengths[..., None]
        return AnswerLogProbs(-jnp.where(counts, rows.answers, 0).sum(-1).astype(jnp.float32), rows.answer_lengths)


def fill(parts, path, pairs, golden, **changes):
    config = tpo_config.default()
    config.batch_size, config.data.num_frames, config.answerer.folder = 2, 2, str(golden / "llava_video_grid")
    config.update_from_flattened_dict(changes)
    config = cfg.read(config, TpoConfig)
    batches, computed = PairBatches(config, pairs, "pairs", *parts), Computed()
    reference.fill(path, config, parts[0], batches, computed, MESH)
    return batches, computed.pairs


def pairs_of(count):
    return [Pair(str(i), LONG, "Why?", "Because" * (i + 1), "No") for i in range(count)]


def test_only_what_is_missing_is_computed(parts, golden, tmp_path):
    path = tmp_path / "reference.jsonl"
    first, computed = fill(parts, path, pairs_of(2), golden)
    assert computed == 2
    more, computed = fill(parts, path, pairs_of(5), golden)
    assert computed == 3
    np.testing.assert_array_equal(more.reference[:2], first.reference)
    rows = more.rows(np.arange(5))
    counts = np.arange(rows.answers.shape[-1]) < rows.answer_lengths[..., None]
    np.testing.assert_array_equal(more.reference, -np.where(counts, rows.answers, 0).sum(-1))
    row = json.loads(path.read_text().splitlines()[1])
    assert row["id"] == "0" and row["tokens"] == more.answer_lengths[0].tolist()
    assert fill(parts, path, pairs_of(5), golden)[1] == 0


@pytest.mark.parametrize(
    "field, value",
    [("data.num_frames", 3), ("answerer.dtype", "float32"), ("data.suffix", "x"), ("data.answer_text", " {answer}")],
)
def test_other_settings_are_an_error(parts, golden, tmp_path, field, value):
    path = tmp_path / "reference.jsonl"
    fill(parts, path, pairs_of(2), golden)
    with pytest.raises(reference.StoredReferenceError, match=field.rsplit(".", 1)[1]):
        fill(parts, path, pairs_of(2), golden, **{field: value})


def test_other_texts_of_a_pair_are_an_error(parts, golden, tmp_path):
    path = tmp_path / "reference.jsonl"
    fill(parts, path, pairs_of(2), golden)
    changed = [Pair("0", LONG, "Why not?", "Because", "No"), *pairs_of(2)[1:]]
    with pytest.raises(reference.StoredReferenceError, match="pair 0 has other texts"):
        fill(parts, path, changed, golden)
