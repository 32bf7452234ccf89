import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.tspo import policy
from tspo_jax.tspo.policy import Objective


def probability_of_draw(logits: np.ndarray, draw: tuple[int, ...]) -> float:
    """Chance to draw these frames in this order without replacement from softmax(logits)."""
    weight = np.exp(np.float64(logits))
    chance, left = 1.0, weight.sum()
    for frame in draw:
        chance, left = chance * weight[frame] / left, left - weight[frame]
    return chance


# ---- schedules and optimiser ----


def test_schedules(golden):
    data = np.load(golden / "training_trajectory.npz")
    for step in range(6):
        assert policy.temperature(step, 10) == pytest.approx(data[f"step{step}/tau"], rel=1e-6)
        assert policy.learning_rate(step, 10) == pytest.approx(data[f"step{step}/lr"].item(), rel=1e-6)
    assert policy.temperature(10, 10) == policy.temperature(99, 10) == pytest.approx(0.01)
    assert policy.learning_rate(10, 10) == policy.learning_rate(99, 10) == 0


def test_optimizer_clips_the_global_norm():
    # Adam is blind to the scale of all gradients, but not to one step's against another's.
    optimizer = policy.make_optimizer(num_steps=1000, peak_learning_rate=1.0, max_grad_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    grads = [{"a": jnp.array([0.6]), "b": jnp.array([0.0])}, {"a": jnp.array([30.0]), "b": jnp.array([40.0])}]
    state = optimizer.init(params)
    for grad in grads:
        updates, state = optimizer.update(grad, state, params)
    # The second gradient is clipped to (0.6, 0.8): both moments of `a` are as after twice the same gradient.
    rate = policy.learning_rate(1, 1000, 1.0)
    np.testing.assert_allclose(updates["a"], -rate, rtol=1e-4)
    b = (0.1 * 0.8 / (1 - 0.9**2)) / np.sqrt(0.001 * 0.64 / (1 - 0.999**2))
    np.testing.assert_allclose(updates["b"], -rate * b, rtol=1e-4)


# ---- sampling ----


def test_golden_picks_and_log_probs(golden):
    data = np.load(golden / "group_sampling.npz")
    for case, meta in enumerate(json.loads(str(data["meta"]))):
        logits, noise = data[f"case{case}/logits"], data[f"case{case}/gumbel_noise"]
        draws = policy.perturbed_top_k(logits[None], noise[None], meta["k"])
        picks = jnp.sort(draws, axis=-1)
        np.testing.assert_array_equal(picks[0], data[f"case{case}/selected"])
        expected = data[f"case{case}/log_probs"][data[f"case{case}/selected"]]
        np.testing.assert_allclose(policy.independent_log_probs(logits[None], picks)[0], expected, atol=1e-5)


def test_draws_follow_plackett_luce():
    logits = jnp.array([[1.5, -0.5, 0.0, 0.7, -1.0, 0.3]])
    num_draws = 40_000
    keys = policy.question_keys(0, 0, jnp.arange(1))
    draws = np.asarray(jax.jit(policy.gumbel_draws, static_argnums=(2, 3))(keys, logits, num_draws, 3))[0]
    orders = list(itertools.permutations(range(6), 3))
    exact = np.array([probability_of_draw(logits[0], order) for order in orders])
    assert exact.sum() == pytest.approx(1)
    # Inclusion of each frame, then each of the 120 ordered draws (4.5 standard errors: 1 of 1000 seeds fails).
    included = np.array([sum(p for p, o in zip(exact, orders, strict=True) if t in o) for t in range(6)])
    frequency = (draws[..., None] == np.arange(6)).any(1).mean(0)
    assert (abs(frequency - included) < 4.5 * np.sqrt(included * (1 - included) / num_draws)).all()
    code = draws @ [36, 6, 1]
    frequency = np.array([(code == np.dot(order, [36, 6, 1])).mean() for order in orders])
    assert (abs(frequency - exact) < 4.5 * np.sqrt(exact * (1 - exact) / num_draws)).all()


def test_picks_ascend_and_never_hold_padding():
    logits = jnp.where(jnp.arange(12) < 9, jax.random.normal(jax.random.key(0), (3, 12)), -jnp.inf)
    keys = policy.question_keys(0, 0, jnp.arange(3))
    for k in (1, 5, 9):
        picks = np.asarray(policy.gumbel_top_k(keys, logits, group_size=64, k=k))
        assert picks.shape == (3, 64, k) and picks.dtype == np.int32
        assert (np.diff(picks) > 0).all() and picks.min() >= 0 and picks.max() < 9


def test_picks_depend_on_seed_step_and_question_alone():
    logits = np.random.default_rng(1).normal(size=(5, 30)).astype(np.float32)
    index = np.array([3, 14, 15, 92, 65])

    @jax.jit
    def draw(seed, step, index, logits):
        return policy.gumbel_top_k(policy.question_keys(seed, step, index), logits, group_size=4, k=6)

    def picks(seed, step, questions):
        return np.asarray(draw(seed, step, index[questions], logits[questions]))

    everyone = np.arange(5)
    expected = picks(7, 2, everyone)
    for questions in ([4, 3, 2, 1, 0], [4, 0, 2], [1, 3, 3]):
        np.testing.assert_array_equal(picks(7, 2, np.array(questions)), expected[questions])
    padded = np.pad(logits, ((0, 0), (0, 11)), constant_values=-np.inf)
    np.testing.assert_array_equal(draw(7, 2, index, padded), expected)
    assert (picks(8, 2, everyone) != expected).any((1, 2)).all()
    assert (picks(7, 3, everyone) != expected).any((1, 2)).all()
    same_logits = np.asarray(draw(7, 2, index, np.tile(logits[:1], (5, 1))))
    assert len(np.unique(same_logits.reshape(5, -1), axis=0)) == 5
    assert len(np.unique(same_logits[0], axis=0)) == 4


def test_picks_are_the_same_on_a_mesh():
    logits = jax.random.normal(jax.random.key(1), (8, 30))

    @jax.jit
    def picks(index, logits):
        return policy.gumbel_top_k(policy.question_keys(0, 5, index), logits, 4, 6)

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    on_mesh = picks(*jax.device_put((jnp.arange(8), logits), split))
    np.testing.assert_array_equal(on_mesh, picks(jnp.arange(8), logits))


def test_check_candidates():
    mask = np.arange(10) < np.array([[10], [4], [7]])
    policy.check_candidates(mask, 4, np.array([20, 21, 22]), "config.num_picks")
    with pytest.raises(ValueError, match=r"config.num_picks is 8, .* question 21 \(4\), 22 \(7\): lower"):
        policy.check_candidates(mask, 8, np.array([20, 21, 22]), "config.num_picks")
    with pytest.raises(ValueError, match="config.num_picks is 0"):
        policy.check_candidates(mask, 0, np.array([20, 21, 22]), "config.num_picks")


# ---- log-probabilities ----


def test_plackett_luce_equals_enumeration():
    logits = jnp.array([[1.5, -0.5, 0.0, 0.7, -1.0, 0.3, -jnp.inf]])
    orders = np.array(list(itertools.permutations(range(6), 3)))
    exact = [probability_of_draw(logits[0], order) for order in orders]
    log_probs = policy.plackett_luce_log_probs(logits, orders[None])[0]
    np.testing.assert_allclose(log_probs.sum(-1), np.log(exact), atol=1e-5)
    # The first frame's own term is the plain softmax.
    np.testing.assert_allclose(log_probs[:, 0], policy.independent_log_probs(logits, orders[None])[0, :, 0], atol=1e-6)


@pytest.mark.parametrize("draw", [(3, 0, 5), (2, 4, 1), (0, 1, 2, 3, 4, 5)])
def test_plackett_luce_gradient(draw):
    logits = np.array([1.5, -0.5, 0.0, 0.7, -1.0, 0.3])
    padded = jnp.pad(jnp.float32(logits)[None], ((0, 0), (0, 2)), constant_values=-jnp.inf)
    grad = jax.grad(lambda x: policy.plackett_luce_log_probs(x, jnp.array([[draw]])).sum())(padded)[0]
    step = 1e-5 * np.eye(6)
    difference = [
        np.log(probability_of_draw(logits + d, draw) / probability_of_draw(logits - d, draw)) / 2e-5 for d in step
    ]
    np.testing.assert_allclose(grad[:6], difference, atol=1e-5)
    np.testing.assert_array_equal(grad[6:], 0)


# ---- advantages and loss ----


def test_golden_advantages(golden):
    data = np.load(golden / "training_trajectory.npz")
    for step in range(6):
        advantages = policy.grpo(data[f"step{step}/rewards"])
        np.testing.assert_allclose(advantages, data[f"step{step}/advantages"], atol=1e-5)


def test_advantages_by_hand():
    rewards = jnp.array([[1.0, 0, 0, 0, 0, 0, 0, 0], [2.0] * 8])
    np.testing.assert_allclose(policy.grpo(rewards)[:, :2], [[2.474174, -0.353453], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(policy.dr_grpo(rewards)[:, :2], [[0.875, -0.125], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(policy.leave_one_out(rewards)[:, :2], [[1, -1 / 7], [0, 0]], atol=1e-6)


@pytest.mark.parametrize("advantage", policy.ADVANTAGES)
def test_equal_rewards_teach_exactly_nothing(advantage):
    assert not policy.ADVANTAGES[advantage](jnp.full((1, 12), 1 / 3 + 1)).any()


def test_loss_gradient_by_hand():
    # -(1/BG) sum A (1/K) sum_k grad log softmax, and nothing for padding.
    logits = jnp.array([[0.3, -1.0, 2.0, -jnp.inf], [0.0, 0.5, -0.5, 1.0]])
    picks = jnp.array([[[0, 1], [1, 2]], [[0, 3], [2, 3]]])
    rewards = jnp.array([[1.0, 0.0], [0.25, 0.5]])
    value, grad = jax.value_and_grad(lambda x: policy.loss(x, picks, rewards)[0])(logits)
    expected = np.zeros((2, 4))
    for b in range(2):
        for g in range(2):
            for pick in picks[b, g]:
                score = np.eye(4)[pick] - jax.nn.softmax(logits[b])
                expected[b] -= policy.grpo(rewards)[b, g] * score / 2 / 4
    assert value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_metrics():
    logits = jnp.array([[0.0, 0.0, 0.0, -jnp.inf], [50.0, 0.0, 0.0, 0.0]])
    picks = jnp.zeros((2, 4, 1), jnp.int32)
    rewards = jnp.array([[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]])
    metrics = policy.loss(logits, picks, rewards, Objective(advantage="dr_grpo"))[1]
    assert metrics["score_entropy"] == pytest.approx(np.log(3) / 2, abs=1e-5)
    assert metrics["dead_groups"] == 0.5
    assert metrics["advantage_std"] == pytest.approx(np.std([-0.5, 0.5, 0.5, -0.5], ddof=1) / 2)
    assert jnp.isfinite(jax.grad(lambda x: policy.score_entropy(x).sum())(logits)).all()


def test_bad_objective():
    with pytest.raises(ValueError, match="objective.advantage is 'ppo', not one of grpo, dr_grpo"):
        Objective(advantage="ppo")
    with pytest.raises(ValueError, match="objective.log_prob is 'exact', not one of independent"):
        Objective(log_prob="exact")
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        policy.loss(jnp.zeros((1, 4)), jnp.zeros((1, 1, 2), jnp.int32), jnp.zeros((1, 1)))


@pytest.mark.parametrize("advantage", policy.ADVANTAGES)
@pytest.mark.parametrize("log_prob", policy.LOG_PROBS)
def test_every_objective_learns_a_needle(advantage, log_prob):
    """A table of 12 logits, reward = share of picks among frames 4-6: the policy learns to pick them."""
    optimizer = policy.make_optimizer(num_steps=40, peak_learning_rate=0.3)
    logits = jnp.zeros((2, 12))

    @jax.jit
    def step(logits, opt_state, step):
        draws = policy.gumbel_draws(policy.question_keys(0, step, jnp.arange(2)), logits, 8, 3)
        rewards = ((draws >= 4) & (draws <= 6)).mean(-1)
        objective = Objective(advantage, log_prob)
        new = policy.update(lambda p: p, optimizer, logits, opt_state, draws, rewards, objective)
        return *new[:2], rewards.mean()

    opt_state, history = optimizer.init(logits), []
    for i in range(40):
        logits, opt_state, reward = step(logits, opt_state, i)
        history.append(float(reward))
    assert np.mean(history[:3]) < 0.5
    assert np.mean(history[-5:]) > 0.9


# ---- the original's training run ----


def nnx_path(name: str) -> tuple[str, ...]:
    module, kind = name.rsplit(".", 1)
    module = module.replace("mlp.0", "mlp.linear_1").replace("mlp.2", "mlp.linear_2")
    return (*module.split("."), {"weight": "kernel", "bias": "bias"}[kind])


def golden_tree(data, prefix: str) -> dict:
    """Parameters or gradients of the golden agent as {path: array}."""
    names = [name for name in data.files if name.startswith(prefix)]
    return {nnx_path(name.removeprefix(prefix)): data[name].T for name in names}


@pytest.mark.parametrize("padding", [0, 9])
def test_golden_training_trajectory(golden, padding):
    """Scores, draws, loss, gradients and AdamW over the six steps of the original's trainer in the file."""
    data = np.load(golden / "training_trajectory.npz")
    graphdef = nnx.graphdef(TemporalAgent(64, num_heads=8, window=12, rngs=nnx.Rngs(0)))
    params = nnx.traversals.unflatten_mapping(golden_tree(data, "init/"))
    optimizer = policy.make_optimizer(num_steps=10)
    flatten = nnx.traversals.flatten_mapping

    @jax.jit
    def step(params, opt_state, step, inputs, noise, rewards, picks):
        def score(params):
            agent = nnx.merge(graphdef, params)
            return agent(**inputs, temperature=policy.temperature(step, num_steps=10))

        drawn = jnp.sort(policy.perturbed_top_k(score(params), noise, picks.shape[-1]), axis=-1)
        grads = jax.grad(lambda p: policy.loss(score(p), drawn, rewards)[0])(params)
        return drawn, grads, *policy.update(score, optimizer, params, opt_state, drawn, rewards)

    opt_state = optimizer.init(params)
    for i in range(6):
        now = {key: data[f"step{i}/{key}"] for key in ("selected", "rewards", "loss", "grad_norm")}
        num_frames = len(data[f"step{i}/clip_scores"])
        inputs = {
            "features": np.pad(data[f"step{i}/image_features"], ((0, padding), (0, 0)))[None],
            "text": data[f"step{i}/text_features"],
            "clip_scores": np.pad(data[f"step{i}/clip_scores"], (0, padding))[None],
            "mask": np.arange(num_frames + padding)[None] < num_frames,
        }
        noise = np.pad(data[f"step{i}/gumbel_noise"], ((0, 0), (0, padding)))[None]
        drawn, grads, params, opt_state, metrics = step(
            params, opt_state, i, inputs, noise, now["rewards"][None], now["selected"][None]
        )
        np.testing.assert_array_equal(drawn[0], now["selected"])
        np.testing.assert_allclose(metrics["loss"], now["loss"], atol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], now["grad_norm"].item(), rtol=1e-4, atol=1e-7)
        if i == 0:
            for path, expected in golden_tree(data, "grad0/").items():
                np.testing.assert_allclose(flatten(grads)[path], expected, atol=1e-6, err_msg=str(path))
                assert path[1] != "ffn_o" or not np.any(flatten(grads)[path])
    # A weight moves by up to 2e-3. Adam divides by the gradient's size, so where that is rounding alone (Self_k.bias)
    # or nearly nothing, the last digits decide: hence the tolerance.
    for path, expected in golden_tree(data, "final/").items():
        np.testing.assert_allclose(flatten(params)[path], expected, atol=4e-5, err_msg=str(path))


# ---- beyond the paper ----


def test_clipping_by_hand():
    """Frames drawn at log-probabilities 0.3 lower or higher: only improvements beyond the limits are cut off."""
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.3, 0.4]]))
    picks, rewards = jnp.array([[[0, 1], [2, 3]]]), jnp.array([[1.0, 0.0]])
    log_probs = policy.independent_log_probs(logits, picks)
    drawn = log_probs - jnp.array([[[0.3, -0.3], [0.3, -0.3]]])  # ratios 1.35 and 0.74
    objective = Objective(advantage="dr_grpo", clip_low=0.2, clip_high=0.28)
    value, metrics = policy.loss(logits, picks, rewards, objective, drawn_log_probs=drawn)
    up, down = np.exp(0.3), np.exp(-0.3)
    # A = 0.5: min(r A, clip(r) A) = 0.64, r A; A = -0.5: r A, clip(r) A = -0.4
    expected = -(0.5 * 1.28 + 0.5 * down - 0.5 * up - 0.5 * 0.8) / 4
    assert value == pytest.approx(expected, abs=1e-6) and metrics["clipped"] == 1.0
    grad = jax.grad(lambda x: policy.loss(x, picks, rewards, objective, drawn_log_probs=drawn)[0])(logits)[0]
    score = lambda frame: np.eye(4)[frame] - np.array([0.1, 0.2, 0.3, 0.4])  # noqa: E731
    np.testing.assert_allclose(grad, -(0.5 * down * score(1) - 0.5 * up * score(2)) / 4, atol=1e-6)


