"""Single rendered frames with known contents: what the tiny CLIP and the tiny LLaVA-Video are trained on."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from tspo_jax.toy.scenes import render_scene
from tspo_jax.toy.settings import SETTINGS
from tspo_jax.toy.sprites import BALLS, THINGS

SETTING_NAMES, THING_NAMES, BALL_NAMES = tuple(SETTINGS), tuple(THINGS), tuple(BALLS)
NOTHING = -1
# Shares of frames that show a thing and a ball, a thing, a ball, and the setting alone.
CONTENTS = (0.5, 0.25, 0.12, 0.13)


class FrameBank(NamedTuple):
    """n frames; thing and ball are indices into THING_NAMES and BALL_NAMES, or NOTHING."""

    pixels: np.ndarray  # uint8 [n, S, S, 3]
    setting: np.ndarray  # int [n]
    thing: np.ndarray  # int [n]
    ball: np.ndarray  # int [n]

    def words(self, i: int) -> tuple[str, str | None, str | None]:
        """The setting, thing and ball of frame i by name."""
        thing, ball = self.thing[i], self.ball[i]
        return (
            SETTING_NAMES[self.setting[i]],
            None if thing == NOTHING else THING_NAMES[thing],
            None if ball == NOTHING else BALL_NAMES[ball],
        )


def draw_frame_bank(
    rng: np.random.Generator, num_frames: int, crop: Callable[[np.ndarray], np.ndarray], track: Callable = iter
) -> FrameBank:
    """Random frames, cropped for a tower. `track` may wrap the iteration (a progress bar)."""
    contents = rng.choice(4, num_frames, p=CONTENTS)
    setting = rng.integers(len(SETTING_NAMES), size=num_frames)
    thing = np.where(contents < 2, rng.integers(len(THING_NAMES), size=num_frames), NOTHING)
    ball = np.where(contents % 2 == 0, rng.integers(len(BALL_NAMES), size=num_frames), NOTHING)
    bank = FrameBank(np.empty(0, np.uint8), setting, thing, ball)
    pixels = np.stack([crop(render_scene(rng, *bank.words(i))) for i in track(range(num_frames))])
    return bank._replace(pixels=pixels)
