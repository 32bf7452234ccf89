import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.weights import load_params
from tspo_jax.models.clip import Clip, ClipConfig
from tspo_jax.models.layers import abstract_module
from tspo_jax.models.llava_video import LlavaVideo, LlavaVideoConfig
from tspo_jax.models.temporal_agent import TemporalAgent

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def abstract_clip(folder):
    config = ClipConfig.from_hf(weights.read_config(folder))
    return abstract_module(lambda rngs: Clip(config, rngs=rngs))[1]


def abstract_agent(folder):
    return abstract_module(lambda rngs: TemporalAgent(64, rngs=rngs))[1]


def abstract_llava(folder):
    config = LlavaVideoConfig.from_hf(weights.read_config(folder))
    return abstract_module(lambda rngs: LlavaVideo(config, rngs=rngs))[1]


# Golden folder, what to load from it, and which of its tensors that covers.
FORMATS = {
    "clip": ("tspo_agent", abstract_clip, weights.CLIP, r"^(?!selector\.)"),
    "agent": ("tspo_agent", abstract_agent, weights.agent_format(weights.SELECTOR), r"^selector\."),
    "llava-video": ("llava_video_grid", abstract_llava, weights.LLAVA_VIDEO, ""),
}


@pytest.fixture(scope="module", params=FORMATS)
def checkpoint(request, golden):
    name, make_abstract, fmt, covered = FORMATS[request.param]
    folder = golden / name
    tensors = {n: t for n, t in load_file(folder / "model.safetensors").items() if re.search(covered, n)}
    return folder, make_abstract(folder), fmt, tensors


def assert_equal(a, b):
    a, b = weights.flatten(a), weights.flatten(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert leaf.dtype == b[path].dtype, path
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[path]), err_msg=path)


# ---- both ways ----


def test_saved_file_equals_the_one_that_was_loaded(checkpoint, tmp_path):
    folder, abstract, fmt, tensors = checkpoint
    dtype = next(iter(tensors.values())).dtype
    params = load_params(folder, abstract, fmt, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {dtype}
    weights.save_params(tmp_path, params, fmt)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert saved[name].dtype == tensor.dtype
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)
    assert_equal(load_params(tmp_path, abstract, fmt, dtype=dtype), params)


def test_files_of_one_dtype_load_as_another(checkpoint, tmp_path):
    folder, abstract, fmt, tensors = checkpoint
    wide = load_params(folder, abstract, fmt)
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype(np.float32)}
    weights.save_params(tmp_path / "half", wide, fmt, dtype=BFLOAT16)
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {BFLOAT16}
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16), wide)
    assert_equal(load_params(tmp_path / "half", abstract, fmt, dtype=BFLOAT16), rounded)
    assert_equal(load_params(tmp_path / "half", abstract, fmt), jax.tree.map(lambda p: p.astype(jnp.float32), rounded))
    assert_equal(load_params(folder, abstract, fmt, dtype=BFLOAT16), rounded)


def test_layout_by_hand(golden):
    """Linear kernels are transposed, convolutions go from OIHW to HWIO, layers are stacked in their order."""
    tensors = load_file(golden / "llava_video_grid" / "model.safetensors")
    folder = golden / "llava_video_grid"
    params = weights.flatten(load_params(folder, abstract_llava(folder), weights.LLAVA_VIDEO))
    q = "model.layers.{}.self_attn.q_proj.weight"
    np.testing.assert_array_equal(
        params["language_model.layers.self_attn.q_proj.kernel"], [tensors[q.format(i)].T for i in range(3)]
    )
    conv = tensors["model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight"]
    kernel = params["vision_tower.vision_model.embeddings.patch_embedding.kernel"]
    np.testing.assert_array_equal(kernel[1, 2, 0, 7], conv[7, 0, 1, 2])
    table = params["language_model.embed_tokens.embedding"]
    np.testing.assert_array_equal(table, tensors["model.embed_tokens.weight"])


def test_tspo_layout_survives_a_change(golden, tmp_path):
    """CLIP and the agent are read from one TSPO-0.4B folder, changed, written to one folder and read again."""
    folder = golden / "tspo_agent"
    parts = [(abstract_clip(folder), weights.CLIP), (abstract_agent(folder), weights.agent_format(weights.SELECTOR))]
    changed = [jax.tree.map(lambda p: p + 0.5, load_params(folder, *part)) for part in parts]
    tensors = {}
    for params, (_, fmt) in zip(changed, parts, strict=True):
        tensors |= weights.file_tensors(params, fmt)
    assert tensors.keys() == load_file(folder / "model.safetensors").keys()
    weights.save_tensors(tmp_path, tensors)
    for params, part in zip(changed, parts, strict=True):
        assert_equal(load_params(tmp_path, *part), params)


