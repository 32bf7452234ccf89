"""The real TPU compiler on a shallow LLaVA-Video-7B: what it says, and what does not fit."""

import dataclasses
import importlib
import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

from tspo_jax import config as cfg
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.devices import chips as tpu
from tspo_jax.devices import compiling, program_cost, sharding
from tspo_jax.tspo import ahead_of_time

LAYERS = 2
K = 4  # frames of a set
DESCRIPTIONS = ROOT / "configs" / "architectures"


@pytest.fixture(scope="module")
def config():
    sys.path.insert(0, str(ROOT))
    values = importlib.import_module("configs.llava_video_7b").get_config()
    values.data.buckets = (128,)  # of which the largest is compiled
    values.data.max_frames, values.data.specific.k = 128, K
    values.answerer.max_new_tokens = 2
    return cfg.read(values)


@pytest.fixture(scope="module")
def slice_of_8():
    """The chip and devices of v5e-8."""
    pytest.importorskip("libtpu", reason="the TPU compiler is not installed: pip install --no-deps libtpu==0.0.42")
    try:
        return tpu.slice_devices("v5e-8")
    except ValueError as error:
        if "lockfile" in str(error):
            pytest.skip("another process uses the TPU compiler, which serves one at a time")
        raise


@pytest.fixture(scope="module")
def compiled(config, slice_of_8):
    """With the least effort for fast programs: a third of the compiler's time, the same collectives."""
    jax.config.update("jax_exec_time_optimization_effort", -1.0)
    (result,) = ahead_of_time.compile_config(config, DESCRIPTIONS, ["v5e-8"], LAYERS)
    jax.config.update("jax_exec_time_optimization_effort", 0.0)
    return result


def test_an_axis_of_a_mesh_may_cut_one_of_the_slice(slice_of_8):
    """8 of 4 x 4 x 4 chips, and 4 of 16 x 16: both are in docs/scaling.md."""
    for name, axes in (("v5p-128", (8, 8)), ("v5e-256", (64, 4))):
        mesh = sharding.make_mesh(list(zip(sharding.AXES, axes, strict=True)), tpu.slice_devices(name)[1])
        assert mesh.devices.shape == axes and len({d.id for d in mesh.devices.flat}) == mesh.size


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_single_chip(slice_of_8, chip):
    assert len(tpu.slice_devices(f"{chip}-1")[1]) == 1


def test_all_programs_fit(compiled):
    assert compiled["fits"] and compiled["mesh"] == {"data": 2, "model": 4} and compiled["batch_size"] == 16
    assert set(compiled["programs"]) == {"sample", "answer", "update"}
    for program in compiled["programs"].values():
        assert program["argument_bytes"] + program["temporary_bytes"] + program["output_bytes"] < compiled["hbm_bytes"]
        assert program["seconds"] == max(program["roofline_seconds"].values()) > 0
    assert compiled["seconds"] == sum(program["seconds"] for program in compiled["programs"].values())
    assert len(compiling.table_rows([compiled])) == 3
    json.dumps(compiled)


def test_arguments_are_the_split_weights_and_the_frames(compiled, config):
    description, path = ahead_of_time.read_architecture(config.answerer.folder, DESCRIPTIONS)
    leaves = weights.flatten(answerer_architecture(ahead_of_time.shallow(description, LAYERS), path).abstract)
    split = sum(2 * x.size for name, x in leaves.items() if name.startswith("language_model"))
    whole = sum(2 * x.size for name, x in leaves.items() if not name.startswith("language_model"))
    frames = 8 * 8 * K * 384 * 384 * 3
    assert compiled["programs"]["answer"]["argument_bytes"] == pytest.approx(split / 4 + whole + frames, rel=0.02)


def test_no_weights_are_gathered(compiled):
    collectives = compiled["programs"]["answer"]["collectives"]
    sums = [c for c in collectives if c["kind"] == "all-reduce" and "prefill/while/while" in c["where"]]
    assert sum(c["count"] for c in sums) == 8 * (LAYERS - 1) * 2, "two per whole layer and prompt of a group"
    smallest_matrix = 2 * LAYERS * 3584 * 512  # bytes of the stacked key projections
    of_encoded_frames = 8 * 16 * 14 * 14 * 3584 * 2  # a chunk of frames of the questions of a row of the mesh
    for c in collectives:
        if c["kind"] == "all-gather":
            assert c["bytes"] < smallest_matrix or (c["bytes"] == of_encoded_frames and "encode" in c["where"]), c


