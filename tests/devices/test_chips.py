"""Names of TPU slices; the compiler itself is tried in tspo/test_ahead_of_time.py: one process at a time may use it."""

import math

import pytest

from tspo_jax.devices import chips as tpu


@pytest.mark.parametrize(("chip", "per_chip"), [("v5e", 1), ("v6e", 1), ("v5p", 2)])
def test_shapes_hold_as_many_chips_as_the_name_says(chip, per_chip):
    _, shapes = tpu.SLICES[chip]
    for number, shape in shapes.items():
        assert math.prod(map(int, shape.split("x"))) * per_chip == number
    assert chip in tpu.CHIPS


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("H200-8", "H200 is a GPU; programs are compiled ahead of time for TPUs only"),
        ("v9-8", "one of the chips v5e, v6e, v5p"),
        ("v5e", "not CHIP-NUMBER"),
        ("v5e-7", "there is v5e-1, v5e-4, v5e-8"),
        ("v5p-4", "there is v5p-8"),
    ],
)
def test_slices_that_do_not_exist(name, message):
    with pytest.raises(ValueError, match=message):
        tpu.slice_devices(name)
