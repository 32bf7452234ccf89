"""benchmarks/decode_waves.py: what waves save, counted by hand and measured on tiny models."""

import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import decode_waves, step_time
from benchmarks.accelerator_stages import TINY


@pytest.mark.slow
def test_totals_by_hand():
    """Of 4 answers three end after 2, 3 and 5 tokens: a wave of 4 for 2 tokens, of 4 for one more, of 2, of 1."""
    lengths, step = np.array([2, 3, 5, 9]), {1: 1.0, 2: 1.5, 4: 4.0}
    found = decode_waves.totals(lengths, step, halve=0.5)
    assert found["at once"] == 9 * 4
    assert found["in waves"] == pytest.approx(3 * 4 + (0.5 + 2 * 1.5) + (0.25 + 4 * 1))


@pytest.mark.slow
def test_measured_on_tiny_models():
    ours = step_time.Ours(step_time.World(TINY.setting, 1))
    result = decode_waves.measure(ours, prompts=8, tokens=16, prefilled=2)
    assert list(result["seconds"]["a token"]) == [1, 2, 4, 8] and result["seconds"]["prefill"] > 0
    decoding = result["seconds"]["decoding"]
    assert result["saved"]["of decoding"] == pytest.approx(1 - decoding["in waves"] / decoding["at once"])
    assert abs(result["saved"]["of prefill and decoding"]) < abs(result["saved"]["of decoding"])
