"""benchmarks/accelerator.py on the CPU: every stage gives figures, and none that overruns or fails stops the rest."""

import json
import sys

import numpy as np
import pytest
import scripted_stages
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import accelerator


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return accelerator.Bench(accelerator.TINY, str(tmp_path_factory.mktemp("accelerator")))


@pytest.mark.parametrize("name", ["ceilings", "prefill", "decode", "answer", "siglip", "clip", "qwen"])
@pytest.mark.slow
def test_a_stage_is_timed(bench, name, monkeypatch):
    monkeypatch.setattr(accelerator, "REPEATS", 1)
    found = accelerator.STAGES[name].run(bench)
    for figures in found.values():
        assert 0 < figures["seconds"] < figures.get("first_seconds", np.inf)
        assert figures.get("flops", figures.get("bytes")) > 0
    if name == "decode":
        few, many = (figures["bytes"] for figures in found.values())
        language = bench.ours.world.params["language_model"]
        read = [x for part, x in language.items() if part != "embed_tokens"]
        weights = sum(x.nbytes for part in read for x in accelerator.jax.tree.leaves(part))
        assert many - few == few - weights, "twice the prompts are twice the cache beside the same weights"


@pytest.mark.slow
def test_numerics_are_those_of_bfloat16(bench):
    found = accelerator.numerics(bench)
    assert list(found) == [f"{name}, xla" for name in accelerator.TINY.attended]
    for figures in found.values():
        assert all(2**-12 < error < 2**-6 for error in figures.values())
    same = np.ones(3)
    assert accelerator._error(same, same) == 0 and accelerator._error(3 * same, 2 * same) == 0.5


@pytest.mark.slow
def test_the_trainer_trains(bench):
    (figures,) = accelerator.trainer(bench).values()
    assert figures["seconds"] > 0 and figures["questions"] == 2 and 0 <= figures["device_idle"] <= 1


@pytest.mark.slow
def test_stages_that_overrun_or_fail_are_recorded_and_the_rest_go_on():
    """With a process that does what it is told: "ceilings" and "clip" end well."""
    rows, limits = [], {"ceilings": 60, "prefill": 60, "decode": 0.5, "answer": 60, "trainer": 60, "clip": 60}
    accelerator.measure(list(limits), limits, "", rows.append, scripted_stages.work)
    assert [row["stage"] for row in rows] == list(limits)
    found = {row["stage"]: row.get("found", row.get("error")) for row in rows}
    figures = {"seconds": 2.0, "flops": 10**12, "first_seconds": 3.0}
    assert found == {
        "ceilings": {"matrix": figures, "copy": {"seconds": 1.0, "bytes": 10**9}},
        "prefill": "ValueError: too large",
        "decode": "overran its 0.5 s",
        "answer": {"a question": figures},
        "trainer": "its process ended with status 3",
        "clip": {"images": figures},
    }
    text = accelerator.table(rows, "python -m benchmarks.accelerator")
    assert "| trainer | | not measured: its process ended with status 3 |" in text
    assert "| clip | images | 2000 | 0.5 TFLOP/s | 100% | before: 3.0 s |" in text
    assert "| ceilings | copy | 1000 | 1 GB/s | 100% |  |" in text and "jax 1" in text


@pytest.mark.slow
def test_the_command_adds_to_its_file_and_prints_the_table(tmp_path, capsys):
    output = tmp_path / "found.json"
    output.write_text(json.dumps([{"stage": "clip", "device": "another", "found": {}}]))
    accelerator.main(["--stages=ceilings", f"--output={output}"])
    old, new = json.loads(output.read_text())
    assert old["device"] == "another" and new["found"]["matrix"]["seconds"] > 0
    text = capsys.readouterr().out
    assert text.startswith("`python -m benchmarks.accelerator`, 20") and "cpu: " in text
    assert text.count("| ceilings |") == len(new["found"]) and "| clip |" not in text


@pytest.mark.slow
def test_an_unknown_stage_is_an_error(tmp_path):
    with pytest.raises(SystemExit, match="--stages: towers: not of ceilings"):
        accelerator.main(["--stages=towers", f"--output={tmp_path / 'x.json'}"])
