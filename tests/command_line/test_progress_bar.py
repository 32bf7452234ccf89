"""Progress in the log of a job."""

import pytest

from tspo_jax.command_line.progress_bar import ProgressBar


@pytest.mark.parametrize(("seconds", "lines"), [(0.0, ["many 1", "many 2"]), (60.0, [])])
def test_lines_of_a_log(capsys, seconds, lines):
    with ProgressBar("{task.description} {task.completed:.0f}", seconds=seconds) as progress:
        progress.add_task("done before", total=1, completed=1)
        task = progress.add_task("many", total=3)
        progress.advance(task)
        progress.update(task, completed=2)
        assert [line.strip() for line in capsys.readouterr().err.splitlines()] == lines
