import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.streaming.objective import Schedule, answer_loss, found_evidence, selection_loss


def test_selection_loss_by_hand():
    scores = jnp.array([[1.0, 2.0, -jnp.inf], [0.0, 0.0, 0.0], [5.0, 1.0, 0.0]])
    evidence = jnp.array([[True, False, False], [True, True, False], [False, False, False]])
    first, second = -np.log(np.exp(1) / (np.exp(1) + np.exp(2))), np.log(3)
    assert selection_loss(scores, evidence) == pytest.approx((first + second) / 2, rel=1e-6)
    assert selection_loss(scores, jnp.zeros((3, 3), bool)) == 0


def test_answer_loss_counts_tokens():
    logits = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], [[0.2, 0.2, 0.6], [1.0, 1.0, 1.0]]]))
    targets = jnp.array([[0, 1], [2, -1]])
    assert answer_loss(logits, targets) == pytest.approx(-np.log([0.5, 0.8, 0.6]).mean(), rel=1e-5)
    assert answer_loss(logits, jnp.full((2, 2), -1)) == 0


def test_found_evidence():
    evidence = jnp.array([[True, False, False], [False, True, False], [False, False, False]])
    assert found_evidence(jnp.array([[0, 3], [0, 2], [0, 1]]), evidence) == 0.5
    assert found_evidence(jnp.array([[3, 3]] * 3), evidence) == 0


def test_schedule():
    schedule = Schedule(10, 4, 0.1)
    assert [float(schedule.weight(step)) for step in (0, 3, 4, 9)] == pytest.approx([1, 1, 0.1, 0.1])
    for wrong in (Schedule, (10, 11)), (Schedule, (10, 1, 2.0)):
        with pytest.raises(ValueError, match="not between"):
            wrong[0](*wrong[1])
