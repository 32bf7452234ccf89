import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.checkpoints.weights import OWLVIT, load_params, read_config
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.owlvit import HIDDEN_QUERY, Detections, OwlVit, box_bias, config_from_hf
from tspo_jax.models.preprocessing import ImageProcessor

TEXT = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    vocab_size=50,
    max_position_embeddings=7,
)
VISION = dict(
    hidden_size=20, intermediate_size=36, num_hidden_layers=3, num_attention_heads=5, image_size=30, patch_size=10
)


class Loaded:
    """A folder's network as compiled functions."""

    def __init__(self, folder):
        config = config_from_hf(read_config(folder))
        graphdef, abstract = abstract_module(lambda rngs: OwlVit(config, rngs=rngs))
        self.config, self.params = config, load_params(folder, abstract, OWLVIT)
        self.queries = jax.jit(lambda params, ids: merge_params(graphdef, params).queries(ids))
        self.features = jax.jit(lambda params, pixels: merge_params(graphdef, params).features(pixels))
        self.embeddings = jax.jit(lambda params, f: merge_params(graphdef, params).class_head.embeddings(f))
        self.detect = jax.jit(lambda params, *args: merge_params(graphdef, params)(*args))


@pytest.fixture(scope="module")
def tiny(golden):
    return Loaded(golden / "owlvit_tiny")


def cases(golden):
    data = np.load(golden / "owlvit_tiny.npz")
    for i, meta in enumerate(json.loads(str(data["meta"]))):
        yield {k.removeprefix(f"case{i}/"): data[k] for k in data.files if k.startswith(f"case{i}/")}, meta


def test_golden_network(golden, tiny):
    for case, _ in cases(golden):
        pixels = case["pixel_values"].transpose(0, 2, 3, 1)
        ids = case["input_ids"].reshape(len(pixels), -1, case["input_ids"].shape[1])
        mask = ids[..., 0] > 0
        queries = np.stack([tiny.queries(tiny.params, rows) for rows in ids])
        np.testing.assert_allclose(queries[mask], case["query_embeds"][mask], atol=1e-4)
        features = tiny.features(tiny.params, pixels)
        np.testing.assert_allclose(features.reshape(case["feature_map"].shape), case["feature_map"], atol=1e-4)
        embeddings = tiny.embeddings(tiny.params, features)
        np.testing.assert_allclose(embeddings, case["class_embeds"], atol=1e-4)
        logits, boxes = tiny.detect(tiny.params, pixels, queries, mask)
        np.testing.assert_allclose(logits, case["logits"], atol=1e-4)
        np.testing.assert_allclose(boxes, case["pred_boxes"], atol=1e-5)


def test_golden_pictures(golden, tiny):
    """Preprocessing, and what comes out at every threshold."""
    processor = ImageProcessor.owlvit(
        read_config(golden / "owlvit_tiny", "preprocessor_config.json"), tiny.config.vision.image_size
    )
    for case, meta in cases(golden):
        for i, _ in enumerate(meta["images"]):
            image = case[f"image{i}"]
            pixels = processor.normalize(processor.crop(image))
            np.testing.assert_allclose(pixels.transpose(2, 0, 1), case["pixel_values"][i], atol=1e-6)
            found = Detections.of(case["logits"][i], case["pred_boxes"][i], *image.shape[:2])
            for threshold in meta["thresholds"]:
                there, prefix = found.above(threshold), f"detections/{threshold}/image{i}"
                np.testing.assert_array_equal(there.labels, case[f"{prefix}/labels"])
                np.testing.assert_allclose(there.confidence, case[f"{prefix}/scores"], atol=1e-5)
                np.testing.assert_allclose(there.boxes, case[f"{prefix}/boxes"], atol=1e-3)