def test_page_of_scaling(compiled):
    """What benchmarks/scaling.py writes of it, and of a slice that is too small."""
    sys.path.insert(0, str(ROOT))
    from benchmarks import scaling

    too_small = compiled | {
        "topology": "v5e-4",
        "fits": False,
        "programs": {"answer": {"fits": False, "reason": "full"}},
    }
    page = scaling.section("llava_video_7b", 3360, [compiled, too_small], 2 * 3584 * 512)
    assert page.count("| v5e-8, 2 x 4, B 16 |") == 3 and "| v5e-4 | does not fit |" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| v5e-8 |"))
    assert "| none |" in row and row.endswith("| 3.7 MB |")
    assert scaling.of_activations("encode/while/dot_general") and not scaling.of_activations(
        "prefill/while/dot_general"
    )


def test_arithmetic_is_that_of_the_layers(compiled):
    tokens = 128 * (K * 210 + 255)
    layer = 2 * 3584 * (3584 + 512) + 3 * 3584 * 18944
    last_layer = 2 * 3584 * 512  # keys and values alone
    image = 128 * K * 729 * LAYERS * (4 * 1152**2 + 2 * 1152 * 4304)
    projector = 128 * K * 729 * (1152 * 3584 + 3584**2)
    products = 2 * (tokens * ((LAYERS - 1) * layer + last_layer) + image + projector)
    assert products < compiled["programs"]["answer"]["flops_all_devices"] < 1.2 * products


def test_what_does_not_fit_is_said(config, slice_of_8):
    chip, devices = slice_of_8
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    large = jax.ShapeDtypeStruct((2**33,), jnp.float32, sharding=sharding.replicated(mesh))
    result = compiling.compile_call(compiling.Call(jax.jit(jnp.sin), (large,), {}, {}), mesh, chip)
    # The compiler has several sentences for it; all of them say what there is (15.75 of 16 GiB are for programs).
    assert not result["fits"] and "15.75G" in result["reason"] and "\n" not in result["reason"]


def test_advice_names_what_is_left_to_change(config):
    description, path = ahead_of_time.read_architecture(config.answerer.folder, DESCRIPTIONS)
    answerer = answerer_architecture(description, path)
    mesh = sharding.make_mesh([("data", 4), ("model", 2)], jax.devices())
    text = "; ".join(ahead_of_time.advice(config, answerer, mesh))
    assert "model axis of 4" in text and "batch_size=4" in text and "split_over_data" in text
    assert "prefill_chunk" not in text, "it is 1 already"
    assert "question_chunk=1" in text
    mesh = sharding.make_mesh([("data", 1), ("model", 8)], jax.devices())
    least = dataclasses.replace(config, batch_size=1, answerer=dataclasses.replace(config.answerer, encode_chunk=1))
    assert ahead_of_time.advice(least, answerer, mesh) == ["a slice with more or larger chips"]


LLAVA, LLAVA_LARGE, QWEN = "LLaVA-Video-7B-Qwen2", "LLaVA-Video-72B-Qwen2", "Qwen2.5-VL-7B-Instruct"
QWEN3 = "Qwen3-VL-8B-Instruct"
TIED_QWEN2_HALF_B = dict(
    hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, intermediate_size=4864
) | dict(vocab_size=151936, tie_word_embeddings=True)
TIED_QWEN_3B = dict(
    hidden_size=2048, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, intermediate_size=11008
) | dict(vocab_size=151936, tie_word_embeddings=True)
TIED_QWEN3_2B = dict(
    hidden_size=2048, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144, tie_word_embeddings=True
)
QWEN3_SMALL_TOWER = dict(depth=24, hidden_size=1024, intermediate_size=4096, deepstack_visual_indexes=[5, 11, 17])
QWEN_72B = dict(
    hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8, intermediate_size=29568
)


