"""A random streaming encoder for the answerers of tests/golden."""

from flax import nnx

from tspo_jax.models.layers import split_params
from tspo_jax.models.streaming import StreamingConfig, StreamingEncoder
from tspo_jax.streaming import folders


def save_encoder(folder, answerer, seed=0):
    width = answerer.config.language.hidden_size
    config = StreamingConfig(
        width, width, frames=2, cells=1, width=16, num_layers=2, num_heads=2, num_kv_heads=1, hidden=24, selected=2
    )
    _, params = split_params(StreamingEncoder(config, rngs=nnx.Rngs(seed)))
    folders.save(folder, config, params, answerer)
    return folder
