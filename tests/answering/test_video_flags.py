"""Flags of what a Video-MLLM is shown become VideoOptions, or one line; the command is run in test_given_frames.py."""

from types import SimpleNamespace

import pytest

from tspo_jax.answering import video_flags
from tspo_jax.models.video_prompt import VideoOptions


def given(**changes):
    flags = dict(
        frame_size=[], second_per_grid=2.0, next_position="after_all", outer_markers=True, time_instruction=False,
        merge=[],
    )  # fmt: skip
    return SimpleNamespace(**flags | changes)


def test_options():
    flags = given(frame_size=["56", " 84"], second_per_grid=0.0, next_position="after_space", merge=["2", "3"])
    assert video_flags.options(flags) == VideoOptions((56, 84), 0.0, "after_space", True, False, (2, 3))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"frame_size": ["5x6"]}, "--frame_size=5x6 is not height,width in pixels"),
        ({"merge": ["a", "1"]}, "--merge=a,1 is not frames,patches"),
    ],
)
def test_what_is_no_number(flags, message):
    with pytest.raises(ValueError, match=message):
        video_flags.options(given(**flags))
