"""Many frames in one picture, as T* shows them to a detector, and which frame a box belongs to."""

from collections.abc import Callable, Sequence

import numpy as np

Resize = Callable[[np.ndarray], np.ndarray]


def tile(frames: Sequence[np.ndarray], rows: int, columns: int, resize: Resize) -> np.ndarray:
    """The grid uint8 [rows * h, columns * w, 3] of at most rows * columns frames, row by row; missing ones are black.

    Args:
      resize: frame uint8 [H, W, 3] -> cell uint8 [h, w, 3], one size for all.
    Raises: ValueError for no frame or too many.
    """
    if not 0 < len(frames) <= rows * columns:
        raise ValueError(f"{len(frames)} frames do not go into a grid of {rows} x {columns}")
    cells = [resize(frame) for frame in frames]
    height, width, _ = cells[0].shape
    grid = np.zeros((rows, height, columns, width, 3), np.uint8)
    for i, cell in enumerate(cells):
        grid[i // columns, :, i % columns] = cell
    return grid.reshape(rows * height, columns * width, 3)


def cells_of(boxes: np.ndarray, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """The cell int [M] in which the centre of each box lies: boxes float [M, 4] in pixels of a grid of height x width.

    Centres outside of the picture count to the nearest cell.
    """
    centre_x, centre_y = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
    column = np.clip(centre_x // (width / columns), 0, columns - 1).astype(int)
    row = np.clip(centre_y // (height / rows), 0, rows - 1).astype(int)
    return row * columns + column
