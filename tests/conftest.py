"""Eight CPU devices, exact matrix products and quick compilation for every test; set before jax is first used."""

import os
from pathlib import Path

from xla_flags import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
# Commands that tests start compile the same programs again and again, and so does the next run of the suite.
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ.get(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
os.environ["XLA_FLAGS"] = f"{xla_flags(8)} {os.environ.get('XLA_FLAGS', '')}"  # the last of equal flags counts

import json
import shutil

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


@pytest.fixture(scope="module")
def compile_once(tmp_path_factory):
    """Training runs of a file share their compiled programs: pytest.mark.usefixtures("compile_once")."""
    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


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