def test_agent_of_a_training_checkpoint(golden, tmp_path):
    """The original's training writes the agent as multiModal_align.* among the tensors of LLaVA-Video."""
    folder = golden / "tspo_agent"
    abstract = abstract_agent(folder)
    agent = load_params(folder, abstract, weights.agent_format(weights.SELECTOR))
    fmt = weights.agent_format(weights.TRAINING)
    tensors = load_file(golden / "llava_video_grid" / "model.safetensors") | weights.file_tensors(agent, fmt)
    weights.save_tensors(tmp_path, tensors)
    assert_equal(load_params(tmp_path, abstract, fmt), agent)
    llava = abstract_llava(golden / "llava_video_grid")
    load_params(tmp_path, llava, weights.LLAVA_VIDEO)


def test_sharded_load_equals_unsharded(checkpoint):
    """Kernels are split over both axes of a 2 x 4 mesh, vectors over one; every device holds its slice alone."""
    folder, abstract, fmt, _ = checkpoint
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def sharding(path, shape):
        last = shape[-2:]
        names = ("data", "model")[2 - len(last) :]
        axes = [name if size % mesh.shape[name] == 0 else None for name, size in zip(names, last, strict=True)]
        return NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - len(axes)), *axes))

    sharded = load_params(folder, abstract, fmt, sharding=sharding)
    assert_equal(sharded, load_params(folder, abstract, fmt))
    split = [leaf for leaf in jax.tree.leaves(sharded) if not leaf.is_fully_replicated]
    assert len(split) > 10 and all(len(leaf.sharding.device_set) == 8 for leaf in split)
    assert any(leaf.addressable_shards[0].data.size * 8 == leaf.size for leaf in split)


# ---- several files ----


@pytest.fixture
def broken(golden, tmp_path):
    """A copy of the LLaVA-Video folder to break: its tensors, write(tensors, file name), load()."""
    source = golden / "llava_video_grid"
    abstract = abstract_llava(source)

    class Folder:
        path = tmp_path
        tensors = load_file(source / "model.safetensors")

        def write(self, tensors, name="model.safetensors"):
            save_file(tensors, tmp_path / name)

        def load(self):
            return load_params(tmp_path, abstract, weights.LLAVA_VIDEO)

        def original(self):
            return load_params(source, abstract, weights.LLAVA_VIDEO)

    return Folder()


def split_in_three(tensors):
    names = sorted(tensors)
    return {f"model-0000{i + 1}-of-00003.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)}


def write_index(path, files):
    weight_map = {name: file for file, tensors in files.items() for name in tensors}
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("with_index", [True, False])
def test_several_files(broken, with_index):
    files = split_in_three(broken.tensors)
    for name, tensors in files.items():
        broken.write(tensors, name)
    if with_index:
        write_index(broken.path, files)
        broken.write(broken.tensors, "consolidated.safetensors")  # a second copy that the index does not name
    assert_equal(broken.load(), broken.original())


def test_index_that_names_missing_files(broken):
    files = split_in_three(broken.tensors)
    first, second, third = files
    broken.write(files[second], second)
    write_index(broken.path, files)
    with pytest.raises(CheckpointError, match=f"index.json: .*{first}, {third}"):
        broken.load()


def test_the_same_tensor_in_two_files(broken):
    broken.write(broken.tensors)
    broken.write({"lm_head.weight": broken.tensors["lm_head.weight"]}, "more.safetensors")
    with pytest.raises(CheckpointError, match="more.safetensors: tensor lm_head.weight is also in model.safetensors"):
        broken.load()


@pytest.mark.parametrize("shape", [None, (2, 4)])
@pytest.mark.parametrize("read_bytes", [1, 40_000])
def test_layers_are_read_a_few_at_a_time(checkpoint, monkeypatch, shape, read_bytes):
    """One by one, and two of three at a time; the arrays and where they lie are the same."""
    folder, abstract, fmt, _ = checkpoint
    mesh = shape and Mesh(np.reshape(jax.devices(), shape), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def where(path, dims):
        split = [None] * (len(dims) - 1) + ["model"]
        return NamedSharding(mesh, PartitionSpec(*split if weights.is_stacked(path) and dims[-1] % 4 == 0 else ()))

    whole = load_params(folder, abstract, fmt, sharding=where if mesh else None)
    monkeypatch.setattr(weights, "READ_BYTES", read_bytes)
    pieces = load_params(folder, abstract, fmt, sharding=where if mesh else None)
    assert_equal(pieces, whole)
    for path, leaf in weights.flatten(pieces).items():
        assert leaf.sharding == weights.flatten(whole)[path].sharding


def test_every_part_is_read_once(checkpoint, monkeypatch):
    """Also where several devices hold it."""
    folder, abstract, fmt, tensors = checkpoint
    read = []
    original = weights.SafetensorsFolder.read

    def counted(self, name, index):
        part = original(self, name, index)
        read.append(part.size)
        return part

    monkeypatch.setattr(weights.SafetensorsFolder, "read", counted)
    mesh = Mesh(np.reshape(jax.devices(), (2, 4)), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    load_params(folder, abstract, fmt, sharding=lambda path, dims: NamedSharding(mesh, PartitionSpec()))
    assert sum(read) == sum(tensor.size for tensor in tensors.values())


# ---- damage ----


def test_a_set_of_files_must_be_whole(broken):
    files = split_in_three(broken.tensors)
    first, second, third = files
    for name in (first, third):
        broken.write(files[name], name)
    with pytest.raises(CheckpointError, match=f"incomplete, {second} of 00003 files are missing"):
        broken.load()
    broken.write(files[second], "model-00002-of-00004.safetensors")
    with pytest.raises(CheckpointError, match="mixed files of several checkpoints: model-00001-of-00003.safetensors, "):
        broken.load()


def test_a_file_of_another_checkpoint(broken):
    """Two of the three files have changed places."""
    files = split_in_three(broken.tensors)
    first, second, third = files
    write_index(broken.path, files)
    for name, tensors in zip((second, first, third), files.values(), strict=True):
        broken.write(tensors, name)
    with pytest.raises(
        CheckpointError, match=f"{first}: holds .*, which model.safetensors.index.json places in {second}"
    ):
        broken.load()


def test_a_tensor_under_two_names(broken):
    norm = "model.norm.weight"
    broken.write(broken.tensors | {"language_model.model.norm.weight": broken.tensors[norm]})
    with pytest.raises(CheckpointError, match=f"twice: language_model.model.norm.weight, {norm}"):
        broken.load()


def test_every_offending_tensor_is_named(broken):
    tensors = dict(broken.tensors)
    del tensors["model.layers.1.mlp.up_proj.weight"], tensors["model.mm_projector.2.bias"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-2]
    tensors["model.norm.weight"] = np.ones((1, 64), np.float32)
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((128, 64), np.float32)
    broken.write(tensors)
    with pytest.raises(CheckpointError) as error:
        broken.load()
    lines = str(error.value).split("\n  ")
    assert lines[0].startswith(str(broken.path))
    assert sorted(lines[1:]) == [
        "missing: model.layers.1.mlp.up_proj.weight [128, 64]",
        "missing: model.mm_projector.2.bias [64]",
        "unexpected: model.layers.3.mlp.up_proj.weight [128, 64]",
        "wrong shape: lm_head.weight is [270, 64], expected [272, 64]",
        "wrong shape: model.norm.weight is [1, 64], expected [64]",
    ]


def test_buffers_of_old_checkpoints_are_ignored(broken):
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": np.arange(49)[None],
    }
    broken.write(broken.tensors | buffers)
    assert_equal(broken.load(), broken.original())


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_file(broken, keep):
    broken.write(broken.tensors)
    file = broken.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors: truncated or not a safetensors file"):
        broken.load()


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"weight_map": {}}'])
def test_broken_index(broken, text):
    broken.write(broken.tensors)
    (broken.path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="model.safetensors.index.json: "):
        broken.load()


def test_no_folder_and_no_file(broken):
    with pytest.raises(CheckpointError, match="holds no .*safetensors file"):
        broken.load()
    with pytest.raises(CheckpointError, match="nowhere: no such checkpoint folder"):
        weights.SafetensorsFolder(broken.path / "nowhere")


@pytest.mark.parametrize("content", [b"{", b"", b"[1]", b"\xff\xfe\x00"])
def test_broken_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="config.json: "):
        weights.read_config(tmp_path)
    with pytest.raises(CheckpointError, match="other.json: no such file"):
        weights.read_config(tmp_path, "other.json")


