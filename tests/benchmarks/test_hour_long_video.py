"""benchmarks/hour_long_video.py with small towers: 3,600 candidates of CLIP ViT-L's width, from a frame store."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import hour_long_video
from benchmarks.load_memory import resident
from tspo_jax.checkpoints.folders import ClipEncoder
from tspo_jax.data.decode import Video

TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)


@pytest.mark.slow
def test_a_question_about_an_hour_is_quick_and_small(tmp_path, monkeypatch):
    """Below a second and a gigabyte (of which other tests may hold more), and nothing is decoded or encoded."""
    small = {f"{part}_config": hour_long_video.VIT_L[f"{part}_config"] | TOWER for part in ("text", "vision")}
    hour_long_video.write(tmp_path, hour_long_video.VIT_L | small)

    def never(*_):
        raise AssertionError("a video was opened or frames were encoded")

    monkeypatch.setattr(Video, "__init__", never)
    monkeypatch.setattr(ClipEncoder, "image_features", never)
    before = resident("VmRSS")
    found = hour_long_video.measure(tmp_path)
    assert found["question_cpu_s"] < 1
    assert found["besides_gb"] < max(1.0, before + 0.3)
