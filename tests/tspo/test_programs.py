"""The compiled programs `sample` and `update`: the same on every mesh, compiled once per shape."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_agent
from tspo_jax.devices import sharding
from tspo_jax.tspo import programs
from tspo_jax.tspo.programs import TrainState

B, T, D, K = 8, 40, 64, 4
DEVICES = jax.devices()


def make_batch(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(K + 1, T + 1, (B, 1))
    return {
        "index": np.arange(B, dtype=np.int32) + 100 * seed,
        # Cosines spread as little as in real videos, so that draws differ within a group.
        "features": (3 * rng.normal(size=(B, 1, D)) + rng.normal(size=(B, T, D))).astype(np.float32) * mask[..., None],
        "text": rng.normal(size=(B, D)).astype(np.float32),
        "mask": mask,
    }


@pytest.fixture(scope="module")
def config():
    values = cfg.default()
    values.num_steps = 10
    return cfg.read(values)


def run(golden, config, shape, num_steps=3):
    """Draws and metrics of every step, final parameters, and how often the programs were compiled."""
    num_devices = shape[0] * shape[1]
    mesh = sharding.make_mesh(list(zip(sharding.AXES, shape, strict=True)), DEVICES[:num_devices])
    graphdef, agent = load_agent(golden / "tspo_agent")
    sample = programs.make_sample(graphdef, config, mesh)
    update = programs.make_update(graphdef, config, mesh)
    state = TrainState(agent, programs.make_optimizer(config).init(agent))
    state = sharding.put_replicated(mesh, state)
    history = []
    for step in range(num_steps):
        batch = sharding.put_batch(mesh, make_batch(step))
        draws = sample(state.agent, batch, np.int32(step), k=K)
        assert draws.sharding.spec == PartitionSpec("data")
        rewards = {"total": (sharding.local_rows(draws) % 7 == 0).mean(-1, dtype=np.float32)}
        state, metrics = update(state, batch, draws, sharding.put_batch(mesh, rewards), np.int32(step))
        history.append((np.asarray(draws), {name: float(value) for name, value in metrics.items()}))
    return history, jax.tree.map(np.asarray, state.agent), (sample._cache_size(), update._cache_size())


@pytest.fixture(scope="module")
def unsharded(golden, config):
    return run(golden, config, (1, 1))


def test_each_program_is_compiled_once(unsharded):
    assert unsharded[2] == (1, 1)


def test_metrics_and_schedules(unsharded):
    history, agent, _ = unsharded
    for step, (draws, metrics) in enumerate(history):
        assert metrics["tau"] == pytest.approx(0.025 - 0.0015 * step)
        assert metrics["learning_rate"] == pytest.approx(5e-4 * (1 - step / 10))
        assert metrics["loss"] == pytest.approx(0, abs=1e-6)
        assert metrics["total"] == pytest.approx((draws % 7 == 0).mean(), abs=1e-6)
        assert metrics["grad_norm"] > 0
        assert {"score_entropy", "advantage_std", "dead_groups"} <= metrics.keys()
        assert (np.take_along_axis(make_batch(step)["mask"][:, None], draws, -1)).all(), "no padding is ever drawn"


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 4)])
def test_same_on_every_mesh(golden, config, unsharded, shape):
    history, agent, _ = run(golden, config, shape)
    for (draws, metrics), (expected_draws, expected) in zip(history, unsharded[0], strict=True):
        np.testing.assert_array_equal(draws, expected_draws)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), agent, unsharded[1])


def test_a_draw_depends_on_seed_step_and_question_alone(golden, config):
    mesh = sharding.make_mesh([("data", 1), ("model", 1)], DEVICES[:1])
    graphdef, agent = load_agent(golden / "tspo_agent")
    sample = programs.make_sample(graphdef, config, mesh)
    batch, order = make_batch(0), np.random.default_rng(0).permutation(B)
    draws = np.asarray(sample(agent, batch, np.int32(2), k=K))
    shuffled = np.asarray(sample(agent, {name: rows[order] for name, rows in batch.items()}, np.int32(2), k=K))
    np.testing.assert_array_equal(shuffled, draws[order])
    assert (np.asarray(sample(agent, batch, np.int32(3), k=K)) != draws).any()
    padded = {"features": [(0, 0), (0, 9), (0, 0)], "mask": [(0, 0), (0, 9)]}
    wider = {name: np.pad(rows, padded[name]) if name in padded else rows for name, rows in batch.items()}
    np.testing.assert_array_equal(np.asarray(sample(agent, wider, np.int32(2), k=K)), draws)
    assert jnp.all(jnp.diff(jnp.sort(draws), axis=-1) > 0), "no frame twice"
    again = [np.asarray(sample(agent, batch, np.int32(2), k=K, attempt=np.int32(i))) for i in (0, 1, 2)]
    np.testing.assert_array_equal(again[0], draws)
    assert (again[1] != draws).any() and (again[2] != again[1]).any(), "each attempt has its own noise"


def test_several_optimizer_steps_and_a_warm_start(golden, config):
    """The learning rate follows the optimiser's own count, and labels are learned."""
    changed = dataclasses.replace(config.policy, inner_steps=3, warm_start_steps=4, kl=0.1, tau_end=0.025)
    config = dataclasses.replace(config, policy=changed)
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], DEVICES[:2])
    graphdef, agent = load_agent(golden / "tspo_agent", kind="question_aware")
    initial = sharding.put_replicated(mesh, agent)
    state = sharding.put_replicated(mesh, TrainState(agent, programs.make_optimizer(config).init(agent)))
    batch = sharding.put_batch(mesh, make_batch(0))
    labels = sharding.put_batch(mesh, (np.arange(T) < 3) & np.ones((B, 1), bool))
    warm_start, losses = programs.make_warm_start(graphdef, config, mesh), []
    for step in range(4):
        state, metrics = warm_start(state, batch, labels, np.int32(step))
        losses.append(float(metrics["label_loss"]))
    assert losses[3] < losses[0] and metrics["learning_rate"] == pytest.approx(5e-4 * (1 - 3 / 22), rel=1e-5)
    draws = programs.make_sample(graphdef, config, mesh)(state.agent, batch, np.int32(4), k=K)
    rewards = sharding.put_batch(mesh, {"total": np.asarray(draws % 7 == 0).mean(-1, dtype=np.float32)})
    update = programs.make_update(graphdef, config, mesh)
    state, metrics = update(state, batch, draws, rewards, np.int32(4), initial)
    assert metrics["learning_rate"] == pytest.approx(5e-4 * (1 - 4 / 22), rel=1e-5) and metrics["kl"] > 0
    counts = [x for x in jax.tree.leaves(state.optimizer) if x.shape == ()]
    assert counts and all(count == 7 for count in counts)


