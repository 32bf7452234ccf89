import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.devices import sharding
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.llava_video import LlavaVideo, insert_newlines
from tspo_jax.models.token_budget import Budget, merge_visual, rows_closed
from tspo_jax.models.video_prompt import VIDEO_TOKEN, VideoOptions


def frames(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@jax.jit
def half(x):
    return merge_visual(x, Budget(x.shape[-3] // 2, 0))


def test_frames_shown_twice_are_the_frames():
    """In order of time, each with the number of its first showing."""
    x = frames(2, 5, 4, 8)
    merged = half(jnp.repeat(x, 2, axis=1))
    np.testing.assert_allclose(merged.tokens, x, atol=1e-6)
    np.testing.assert_array_equal(merged.frames, np.broadcast_to(np.arange(0, 10, 2), (2, 5)))
    np.testing.assert_array_equal(merged.places, np.broadcast_to(np.arange(4), (2, 5, 4)))


def test_order_is_restored():
    merged = jax.jit(lambda x: merge_visual(x, Budget(3, 5)))(frames(3, 8, 16, 6))
    assert merged.tokens.shape == (3, 5, 11, 6)
    assert (np.diff(merged.frames) > 0).all() and (np.diff(merged.places) > 0).all()
    alone = jax.jit(lambda x: merge_visual(x, Budget(3, 5)))(frames(3, 8, 16, 6)[1:2])
    np.testing.assert_allclose(alone.tokens[0], merged.tokens[1], atol=1e-6)  # sets do not see each other


def test_a_needle_stays():
    x = jnp.broadcast_to(frames(1, 1, 4, 8), (1, 8, 4, 8)) + 1e-3 * frames(1, 8, 4, 8)
    needle = x[:, 5] * -1.0
    merged = half(x.at[:, 5].set(needle))
    assert 5 in np.asarray(merged.frames[0])
    place = list(np.asarray(merged.frames[0])).index(5)
    np.testing.assert_allclose(merged.tokens[0, place], needle[0], atol=1e-6)


def test_eight_devices_equal_one():
    x = frames(8, 8, 16, 6)
    mesh = sharding.make_mesh((("data", 8), ("model", 1)), jax.devices())
    run = jax.jit(lambda x: merge_visual(x, Budget(3, 5)))
    one, eight = run(x), run(sharding.put_batch(mesh, np.asarray(x)))
    np.testing.assert_allclose(eight.tokens, one.tokens, atol=1e-6)
    np.testing.assert_array_equal(eight.frames, one.frames)
    np.testing.assert_array_equal(eight.places, one.places)


def test_newlines():
    """All places taken: today's layout. Some missing: rows still close, in the raster's order."""
    side, newline = 3, jnp.full(2, -1.0)
    x = frames(2, 4, side, side, 2)
    places = jnp.broadcast_to(jnp.arange(side * side), (2, 4, side * side))
    closed = rows_closed(x.reshape(2, 4, 9, 2), places, newline, side)
    np.testing.assert_array_equal(closed, insert_newlines(x, newline, "grid"))
    tokens = jnp.arange(1.0, 4)[None, :, None]  # one frame, three tokens at places 1, 3 and 8; no token of its own
    closed = rows_closed(tokens, jnp.array([[1, 3, 8]]), jnp.zeros(1), side)
    np.testing.assert_array_equal(closed[:, 0], [1, 0, 2, 0, 3, 0])


@pytest.mark.parametrize(
    ("folder", "merge", "num_tokens"),
    [
        ("llava_video_grid", (2, 0), 2 * (16 + 4)),
        ("llava_video_grid", (2, 1), 2 * (15 + 4)),
        ("llava_video_one_token", (1, 2), 3 * 7 + 1),
    ],
)
def test_prompts_of_llava_video(golden, folder, merge, num_tokens):
    """The prompt has as many visual tokens as num_visual_tokens says; nothing merged gives today's bits."""
    plain = load_answerer(golden / folder)
    config = dataclasses.replace(plain.config, video=VideoOptions(merge=merge))
    graphdef, _ = abstract_module(lambda rngs: LlavaVideo(config, rngs=rngs))
    side = config.pooled_side
    assert config.num_visual_tokens(4) == num_tokens
    x = frames(1, 4, side, side, config.language.hidden_size)
    ids = jnp.array([[3, VIDEO_TOKEN, 4, 5]])

    def run(graphdef, x):
        return jax.jit(lambda p, x: merge_params(graphdef, p).embed_prompt(x, ids))(plain.params, x)

    merged, today = run(graphdef, x), run(plain.graphdef, x)
    assert merged.shape[1] == 3 + num_tokens and today.shape[1] == 3 + plain.config.num_visual_tokens(4)
    np.testing.assert_array_equal(merged[:, [0, -2, -1]], today[:, [0, -2, -1]])
    none = dataclasses.replace(config, video=VideoOptions(merge=(0, 0)))
    graphdef, _ = abstract_module(lambda rngs: LlavaVideo(none, rngs=rngs))
    np.testing.assert_array_equal(run(graphdef, x), today)


def test_bad_input(golden):
    with pytest.raises(ValueError, match="remove 3 of 4 frames; at most half"):
        Budget(3, 0).left(4, 4)
    with pytest.raises(ValueError, match="remove 3 of 4 patches"):
        merge_visual(frames(1, 4, 4, 2), Budget(0, 3))
    for wrong in ((1,), (1, -1), (1, 2, 3), (0.5, 0)):
        with pytest.raises(ValueError, match="merge is"):
            load_answerer(golden / "llava_video_grid", video=VideoOptions(merge=wrong))
    with pytest.raises(ValueError, match="which of them merge is not known"):
        load_answerer(golden / "llava_video_grid", video=VideoOptions(merge=(1, 0), time_instruction=True))
