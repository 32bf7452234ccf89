"""Visual tokens in the places of a prompt's tags, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.models.video_prompt import VIDEO_TOKEN, FrameTimes, VideoOptions, add_behind, lay_out, splice

V = VIDEO_TOKEN


def test_places_of_several_videos():
    """Rows of which one begins with a tag and one ends with two, right padded."""
    ids = jnp.array([[V, 5, 6, V, 7], [5, 6, V, V, 0]])
    text = ids[..., None].astype(jnp.float32)
    visual = jnp.array([[[10, 11, 12], [13, 14, 15]], [[20, 21, 22], [23, 24, 25]]], jnp.float32)[..., None]
    spliced = splice(text, visual, ids)[..., 0]
    assert spliced.tolist() == [[10, 11, 12, 5, 6, 13, 14, 15, 7], [5, 6, 20, 21, 22, 23, 24, 25, 0]]
    layout = lay_out(ids, 2, 3)
    assert layout.source[0].tolist() == [0, 0, 0, 1, 2, 3, 3, 3, 4]
    assert layout.is_visual[1].tolist() == [False, False, *[True] * 6, False]


def test_what_is_added_behind_the_first_layers():
    x, added = jnp.ones((1, 3, 2)), jnp.arange(8.0).reshape(1, 2, 2, 2)  # two layers, the first two tokens
    assert add_behind(1, x, added)[0].tolist() == [[5, 6], [7, 8], [1, 1]]
    assert add_behind(2, x, added).tolist() == x.tolist() and add_behind(0, x, None) is x


def test_times():
    times = FrameTimes.of([0, 1.5, 1.5], 4.0)
    assert VideoOptions().seconds(times, 2).tolist() == [0, 1.5, 1.5]
    assert VideoOptions(second_per_grid=3.0).seconds(times, 2).tolist() == [0, 1.5, 3]
    assert FrameTimes.unknown(4).seconds.tolist() == [0, 0.5, 1, 1.5]
    for seconds in ([3, 2], [-1, 2], [0, np.inf], [[0]], ["a"]):
        with pytest.raises(ValueError):
            FrameTimes.of(seconds)
