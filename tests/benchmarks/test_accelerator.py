"""benchmarks/accelerator.py on the CPU: no stage that overruns or fails stops the rest."""

import json
import sys

import pytest
import scripted_stages
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import accelerator


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
