import json
import shutil

import jax
import numpy as np
import pytest

from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.devices.sharding import make_mesh


@pytest.fixture(scope="module")
def detector(golden):
    return load_detector(golden / "owlvit_tiny")


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in ((30, 50), (64, 64), (70, 40), (20, 20), (9, 90))]


def test_golden_detections(golden, detector):
    data = np.load(golden / "owlvit_tiny.npz")
    for i, meta in enumerate(json.loads(str(data["meta"]))):
        texts = [text for part in meta["texts"] for text in (part if isinstance(part, list) else [part])]
        ids = data[f"case{i}/input_ids"]
        if len(texts) == len(ids) and not meta["zero_rows"]:  # others fill up with queries that ours leaves out
            np.testing.assert_array_equal(detector.token_ids(texts), ids)
            found = detector.detect([data[f"case{i}/image0"]], detector.queries(texts))[0]
            for threshold in meta["thresholds"]:
                there, prefix = found.above(threshold), f"case{i}/detections/{threshold}/image0"
                np.testing.assert_array_equal(there.labels, data[f"{prefix}/labels"])
                np.testing.assert_allclose(there.confidence, data[f"{prefix}/scores"], atol=1e-4)
                np.testing.assert_allclose(there.boxes, data[f"{prefix}/boxes"], atol=1e-3)


def test_a_picture_alone_or_in_a_batch(detector, pictures):
    queries = detector.queries(["red ball", "dog"])
    together = detector.detect(pictures, queries)
    for picture, found in zip(pictures, together, strict=True):
        alone = detector.detect([picture], queries)[0]
        np.testing.assert_allclose(alone.scores, found.scores, atol=1e-5)
        np.testing.assert_allclose(alone.boxes, found.boxes, atol=1e-3)
        assert found.scores.shape == (16, 2)
    assert detector.detect([], queries) == []


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(("data", 8), ("model", 1)), (("data", 2), ("model", 4))])
def test_sharded_equals_unsharded(golden, detector, pictures, axes):
    sharded = load_detector(golden / "owlvit_tiny", mesh=make_mesh(axes, jax.devices()))
    texts = ["red ball", "dog", " "]
    ours, theirs = sharded.detect(pictures, sharded.queries(texts)), detector.detect(pictures, detector.queries(texts))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.scores, b.scores, atol=1e-5)
        np.testing.assert_allclose(a.boxes, b.boxes, atol=1e-3)


def test_few_shapes_are_compiled(detector, pictures):
    for texts in (["a"], ["a", "b", "c"], list("abcdefgh")):
        queries = detector.queries(texts)
        for count in (1, 2, 5):
            assert len(detector.detect(pictures[:count], queries)) == count
    assert detector._detect._cache_size() == 2  # one picture, a batch
    detector.queries(list("abcdefghi"))
    assert detector._encode._cache_size() == 2


def test_long_query_is_cut_before_its_end_token(detector):
    long = "a very long name of a thing that has many more letters than the detector reads"
    ids = detector.token_ids([long, "dog"])
    assert ids.shape == (2, 16) and ids[0, -1] == detector.tokenizer.eos_token_id and ids[1, -1] == 0
    queries = detector.queries(["dog", long])
    assert queries.cut == (long,) and queries.texts == ("dog", long)
    assert queries.embeddings.shape == (8, 32) and queries.mask.tolist() == [True, True, *[False] * 6]


def test_nothing_to_look_for(detector):
    with pytest.raises(ValueError, match="nothing to look for"):
        detector.queries([])


def copy(golden, folder):
    shutil.copytree(golden / "owlvit_tiny", folder)
    return folder


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_folder_that_is_no_detector(golden, tmp_path):
    with pytest.raises(CheckpointError, match="model_type is 'clip', not owlvit"):
        load_detector(golden / "tspo_agent")
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        load_detector(tmp_path / "none")
    folder = copy(golden, tmp_path / "owlvit")
    edit(folder / "config.json", projection_dim=16)
    with pytest.raises(CheckpointError, match=r"config.json: projection_dim is 16"):
        load_detector(folder)
    edit(folder / "config.json", projection_dim=32, text_config={"hidden_size": 32, "num_hidden_layers": 3})
    with pytest.raises(CheckpointError, match="text_model.encoder.layers.2"):
        load_detector(folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": {"height": 768, "width": 768}}, "size .* is not the 64 x 64"),
        ({"do_center_crop": True}, "do_center_crop is true"),
        ({"do_normalize": False}, "do_normalize is false"),
    ],
)
def test_other_preprocessing_is_refused(golden, tmp_path, fields, message):
    folder = copy(golden, tmp_path / "owlvit")
    edit(folder / "preprocessor_config.json", **fields)
    with pytest.raises(CheckpointError, match=message):
        load_detector(folder)


def test_old_files(golden, tmp_path, detector, pictures):
    """Sizes as a list, and buffers that newer files no longer hold."""
    from safetensors.numpy import load_file, save_file

    folder = copy(golden, tmp_path / "owlvit")
    edit(folder / "preprocessor_config.json", size=[64, 64], feature_extractor_type="OwlViTFeatureExtractor")
    tensors = load_file(folder / "model.safetensors")
    for tower, count in (("text", 16), ("vision", 17)):
        tensors[f"owlvit.{tower}_model.embeddings.position_ids"] = np.arange(count)[None]
    save_file(tensors, folder / "model.safetensors")
    old = load_detector(folder)
    found = old.detect(pictures[:1], old.queries(["dog"]))[0]
    expected = detector.detect(pictures[:1], detector.queries(["dog"]))[0]
    np.testing.assert_array_equal(found.scores, expected.scores)
