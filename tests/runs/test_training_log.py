"""wandb that is absent, offline or broken; the rows are tested with a training in test_train.py."""

import sys
from types import SimpleNamespace

import pytest

from tspo_jax.config import Config
from tspo_jax.runs.training_log import start_wandb


class FakeWandb(SimpleNamespace):
    """Remembers what `init` was called with, or raises."""

    def __init__(self, error=None):
        super().__init__(calls=[], error=error, Settings=dict)

    def init(self, **options):
        self.calls.append(options)
        if self.error:
            raise self.error
        return "a run"


def start(monkeypatch, folder, wandb):
    notes = []
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return start_wandb("tspo", folder, Config(), notes.append), notes


def test_a_rerun_continues_the_same_run(monkeypatch, tmp_path):
    fake = FakeWandb()
    for _ in range(2):
        assert start(monkeypatch, tmp_path / "first", fake) == ("a run", [])
    start(monkeypatch, tmp_path / "second", fake)
    first, again, second = fake.calls
    assert first["id"] == again["id"] != second["id"] and first["resume"] == "allow"
    assert first["project"] == "tspo" and first["name"] == "first" and first["config"]["policy"]["group_size"] == 8


@pytest.mark.parametrize("error", [RuntimeError("no API key configured\nsee here"), OSError("unreachable")])
def test_training_goes_on_without_it(monkeypatch, tmp_path, error):
    run, (note,) = start(monkeypatch, tmp_path, FakeWandb(error))
    assert run is None and str(error).splitlines()[0] in note and "WANDB_MODE=offline" in note


def test_not_installed(monkeypatch, tmp_path):
    run, (note,) = start(monkeypatch, tmp_path, None)  # None in sys.modules makes the import fail
    assert run is None and "pip install wandb" in note