@pytest.mark.parametrize("num_queries", [1, 4])
def test_hugging_face(tmp_path, num_queries):
    torch = pytest.importorskip("torch")
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    config = OwlViTConfig(text_config=TEXT, vision_config=VISION, projection_dim=24, attn_implementation="eager")
    torch.manual_seed(num_queries)
    oracle = OwlViTForObjectDetection(config).eval()
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 3, 30, 30)).astype(np.float32)
    ids = rng.integers(1, 49, (3 * num_queries, 7))
    ids[:, 4], ids[:, 5:] = 49, 0  # the end token, the largest id, then padding
    ids[-1] = 0  # a query that does not count
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter))
        oracle.save_pretrained(tmp_path)
        expected = oracle(input_ids=torch.from_numpy(ids), pixel_values=torch.from_numpy(pixels))

    ours, ids = Loaded(tmp_path), ids.reshape(3, num_queries, 7)
    queries = np.stack([ours.queries(ours.params, rows) for rows in ids])
    logits, boxes = ours.detect(ours.params, pixels.transpose(0, 2, 3, 1), queries, ids[..., 0] > 0)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    np.testing.assert_allclose(boxes, expected.pred_boxes, atol=1e-5)


def test_queries_of_all_images_at_once(golden, tiny):
    """One set of queries for a batch is as good as the same set for each image."""
    case, _ = next(cases(golden))
    pixels = np.repeat(case["pixel_values"], 2, axis=0).transpose(0, 2, 3, 1)
    queries, mask = tiny.queries(tiny.params, case["input_ids"]), np.array([True, False, True, True])
    one = tiny.detect(tiny.params, pixels, queries, mask)
    each = tiny.detect(tiny.params, pixels, np.stack([queries] * 2), np.stack([mask] * 2))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, each)
    assert (one[0][..., 1] == HIDDEN_QUERY).all() and (one[0][..., [0, 2, 3]] > HIDDEN_QUERY).all()


def test_box_bias_lies_at_the_far_corner():
    boxes = jax.nn.sigmoid(box_bias(4)).reshape(4, 4, 4)
    np.testing.assert_allclose(boxes[1, 2], [0.75, 0.5, 0.25, 0.25], atol=1e-3)
    np.testing.assert_allclose(boxes[3, 0, :2], [0.25, 1.0], atol=1e-3)


LARGE_VISION = dict(
    image_size=840,
    patch_size=14,
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
)
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)


@pytest.mark.parametrize(
    ("vision", "text", "projection", "parameters"),
    [({}, {}, 512, 153_231_879), (LARGE_VISION, LARGE_TEXT, 768, 433_888_519)],
)
def test_published_sizes(vision, text, projection, parameters):
    """owlvit-base-patch32, whose config names no size, and owlvit-large-patch14."""
    config = config_from_hf({"vision_config": vision, "text_config": text, "projection_dim": projection})
    _, params = abstract_module(lambda rngs: OwlVit(config, rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
    assert config.text.max_position_embeddings == 16


def test_half_precision_ends_in_float32():
    config = config_from_hf({"vision_config": VISION, "text_config": TEXT, "projection_dim": 24})
    graphdef, abstract = abstract_module(lambda rngs: OwlVit(config, rngs=rngs))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)
    args = (
        jax.ShapeDtypeStruct((2, 30, 30, 3), jnp.float32),
        jax.ShapeDtypeStruct((3, 24), jnp.float32),
        jax.ShapeDtypeStruct((3,), bool),
    )
    model = lambda params, *args: merge_params(graphdef, params)(*args)  # noqa: E731
    assert [(x.shape, x.dtype) for x in jax.eval_shape(model, half, *args)] == [
        ((2, 9, 3), jnp.float32),
        ((2, 9, 4), jnp.float32),
    ]


def test_projection_of_another_width_is_refused():
    with pytest.raises(ValueError, match="projection_dim is 16"):
        config_from_hf({"vision_config": VISION, "text_config": TEXT, "projection_dim": 16})


def test_detections():
    logits = np.array([[0.0, 2.0], [HIDDEN_QUERY, -3.0], [1.0, 1.0]], np.float32)
    boxes = np.array([[0.5, 0.5, 0.2, 0.4], [0.1, 0.1, 0.4, 0.4], [1, 1, 1, 1]], np.float32)
    found = Detections.of(logits, boxes, 100, 200)
    np.testing.assert_allclose(found.boxes[0], [80, 30, 120, 70], atol=1e-4)
    np.testing.assert_allclose(found.boxes[1], [-20, -10, 60, 30], atol=1e-4)  # not cut at the border
    assert found.labels.tolist() == [1, 1, 0] and found.scores[1, 0] == 0
    assert found.above(0.5).labels.tolist() == [1, 0]
