"""Each rule finds its illness and nothing else; a healthy run has no finding."""

import math

import pytest

from tspo_jax.tpo.doctor import diagnose

CONFIG = {"num_steps": 40, "preference": {"loss_type": "sigmoid", "beta": 0.2, "gamma": 1.0, "alpha": 1.0}}


def healthy(num_steps=40):
    """The margin grows slowly, the chosen answers too."""
    rows = []
    for i in range(num_steps):
        margin = 0.05 * i
        rows.append(
            {
                "step": i + 1,
                "loss": math.log1p(math.exp(-margin)) + 1.0,
                "losses/dpo": math.log1p(math.exp(-margin)),
                "losses/sft": 1.0,
                "rewards/chosen": margin / 2,
                "rewards/rejected": -margin / 2,
                "rewards/margins": margin,
                "rewards/margin_per_token": margin / 10,
                "rewards/accuracies": min(0.95, i / 20),
                "logps/chosen": -10 + margin,
                "logps/rejected": -10 - margin,
                "ref_logps/chosen": -10.0,
                "ref_logps/rejected": -10.0,
                "tokens/chosen": 10.0,
                "tokens/rejected": 10.0,
                "learning_rate": 1e-5 * (i > 0),
            }
        )
    rows.append({"step": num_steps, "eval_loss": 1.2, "eval_rewards/accuracies": 0.9})
    return rows


def changed(**change):
    """A healthy run with metrics that are functions of the row."""
    rows = healthy()
    for row in rows[:-1]:
        row.update({name: value(row) for name, value in change.items()})
    return rows


def test_a_healthy_run():
    assert diagnose(healthy(), CONFIG) == []


@pytest.mark.parametrize(
    "name, rows",
    [
        ("chosen_less_likely", changed(**{"logps/chosen": lambda row: -10 - 0.1 * row["step"]})),
        ("loss_stays", changed(**{"losses/dpo": lambda row: math.log(2), "rewards/accuracies": lambda row: 0.0})),
        ("wrong_reference", changed(**{"rewards/chosen": lambda row: 2.0})),
        (
            "longer_is_better",
            changed(**{"tokens/chosen": lambda row: 30.0, "rewards/margin_per_token": lambda row: -0.1}),
        ),
        ("not_finite", changed(loss=lambda row: None if row["step"] > 30 else 1.0)),
    ],
)
def test_one_illness_one_finding(name, rows):
    (finding,) = diagnose(rows, CONFIG)
    assert finding.name == name and finding.text and all(math.isfinite(x) for x in finding.numbers.values())


def test_pairs_that_are_told_apart_at_once():
    rows = changed(**{"rewards/accuracies": lambda row: float(row["step"] > 1)})
    assert diagnose(rows, CONFIG) == [], "where held-out pairs are ranked right as well"
    rows[-1]["eval_rewards/accuracies"] = 0.5
    (finding,) = diagnose(rows, CONFIG)
    assert finding.name == "told_apart_at_once" and "held-out pairs 50% at best" in finding.text


def test_too_few_steps():
    with pytest.raises(ValueError, match="2 steps"):
        diagnose(healthy(2), CONFIG)
