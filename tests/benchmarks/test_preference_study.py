"""The study of preference training: what it makes of its results."""

import dataclasses

import pytest
import tiny_store

from benchmarks.preference_study import KINDS, OF_PAIRS, PICKED, SHOWN, Study, picked_sets, summarise
from tspo_jax.config import Config
from tspo_jax.data.questions import read_questions
from tspo_jax.data.row_file import RowFile
from tspo_jax.runs.run_folder import RunFolderError
from tspo_jax.tpo.config import TpoConfig

PAIRS = dict.fromkeys(OF_PAIRS, 0.9)


def row(name, full, **more):
    return {"id": name, "full relation": full / 2} | dict.fromkeys(SHOWN, full) | {"questions": 100, **more}


def picks(name, share):
    return {"id": name, "questions": 100} | dict.fromkeys(PICKED, share)


ROWS = [
    row("before", 0.5),
    row("tpo 0", 0.7, **PAIRS),
    row("tpo 1", 0.8, **PAIRS),
    row("sft 0", 0.6, **PAIRS),
    picks("before | before 0", 0.4),
    picks("before | before 1", 0.6),
    picks("before | after 0", 0.5),
    picks("tpo 0 | before 0", 0.7),
    picks("tpo 0 | after 0", 0.9),
    picks("sft 0 | before 0", 0.5),
]


def test_means_gains_and_intervals():
    found = summarise(ROWS)
    assert found["before"]["full"]["low"] < 0.5 < found["before"]["full"]["high"]
    assert found["tpo"]["full"]["value"] == pytest.approx(0.75)
    assert found["tpo"]["full"]["low"] < 0.7 and found["tpo"]["full"]["high"] > 0.8
    assert found["tpo"]["full"]["gain"]["value"] == pytest.approx(0.25)
    assert found["sft"]["full"]["low"] is None and "dpo" not in found
    assert found["before"]["families"] == {"full relation": 0.25}
    assert found["tpo"]["families"] == {"full relation": pytest.approx(0.375)}


def test_gain_from_an_agents_picks_is_over_the_untuned_answerer_with_the_same_agent():
    found = summarise(ROWS)
    assert found["tpo"]["picks"]["gain"]["value"] == pytest.approx(0.3)  # seed 1 was not asked
    assert found["sft"]["few_picks"]["gain"]["value"] == pytest.approx(0.1)


def test_four_combinations():
    table = summarise(ROWS)["table"]
    shares = {name: cell["picks"]["value"] for name, cell in table.items()}
    assert shares == {
        "agent before, answerer before": pytest.approx(0.5),
        "agent before, answerer after": pytest.approx(0.7),
        "agent after, answerer before": pytest.approx(0.5),
        "agent after, answerer after": pytest.approx(0.9),
    }


def test_an_agents_picks(golden, tmp_path):
    store = tiny_store.make_store(tmp_path, golden)
    questions = read_questions(tiny_store.write_questions(tmp_path / "questions.jsonl", 2))[0]
    config = TpoConfig()
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, store=str(store), num_frames=4),
        build=dataclasses.replace(config.build, frames=2),
    )
    with RowFile(tmp_path / "study" / "results.jsonl") as file:
        for _ in range(2):
            Study(config, Config(), questions, tmp_path / "study", file)
        with pytest.raises(RunFolderError, match="config.num_steps: 157 there, 9 here"):
            Study(dataclasses.replace(config, num_steps=9), Config(), questions, tmp_path / "study", file)
    for sets in picked_sets(config, questions, golden / "tspo_agent"):
        assert {name: picks.shape for name, picks in sets.items()} == {"picks": (1, 4), "few_picks": (1, 2)}
        assert set(sets["few_picks"][0]) <= set(sets["picks"][0])


def test_controls():
    assert KINDS["sft"] == {"alpha": 0.0} and KINDS["dpo"] == {"gamma": 0.0}
