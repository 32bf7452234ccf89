"""The benchmark of a video file that was never seen before, on minutes instead of an hour."""

import pytest

from benchmarks import cold_hour
from benchmarks.hour_long_video import VIT_L


def test_both_models_are_cut_alike():
    clip, detector = cold_hour.cut(VIT_L), cold_hour.cut(cold_hour.OWLVIT)
    for whole, small in ((VIT_L, clip), (cold_hour.OWLVIT, detector)):
        whole, small = whole["vision_config"], small["vision_config"]
        assert whole["num_hidden_layers"] == 12 * small["num_hidden_layers"]
        assert whole["hidden_size"] == 16 * small["hidden_size"] and whole["patch_size"] == small["patch_size"]


@pytest.mark.slow
def test_a_search_that_finds_nothing_reads_its_budget(tmp_path):
    found = cold_hour.measure(tmp_path, 400)
    assert found["dense"]["frames"] == 400 and found["search"]["frames"] == 40
    assert found["share"]["frames"] == pytest.approx(0.1, abs=1e-3)
    assert found["search"]["seconds"] > 0 and found["dense"]["cpu_seconds"] > 0