def test_the_first_of_several_steps_is_the_papers():
    """With the limits far away, two inner steps are one step, then one on the ratio to the policy that drew."""
    logits = jnp.array([[0.3, -1.0, 2.0, 0.1]])
    picks, rewards = jnp.array([[[0, 1], [1, 2]]]), jnp.array([[1.0, 0.0]])
    optimizer = optax.sgd(0.5)
    drawn = policy.independent_log_probs(logits, picks)
    expected = logits
    for _ in range(2):
        objective = Objective(clip_low=0.99, clip_high=99.0)
        grad = jax.grad(lambda x: policy.loss(x, picks, rewards, objective, drawn)[0])(expected)  # noqa: B023
        expected = expected - 0.5 * grad
    new, _, metrics = policy.update(
        lambda x: x, optimizer, logits, optimizer.init(logits), picks, rewards, objective, inner_steps=2
    )
    np.testing.assert_allclose(new, expected, atol=1e-6)
    once = policy.update(lambda x: x, optimizer, logits, optimizer.init(logits), picks, rewards)[0]
    assert (new != once).any() and metrics["clipped"] == 0


def test_kl_and_entropy_by_hand():
    p, q = np.array([0.7, 0.2, 0.1]), np.array([0.25, 0.25, 0.5])
    logits, reference = (jnp.log(jnp.array([[*x, 0.0]])) for x in (p, q))
    expected = (p * np.log(p / q)).sum()
    np.testing.assert_allclose(policy.kl_divergence(logits, reference), [expected], rtol=1e-5)
    picks, rewards = jnp.array([[[0], [1]]]), jnp.zeros((1, 2))
    value, metrics = policy.loss(logits, picks, rewards, Objective(kl=0.5, entropy=0.1), reference=reference)
    assert value == pytest.approx(0.5 * expected + 0.1 * (p * np.log(p)).sum(), rel=1e-5)
    assert metrics["kl"] == pytest.approx(expected, rel=1e-5)
    grad = jax.grad(lambda x: policy.loss(x, picks, rewards, Objective(kl=1.0), reference=reference)[0])(logits)
    np.testing.assert_allclose(grad[0], [*(p * (np.log(p / q) - expected)), 0], atol=1e-5)
    with pytest.raises(ValueError, match="initial agent's logits are not given"):
        policy.loss(logits, picks, rewards, Objective(kl=1.0))


