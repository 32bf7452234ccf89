"""Eight CPU devices, exact matrix products and quick compilation for every test; set before jax is first used."""

import os


def xla_flags(num_devices: int) -> str:
    """XLA_FLAGS of a process with this many CPU devices, whose tiny programs are compiled once and hardly run.

    LLVM optimises nothing and fused loops are emitted the old way: a third of the suite's time. What partitions and
    rewrites programs is as it always is.
    """
    quickly = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    return f"{quickly} --xla_cpu_parallel_codegen_split_count=1 --xla_force_host_platform_device_count={num_devices}"


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}"  # the last of equal flags counts

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

jax.config.update("jax_default_matmul_precision", "highest")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers of the original PyTorch code (tests/golden)."""
    return ROOT / "tests" / "golden"


@pytest.fixture
def plain_clip(golden, tmp_path) -> Path:
    """A CLIP folder in float32 that holds no agent."""
    folder = tmp_path / "clip"
    shutil.copytree(golden / "tspo_agent", folder)
    tensors = load_file(folder / "model.safetensors")
    clip = {name: x.astype(np.float32) for name, x in tensors.items() if not name.startswith("selector.")}
    save_file(clip, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["CLIPModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def annotations() -> Path:
    """The real benchmark annotations, which the project may not ship: skipped where they are absent."""
    folder = ROOT.parent / "shared" / "annotations"
    if not folder.is_dir():
        pytest.skip("the benchmark annotations are not on this machine")
    return folder
