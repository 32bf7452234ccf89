"""Every illness is found in a log that has it, with its numbers; a healthy one has none."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from tiny_store import make_store

from tspo_jax import doctor as command
from tspo_jax.config import Config
from tspo_jax.tspo import doctor

CONFIG = json.loads(json.dumps(dataclasses.asdict(Config())))
NUM_STEPS = 60


def healthy(num_steps=NUM_STEPS):
    """A run that learns: rewards rise, scores sharpen, tau falls as in the paper."""
    rng, rows = np.random.default_rng(0), []
    for i in range(num_steps):
        done, kind = i / num_steps, ("general", "specific")[i % 2]
        row = {"step": i + 1, f"reward/{kind}": 0.4 + 0.3 * done, f"accuracy/{kind}": 0.4 + 0.3 * done}
        row |= {"location/specific": 0.3 + 0.4 * done} if kind == "specific" else {}
        row |= {
            "unparsed": 0.01, "dead_groups": 0.3 + 0.1 * rng.random(), "grad_norm": 0.5 + rng.random(),
            "score_entropy": math.log(60 - 35 * done), "tau": 0.025 - 0.015 * done, "cosine_spread": 0.03,
            "unique_frames": 60 - 30 * done, "compilations": 40 if i > 2 else 20 * i, "device_idle": 0.05,
        }  # fmt: skip
        row |= {f"seconds/{part}": s for part, s in zip(("data", "sample", "fetch", "answer", "update"),
                                                       (0.01, 0.02, 0.1, 1.0, 0.1), strict=True)}  # fmt: skip
        rows.append(row)
    return rows


def ill(**values):
    """The healthy log with metrics replaced, by a value or a function of (row, share of the run that is done)."""
    rows = healthy()
    for name, value in values.items():
        name = name.replace("__", "/")
        for i, row in enumerate(rows):
            if name in row:
                row[name] = value(row, i / NUM_STEPS) if callable(value) else value
    return rows


def test_a_healthy_run_has_no_finding():
    assert doctor.diagnose(healthy(), CONFIG) == []
    warm = [{"step": i, "label_loss": 1.0, "score_entropy": 1.0} for i in range(5)]
    assert doctor.diagnose(warm + healthy(), CONFIG) == []


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("dead_groups", ill(dead_groups=0.9), "90% of the groups"),
        ("always_right/general", ill(accuracy__general=0.99), "99% of the general answers are right"),
        ("always_wrong/specific", ill(accuracy__specific=0.01), "Only 1.0% of the specific answers"),
        ("unparsed", ill(unparsed=0.5), "50% of the answers name no option letter.*now 256"),
        (
            "too_sharp_from_the_start",
            ill(unique_frames=13.0, cosine_spread=0.3, score_entropy=1.0),
            "13.0 different frames together, for 12 picks.*spread by 0.300, 13 times tau",
        ),
        (
            "entropy_collapse",
            ill(score_entropy=lambda row, done: math.log(60) if done < 0.3 else 0.5),
            "over 60 frames at the start.*1.6 at the end",
        ),
        (
            "temperature_too_low",
            ill(tau=lambda row, done: 0.025 * (1 - done) + 0.0005, unique_frames=lambda row, done: 60 - 48 * done**0.1),
            "tau fell to 0.00",
        ),
        ("gradient_too_large", ill(grad_norm=500.0), "500 in most steps, 500 times"),
        ("no_gradient", ill(grad_norm=1e-9), "1.0e-09"),
        ("not_finite", ill(grad_norm=lambda row, done: None if row["step"] == 30 else 1.0), "at step 30"),
        ("input_bound", ill(seconds__fetch=2.0, device_idle=0.6), "waits 60% .* 2.00 s for the picked frames"),
        ("recompilations", ill(compilations=lambda row, done: row["step"]), "29 of the last 30 steps"),
    ],
)
def test_every_illness_is_found_alone(name, rows, said):
    (finding,) = doctor.diagnose(rows, CONFIG)
    assert finding.name == name
    assert re.search(said, finding.text), finding.text
    assert all(math.isfinite(value) for value in finding.numbers.values())


def test_stale_features(golden, tmp_path):
    store = make_store(tmp_path, golden)
    config = CONFIG | {
        "data": CONFIG["data"] | {"store": str(store)},
        "agent": CONFIG["agent"] | {"clip": str(golden / "tspo_agent")},
    }
    assert doctor.diagnose(healthy(), config) == []
    next((store / "features").rglob("short*")).unlink()
    (finding,) = doctor.diagnose(healthy(), config)
    assert finding.name == "stale_features" and "1 of 2 videos" in finding.text and "short.mp4" in finding.text


def test_command(tmp_path, capsys):
    assert command.main(["doctor", str(tmp_path)]) == 1
    assert "config.json: no such file; is" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ill(unparsed=0.5)) + '{"ste')
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert command.main(["doctor", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["findings"][0]["name"] == "unparsed" and "50%" in err
    (tmp_path / "config.json").write_text("{}")
    assert command.main(["doctor", str(tmp_path)]) == 1
    assert "is a run of another version: it has no field 'answerer'" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text(json.dumps(healthy()[0]) + "\n")
    assert command.main(["doctor", str(tmp_path)]) == 1
    assert "at least 3 are needed" in capsys.readouterr().err
    assert command.main(["doctor"]) == 1