def test_skipped_groups_do_not_count():
    logits, picks = jnp.array([[0.3, -1.0, 2.0], [0.0, 0.5, -0.5]]), jnp.array([[[0], [1]], [[0], [2]]])
    rewards = jnp.array([[1.0, 0.0], [1.0, 1.0]])

    def grad(objective, rows):
        return jax.grad(lambda x: policy.loss(x[rows], picks[rows], rewards[rows], objective)[0])(logits)

    skip = Objective(dead_groups="skip")
    np.testing.assert_allclose(grad(skip, slice(0, 2)), grad(Objective(), slice(0, 1)), atol=1e-7)
    np.testing.assert_allclose(grad(Objective(), slice(0, 2)), grad(skip, slice(0, 2)) / 2, atol=1e-7)
    assert not grad(skip, slice(1, 2)).any()


def test_label_loss_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.2, 0.7, 0.0], [0.5, 0.25, 0.25, 0.0], [0.3, 0.3, 0.4, 0.0]]))
    labels = jnp.array([[True, True, False, False], [False, True, False, False], [False] * 4])
    expected = -(np.log(0.1 * 0.2) / 2 + np.log(0.25)) / 2
    assert policy.label_loss(logits, labels) == pytest.approx(expected, rel=1e-5)
    assert jnp.isfinite(jax.grad(policy.label_loss)(logits, labels)).all()
    assert policy.label_loss(logits, jnp.zeros((3, 4), bool)) == 0


