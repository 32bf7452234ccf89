"""The picture of chosen frames."""

import numpy as np
import pytest

from tspo_jax.pages.contact_sheet import CAPTION, MARGIN, WIDTH, clock, contact_sheet


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00.0"), (59.96, "1:00.0"), (754.25, "12:34.2"), (3600, "1:00:00.0"), (3725.5, "1:02:05.5")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_frames_fill_rows_and_have_their_time_below():
    shades = [40, 80, 120, 160, 200]
    frames = [np.full((60, 80, 3), shade, np.uint8) for shade in shades]
    sheet = np.asarray(contact_sheet(frames, range(5), columns=3))
    height, cell = WIDTH * 60 // 80, WIDTH + MARGIN
    row = height + CAPTION + MARGIN
    assert sheet.shape == (2 * row + MARGIN, 3 * cell + MARGIN, 3)
    for i, shade in enumerate(shades):
        x, y = MARGIN + i % 3 * cell, MARGIN + i // 3 * row
        assert (sheet[y : y + height, x : x + WIDTH] == shade).all()
        caption = sheet[y + height : y + height + CAPTION, x : x + WIDTH]
        assert caption.min() < 100 and caption.max() == 255
    assert (sheet[MARGIN + row :, MARGIN + 2 * cell :] == 255).all()
