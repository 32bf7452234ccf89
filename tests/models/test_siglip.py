import jax
import numpy as np
import pytest

from tspo_jax.checkpoints.weights import Format, flatten, load_params
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.siglip import SiglipConfig, SiglipVision

# transformers 5 saves a tower that stands alone without its prefix.
ALONE = Format(rename=((r"^vision_model\.", ""),))


@pytest.mark.parametrize(("image_size", "patch_size"), [(73, 14), (28, 7)])
def test_hugging_face(tmp_path, image_size, patch_size):
    """73 / 14 leaves a border of 3 pixels that no patch covers."""
    torch = pytest.importorskip("torch")
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = dict(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=image_size,
        patch_size=patch_size,
    )
    torch.manual_seed(0)
    oracle = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False, attn_implementation="eager")).eval()
    with torch.no_grad():
        for p in oracle.parameters():
            p.copy_(0.2 * torch.randn_like(p))
        oracle.save_pretrained(tmp_path)
        pixels = np.random.default_rng(0).normal(size=(2, 3, image_size, image_size)).astype(np.float32)
        hidden = oracle(torch.from_numpy(pixels), output_hidden_states=True)

    graphdef, abstract = abstract_module(lambda rngs: SiglipVision(SiglipConfig(**sizes), rngs=rngs))
    params = load_params(tmp_path, abstract, ALONE)
    run = jax.jit(lambda params, pixels: merge_params(graphdef, params)(pixels))
    tokens = run(params, pixels.transpose(0, 2, 3, 1))
    assert tokens.shape == (2, (image_size // patch_size) ** 2, 24)
    np.testing.assert_allclose(tokens, hidden.hidden_states[-1], atol=1e-4)
    # The tower ends before post_layernorm: the normed states are something else.
    assert np.abs(tokens - hidden.last_hidden_state.numpy()).max() > 0.1


def test_published_size():
    """so400m-patch14-384 without its last layer and its pooling head."""
    _, params = abstract_module(lambda rngs: SiglipVision(SiglipConfig(), rngs=rngs))
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes["vision_model.embeddings.position_embedding.embedding"] == (729, 1152)
    assert shapes["vision_model.encoder.layers.mlp.fc1.kernel"] == (26, 1152, 4304)
    assert shapes["vision_model.embeddings.patch_embedding.kernel"] == (14, 14, 3, 1152)
