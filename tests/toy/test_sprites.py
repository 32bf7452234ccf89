import itertools

import numpy as np
import pytest
from PIL import Image

from tspo_jax.toy.sprites import BALLS, THINGS, ball_sprite, thing_sprite


def _on_grey(sprite: np.ndarray, size: int) -> np.ndarray:
    image = (sprite[..., :3] + 128 * (1 - sprite[..., 3:])).round().astype(np.uint8)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC), np.float32)


def test_vocabulary():
    assert len(THINGS) == len(set(THINGS)) == 32
    assert all(thing.isalpha() and thing not in BALLS for thing in THINGS)


@pytest.mark.parametrize("frame", [48, 32])
def test_things_stay_distinct_in_small_frames(frame):
    size = 56 * frame // 96
    pictures = [_on_grey(thing_sprite(thing, 56), size) for thing in THINGS]
    distances = {
        (THINGS[i], THINGS[j]): np.abs(pictures[i] - pictures[j]).mean()
        for i, j in itertools.combinations(range(len(THINGS)), 2)
    }
    assert min(distances.values()) > 20, min(distances, key=distances.get)


def test_sprites_are_premultiplied_and_cached():
    sprite = thing_sprite("tree", 44)
    assert sprite.shape == (44, 44, 4) and sprite.dtype == np.float32
    assert (sprite[..., :3] <= 255 * sprite[..., 3:] + 1e-3).all()
    assert sprite[0, 0, 3] == 0 and sprite[22, 22, 3] == 1
    assert thing_sprite("tree", 44) is sprite


@pytest.mark.parametrize("color", BALLS)
def test_ball_has_its_colour_and_a_white_rim(color):
    sprite = ball_sprite(color, 26)
    np.testing.assert_allclose(sprite[13, 13], [*BALLS[color], 1], atol=1)
    assert sprite[13, :2, :3].max() > 140  # the rim shows black balls on dark settings