@pytest.mark.parametrize(
    ("name", "language", "vision", "parameters"),
    [
        (LLAVA, TIED_QWEN2_HALF_B, {}, 893_618_208),
        (LLAVA, {}, {}, 8_030_348_832),
        (LLAVA_LARGE, {}, {}, 73_180_522_016),
        (QWEN, TIED_QWEN_3B, dict(out_hidden_size=2048), 3_754_622_976),
        (QWEN, {}, {}, 8_292_166_656),
        (QWEN, QWEN_72B, dict(out_hidden_size=8192, intermediate_size=3456), 73_410_777_344),
        (QWEN3, TIED_QWEN3_2B, dict(out_hidden_size=2048) | QWEN3_SMALL_TOWER, 2_127_532_032),
        (QWEN3, {}, {}, 8_767_123_696),
    ],
    ids=["llava-0.5b", "llava-7b", "llava-72b", "qwen-3b", "qwen-7b", "qwen-72b", "qwen3-2b", "qwen3-8b"],
)
def test_published_sizes_and_where_they_lie(name, language, vision, parameters):
    """As many parameters as in the published files, each with a place on the largest mesh of the model."""
    description, path = ahead_of_time.read_architecture(f"checkpoints/{name}", DESCRIPTIONS)
    vision = {"vision_config": {**description["vision_config"], **vision}} if vision else {}
    if "text_config" in description:
        tied = {"tie_word_embeddings": language.get("tie_word_embeddings", False)}
        description = {**description, **tied, **vision, "text_config": {**description["text_config"], **language}}
    else:
        description = {**description, **language, **vision}
    leaves = weights.flatten(answerer_architecture(description, path).abstract)
    assert sum(x.size for x in leaves.values()) == parameters
    heads = description.get("text_config", description)["num_key_value_heads"]
    mesh = sharding.make_mesh([("data", 8 // heads), ("model", heads)], jax.devices())
    where = sharding.answerer_sharding(mesh, description, split_over_data=True)
    whole, held = 0, 0
    for path, x in leaves.items():
        shard = where(path, x.shape).shard_shape(x.shape)
        if path.startswith("language_model"):
            whole, held = whole + x.size, held + math.prod(shard)
    assert held < 1.01 * whole / 8, "of the language model all but vectors is split over all devices"


@pytest.mark.parametrize("name", ["llava_video_7b", "llava_video_72b", "qwen2_5_vl_7b", "qwen3_vl_8b"])
@pytest.mark.slow
def test_programs_of_a_step_at_full_size(name, monkeypatch):
    """Traced without a compiler, on CPU devices."""
    monkeypatch.syspath_prepend(ROOT)
    config = cfg.read(importlib.import_module(f"configs.{name}").get_config())
    description, path = ahead_of_time.read_architecture(config.answerer.folder, DESCRIPTIONS)
    answerer = answerer_architecture(description, path, video=config.answerer.video)
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    calls = ahead_of_time.training_step(config, answerer, 768, mesh)
    traced = {name: call.program.trace(*call.args, **call.kwargs) for name, call in calls.items()}
    draws, answers = traced["sample"].out_info, traced["answer"].out_info
    assert (draws.shape, answers.tokens.shape) == ((16, 8, 16), (16, 8, 16))
    flops = program_cost.arithmetic(traced["answer"].jaxpr, calls["answer"].while_trips).flops
    layers = sum(x.size for x in jax.tree.leaves(answerer.abstract["language_model"]["layers"]))
    tokens = 16 * 8 * answerer.config.num_visual_tokens(16, *config.answerer.video.frame_size)
    assert 2 * tokens * layers < flops < 2 * 2 * tokens * layers
    config = dataclasses.replace(config, answerer=dataclasses.replace(config.answerer, question_chunk=8))
    in_parts = ahead_of_time.training_step(config, answerer, 768, mesh)
    assert in_parts["answer"].times == 2 and in_parts["answer"].args[1].shape[0] == 8
    assert in_parts["update"].args[2].shape == calls["update"].args[2].shape


def test_an_update_that_needs_other_agents_too(config):
    """The initial one for a KL, the one that drew for stale steps."""
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, kl_limit=0.1, stale_steps=1))
    description, path = ahead_of_time.read_architecture(config.answerer.folder, DESCRIPTIONS)
    answerer = answerer_architecture(ahead_of_time.shallow(description, LAYERS), path)
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    call = ahead_of_time.training_step(config, answerer, 768, mesh)["update"]
    state, metrics = call.program.trace(*call.args).out_info
    assert jax.tree.map(jnp.shape, state.drew) == jax.tree.map(jnp.shape, state.agent) and "kl_after" in metrics


@pytest.mark.slow
def test_mistakes_are_one_line():
    for flag, message in (
        ("--topology=v9-8", "error: topology 'v9-8': not CHIP-NUMBER with one of the chips v5e, v6e, v5p"),
        ("--config.answerer.folder=nowhere/x", "error: nowhere/x: holds no config.json, and there is no"),
    ):
        command = [sys.executable, "-m", "tspo_jax.aot_compile", "--config=configs/llava_video_7b.py", flag]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 1 and result.stdout == ""
        assert message in result.stderr and "Traceback" not in result.stderr
