"""A retriever learns on the shared loop: losses against NumPy, a step on one and on eight devices, a run."""

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_store
import tiny_testa

from tspo_jax.checkpoints.testa_folders import load_testa
from tspo_jax.config import ConfigError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.retrieval import training
from tspo_jax.retrieval.config import Contrast, RetrievalConfig, RetrievalData, RetrievalOptimizer
from tspo_jax.runs.run_folder import RunFolderError, write_content

ROWS = [
    {"video": tiny_store.LONG, "start": 0, "end": 10, "caption": "a man runs"},
    {"video": tiny_store.LONG, "start": 10, "end": 30, "caption": "the red ball rolls"},
    {"video": tiny_store.SHORT, "start": 0, "end": 5, "caption": "the door opens"},
]


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retriever")
    store = tiny_store.make_store(folder, golden)
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return RetrievalConfig(
        batch_size=8,
        num_steps=2,
        model=str(tiny_testa.make(folder / "testa", golden)),
        data=RetrievalData(str(store), str(folder / "captions.jsonl"), 2),
        contrast=Contrast(queue=16, ramp=0.0),
        optimizer=RetrievalOptimizer(learning_rate=1e-3),
    )


def test_contrast_loss():
    """Written out in NumPy."""
    rng = np.random.default_rng(0)

    def vectors(n):
        x = rng.normal(size=(n, 5)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    fast, slow, queued = ((vectors(n), vectors(n)) for n in (3, 3, 4))
    video, of = np.array([7, 8, 7]), np.array([8, 9, -1, -1])

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    expected = 0.0
    for a, b in ((0, 1), (1, 0)):
        to = np.concatenate([slow[b], queued[b]])
        same = (video[:, None] == np.concatenate([video, of])).astype(float)
        targets = 0.4 * np.exp(log_softmax(slow[a] @ to.T / 0.1)) + 0.6 * same / same.sum(1, keepdims=True)
        expected += -(log_softmax(fast[a] @ to.T / 0.1) * targets).sum(1).mean() / 2
    found = training.contrast_loss(fast, slow, queued, video, of, 0.1, 0.4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_eight_devices_equal_one(config):
    model = load_testa(config.model)
    optimizer = training.make_optimizer(config)
    update = training.make_update(config, model, optimizer)
    with ThreadPoolExecutor(2) as pool:
        batch = training.VideoBatches(config, model, FrameStore(config.data.store), pool).batch(0)
    assert len(set(batch.video.tolist())) == 2 and batch.frames.shape == (8, 6, 16, 16, 3)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh((("data", -1), ("model", 1)), devices)
        state = sharding.put_replicated(mesh, training.first_state(config, model, optimizer))
        state, metrics = update(jnp.int32(0), state, sharding.put_batch(mesh, batch))
        results.append(jax.tree.map(np.asarray, (metrics, state["videos"], state["of"], state["moments"])))
    (one, videos, of, moments), (eight, videos_of_eight, _, moments_of_eight) = results
    for name in one:
        np.testing.assert_allclose(eight[name], one[name], rtol=1e-3, err_msg=name)
    np.testing.assert_allclose(videos_of_eight, videos, atol=1e-5)
    largest = max(np.abs(x).max() for x in jax.tree.leaves(moments) if x.ndim)
    for a, b in zip(*map(jax.tree.leaves, (moments, moments_of_eight)), strict=True):  # gradients and their squares
        np.testing.assert_allclose(b, a, rtol=2e-3, atol=2e-4 * largest)
    np.testing.assert_array_equal(of[:8], batch.video)  # the queue begins with this batch
    assert (of[8:] == -1).all()


@pytest.mark.slow
def test_run(config, tmp_path):
    """Two steps, then a folder that retrieve takes, with the schedule that was trained."""
    assert training.train(config, tmp_path / "run", jax.devices()[:1])
    made, started = load_testa(tmp_path / "run" / "retriever"), load_testa(config.model)
    assert made.config == started.config
    moved = np.abs(made.params["text_proj"]["kernel"] - started.params["text_proj"]["kernel"]).max()
    assert 1e-4 < moved < 1e-2
    assert made.text_features(["a red ball"]).shape == (1, 12)


def test_other_captions_are_refused_by_name(config, tmp_path):
    write_content(tmp_path, {"data.captions": "of another file", "data.store": "of another store"})
    with pytest.raises(RunFolderError, match="other content of config.data.captions, config.data.store"):
        training.train(config, tmp_path, jax.devices()[:1])


def test_bad_input(config, tmp_path):
    with pytest.raises(ConfigError, match="multiple of batch_size 8"):
        dataclasses.replace(config, contrast=Contrast(queue=12))
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS[0]))
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, captions=str(tmp_path / "one.jsonl")))
    with pytest.raises(ValueError, match="one video alone"), ThreadPoolExecutor(1) as pool:
        training.VideoBatches(alone, load_testa(config.model), FrameStore(config.data.store), pool)
