import itertools

import numpy as np

from tspo_jax.toy.settings import BACKGROUND_SIZE, SETTINGS, background


def test_settings_look_different_wherever_the_frame_lies():
    """Colour histograms do not depend on the position: any two settings share little of theirs."""
    assert len(SETTINGS) == 12
    histograms = {}
    for setting in SETTINGS:
        image = background(setting)
        assert image.shape == (BACKGROUND_SIZE, BACKGROUND_SIZE, 3) and image.dtype == np.float32
        counts, _ = np.histogramdd(image.reshape(-1, 3), bins=6, range=[(0, 256)] * 3)
        histograms[setting] = counts / counts.sum()
    for a, b in itertools.combinations(SETTINGS, 2):
        assert np.minimum(histograms[a], histograms[b]).sum() < 0.5, (a, b)


def test_settings_are_named_by_a_place():
    assert all(
        place.split(" ")[0] in ("in", "on") and place.endswith(f"the {name}") for name, place in SETTINGS.items()
    )
