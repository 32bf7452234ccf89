"""Losses of pairs against those of TPO's own trainer (golden), and their properties."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.tpo import losses
from tspo_jax.tpo.losses import AnswerLogProbs, Objective


@pytest.fixture(scope="module")
def recorded(golden):
    with np.load(golden / "dpo_losses.npz") as arrays:
        return json.loads(str(arrays["meta"])), {name: arrays[name] for name in arrays.files if name != "meta"}


def by_pair(x: AnswerLogProbs) -> AnswerLogProbs:
    """[2B] with the chosen answers first -> [B, 2]."""
    return AnswerLogProbs(*(y.reshape(2, -1).T for y in x))


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(loss_type, numbers, logits, ref_logits, labels):
    """Compiled once per kind of loss and case; `numbers` are the other fields of the objective."""
    objective = Objective(loss_type, **numbers)
    reference = by_pair(losses.label_log_probs(ref_logits, labels))

    def loss(logits):
        policy = by_pair(losses.label_log_probs(logits, labels))
        total, parts = losses.total_loss(objective, policy, reference)
        compared = policy.of(objective), reference.of(objective)
        each = losses.preference_losses(objective, *compared), losses.rewards(objective, *compared)
        metrics = losses.pair_metrics(objective, policy, reference, jnp.ones(len(policy.total)))
        return total, (*each, parts, metrics)

    return jax.value_and_grad(loss, has_aux=True)(logits)


def test_golden_log_probs(recorded):
    meta, arrays = recorded
    for case in meta["cases"]:
        name = f"case{case['case']}"
        for kind in ("", "ref_"):
            found = losses.label_log_probs(arrays[f"{name}/{kind}logits"], arrays[f"{name}/labels"])
            np.testing.assert_allclose(found.total, arrays[f"{name}/{kind}logps_sum"], rtol=1e-5, atol=2e-5)
            np.testing.assert_allclose(found.mean, arrays[f"{name}/{kind}logps_mean"], rtol=1e-5, atol=2e-5)


def test_golden_losses_rewards_and_gradients(recorded):
    meta, arrays = recorded
    assert meta["runs"]
    for run in meta["runs"]:
        name, case = f"run{run['run']}", f"case{run['case']}"
        objective = Objective(**{field: run[field] for field in Objective._fields}).check()
        logits, ref_logits, labels = (arrays[f"{case}/{field}"] for field in ("logits", "ref_logits", "labels"))
        numbers = objective._asdict()
        loss_type = numbers.pop("loss_type")
        outputs, grad = value_and_grad(loss_type, numbers, logits, ref_logits, labels)
        total, (each, rewards, parts, metrics) = outputs
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=2e-5, err_msg=str(run))
        close(each, arrays[f"{name}/losses"])
        close(rewards[:, 0], arrays[f"{name}/rewards_chosen"])
        close(rewards[:, 1], arrays[f"{name}/rewards_rejected"])
        found = {
            "dpo": parts["losses/dpo"],
            "sft": parts["losses/sft"],
            "total": total,
            "accuracy": metrics["rewards/accuracies"],
            "margin": metrics["rewards/margins"],
        }
        close([found[scalar] for scalar in meta["scalars"]], arrays[f"{name}/scalars"])
        predicts = np.zeros(labels.shape, bool)
        predicts[:, :-1] = labels[:, 1:] != losses.IGNORED
        np.testing.assert_allclose(np.asarray(grad)[predicts], arrays[f"{name}/grad"], atol=1e-6, err_msg=str(run))
        assert not np.asarray(grad)[~predicts].any()


@pytest.mark.parametrize("loss_type", losses.LOSS_TYPES)
def test_rows_of_weight_zero_change_nothing(loss_type):
    rng = np.random.default_rng(0)
    objective = Objective(loss_type, beta=0.3)
    policy, reference = (
        AnswerLogProbs(*map(jnp.asarray, (-10 * rng.random((5, 2)), rng.integers(1, 9, (5, 2))))) for _ in range(2)
    )
    weights = jnp.array([1.0, 1, 1, 0, 0])
    padded = losses.total_loss(objective, policy, reference, weights)
    alone = losses.total_loss(objective, *(AnswerLogProbs(*(y[:3] for y in x)) for x in (policy, reference)))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), padded, alone)


def test_parts_add_up_to_the_whole_batch():
    rng = np.random.default_rng(1)
    objective = Objective("sigmoid", beta=0.3)
    policy, reference = (
        AnswerLogProbs(*map(jnp.asarray, (-10 * rng.random((6, 2)), rng.integers(1, 9, (6, 2))))) for _ in range(2)
    )
    whole, _ = losses.total_loss(objective, policy, reference)
    tokens = policy.tokens[:, 0].sum()
    parts = [
        losses.total_loss(
            objective, *(AnswerLogProbs(*(y[i : i + 2] for y in x)) for x in (policy, reference)), None, 6, tokens
        )[0]
        for i in (0, 2, 4)
    ]
    np.testing.assert_allclose(sum(parts), whole, rtol=1e-6)


def test_policy_equal_to_reference_is_log_2_and_ranks_nothing_right():
    same = AnswerLogProbs(jnp.array([[-3.0, -4.0]]), jnp.array([[2, 3]]))
    loss, _ = losses.total_loss(Objective(gamma=0.0), same, same)
    metrics = losses.pair_metrics(Objective(), same, same, jnp.ones(1))
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    assert metrics["rewards/accuracies"] == 0 and metrics["rewards/margins"] == 0


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"loss_type": "dpo"}, "loss_type is 'dpo', not one of sigmoid"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "loss_type hinge has none"),
        ({"alpha": 0.0, "gamma": 0.0}, "at least one"),
    ],
)
def test_settings_without_meaning_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Objective(**fields).check()
