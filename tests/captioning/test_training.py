"""A captioner learns on the shared loop: batches, a step on one and on eight devices, a run and its folder."""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_store

from tspo_jax.captioning import training
from tspo_jax.captioning.config import CaptionData, CaptioningConfig, CaptionOptimizer, SparseMask, Words
from tspo_jax.captioning.examples import NOT_HIDDEN, CaptionBatches, hide_words
from tspo_jax.checkpoints.swinbert_folders import load_captioner, start_captioner
from tspo_jax.config import ConfigError
from tspo_jax.data.caption_files import drawn, read_examples
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.runs.run_folder import RunFolderError, write_content

ROWS = [
    {"video": tiny_store.LONG, "start": 0, "end": 10, "caption": "a man is throwing the red ball"},
    {"video": tiny_store.LONG, "start": 10, "end": 25.5, "caption": "two people cook food"},
    {"video": tiny_store.SHORT, "start": 0, "end": 5, "caption": "yellow cat"},
]


def shallow(model, folder):
    """A folder without weights of fewer blocks, which compile in a third of the time."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("best-checkpoint"))
    swin = json.loads((folder / "video_swin.json").read_text()) | {"depths": [2, 1], "num_heads": [1, 2]}
    (folder / "video_swin.json").write_text(json.dumps(swin))
    bert = json.loads((folder / "bert_config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "bert_config.json").write_text(json.dumps(bert))
    return folder


@pytest.fixture(scope="module")
def config(golden, tmp_path_factory):
    folder = tmp_path_factory.mktemp("captions")
    store = tiny_store.make_store(folder, golden)
    captions = folder / "captions.jsonl"
    captions.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return CaptioningConfig(
        batch_size=8,
        num_steps=2,
        model=str(shallow(golden / "swinbert_tiny", folder / "model")),
        dropout=0.0,
        data=CaptionData(str(store), str(captions), 2),
        mask=SparseMask("straight_through"),
        optimizer=CaptionOptimizer(warmup=0.0),
    )


@pytest.fixture(scope="module")
def captioner(config):
    return start_captioner(config.model, mask="straight_through")


@pytest.fixture(scope="module")
def batches(config, captioner):
    with ThreadPoolExecutor(2) as pool:
        yield CaptionBatches(config, captioner, FrameStore(config.data.store), pool)


def test_hidden_words(captioner):
    """Half of a caption, [SEP] too and [CLS] never, about 80 % of them [MASK]."""
    ids, mask = captioner.tokenizer.batch([ROWS[0]["caption"]], "[CLS]", 16)
    length, tokens = int(mask.sum()), captioner.tokens
    places, masked, total = np.zeros(16, int), 0, 0
    for seed in range(400):
        rng = np.random.default_rng(seed)
        hidden, targets = hide_words(rng, ids[0], length, tokens, 43, Words())
        drawn = targets != NOT_HIDDEN
        assert drawn.sum() == round(0.5 * length)
        np.testing.assert_array_equal(targets[drawn], ids[0][drawn])
        np.testing.assert_array_equal(hidden[~drawn], ids[0][~drawn])
        places, total, masked = places + drawn, total + drawn.sum(), masked + (hidden == tokens.mask).sum()
    assert places[0] == 0 and (places[length:] == 0).all() and (places[1:length] > 0).all()
    assert abs(masked / total - 0.8) < 0.05
    few = hide_words(np.random.default_rng(0), ids[0], length, tokens, 43, Words(most=1))[1]
    assert (few != NOT_HIDDEN).sum() == 1


def test_batches(config, captioner, batches):
    """The same again, every caption once before any comes again, and each process its own rows."""
    first, again = batches.batch(3), batches.batch(3)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert first.frames.shape == (8, 12, 64, 64, 3) and first.ids.shape == (8, 16)
    assert sorted(drawn(0, i, 3) for i in range(3)) == sorted(drawn(0, i, 3) for i in range(3, 6)) == [0, 1, 2]
    with ThreadPoolExecutor(2) as pool:
        parts = [
            CaptionBatches(config, captioner, FrameStore(config.data.store), pool, (i, 2)).batch(3) for i in (0, 1)
        ]
    np.testing.assert_array_equal(first.ids[1::2], parts[1].ids)
    np.testing.assert_array_equal(first.targets[::2], parts[0].targets)


@pytest.mark.slow
def test_eight_devices_equal_one(config, captioner, batches):
    optimizer = training.make_optimizer(config)
    update = training.make_update(config, captioner, optimizer)
    results = []
    for devices in (jax.devices()[:1], jax.devices()):
        mesh = sharding.make_mesh((("data", -1), ("model", 1)), devices)
        params = sharding.put_replicated(mesh, captioner.params)
        state = {"params": params, "moments": jax.jit(optimizer.init)(params)}
        state, metrics = update(jnp.int32(0), state, sharding.put_batch(mesh, batches.batch(0)))
        results.append(jax.tree.map(np.asarray, (state, metrics)))
    (one, of_one), (eight, of_eight) = results
    for name in of_one:
        np.testing.assert_allclose(of_eight[name], of_one[name], rtol=1e-4, err_msg=name)
    # The moments are the gradients and their squares. The parameters themselves are not compared: Adam makes whole
    # steps of gradients that are 0 but for rounding, such as those of the keys' biases.
    pairs = zip(*map(jax.tree.leaves, (one["moments"], eight["moments"])), strict=True)
    pairs = [(a, b) for a, b in pairs if a.ndim]
    largest = max(np.abs(a).max() for a, _ in pairs)
    assert largest > 1e-3
    for a, b in pairs:
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-4 * largest)
    moved = one["params"]["learn_vid_att"]["embedding"] - captioner.params["learn_vid_att"]["embedding"]
    assert np.abs(moved).max() > 1e-3


@pytest.mark.slow
def test_run(config, tmp_path):
    """Two steps, then a folder that caption takes, with the mask that was trained."""
    assert training.train(config, tmp_path / "run", jax.devices()[:1])
    made = load_captioner(tmp_path / "run" / "captioner")
    assert made.config.mask == "straight_through"
    started = start_captioner(config.model, mask="straight_through", seed=config.seed)
    moved = np.abs(made.params["fc"]["kernel"] - started.params["fc"]["kernel"]).max()
    assert 1e-5 < moved < 1e-2
    text, confidence = made.caption(np.zeros((4, 64, 64, 3), np.uint8))
    assert isinstance(text, str) and 0 < confidence <= 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"caption": ""}, "line 1: an empty caption"),
        ({"end": -1}, "ends before it starts"),
        ({"video": "none.mp4"}, "none.mp4, of which there is a caption, is not in"),
        ({"start": 100, "end": 101}, "no stored frame from 100 to 101 s"),
        ({"caption": "ball " * 20}, "model's limit is 16"),
        ({"start": "soon"}, "line 1 is no caption"),
    ],
)
def test_wrong_captions(config, captioner, tmp_path, row, message):
    path = tmp_path / "captions.jsonl"
    path.write_text(json.dumps(ROWS[0] | row))
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, captions=str(path)))
    with pytest.raises(ValueError, match=message):
        CaptionBatches(wrong, captioner, FrameStore(config.data.store), ThreadPoolExecutor(1))


def test_other_captions_are_refused_by_name(config, tmp_path):
    write_content(tmp_path, {"data.captions": "of another file", "data.store": "of another store"})
    with pytest.raises(RunFolderError, match="other content of config.data.captions, config.data.store"):
        training.train(config, tmp_path, jax.devices()[:1])


def test_wrong_configs(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no caption"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(ConfigError, match="mask.kind"):
        CaptioningConfig(mask=SparseMask("soft"))
    with pytest.raises(ConfigError, match="words.share"):
        CaptioningConfig(words=Words(share=1.5))
