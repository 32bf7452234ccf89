"""kill -9 of a training, alone and as one of two processes: the other ends by itself, and a rerun goes on exactly."""

from test_two_processes import needle_config

from benchmarks import kill_resume
from tspo_jax.processes import LOST


def arguments(golden, folder, num_steps):
    config = needle_config(golden, folder)
    config.num_steps, config.checkpoint_every = num_steps, 2
    path = folder / "needles.py"
    path.write_text(
        f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.to_dict()!r})\n"
    )
    return [f"--config={path}"]


def test_killed_at_random_moments(golden, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    mesh = """--config.mesh.axes=(("data",-1),("model",1))"""
    command = [*arguments(golden, tmp_path, num_steps=20), mesh]
    pace = kill_resume.undisturbed(tmp_path / "whole", command)
    kills = kill_resume.disturbed(tmp_path / "killed", command, 2, pace, num_steps=20)
    assert len(kills) > 0
    result = kill_resume.compare(tmp_path / "whole", tmp_path / "killed")
    assert result["parameters"] and result["picks"]


def test_one_of_two_processes_is_killed(golden, tmp_path, monkeypatch):
    """As soon as two steps are saved, so that the rerun does not begin anew."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    command = arguments(golden, tmp_path, num_steps=20)
    kill_resume.undisturbed(tmp_path / "whole", command, 2)
    run = kill_resume.Run(tmp_path / "killed", command, 2)
    while run.is_running() and kill_resume.num_rows(tmp_path / "killed") < 5:
        pass
    run.processes[1].kill()
    assert run.wait(60) == [LOST, -9]
    said = run.log.read_text()
    assert "error: process 0 of 2: another process has ended or cannot be reached" in said
    assert "run the same command again in all of them" in said and "Traceback" not in said
    assert not any(kill_resume.Run(tmp_path / "killed", command, 2).wait(300))
    result = kill_resume.compare(tmp_path / "whole", tmp_path / "killed")
    assert result["parameters"] and result["picks"] and result["steps_redone"] < 20
