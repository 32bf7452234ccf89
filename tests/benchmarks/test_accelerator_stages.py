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


def found_by(bench, name):
    ready, (of, found, error) = accelerator_stages.measured([name], bench)
    assert (ready, of, error) == (None, name, None)
    return found


@pytest.mark.parametrize("name", ["ceilings", "prefill", "decode", "answer", "siglip", "clip", "qwen"])
@pytest.mark.slow
def test_a_stage_is_timed(bench, name, monkeypatch):
    monkeypatch.setattr(accelerator_stages, "REPEATS", 1)
    found = found_by(bench, name)
    for figures in found.values():
        assert figures["seconds"] > 0
        assert figures.get("flops", figures.get("bytes")) > 0
    if name == "decode":
        few, many = (figures["bytes"] for figures in found.values())
        language = bench.ours.world.params["language_model"]
        read = [x for part, x in language.items() if part != "embed_tokens"]
        weights = sum(x.nbytes for part in read for x in jax.tree.leaves(part))
        assert many - few == few - weights, "twice the prompts are twice the cache beside the same weights"


@pytest.mark.slow
def test_numerics_are_those_of_bfloat16(bench):
    found = found_by(bench, "numerics")
    assert list(found) == [f"{name}, xla" for name in accelerator_stages.TINY.attended]
    for figures in found.values():
        assert all(2**-12 < error < 2**-6 for error in figures.values())
    same = np.ones(3)
    assert accelerator_stages._error(same, same) == 0 and accelerator_stages._error(3 * same, 2 * same) == 0.5


@pytest.mark.slow
def test_the_trainer_trains(bench):
    (figures,) = found_by(bench, "trainer").values()
    assert figures["seconds"] > 0 and figures["questions"] == 2 and 0 <= figures["device_idle"] <= 1


@pytest.mark.slow
def test_a_stage_that_fails_before_or_behind_compiling_leaves_the_others(bench, monkeypatch):
    def fails_at_once(bench):
        raise ValueError("no room")
        yield []

    def cannot_be_compiled(bench):
        piece = accelerator_stages.Piece(lambda x: x @ x, np.ones(3)[:, None])
        yield [piece]
        return {"product": accelerator_stages.timed(piece)}

    stages = accelerator_stages.STAGES
    monkeypatch.setitem(stages, "prefill", accelerator_stages.Stage(fails_at_once, 1))
    monkeypatch.setitem(stages, "decode", accelerator_stages.Stage(cannot_be_compiled, 1))
    ready, *found = accelerator_stages.measured(["prefill", "decode", "siglip"], bench)
    assert ready is None and [name for name, *_ in found] == ["prefill", "decode", "siglip"]
    (_, nothing, first), (_, none, second), (_, figures, error) = found
    assert str(first) == "no room" and isinstance(second, TypeError) and nothing is none is error is None
    assert figures["2 frames"]["seconds"] > 0
