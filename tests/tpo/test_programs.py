"""The trainer's programs against five steps of Hugging Face's models, torch's AdamW and PEFT (golden)."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from tpo_trajectory_pairs import Trajectory, model_of

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.devices import sharding
from tspo_jax.models.lora import LoraConfig
from tspo_jax.tpo import programs
from tspo_jax.tpo.losses import Objective
from tspo_jax.tpo.programs import State

FORMAT = weights.LLAVA_VIDEO


@pytest.fixture(scope="module")
def trajectory(golden):
    return Trajectory(golden)


def mesh_for(trajectory, num_devices: int):
    """A mesh of so many devices that the checkpoint's heads and the batches allow."""
    heads = trajectory.answerer().config.language.num_attention_heads
    model = math.gcd(heads, num_devices)
    return sharding.make_mesh((("data", num_devices // model), ("model", model)), jax.devices()[:num_devices])


def setup(trajectory, kind: str, num_devices: int, accumulate: int = 1):
    """Model, state, frozen parameters, update program and batch -> its pairs on the devices."""
    meta = trajectory.meta
    mesh = mesh_for(trajectory, num_devices)
    where = sharding.answerer_sharding(mesh, weights.read_config(trajectory.folder), split_over_data=True)
    answerer = trajectory.answerer(sharding=where)
    graphdef, params = answerer.graphdef, answerer.params
    if kind == "lora":
        config = {"r": meta["lora"]["r"], "lora_alpha": meta["lora"]["alpha"]}
        tensors = trajectory.of("lora/init/")  # A; B starts at 0
        base = weights.file_tensors(params, FORMAT)
        for name in list(tensors):
            d_out = len(base[name.removeprefix("base_model.model.").replace(".lora_A.", ".")])
            tensors[name.replace(".lora_A.", ".lora_B.")] = np.zeros((d_out, config["r"]), np.float32)
        adapter = adapters.from_tensors(tensors, config, params, FORMAT, "lora/init")
        graphdef, _ = adapters.add(graphdef, params, adapter.lora)
        params = adapters.beside(params, adapter.params, where)
    trained, frozen = programs.partition(params, kind == "lora")
    base, total, warmup = meta["learning_rate"][kind], meta["total_steps"], meta["warmup_steps"]
    rates = programs.learning_rates(base, total, warmup)
    optimizer = programs.make_optimizer(rates, max_grad_norm=meta["clip"], **meta["adamw"])
    places = sharding.optimizer_sharding(optimizer, trained, mesh)
    state = State(trained, jax.jit(optimizer.init, out_shardings=places)(trained))
    objective = Objective(*(meta[name] for name in Objective._fields))
    model = model_of(answerer, graphdef, mesh)
    update = programs.make_update(
        model,
        objective,
        optimizer,
        accumulate=accumulate,
        online_reference=kind == "lora",
        shardings=jax.tree.map(lambda x: x.sharding, state),
    )

    def batch(indices):
        multiple = mesh.shape["data"] * accumulate
        fill = -len(indices) % multiple
        return sharding.put_batch(mesh, trajectory.pairs(indices, trajectory.arrays[f"{kind}/ref_logps"], fill))

    return model, state, frozen, update, batch, answerer, rates


@pytest.mark.parametrize("num_devices", [1, 8])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.slow
def test_golden_trajectory(trajectory, kind, num_devices):
    expected = trajectory.of(f"{kind}/")
    model, state, frozen, update, batch, answerer, rates = setup(trajectory, kind, num_devices)
    evaluate = programs.make_evaluation(model)
    for step, indices in enumerate(trajectory.arrays["batches"]):
        np.testing.assert_allclose(rates(step), expected["lr"][step], rtol=1e-5)
        state, metrics = update(state, frozen, batch(indices.tolist()))
        for name, key, atol in [
            ("loss", "loss", 1e-5),
            ("losses/dpo", "dpo", 1e-5),
            ("losses/sft", "sft", 1e-5),
            ("rewards/margins", "margin", 2e-4),
            ("grad_norm", "grad_norm", 2e-4),
        ]:
            found, wanted = float(metrics[name]), expected[key][step]
            assert found == pytest.approx(wanted, abs=atol, rel=2e-6), f"step {step}: {name}"
        margins = expected["rewards_chosen"][step] - expected["rewards_rejected"][step]
        if np.abs(margins).min() > 1e-3:  # else they are rounding
            assert float(metrics["rewards/accuracies"]) == expected["accuracy"][step]
        if step == 0:
            check_first_gradient(trajectory, kind, state, expected["grad_norm"][0])
        for name in ("chosen", "rejected"):
            np.testing.assert_allclose(metrics[f"logps/{name}"], expected[f"logps_{name}"][step].mean(), atol=2e-4)
            np.testing.assert_allclose(metrics[f"rewards/{name}"], expected[f"rewards_{name}"][step].mean(), atol=2e-4)
    everything = list(range(trajectory.num_pairs))
    pairs = batch(everything)
    policy, _ = evaluate(state.trained, frozen, pairs)
    np.testing.assert_allclose(policy.total[: len(everything)], expected["final_logps"], rtol=1e-6, atol=2e-4)
    params = weights.unflatten(weights.flatten(state.trained) | weights.flatten(frozen))
    found = as_tensors(kind, params)
    finals = trajectory.of(f"{kind}/final/")
    assert finals and finals.keys() <= found.keys()
    for name, wanted in finals.items():
        # Where the gradient is nearly 0, the updates are rounding that Adam has magnified.
        atol = 5e-5 if name.endswith("k_proj.bias") else 1e-5 if name.endswith("lora_A.weight") else 1e-6
        np.testing.assert_allclose(found[name], wanted, atol=atol, rtol=1e-5, err_msg=name)


def as_tensors(kind: str, params: dict) -> dict[str, np.ndarray]:
    return weights.file_tensors(params, FORMAT) if kind == "full" else adapters.to_tensors(params, FORMAT, "model.")


def check_first_gradient(trajectory, kind, state, norm) -> None:
    """Adam's first moment after one step is (1 - b1) times the clipped gradient."""
    clipped = min(1.0, trajectory.meta["clip"] / float(norm)) * (1 - trajectory.meta["adamw"]["b1"])
    moment = optax.tree_utils.tree_get(state.optimizer, "mu")
    found = as_tensors(kind, moment)
    gradients = trajectory.of(f"{kind}/grad0/")
    assert gradients
    for name, wanted in gradients.items():
        np.testing.assert_allclose(found[name] / clipped, wanted, atol=1e-6, err_msg=name)


def test_golden_token_log_probs(trajectory):
    """Of the untouched weights; and the sums are the reference that the trajectories start from."""
    answerer = trajectory.answerer()
    everything = list(range(trajectory.num_pairs))
    pairs = trajectory.pairs(everything)
    found = programs.make_reference(model_of(answerer))(answerer.params, pairs)
    for kind in ("full", "lora"):
        np.testing.assert_allclose(found.total, trajectory.arrays[f"{kind}/ref_logps"], rtol=1e-6, atol=2e-4)
    for i in everything:
        for j, name in enumerate(("chosen", "rejected")):
            of_tokens = trajectory.arrays[f"pair{i}/{name}_token_logps"]
            assert int(found.tokens[i, j]) == len(of_tokens)
            np.testing.assert_allclose(found.total[i, j], of_tokens.sum(), rtol=1e-6, atol=2e-4)


@functools.cache
def gradient_and_metrics(trajectory, loss_type, accumulate, online=False):
    """Of one batch of all pairs, after B was moved away from 0; on one device."""
    meta = dict(trajectory.meta, loss_type=loss_type, label_smoothing=0.0)
    answerer = trajectory.answerer()
    config = {"r": meta["lora"]["r"], "lora_alpha": meta["lora"]["alpha"]}
    graphdef, abstract = adapters.add(answerer.graphdef, answerer.params, LoraConfig(config["r"], config["lora_alpha"]))
    fresh = weights.flatten(adapters.fresh(abstract, 3))
    moved = {path: x + 0.02 * jax.random.normal(jax.random.key(4), x.shape) for path, x in fresh.items()}
    params = weights.unflatten(weights.flatten(answerer.params) | moved)
    trained, frozen = programs.partition(params, lora=True)
    optimizer = optax.sgd(1.0)
    objective = Objective(*(meta[name] for name in Objective._fields))
    model = model_of(answerer, graphdef)
    update = programs.make_update(model, objective, optimizer, accumulate=accumulate, online_reference=online)
    pairs = trajectory.pairs([i % trajectory.num_pairs for i in range(4)])
    if not online:
        reference = programs.make_reference(model_of(answerer))(answerer.params, pairs)
        pairs = pairs._replace(reference=np.asarray(reference.total))
    before = jax.tree.map(np.asarray, trained)
    state, metrics = update(State(trained, optimizer.init(trained)), frozen, pairs)
    return jax.tree.map(lambda a, b: a - np.asarray(b), before, state.trained), metrics


@pytest.mark.parametrize("loss_type", ["sigmoid", "kto_pair"])
@pytest.mark.slow
def test_accumulation_changes_nothing(trajectory, loss_type):
    whole, parts = (gradient_and_metrics(trajectory, loss_type, accumulate) for accumulate in (1, 4))
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole[0])) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4), whole, parts)


@pytest.mark.slow
def test_reference_computed_before_equals_online(trajectory):
    before, online = (gradient_and_metrics(trajectory, "sigmoid", 4, online) for online in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4), before, online)


def test_rates_are_those_of_hugging_face():
    rates = programs.learning_rates(2.0, 20, 2)
    np.testing.assert_allclose([rates(s) for s in (0, 1, 2, 11, 20)], [0, 1, 2, 1, 0], atol=1e-6)
    assert programs.learning_rates(2.0, 20, 0)(0) == 2


@pytest.mark.parametrize("base, total, warmup, said", [(0.0, 10, 1, "learning_rate is 0.0"), (1.0, 1, 1, "warm-up")])
def test_a_rate_of_0_at_every_step_is_refused(base, total, warmup, said):
    with pytest.raises(ValueError, match=said):
        programs.learning_rates(base, total, warmup)


def test_towers_are_not_trained(trajectory):
    trained, frozen = programs.partition(trajectory.answerer().params, lora=False)
    assert set(frozen) == {"vision_tower"}
    assert set(trained) == {"image_newline", "language_model", "mm_projector"}
