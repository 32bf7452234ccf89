import json

import numpy as np
import pytest

from tspo_jax.data.letters import option_letter
from tspo_jax.tspo import rewards


def test_golden_accuracy(golden):
    for case in json.loads((golden / "accuracy_reward.json").read_text()):
        assert rewards.accuracy(case["completion"], case["solution"]) == case["reward"], case


def test_answer_without_a_letter_is_never_correct():
    # The one exception to the original, which counts the first pair as equal. In the golden cases every
    # solution has a letter, so the exception does not touch them.
    assert rewards.accuracy("F", "<answer>f</answer>") == 0.0
    assert rewards.accuracy("", "") == 0.0
    assert rewards.accuracy("It cannot be determined", "<answer>a</answer>") == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("(c) the cat", "C"),
        ("2a", "A"),
        ("a dog, so B", "A"),
        ("AB", None),
        ("f", None),
        ("", None),
        ("**E**", "E"),
    ],
)
def test_option_letter(text, letter):
    assert option_letter(text) == letter


def test_solution_in_tags():
    assert rewards.accuracy("B", "a thought <answer>\nb\n</answer>") == 1.0
    assert rewards.accuracy("A", "a thought <answer>b</answer>") == 0.0


def test_golden_trajectory(golden):
    data = np.load(golden / "training_trajectory.npz")
    for step in range(6):
        name = f"step{step}"
        kind = str(data[f"{name}/type"])
        result = rewards.group_rewards(
            kind,
            completions=[["b" if right else "I do not know" for right in data[f"{name}/accuracy_reward"]]],
            solutions=["<answer>b</answer>"],
            picks=data[f"{name}/selected"][None],
            needle_mask=data[f"{name}/needle_mask"][None],
        )
        np.testing.assert_array_equal(result["accuracy"][0], data[f"{name}/accuracy_reward"])
        if kind == "specific":
            np.testing.assert_array_equal(result["location"][0], data[f"{name}/temporal_reward"])
            np.testing.assert_array_equal(result["total"][0], data[f"{name}/rewards"])
        else:  # the original's constant 1, which cancels in the advantages
            assert result.keys() == {"accuracy", "total"}
            np.testing.assert_array_equal(result["total"][0] + 1, data[f"{name}/rewards"])


def test_batch_and_weights():
    result = rewards.group_rewards(
        "specific",
        completions=[["A", "B"], ["C", "nothing"]],
        solutions=["<answer>a</answer>", "C. a cat"],
        picks=np.array([[[0, 1], [2, 3]], [[0, 3], [1, 2]]]),
        needle_mask=np.array([[True, False, False, False], [True, False, False, True]]),
        weights={"specific": {"accuracy": 2.0, "location": 0.5}},
    )
    np.testing.assert_array_equal(result["accuracy"], [[1, 0], [1, 0]])
    np.testing.assert_array_equal(result["location"], [[0.5, 0], [1, 0]])
    np.testing.assert_array_equal(result["total"], [[2.25, 0], [2.5, 0]])
    assert result["total"].dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "weights", "message"),
    [
        ("specfic", rewards.PAPER_WEIGHTS, "kind is 'specfic', not one of general, specific"),
        ("general", {"general": {"speed": 1.0}}, "weights.general names 'speed', not one of accuracy, location"),
    ],
)
def test_bad_input(kind, weights, message):
    with pytest.raises(ValueError, match=message):
        rewards.group_rewards(kind, [["A"]], ["A"], np.zeros((1, 1, 1), int), np.ones((1, 1), bool), weights)


def test_coverage_by_hand():
    picks = np.array([[0, 1, 2, 3], [0, 5, 10, 19], [0, 4, 5, 6]])
    np.testing.assert_allclose(rewards.coverage(picks, 20), [0.25, 1.0, 0.5])
    assert rewards.coverage(np.array([[18, 3]]), 20)[0] == 1


def test_soft_rewards_by_hand():
    log_probs = np.log([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]).astype(np.float32)
    np.testing.assert_allclose(rewards.right_option(log_probs, "<answer>c</answer>"), [0.3, 0.1], rtol=1e-5)
    np.testing.assert_allclose(
        rewards.right_option(log_probs, "C", margin=True), [np.log(3 / 4), np.log(1 / 7)], rtol=1e-5
    )
    weights = {"general": {"accuracy": 1.0, "probability": 2.0, "margin": 0.5, "coverage": 0.1}}
    picks = np.array([[[0, 9], [1, 2]]])
    found = rewards.group_rewards("general", [["C", "A"]], ["C"], picks, None, weights, np.array([10]), log_probs[None])
    np.testing.assert_allclose(
        found["total"][0],
        [1 + 0.6 + 0.5 * np.log(3 / 4) + 0.1, 0.2 + 0.5 * np.log(1 / 7) + 0.05],
        rtol=1e-5,
    )
