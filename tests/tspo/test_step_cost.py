"""Steps of a run by their shapes, with small programs in place of the models; test_train.py has real ones."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tspo_jax.config import Config
from tspo_jax.devices import sharding
from tspo_jax.tspo import step_cost
from tspo_jax.tspo.environment import PromptLengths
from tspo_jax.tspo.programs import TrainState

G, D = 4, 16


def rows(kind, T, k):
    return {
        "kind": kind,
        "k": k,
        "index": np.zeros(2, np.int32),
        "copy": np.zeros(2, np.int32),
        "features": np.zeros((2, T, D), np.float32),
        "text": np.zeros((2, D), np.float32),
        "mask": np.ones((2, T), bool),
    }


@pytest.fixture
def steps():
    """A function (K by chance) -> steps of a run on two devices, and what each program was traced with."""
    mesh = sharding.make_mesh([("data", 2), ("model", 1)], jax.devices()[:2])
    state = sharding.put_replicated(mesh, TrainState({"w": jnp.zeros(D)}, jnp.zeros(())))
    seen = []

    def sample(agent, batch, step, k, attempt):
        seen.append(("sample", batch["features"].shape, k))
        return jnp.argsort(batch["features"] @ agent["w"])[:, :k]

    def update(state, batch, draws, measured, step, initial):
        seen.append(("update", draws.shape, sorted(measured)))
        return state, measured["total"].mean()

    answer = jax.jit(lambda picks: picks * 2)

    def abstract_call(rows, k, length):
        seen.append(("answer", k, length))
        return answer, (sharding.abstract_batch(mesh, np.zeros((2, G, k), np.int32)),)

    def prompt_lengths(kind, k):
        rungs, shares = lengths or ((32,), (1.0,))
        return PromptLengths(np.array([20, 100]), rungs, np.array(shares), 50)

    lengths = []

    def of_run(random_k=(), prompts=()):
        lengths[:] = prompts
        config = dataclasses.replace(
            Config(), batch_size=2, policy=dataclasses.replace(Config().policy, group_size=G, random_k=random_k)
        )
        examples = [(0.25, rows("general", 8, 2)), (0.75, rows("specific", 64, 4))]
        programs = jax.jit(sample, static_argnames="k"), jax.jit(update)
        world = SimpleNamespace(abstract_call=abstract_call, prompt_lengths=prompt_lengths)
        return step_cost.of_run(config, mesh, world, examples, *programs, state, None), seen

    return of_run


def test_a_step_per_kind_and_bucket(steps):
    general, specific = steps()[0]
    assert (general.shape, general.share) == (("general", 8), 0.25)
    assert (specific.shape, specific.share) == (("specific", 64), 0.75)
    assert general.words == "general samples, 8 candidates, K = 2"
    assert specific.words == "specific samples, 64 candidates, K = 4"
    assert general.cost.programs.keys() == {"sample", "answer", "update"}
    per_device = 64 * D * 4  # the features of one question
    assert per_device <= specific.cost.bytes < 2 * per_device and general.cost.bytes < specific.cost.bytes


def test_k_by_chance_shares_the_steps_out(steps):
    found, seen = steps(random_k=(2, 3, 4))
    assert [of_shape.words[-1] for of_shape in found] == ["2", "3", "4"] * 2
    assert sum(of_shape.share for of_shape in found) == pytest.approx(1)
    assert [k for name, _, k in seen if name == "sample"] == [2, 3, 4] * 2


def test_each_length_of_prompts_has_its_share_of_the_steps(steps):
    found, seen = steps(prompts=((32, 128), (0.75, 0.25)))
    assert [of_shape.words.partition("prompts of ")[2] for of_shape in found] == [
        "32 tokens of text",
        "128 tokens of text",
    ] * 2
    assert [of_shape.share for of_shape in found] == [0.25 * 0.75, 0.25 * 0.25, 0.75 * 0.75, 0.75 * 0.25]
    assert [call[1:] for call in seen if call[0] == "answer"] == [(2, 32), (2, 128), (4, 32), (4, 128)]


def test_the_update_is_given_what_is_measured_of_the_kind(steps):
    paper = ["accuracy", "cosine_spread", "total", "unique_frames", "unparsed"]
    updates = [call for call in steps()[1] if call[0] == "update"]
    assert updates == [("update", (2, G, 2), paper), ("update", (2, G, 4), sorted([*paper, "location"]))]