def test_stale_draws_and_a_limit_of_the_divergence(golden, config):
    """The agent before an update is kept for the next draws; an update that goes too far changes the counts alone."""
    policy = dataclasses.replace(config.policy, stale_steps=1, kl_limit=1e-12)
    config = dataclasses.replace(config, policy=policy)
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], DEVICES[:2])
    graphdef, agent = load_agent(golden / "tspo_agent")
    first, other = agent, jax.tree.map(lambda x: 1.1 * x, agent)
    sample, batch = programs.make_sample(graphdef, config, mesh), sharding.put_batch(mesh, make_batch(0))

    def step(initial):
        """An update of `first` on draws of `other`."""
        state = TrainState(first, programs.make_optimizer(config).init(first), other)
        state = sharding.put_replicated(mesh, state)
        draws = sample(state.drew, batch, np.int32(0), k=K)
        rewards = {"total": (sharding.local_rows(draws) % 7 == 0).mean(-1, dtype=np.float32)}
        update = programs.make_update(graphdef, config, mesh)
        return update(state, batch, draws, sharding.put_batch(mesh, rewards), np.int32(0), initial)

    def assert_same(a, b):
        jax.tree.map(np.testing.assert_array_equal, a, b)

    state, metrics = step(sharding.put_replicated(mesh, first))
    assert metrics["undone"] == 1 and metrics["kl_after"] > metrics["kl"] == 0 and metrics["clipped"] > 0
    assert_same(state.agent, first)
    assert_same(state.drew, first)
    counts = [x for x in jax.tree.leaves(state.optimizer) if x.shape == ()]
    assert counts and all(count == 1 for count in counts)
    assert all(not np.any(x) for x in jax.tree.leaves(state.optimizer) if x.shape)
    state, metrics = step(sharding.put_replicated(mesh, jax.tree.map(lambda x: x + 0.5, first)))
    assert metrics["kl_after"] != metrics["kl"] and metrics["undone"] == (metrics["kl_after"] > metrics["kl"])
