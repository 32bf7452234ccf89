"""Videos whose frames show their own number, and detectors that follow a script instead of seeing anything."""

import numpy as np

from tspo_jax.models.owlvit import Detections


def look(seconds):
    """Frames of one colour, which tells the second."""
    return [np.broadcast_to(np.array([s % 256, s // 256, 200], np.uint8), (4, 6, 3)) for s in seconds]


def seconds_in(picture, rows=1, columns=1):
    """The seconds of the frames in a grid, row by row; None for a black cell."""
    height, width = picture.shape[0] // rows, picture.shape[1] // columns
    middles = picture[height // 2 :: height, width // 2 :: width][:rows, :columns].reshape(-1, 3)
    return [int(red) + 256 * int(green) if blue else None for red, green, blue in middles]


def detector(boxes_of, num_texts, grid):
    """A detector of `boxes_of(second, is_alone, (x0, y0, width, height, picture's width, its height))`, which gives
    rows (x0, y0, x1, y1, number of the text, confidence). A picture of one colour is a frame alone."""
    rows, columns = grid

    def detect(pictures):
        return [_detections(picture, boxes_of, num_texts, rows, columns) for picture in pictures]

    return detect


def _detections(picture, boxes_of, num_texts, rows, columns):
    is_alone = (picture == picture[0, 0]).all()
    rows, columns = (1, 1) if is_alone else (rows, columns)
    height, width = picture.shape[:2]
    found = []
    for j, second in enumerate(seconds_in(picture, rows, columns)):
        cell = (j % columns * width // columns, j // columns * height // rows, width // columns, height // rows)
        found += boxes_of(second, is_alone, (*cell, width, height)) if second is not None else []
    found = np.array(found).reshape(-1, 6)
    scores = np.zeros((len(found), num_texts))
    scores[np.arange(len(found)), found[:, 4].astype(int)] = found[:, 5]
    return Detections(found[:, :4], scores)
