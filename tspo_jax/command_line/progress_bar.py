"""Progress of long work on stderr: a bar that moves, or a line a minute where stderr is the log of a job."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn


class ProgressBar(Progress):
    """rich's Progress, which alone says nothing in a log before the end.

    Args:
      seconds: between the lines of a log.
    """

    def __init__(self, *columns: str | ProgressColumn, seconds: float = 60.0):
        super().__init__(*columns, console=Console(stderr=True))
        self._seconds = seconds
        self._next_line = time.monotonic() + seconds

    def update(self, *args, **kwargs) -> None:
        super().update(*args, **kwargs)
        self._log()

    def advance(self, *args, **kwargs) -> None:
        super().advance(*args, **kwargs)
        self._log()

    def _log(self) -> None:
        if not self.console.is_terminal and time.monotonic() > self._next_line:
            self._next_line = time.monotonic() + self._seconds
            self.console.print(self.make_tasks_table([task for task in self.tasks if task.remaining]))


def described() -> ProgressBar:
    """A bar whose tasks say in their description what has been done."""
    return ProgressBar(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
