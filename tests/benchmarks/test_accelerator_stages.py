"""benchmarks/accelerator_stages.py on the CPU: every stage gives figures."""

import sys

import jax
import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import accelerator_stages


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return accelerator_stages.Bench(accelerator_stages.TINY, str(tmp_path_factory.mktemp("accelerator")))


@pytest.mark.parametrize("name", ["ceilings", "prefill", "decode", "answer", "siglip", "clip", "qwen"])
@pytest.mark.slow
def test_a_stage_is_timed(bench, name, monkeypatch):
    monkeypatch.setattr(accelerator_stages, "REPEATS", 1)
    found = accelerator_stages.STAGES[name].run(bench)
    for figures in found.values():
        assert 0 < figures["seconds"] < figures.get("first_seconds", np.inf)
        assert figures.get("flops", figures.get("bytes")) > 0
    if name == "decode":
        few, many = (figures["bytes"] for figures in found.values())
        language = bench.ours.world.params["language_model"]
        read = [x for part, x in language.items() if part != "embed_tokens"]
        weights = sum(x.nbytes for part in read for x in jax.tree.leaves(part))
        assert many - few == few - weights, "twice the prompts are twice the cache beside the same weights"


@pytest.mark.slow
def test_numerics_are_those_of_bfloat16(bench):
    found = accelerator_stages.numerics(bench)
    assert list(found) == [f"{name}, xla" for name in accelerator_stages.TINY.attended]
    for figures in found.values():
        assert all(2**-12 < error < 2**-6 for error in figures.values())
    same = np.ones(3)
    assert accelerator_stages._error(same, same) == 0 and accelerator_stages._error(3 * same, 2 * same) == 0.5


@pytest.mark.slow
def test_the_trainer_trains(bench):
    (figures,) = accelerator_stages.trainer(bench).values()
    assert figures["seconds"] > 0 and figures["questions"] == 2 and 0 <= figures["device_idle"] <= 1
