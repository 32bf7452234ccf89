"""The mesh, the table of rules, and LLaVA-Video sharded == unsharded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_agent, load_answerer, load_clip
from tspo_jax.devices import sharding
from tspo_jax.devices.sharding import ShardingError, answerer_sharding, make_mesh
from tspo_jax.models.layers import merge_params

DEVICES = jax.devices()


def test_mesh_takes_the_rest_and_is_auto():
    mesh = make_mesh([("data", -1), ("model", 4)], DEVICES)
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh([("data", -1), ("model", 1)], DEVICES[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ([("data", 3), ("model", 2)], "does not make 8 devices"),
        ([("data", -1), ("model", 3)], "does not make 8 devices"),
        ([("data", -1), ("model", 16)], "does not make 8 devices"),
        ([("data", -1), ("model", -1)], "at most one may be -1"),
        ([("data", 0), ("model", 8)], "at least 1"),
        ([("batch", -1), ("model", 1)], "its axes must be data, model"),
    ],
)
def test_bad_mesh(axes, message):
    with pytest.raises(ShardingError, match=message):
        make_mesh(axes, DEVICES)


def test_rules_cover_every_model_and_split_the_answerer(golden):
    mesh = make_mesh([("data", 4), ("model", 2)], DEVICES)
    folder = golden / "llava_video_grid"
    where = answerer_sharding(mesh, weights.read_config(folder), split_over_data=True)
    for tree in (
        load_answerer(folder).params,
        load_clip(golden / "tspo_agent").params,
        load_agent(golden / "tspo_agent")[1],
    ):
        specs = {path: where(path, leaf.shape).spec for path, leaf in weights.flatten(tree).items()}
        assert specs
        if "image_newline" not in specs:
            assert set(specs.values()) == {PartitionSpec()}, "the agent and CLIP are replicated"
            continue
        assert specs["language_model.layers.mlp.down_proj.kernel"] == PartitionSpec(None, "model", "data")
        assert specs["language_model.embed_tokens.embedding"] == PartitionSpec("model", "data")
        assert specs["language_model.norm.scale"] == PartitionSpec()


def test_questions_and_frames_stay_split_inside_a_program():
    mesh = make_mesh([("data", 2), ("model", 4)], DEVICES)
    x = np.arange(48.0).reshape(8, 6)

    def lies(pin):
        return jax.jit(lambda x: pin(2 * x), in_shardings=sharding.replicated(mesh))(x).sharding.spec

    assert lies(lambda x: sharding.split_questions(mesh, {"x": x})["x"])[0] == "data"
    assert lies(lambda x: sharding.split_questions(mesh, x, axis=1))[1] == "data"
    assert lies(lambda x: sharding.split_frames(mesh, x))[0] == ("data", "model")
    assert lies(lambda x: sharding.split_frames(mesh, x[:6]))[0] == "data", "6 frames for 8 devices"
    assert jax.jit(lambda x: sharding.split_frames(None, x))(x).shape == x.shape


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 4)])
@pytest.mark.parametrize("split_over_data", [False, True])
def test_sharded_answerer_gives_the_same_logits(golden, shape, split_over_data):
    folder = golden / "llava_video_grid"
    data = np.load(golden / "llava_video_grid.npz")
    pixels, ids = data["case0/pixel_values"].transpose(0, 2, 3, 1), data["case0/input_ids"].reshape(1, -1)
    mesh = make_mesh(list(zip(sharding.AXES, shape, strict=True)), DEVICES[: shape[0] * shape[1]])
    where = answerer_sharding(mesh, weights.read_config(folder), split_over_data=split_over_data)

    @jax.jit
    def logits(params, pixels, ids):
        model = merge_params(answerer.graphdef, params)
        return model.prefill(model.prompt(model.encode_frames(pixels)[None], ids, jnp.full(1, ids.shape[1])))[0]

    answerer = load_answerer(folder)
    expected = logits(answerer.params, pixels, ids)
    params = load_answerer(folder, sharding=where).params
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    per_device = kernel.addressable_shards[0].data.size
    assert per_device * shape[1] * (shape[0] if split_over_data else 1) == kernel.size
    actual = logits(params, *sharding.put_replicated(mesh, (pixels, ids)))
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-5)
    np.testing.assert_allclose(np.asarray(actual)[0], data["case0/last_logits"].reshape(-1), atol=1e-3)


@pytest.mark.parametrize("shape", [(2, 4), (8, 1), (1, 4)])
def test_sharded_clip_gives_the_same_features(golden, shape):
    mesh = make_mesh(list(zip(sharding.AXES, shape, strict=True)), DEVICES[: shape[0] * shape[1]])
    where = sharding.ParamSharding(mesh, {})
    clip, split = load_clip(golden / "tspo_agent"), load_clip(golden / "tspo_agent", sharding=where)
    pixels = np.random.default_rng(0).normal(size=(8, clip.processor.size, clip.processor.size, 3)).astype(np.float32)
    ids = clip.token_ids([f"question {i}" for i in range(8)])

    @jax.jit
    def features(params, pixels, ids):
        model = merge_params(clip.graphdef, params)
        return model.image_features(pixels), model.text_features(ids)

    expected, actual = (
        features(clip.params, pixels, ids),
        features(split.params, *sharding.put_batch(mesh, (pixels, ids))),
    )
    for a, b in zip(actual, expected, strict=True):
        assert not a.is_fully_replicated or shape[0] == 1
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_key_and_value_heads_are_never_cut(golden):
    mesh = make_mesh([("data", 2), ("model", 4)], DEVICES)
    where = answerer_sharding(mesh, weights.read_config(golden / "llava_video_grid"))  # 4 heads, 2 of keys and values
    assert where("language_model.layers.self_attn.k_proj.kernel", (3, 64, 32)).spec == PartitionSpec(None, None, None)
    assert where("language_model.layers.self_attn.q_proj.kernel", (3, 64, 64)).spec == PartitionSpec(
        None, None, "model"
    )


def test_errors_name_the_parameter(golden):
    mesh = make_mesh([("data", 1), ("model", 8)], DEVICES)
    with pytest.raises(ShardingError, match=r"model \(8\) does not divide num_attention_heads \(4\)"):
        answerer_sharding(mesh, weights.read_config(golden / "llava_video_grid"))
    where = sharding.ParamSharding(mesh, {"hidden": "model", "vocabulary": "model"})
    with pytest.raises(ShardingError, match=r"language_model\.new\.kernel \[2, 2\]: no sharding rule matches"):
        where("language_model.new.kernel", (2, 2))
    with pytest.raises(ShardingError, match=r"embed_tokens.embedding \[30, 4\]: vocabulary \(30\) is not divisible"):
        where("language_model.embed_tokens.embedding", (30, 4))
    with pytest.raises(ShardingError, match=r"lm_head.kernel \[2, 4, 8\]: its sharding rule .* another number of axes"):
        where("language_model.lm_head.kernel", (2, 4, 8))
    collide = sharding.ParamSharding(mesh, {"hidden": "model", "width": "model"})
    with pytest.raises(ShardingError, match=r"up_proj.kernel .* two dimensions over one mesh axis"):
        collide("language_model.layers.mlp.up_proj.kernel", (2, 8, 8))


def test_too_little_memory_is_said_before_loading(golden, monkeypatch):
    """Weights of 3 x 2 x 4 + 5 float32, half of the first on each of two devices that share the host's memory."""
    mesh = make_mesh([("data", 1), ("model", 2)], DEVICES[:2])
    where = sharding.ParamSharding(mesh, {"hidden": "model"})
    shapes = {"language_model.layers.mlp.up_proj.kernel": (3, 2, 4), "language_model.norm.scale": (5,)}
    need = (3 * 2 * 4 + 2 * 5) * 4
    monkeypatch.setattr(sharding, "free_host_memory", lambda: need)
    sharding.check_memory(shapes, np.float32, where)
    monkeypatch.setattr(sharding, "free_host_memory", lambda: need - 1)
    with pytest.raises(ShardingError, match="GiB are missing. Take a larger model axis"):
        sharding.check_memory(shapes, np.float32, where)
    sharding.check_memory(shapes, jnp.bfloat16, where)
    with pytest.raises(ShardingError, match="of this machine"):
        monkeypatch.setattr(sharding, "free_host_memory", lambda: 1000)
        folder = golden / "llava_video_grid"
        load_answerer(folder, sharding=answerer_sharding(mesh, weights.read_config(folder)))


def test_one_process_feeds_every_question():
    assert sharding.data_slice(make_mesh([("data", 4), ("model", 2)], DEVICES)) == (0, 1)


def test_batches_lie_over_data():
    mesh = make_mesh([("data", 4), ("model", 2)], DEVICES)
    rows = {"x": np.arange(16.0, dtype=np.float32).reshape(8, 2), "i": np.arange(8)}
    placed = sharding.put_batch(mesh, rows)
    assert placed["x"].sharding.spec == PartitionSpec("data")
    np.testing.assert_array_equal(sharding.local_rows(placed["x"]), rows["x"])
    replicated = sharding.put_replicated(mesh, rows)["x"]
    assert replicated.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(replicated), rows["x"])
    with pytest.raises(ShardingError, match="batch_size is 6: it must be a multiple of mesh axis data \\(4\\)"):
        sharding.check_batch_size(mesh, 6)