def test_many_problems_are_counted_and_a_few_named(broken):
    tensors = dict(broken.tensors) | {f"model.layers.0.x{i}.scale": np.ones(1, np.float32) for i in range(40)}
    broken.write(tensors)
    with pytest.raises(CheckpointError, match="does not fit its configuration: 40 unexpected") as error:
        broken.load()
    assert len(str(error.value).splitlines()) == 1 + weights.SHOWN + 1


@pytest.mark.parametrize("kind", ["I8", "U8", "F8_E4M3"])
def test_tensors_that_are_no_numbers_as_they_stand_are_named_with_their_type(broken, kind):
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = dict(broken.tensors)
    types = {"I8": np.int8, "U8": np.uint8, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    tensors[name] = np.ones(tensors[name].shape, types[kind])
    broken.write(tensors)
    with pytest.raises(CheckpointError, match=f"wrong type: {name} is {kind}, not one of F64, F32, F16, BF16"):
        broken.load()


# ---- identity ----


def test_identity(golden, tmp_path):
    """It follows CLIP's weights and configuration, and neither its agent nor the way it was written."""
    folder = golden / "tspo_agent"
    config = weights.read_config(folder)
    clip = {n: t for n, t in load_file(folder / "model.safetensors").items() if not n.startswith("selector.")}

    def identity(config, *files):
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        for i, tensors in enumerate(files):
            save_file(tensors, path / f"{i}.safetensors")
        return weights.checkpoint_identity(path)

    expected = weights.checkpoint_identity(folder)
    assert re.fullmatch("[0-9a-f]{16}", expected)
    half = len(clip) // 2
    names = list(clip)
    parts = [{n: clip[n] for n in names[:half]}, {n: clip[n] for n in names[half:]}]
    assert identity(config | {"architectures": ["CLIPModel"]}, *parts) == expected
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert identity(config, clip | {name: clip[name] + np.array(0.01, BFLOAT16)}) != expected
    assert identity(config | {"projection_dim": 65}, clip) != expected
