import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tspo_jax.checkpoints.weights import flatten
from tspo_jax.models.layers import Embed, FeedForward, LayerNorm, Linear, patch_conv, stack_layers
from tspo_jax.runs.run_folder import RunFolderError
from tspo_jax.toy.fitting import Fitting, adamw, fit, fresh_params, muon

SLOPE = np.array([1.0, -2.0, 0.5, 3.0], np.float32)


def squared_error(params, x, y):
    return jnp.mean((x @ params["slope"] + params["offset"] - y) ** 2)


def regression_batches(seed):
    rng = np.random.default_rng(seed)
    while True:
        x = rng.normal(size=(32, 4)).astype(np.float32)
        yield x, x @ SLOPE + 0.7


def test_fit_solves_a_regression_and_reports_every_step(tmp_path):
    start, reports = {"slope": jnp.zeros(4), "offset": jnp.zeros(())}, []
    fitted = fit(
        squared_error,
        start,
        regression_batches(0),
        Fitting(num_steps=150, learning_rate=0.2),
        tmp_path,
        lambda *report: reports.append(report),
    )
    steps, losses = zip(*reports, strict=True)
    assert steps == tuple(range(1, 151))
    np.testing.assert_allclose(losses[0], squared_error(start, *next(regression_batches(0))), rtol=1e-5)
    assert losses[-1] < 1e-2 * losses[0]
    np.testing.assert_allclose(fitted["slope"], SLOPE, atol=0.1)
    np.testing.assert_allclose(fitted["offset"], 0.7, atol=0.1)
    assert not start["slope"].any()


def test_learning_rate_starts_and_ends_at_nothing(tmp_path):
    """One batch for ever: without a step its loss stays the same."""
    batch, losses = next(regression_batches(1)), []
    start = {"slope": jnp.zeros(4), "offset": jnp.zeros(())}
    fit(
        squared_error,
        start,
        iter([batch] * 100),
        Fitting(num_steps=100, learning_rate=0.01),
        tmp_path,
        lambda _, loss: losses.append(loss),
    )
    change = -np.diff(losses)
    assert change[0] == 0  # the first step of the warm-up
    assert np.all(change[1:-2] > 0)
    assert change[-1] < 0.02 * change.max()


def test_a_run_shorter_than_the_warm_up(tmp_path):
    reports = []
    start = {"slope": jnp.zeros(4), "offset": jnp.zeros(())}
    fitted = fit(
        squared_error,
        start,
        regression_batches(2),
        Fitting(num_steps=3, learning_rate=0.1),
        tmp_path,
        lambda *report: reports.append(report),
    )
    assert [step for step, _ in reports] == [1, 2, 3]
    assert np.abs(fitted["slope"]).min() > 0.05


def stacked_error(params, x, y):
    for kernel in params["layers"]["kernel"]:
        x = x + x @ kernel
    return squared_error(params, x, y)


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_a_stopped_fit_goes_on_exactly(tmp_path, optimizer):
    """After step 7, from the checkpoint of step 5; and a finished one gives its parameters."""
    start = {"slope": jnp.ones(4), "offset": jnp.zeros(()), "layers": {"kernel": jnp.full((2, 4, 4), 0.1)}}
    config, reports = Fitting(num_steps=12, checkpoint_every=5, learning_rate=0.1), []

    def run(folder, report=lambda *_: None):
        return fit(stacked_error, start, regression_batches(0), config, folder, report, optimizer)

    def stop(step, loss):
        reports.append(step)
        if step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", stop)
    resumed, whole = (run(tmp_path / name, lambda step, _: reports.append(step)) for name in ("stopped", "whole"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert reports == [*range(1, 8), *range(6, 13), *range(1, 13)]
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "stopped"), whole)
    with pytest.raises(RunFolderError, match="seed: 42 there, 1 here"):
        fit(stacked_error, start, [], dataclasses.replace(config, seed=1), tmp_path / "whole", None)


def test_muon_orthogonalises_the_kernels_of_layers_and_no_other_leaf():
    params = {
        "layers": {"kernel": jnp.zeros((2, 8, 8)), "bias": jnp.zeros((2, 8))},
        "head": {"kernel": jnp.zeros((8, 8))},
    }
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda leaf: jnp.array(rng.normal(size=leaf.shape), jnp.float32), params)
    transform = muon(optax.constant_schedule(0.1))
    updates, _ = transform.update(gradients, transform.init(params), params)
    singular = np.linalg.svd(updates["layers"]["kernel"], compute_uv=False)  # of every layer apart
    assert singular.shape == (2, 8) and singular.max() < 2.5 * singular.min()
    for adams in (updates["head"]["kernel"], updates["layers"]["bias"]):
        np.testing.assert_allclose(np.abs(adams), np.abs(adams).max(), rtol=1e-3)  # the first step: signs alone


class Net(nnx.Module):
    """One of each kind of parameter."""

    def __init__(self, *, rngs):
        self.embed_tokens = Embed(300, 64, rngs=rngs)
        self.patch_embedding = patch_conv(4, 64, use_bias=True, rngs=rngs)
        self.position_embedding = Embed(300, 64, rngs=rngs)
        self.layers = stack_layers(lambda rngs: FeedForward(64, 200, "relu", rngs=rngs), 2, rngs)
        self.norm = LayerNorm(64, rngs=rngs)


def test_fresh_params_have_the_scale_of_their_fan_in():
    _, params = fresh_params(lambda rngs: Net(rngs=rngs), 0)
    stds = {path: float(np.std(leaf)) for path, leaf in flatten(params).items()}
    expected = {
        "embed_tokens.embedding": 1,
        "patch_embedding.kernel": (4 * 4 * 3) ** -0.5,
        "patch_embedding.bias": 0,
        "position_embedding.embedding": 0.02,
        "layers.fc1.kernel": 64**-0.5,
        "layers.fc1.bias": 0,
        "layers.fc2.kernel": 200**-0.5,
        "layers.fc2.bias": 0,
        "norm.scale": 0,
        "norm.bias": 0,
    }
    assert stds.keys() == expected.keys()
    for path, std in expected.items():
        np.testing.assert_allclose(stds[path], std, rtol=0.04, err_msg=path)
    assert np.all(params["norm"]["scale"] == 1)


def test_fresh_params_are_a_function_of_the_seed():
    a, b, other = (fresh_params(lambda rngs: Linear(16, 4, rngs=rngs), seed)[1] for seed in (1, 1, 2))
    np.testing.assert_array_equal(a["kernel"], b["kernel"])
    assert np.all(a["kernel"] != other["kernel"])
