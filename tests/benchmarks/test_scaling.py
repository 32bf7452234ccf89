"""benchmarks/scaling.py without the TPU compiler: what is kept of programs, and the tables of it."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT))
from benchmarks import scaling

FACTS = {"topology": "v5e-16", "devices": 16, "mesh": {"data": 4, "model": 4}, "hbm_bytes": 16e9, "times": 1}


def program(seconds: float, **more) -> dict:
    sizes = {"argument_bytes": 4e9, "temporary_bytes": 3e9, "output_bytes": 0, "traffic_bytes": 7e11}
    costs = {"flops_all_devices": 1e15, "collectives": [], "compile_processor_seconds": 100}
    return {"fits": True, "bound": "arithmetic", "seconds": seconds} | sizes | costs | more


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Of LLaVA-Video on v5e-16 all programs; of a full preference training on v5p-8 the update."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(scaling, "KEPT", tmp_path)

    def keep(name, facts, result):
        (tmp_path / f"{name}.json").write_text(json.dumps(FACTS | facts | {"lowered": name, "result": result}))

    gathers = [{"kind": "all-gather", "bytes": 512, "devices": 4, "count": 30, "where": "decode/while/reduce"}]
    answer = program(2.0, pass_bytes={"encode": 5e9, "decode": 6e9}, collectives=gathers)
    for name, result in (("sample", program(0.25)), ("answer", answer), ("update", program(0.5))):
        facts = {"batch_size": 16, "token_bytes": 5e9, "times": 2 if name == "answer" else 1}
        keep(f"llava_video_7b_v5e-16_{name}", facts, result)
    facts = {"topology": "v5p-8", "batch_size": 64, "frames": 64, "trained": "full"}
    keep("tpo_llava_video_7b_full_v5p-8_update", facts, program(9.0))


def test_a_step_is_the_sum_of_its_programs(kept):
    (result,) = scaling.Case("llava_video_7b").results(scaling.CASES["llava_video_7b"])
    assert result["topology"] == "v5e-16" and result["seconds"] == 0.25 + 2 * 2.0 + 0.5 and result["fits"]
    page = scaling.section("llava_video_7b", 3360, [result], 2 * 3584 * 512)
    (row,) = (line for line in page.splitlines() if line.startswith("| v5e-16 |"))
    figures = "7.0 GB of 16.0 GB | 4.75 | 2.41 | 700.0 GB | 1.3 TB | 1.20 | none | 512 bytes | 3.7 MB |"
    assert row == f"| v5e-16 | {figures}"
    assert "| v5p-8 | not compiled, formerly 25.6 GB |  | 4.14 |  | 6.6 TB |" in page


def test_a_step_with_a_missing_program_has_no_time(kept, tmp_path):
    (tmp_path / "llava_video_7b_v5e-16_update.json").unlink()
    (result,) = scaling.Case("llava_video_7b").results(["v5e-16"])
    assert "seconds" not in result
    assert "| 7.0 GB of 16.0 GB |  | 2.41 |" in scaling.section("llava_video_7b", 3360, [result], 1)


def test_preference_training(kept):
    name = "tpo_llava_video_7b:full"
    case = scaling.Case(name)
    assert case.is_of_answerer and case.config.full
    results = case.results(scaling.CASES[name])
    assert results[0]["seconds"] == 9.0
    page = scaling.section_of_answerer([(name, results)])
    assert "configs/tpo_llava_video_7b.py:full on v5e-16: not compiled." in page
    assert "full, 64 frames, 64 pairs in a step; 7.0 GB of 16.0 GB." in page


def test_a_program_in_common_is_known(kept):
    assert scaling.known("v5e-16", "llava_video_7b_v5e-16_sample")["seconds"] == 0.25
    assert scaling.known("v5e-8", "llava_video_7b_v5e-16_sample") is None
