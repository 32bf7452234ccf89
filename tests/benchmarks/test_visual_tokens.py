import dataclasses

import jax.numpy as jnp

from benchmarks.visual_tokens import QWEN2_7B, layer_seconds, median_seconds, retrieval_cost


def test_retrieval():
    cost = retrieval_cost(40, 8)
    assert cost["seconds"] > 0 and cost["index_bytes"] == 40 * 8 * 4


def test_seconds():
    narrow = dataclasses.replace(QWEN2_7B, hidden_size=112, intermediate_size=64, head_dim=4)
    assert 0 < layer_seconds(narrow, 1) < 60
    assert median_seconds(jnp.add, 1, 1) < 1
