import jax
import numpy as np
import pytest

from tspo_jax.checkpoints.weights import flatten
from tspo_jax.models.layers import abstract_module
from tspo_jax.models.owlvit import OwlVit
from tspo_jax.selection import frame_grid
from tspo_jax.toy import detector_training as training


@pytest.fixture(scope="module")
def pictures():
    return training.draw_pictures(np.random.default_rng(0), 40)


def test_boxes_are_where_the_things_are(pictures):
    """What a box shows differs from the same frame's corner more than the background does."""
    there = pictures.boxes[..., 2] > 0
    assert (there.sum(axis=1) <= 2).all() and there.any(axis=1).mean() > 0.7
    for frame, boxes, of_frame in zip(pictures.frames, pictures.boxes, there, strict=True):
        for x, y, width, height in boxes[of_frame] * 96:
            left, top = max(0, round(x - width / 2)), max(0, round(y - height / 2))
            inside = frame[top : round(y + height / 2), left : round(x + width / 2)]
            assert inside.size and np.ptp(inside.astype(int), axis=(0, 1)).max() > 60  # dark line, bright fill


@pytest.mark.parametrize("side", [1, 4])
def test_labels_lie_in_the_cell_of_their_frame(pictures, side):
    rows = np.arange(side * side)
    picture, labels, boxes = training.grid_of(pictures, rows, side)
    assert picture.shape == (192, 192, 3) and labels.shape == (144, 40) and boxes.shape == (144, 4)
    middle = (np.arange(12) + 0.5) / 12
    points = np.stack([np.tile(middle, 12), np.repeat(middle, 12)], axis=-1)
    cells = frame_grid.cells_of(np.concatenate([points, points], axis=1), 1, 1, side, side)
    there = pictures.boxes[rows, :, 2] > 0
    things = there & (np.arange(40) < 32)  # a ball in a grid may lie between the middles of patches
    assert not (labels & ~there[cells]).any()  # nothing that the frame in the cell does not show
    assert all(labels[cells == cell].any(axis=0)[things[cell]].any() for cell in rows if things[cell].any())
    of_thing = labels.any(axis=1)
    corners = np.concatenate([boxes[:, :2], boxes[:, :2]], axis=1)[of_thing]
    np.testing.assert_array_equal(frame_grid.cells_of(corners, 1, 1, side, side), cells[of_thing])


def test_loss_is_least_where_names_and_boxes_are_right():
    labels = np.zeros((1, 3, 2), bool)
    labels[0, 1, 0] = True
    wanted = np.full((1, 3, 4), 0.5, np.float32)
    right = np.where(labels, 9.0, -9.0).astype(np.float32)
    value = training.detection_loss(right, wanted, labels, wanted)
    assert value < 1e-3
    assert training.detection_loss(-right, wanted, labels, wanted) > 10
    elsewhere = wanted.copy()
    elsewhere[0, 0] = 0  # a patch that shows nothing may say any box
    assert training.detection_loss(right, elsewhere, labels, wanted) == pytest.approx(float(value))
    elsewhere[0, 1] += 0.25
    assert training.detection_loss(right, elsewhere, labels, wanted) == pytest.approx(2 * 1.0, abs=1e-2)


def test_size():
    """Small enough to be committed: less than 1 MB in bfloat16."""
    config = training.detector_config(400)
    _, params = abstract_module(lambda rngs: OwlVit(config, rngs=rngs))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) < 500_000
    assert "class_head.logit_scale.bias" in flatten(params)
