"""The order of the rooms, as pyproject.toml has it: kept by this tree, and broken by a copy with a forbidden import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

pytest.importorskip("importlinter")
CHECK = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def check(folder: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, "-c", CHECK], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_order_is_kept():
    found = check(ROOT)
    assert found.returncode == 0 and "1 kept, 0 broken" in found.stdout, found.stdout


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("data/decode.py", "import tspo_jax.runs.metrics", "tspo_jax.data.decode -> tspo_jax.runs.metrics"),
        ("models/clip.py", "from tspo_jax import config", "tspo_jax.models.clip -> tspo_jax.config"),
        ("runs/loop.py", "from tspo_jax.tspo import policy", "tspo_jax.runs.loop -> tspo_jax.tspo.policy"),
        ("pages/report.py", "from tspo_jax import evaluate", "tspo_jax.pages.report -> tspo_jax.evaluate"),
        ("evaluate.py", "def f():\n    from tspo_jax import predecode", "tspo_jax.evaluate -> tspo_jax.predecode"),
        ("utils.py", "", "not listed as layers: - tspo_jax.utils"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path, file, line, said):
    for path in (ROOT / "tspo_jax").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "tspo_jax" / file).open("a") as changed:
        changed.write(f"\n\n{line}\n")
    found = check(tmp_path)
    assert found.returncode == 1 and said in " ".join(found.stdout.split()), found.stdout
