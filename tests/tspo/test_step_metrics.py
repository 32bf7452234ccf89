"""Names of the metrics of a step."""

from tspo_jax.tspo import step_metrics


def test_rewards_are_named_by_the_kind_and_come_first():
    metrics = {"accuracy": 0.5, "grad_norm": 2.0, "location": 0.25, "total": 0.75, "unparsed": 0.0}
    named = step_metrics.of_kind("specific", metrics)
    assert named == {
        "reward/specific": 0.75,
        "accuracy/specific": 0.5,
        "location/specific": 0.25,
        "grad_norm": 2.0,
        "unparsed": 0.0,
    }
    assert list(named)[:3] == ["reward/specific", "accuracy/specific", "location/specific"]
    assert step_metrics.of_kind("general", {"label_loss": 1.0, "tau": 0.1}) == {"label_loss": 1.0, "tau": 0.1}


def test_the_main_method_is_the_score_of_held_out_questions():
    found = step_metrics.held_out(20, {"uniform": 0.5, "topk": 0.625}, "topk")
    assert found.metrics == {"held_out/uniform": 0.5, "held_out/topk": 0.625} and found.score == 0.625
    assert found.said == "right in held-out questions after step 20: uniform 50.0 %, topk 62.5 %"


def test_every_reward_and_part_has_a_column_or_a_name():
    columns = step_metrics.COLUMNS
    assert list(columns)[0] == "step" and {f"seconds/{part}" for part in step_metrics.PARTS} <= columns.keys()
    assert len(set(columns.values())) == len(columns), "headings differ"
