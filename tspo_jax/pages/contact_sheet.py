"""Frames side by side in one picture, each with its time."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WIDTH, MARGIN, CAPTION = 320, 4, 22  # pixels: of a frame, between frames, height of a line of text


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss.s (hours only where there are any)."""
    tenths = round(seconds * 10)
    minutes, tenths = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    rest = f"{tenths // 10:02d}.{tenths % 10}"
    return f"{hours}:{minutes:02d}:{rest}" if hours else f"{minutes}:{rest}"


def contact_sheet(frames: Sequence[np.ndarray], timestamps: Sequence[float], columns: int = 4) -> Image.Image:
    """Frames uint8 [H, W, 3] of one size, row by row, with their times in seconds below."""
    H, W = frames[0].shape[:2]
    height = round(WIDTH * H / W)
    columns = min(columns, len(frames))
    rows = -(-len(frames) // columns)
    cell = WIDTH + MARGIN, height + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * cell[0] + MARGIN, rows * cell[1] + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=CAPTION - 6)
    for i, (frame, seconds) in enumerate(zip(frames, timestamps, strict=True)):
        x, y = MARGIN + i % columns * cell[0], MARGIN + i // columns * cell[1]
        sheet.paste(Image.fromarray(frame).resize((WIDTH, height)), (x, y))
        draw.text((x + WIDTH // 2, y + height + CAPTION // 2), clock(seconds), "black", font, anchor="mm")
    return sheet
