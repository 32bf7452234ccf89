"""The study of preference training: what it makes of its results."""

import pytest

from benchmarks.preference_study import KINDS, summarise


def row(name, full, **more):
    pairs = {
        "eval_rewards/accuracies": 0.9,
        "eval_rewards/margins": 1.0,
        "eval_logps/chosen": -1,
        "eval_ref_logps/chosen": -2,
    }
    return {"id": name, "full": full, "evidence": 0.9, "without": 0.25, "questions": 100, **pairs, **more}


def test_means_and_intervals():
    rows = [row("before", 0.5), row("tpo 0", 0.7), row("tpo 1", 0.8), row("sft 0", 0.6)]
    found = summarise(rows)
    assert found["before"]["full"]["low"] < 0.5 < found["before"]["full"]["high"]
    assert found["tpo"]["full"]["value"] == pytest.approx(0.75)
    assert found["tpo"]["full"]["low"] < 0.7 and found["tpo"]["full"]["high"] > 0.8
    assert found["sft"]["full"]["low"] is None and "dpo" not in found


def test_controls():
    assert KINDS["sft"] == {"alpha": 0.0} and KINDS["dpo"] == {"gamma": 0.0}
