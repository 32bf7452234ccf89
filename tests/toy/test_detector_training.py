import json
from pathlib import Path

import numpy as np
import pytest

from tspo_jax.checkpoints.detector import load_detector
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


@pytest.mark.parametrize("side", [1, training.GRID])
def test_labels_lie_in_the_cell_of_their_frame(pictures, side):
    rows = np.arange(side * side)
    picture, labels, boxes = training.grid_of(pictures, rows, side)
    S, Q = training.SIDE, len(training.NAMES)
    assert picture.shape == (training.IMAGE_SIZE,) * 2 + (3,) and labels.shape == (S * S, Q)
    assert boxes.shape == (S * S, 4)
    middle = (np.arange(S) + 0.5) / S
    points = np.stack([np.tile(middle, S), np.repeat(middle, S)], axis=-1)
    cells = frame_grid.cells_of(np.concatenate([points, points], axis=1), 1, 1, side, side)
    there = pictures.boxes[rows, :, 2] > 0
    assert not (labels & ~there[cells]).any()  # nothing that the frame in the cell does not show
    assert all((labels[cells == cell].any(axis=0) == there[cell]).all() for cell in rows)  # and all of it
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


def test_committed_detector():
    """It is as it was measured, less than 1 MB, and tells the things apart, better in a frame alone."""
    folder = Path(training.__file__).parent / "checkpoints" / "owlvit"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 1e6
    detector, quality = load_detector(folder), json.loads((folder / "quality.json").read_text())
    assert detector.config == training.detector_config(detector.config.text.vocab_size)
    assert quality["grid"]["right_thing"] > 0.5 and quality["alone"]["right_thing"] > 0.8
    assert training.measure(folder, seed=1, num_tested=128) == {
        where: {name: pytest.approx(value, abs=0.12) for name, value in values.items()}
        for where, values in quality.items()
    }