def test_dead_groups_by_hand():
    rewards = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], np.float32)
    assert policy.dead(rewards).tolist() == [True, False, True]
    assert policy.dead(jnp.asarray(rewards)).tolist() == [True, False, True]


def test_stale_draws_have_the_ratio_to_the_agent_that_drew():
    """The gradient is that of mean(clipped ratio * advantage), ratio = p now / p when it was drawn."""
    logits = jnp.array([[0.5, -0.2, 0.1, 0.9]])
    drew = jnp.log(jnp.array([[0.15, 0.35, 0.4, 0.1]]))
    picks, rewards = jnp.array([[[0, 1], [2, 3]]]), jnp.array([[1.0, 0.0]])
    objective = policy.Objective(advantage="dr_grpo", clip_low=0.2, clip_high=0.3)
    descent = optax.sgd(1.0)
    after, _, metrics = policy.update(
        lambda x: x, descent, logits, descent.init(logits), picks, rewards, objective, drew=drew
    )
    p, q = (jax.nn.softmax(x[0]) for x in (logits, drew))
    ratio = np.asarray(p / q)
    assert min(ratio[0], ratio[3]) > 1.3 and max(ratio[1], ratio[2]) < 0.8

    def objective_by_hand(x):
        ratio = jax.nn.softmax(x[0]) / q
        # Advantages +1/2 (frames 0, 1) and -1/2 (2, 3). What has gone far enough in the direction of its advantage is
        # held at the limit (0, 2); what has gone the other way counts in full (1, 3).
        return -(0.5 * (1.3 + ratio[1]) - 0.5 * (0.8 + ratio[3])) / 4

    np.testing.assert_allclose(logits - after, jax.grad(objective_by_hand)(logits), rtol=1e-5)
    assert metrics["clipped"] == 1
    np.testing.assert_allclose(metrics["loss"], objective_by_hand(logits), rtol=1e-5)
    same, _, _ = policy.update(
        lambda x: x, descent, logits, descent.init(logits), picks, rewards, objective, drew=logits
    )
    plain, _, _ = policy.update(lambda x: x, descent, logits, descent.init(logits), picks, rewards, objective)
    np.testing.assert_allclose(same, plain, rtol=1e-6)


@pytest.mark.parametrize(("before", "after", "undone"), [(0.1, 0.4, 0), (0.1, 0.6, 1), (0.7, 0.6, 0), (0.6, 0.7, 1)])
def test_an_update_that_goes_too_far_is_undone(before, after, undone):
    """Limit 0.5: above it only a step towards the initial agent is kept; counts go on."""
    old, new = (
        ({"a": jnp.array([before])}, (jnp.array(1.0), jnp.array(3))),
        ({"a": jnp.array([after])}, (jnp.array(2.0), jnp.array(4))),
    )
    params, (moment, count), metrics = policy.undo_if_too_far(lambda p: p["a"].sum(), 0.5, old, new)
    assert metrics == {"kl_after": pytest.approx(after), "undone": undone}
    assert params["a"][0] == pytest.approx(before if undone else after)
    assert moment == (1.0 if undone else 2.0) and count == 4
