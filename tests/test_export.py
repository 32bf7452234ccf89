"""Agents leave a run as TSPO folders, and come back equal."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from tspo_jax.checkpoints.folders import load_agent, load_clip
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.export import export
from tspo_jax.runs.run_folder import Checkpoints, write_content, write_run_config
from tspo_jax.tspo.programs import TrainState


@pytest.fixture
def trained(golden):
    """The golden agent after some training: no parameter is as it was, nor exact in bfloat16."""
    _, params = load_agent(golden / "tspo_agent")
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: np.asarray(x) + 0.01 * rng.normal(size=x.shape).astype(np.float32), params)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_agent_comes_back_in_the_dtype_of_the_folder(golden, trained, tmp_path):
    clip = golden / "tspo_agent"
    export(trained, clip, tmp_path / "out")
    _, back = load_agent(tmp_path / "out")
    assert_trees_equal(back, jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), trained))
    before, after = (load_file(folder / "model.safetensors") for folder in (clip, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype == ml_dtypes.bfloat16 and tensor.shape == before[name].shape
        assert name.startswith("selector.") or (tensor == before[name]).all()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in clip.iterdir()}


def test_exported_twice_gives_the_same_file(trained, plain_clip, tmp_path):
    export(trained, plain_clip, tmp_path / "one")
    export(load_agent(tmp_path / "one")[1], tmp_path / "one", tmp_path / "two")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.slow
def test_checkpoint_of_a_run_from_the_command_line(trained, plain_clip, tmp_path):
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, TrainState(trained, {"count": np.zeros((), np.int32)}), {"batch": 3})
    command = [sys.executable, "-m", "tspo_jax.export", f"--checkpoint={tmp_path / 'run'}", f"--clip={plain_clip}"]
    done = subprocess.run([*command, f"--output={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert_trees_equal(load_agent(tmp_path / "out")[1], trained)
    assert_trees_equal(load_clip(tmp_path / "out").params, load_clip(plain_clip).params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["TSPOModel"]


@pytest.mark.slow
def test_another_clip_than_the_agent_was_trained_with(trained, plain_clip, tmp_path):
    write_run_config(tmp_path / "run", {})
    write_content(tmp_path / "run", {"agent.clip": "of another folder"})
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        checkpoints.save(3, TrainState(trained, {"count": np.zeros((), np.int32)}), {"batch": 3})
    command = [sys.executable, "-m", "tspo_jax.export", f"--checkpoint={tmp_path / 'run'}", f"--clip={plain_clip}"]
    done = subprocess.run([*command, f"--output={tmp_path / 'out'}"], capture_output=True, text=True)
    assert done.returncode == 1 and "was trained with the features of another CLIP (of another folder)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_pytorch_modules_of_the_original_names_take_every_tensor(trained, plain_clip, tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file as load_torch
    from transformers import CLIPConfig, CLIPModel

    class Temporal(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            for name in ("Self_q", "Self_k", "Self_v", "ffn_o"):
                setattr(self, name, torch.nn.Linear(width, width))

    class Selector(torch.nn.Module):
        def __init__(self, width):
            super().__init__()
            self.temporal = Temporal(width)
            self.mlp = torch.nn.Sequential(
                torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width)
            )

    export(trained, plain_clip, tmp_path / "out")
    config = CLIPConfig.from_pretrained(tmp_path / "out")
    model = CLIPModel(config)
    model.selector = Selector(config.projection_dim)
    model.load_state_dict(load_torch(tmp_path / "out" / "model.safetensors"), strict=True)
    x = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
    theirs = model.selector.mlp(torch.tensor(x)).detach().numpy()
    one, two = (trained["mlp"][name] for name in ("linear_1", "linear_2"))
    ours = np.maximum(x @ one["kernel"] + one["bias"], 0) @ two["kernel"] + two["bias"]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_what_cannot_be_exported_is_named(trained, plain_clip, tmp_path):
    with pytest.raises(ValueError, match=r"width 64:\n  mlp.linear_1.kernel is missing, expected \(64, 64\)"):
        export({"temporal": trained["temporal"], "mlp": {**trained["mlp"], "linear_1": {"bias": np.zeros(64)}}},
               plain_clip, tmp_path / "out")  # fmt: skip
    with pytest.raises(ValueError, match="--output is the --clip folder"):
        export(trained, plain_clip, plain_clip)
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="model.safetensors.index.json"):
        export(trained, plain_clip, tmp_path / "sharded")
    (plain_clip / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no"):
        export(trained, plain_clip, tmp_path / "out")
