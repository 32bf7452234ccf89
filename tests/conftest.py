"""Eight CPU devices and exact matrix products for every test; set before jax is first used."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers of the original PyTorch code (tests/golden)."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def annotations() -> Path:
    """The real benchmark annotations, which the project may not ship: skipped where they are absent."""
    folder = ROOT.parent / "shared" / "annotations"
    if not folder.is_dir():
        pytest.skip("the benchmark annotations are not on this machine")
    return folder
