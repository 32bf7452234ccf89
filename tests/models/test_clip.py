import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.checkpoints.weights import CLIP, load_params, read_config
from tspo_jax.models.clip import Clip, ClipConfig, cosine_similarity
from tspo_jax.models.layers import abstract_module, merge_params

TEXT = dict(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    vocab_size=50,
    max_position_embeddings=11,
    bos_token_id=48,
    pad_token_id=1,
)
VISION = dict(
    hidden_size=20, intermediate_size=36, num_hidden_layers=2, num_attention_heads=5, image_size=31, patch_size=7
)
# Tokens after the (legacy) end token, two end tokens, and none at all; 49 is the largest id, 7 the new-style end token.
IDS = np.array(
    [
        [48, 3, 49, 12, 7, 7, 30, 2, 9, 10, 49],
        [48, 7, 8, 9, 49, 49, 49, 49, 49, 49, 49],
        [48, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    ]
)


@pytest.mark.parametrize(("eos_token_id", "activation"), [(2, "quick_gelu"), (7, "gelu")])
def test_hugging_face(tmp_path, eos_token_id, activation):
    torch = pytest.importorskip("torch")
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(
        text_config=TEXT | dict(eos_token_id=eos_token_id, hidden_act=activation),
        vision_config=VISION | dict(hidden_act=activation),
        projection_dim=16,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    oracle = CLIPModel(config).eval()
    pixels = np.random.default_rng(0).normal(size=(2, 3, 31, 31)).astype(np.float32)
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        oracle.save_pretrained(tmp_path)
        image = oracle.get_image_features(pixel_values=torch.from_numpy(pixels)).pooler_output
        text = oracle.get_text_features(input_ids=torch.from_numpy(IDS)).pooler_output

    config = ClipConfig.from_hf(read_config(tmp_path))
    graphdef, abstract = abstract_module(lambda rngs: Clip(config, rngs=rngs))
    params = load_params(tmp_path, abstract, CLIP)
    features = jax.jit(lambda params, pixels: merge_params(graphdef, params).image_features(pixels))
    np.testing.assert_allclose(features(params, pixels.transpose(0, 2, 3, 1)), image, atol=1e-4)
    features = jax.jit(lambda params, ids: merge_params(graphdef, params).text_features(ids))
    np.testing.assert_allclose(features(params, IDS), text, atol=1e-4)


def test_sizes_that_the_configuration_leaves_unsaid():
    """Old dumps name only what differs from Hugging Face's defaults."""
    config = ClipConfig.from_hf({"text_config": {"eos_token_id": 2}, "vision_config": {"patch_size": 16}})
    assert (config.text.hidden_size, config.text.num_attention_heads, config.text.eos_token_id) == (512, 8, 2)
    assert (config.vision.hidden_size, config.vision.patch_size, config.vision.image_size) == (768, 16, 224)
    assert (config.projection_dim, config.vision.hidden_act, config.text.layer_norm_eps) == (512, "quick_gelu", 1e-5)


LARGE = ClipConfig.from_hf(
    {
        "projection_dim": 768,
        "text_config": dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        "vision_config": dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
    }
)
BASE_32 = ClipConfig.from_hf({"text_config": {}, "vision_config": {}})  # Hugging Face's defaults


@pytest.mark.parametrize(("config", "parameters"), [(LARGE, 427_616_513), (BASE_32, 151_277_313)])
def test_published_sizes(config, parameters):
    """clip-vit-large-patch14 and clip-vit-base-patch32."""
    _, params = abstract_module(lambda rngs: Clip(config, rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


def test_half_precision_stays_half():
    graphdef, abstract = abstract_module(lambda rngs: Clip(LARGE, rngs=rngs))
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), abstract)
    pixels, ids = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32), jax.ShapeDtypeStruct((2, 77), jnp.int32)

    def features(params, pixels, ids):
        clip = merge_params(graphdef, params)
        return clip.image_features(pixels), clip.text_features(ids)

    assert [(x.shape, x.dtype) for x in jax.eval_shape(features, half, pixels, ids)] == 2 * [((2, 768), jnp.bfloat16)]


def test_cosine_similarity(golden):
    data = np.load(golden / "agent_forward.npz")
    for meta in json.loads(str(data["meta"])):
        case = f"case{meta['case']}"
        scores = cosine_similarity(data[f"{case}/text_features"], data[f"{case}/image_features"][None])
        np.testing.assert_allclose(scores[0], data[f"{case}/clip_scores"], atol=1e-6)


def test_cosine_similarity_of_nothing_is_zero():
    text, images = np.zeros((1, 4), np.float32), np.ones((1, 2, 4), np.float32)
    np.testing.assert_array_equal(cosine_similarity(text, images), 0)
    np.testing.assert_array_equal(cosine_similarity(images[:, 0], 0 * images), 0)
