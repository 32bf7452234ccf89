"""The study's document and figures from runs that are made up, and that `run` leaves out what is done."""

import json
from xml.etree import ElementTree

import pytest

from benchmarks import ablations
from tspo_jax import config as cfg


def write_run(folder, accuracy, curve):
    """A finished run: accuracy by family in [0, 1], and training accuracy by step."""
    folder.mkdir(parents=True)
    rows = [{"method": "topk", "label": label, "accuracy": value} for label, value in accuracy.items()]
    (folder / "evaluation.json").write_text(json.dumps({"accuracy": rows}))
    (folder / "config.json").write_text(json.dumps({"batch_size": 4}))
    lines = [{"step": i + 1, "accuracy/general": value} for i, value in enumerate(curve)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def study(tmp_path):
    rows = [
        {"method": method, "label": label, "accuracy": value}
        for method, values in {"uniform": (0.2, 0.3), "clip-topk": (0.4, 0.5)}.items()
        for label, value in zip(("all", "lookup"), values, strict=True)
    ]
    (tmp_path / "untrained").mkdir()
    (tmp_path / "untrained" / "evaluation.json").write_text(json.dumps({"accuracy": rows}))
    for seed, (all_, lookup) in enumerate([(0.5, 0.6), (0.42, 0.4)]):
        write_run(tmp_path / "paper" / str(seed), {"all": all_, "lookup": lookup}, [0.1 * i for i in range(6)])
        write_run(tmp_path / "plus" / str(seed), {"all": all_ + 0.1, "lookup": lookup + 0.2}, [0.5] * 6)
    return tmp_path


def test_the_document_has_the_numbers(study):
    output = study / "docs" / "ablations.md"
    ablations.write(study, output)
    output.write_text(f"Findings.\n{output.read_text()}")
    ablations.write(study, output)
    text = output.read_text()
    assert text.startswith("Findings.\n# Ablations") and text.count("## Results") == 1
    assert "| clip-topk, untrained | | 40.0 | 50.0 |" in text
    assert "| paper | 2 | 46.0 [-5, 97] | 50.0 [-77, 177] |" in text
    assert "| paper | the paper's recipe |  |  | 1 of 2 | 5.7 |" in text
    assert "| +10.0 [10, 10] | +20.0 [20, 20] | 0 of 2 | 5.7 |" in text
    for name in ("gains", "curves"):
        figure = (output.parent / "ablations" / f"{name}.svg").read_text()
        assert f"ablations/{name}.svg" in text and len(figure) < 300_000
        root = ElementTree.fromstring(figure)
        words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert "paper" in words and "plus" in words
    assert figure.count("class='run'") == 4


def test_without_the_paper_there_is_nothing_to_compare_with(tmp_path):
    with pytest.raises(ValueError, match="no run of the paper's recipe is done"):
        ablations.write(tmp_path, tmp_path / "x.md")


def test_what_is_done_is_left_out(study, monkeypatch):
    called = []
    monkeypatch.setattr(ablations, "call", lambda module, *arguments: called.append((module, arguments)))
    ablations.run(study, study / "data", study / "held_out", ("paper", "plus"), (0, 1, 2), {"num_steps": 3})
    assert [module for module, _ in called] == ["train", "evaluate"] * 2
    plus = called[2][1]
    assert f"--run_dir={study / 'plus' / '2'}" in plus and "--config.agent.kind=question_aware" in plus
    assert f"--config.evaluation.questions={study / 'held_out' / 'eval.jsonl'}" in plus
    assert "--config.num_steps=3" in plus and "--config.seed=2" in plus


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_every_variant_is_a_config(name):
    config = cfg.default()
    config.update_from_flattened_dict(dict(ablations.VARIANTS[name].fields))
    read = cfg.read(config)
    assert (read == cfg.Config()) == (name == "paper")
