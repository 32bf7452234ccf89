"""Where a training run writes what it measures: the terminal, `metrics.jsonl` and TensorBoard.

A row is {"step": number of updates done, metric: number, ...}; names with a slash are grouped by TensorBoard.
"""

import json
import math
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class MetricsLog:
    """Rows appended to `folder`/metrics.jsonl and `folder`/tensorboard.

    Rows after `step` are dropped first: they belong to updates that were lost when the run was stopped and that will
    be done again. So is a last line that was cut in the middle.
    """

    def __init__(self, folder: str | Path, step: int):
        path = Path(folder) / "metrics.jsonl"
        rows = [row for row in read_rows(path) if row["step"] <= step] if path.exists() else []
        kept = path.with_suffix(".tmp")
        kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
        kept.replace(path)
        self._file = path.open("a")
        self._events = EventFileWriter(str(Path(folder) / "tensorboard"))
        if step:  # TensorBoard then hides what an earlier process wrote for the same steps
            start = SessionLog(status=SessionLog.START)
            self._events.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def write(self, row: Mapping[str, float]) -> None:
        self._file.write(json.dumps({name: _rounded(value) for name, value in row.items()}) + "\n")
        self._file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self._events.add_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=values)))

    def close(self) -> None:
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def read_rows(path: str | Path) -> list[dict]:
    """The rows of a metrics.jsonl; a last line cut in the middle is left out.

    Raises ValueError naming the line where another one is broken.
    """
    lines = Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if number < len(lines):  # an entire line ends with a newline, so something follows it
                raise ValueError(f"{path}, line {number}: not valid json ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: a line is not a json object")
    return rows


def _rounded(value: float) -> float | None:
    """7 significant digits, all that a float32 has; None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.7g}")


class Stopwatch:
    """Seconds spent in the named parts of one step: `with watch("fetch"): ...`, then `watch.seconds`."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start


class DeviceClock:
    """How long the device had something to do, as seen from the host (a `with` block).

    A thread waits for each result; the device works in the order in which it was told to.
    """

    def __init__(self):
        self._busy, self._ready = 0.0, time.perf_counter()
        self._last = self._busy, self._ready
        self._waiter = ThreadPoolExecutor(1)

    def started(self, result: jax.Array, since: float) -> None:
        """A program was given to the device; `result` is one of its outputs, and none that is donated later.

        `since` is time.perf_counter() from before the call: on GPUs one that loops until the data says so blocks its
        caller until it has ended.
        """
        self._waiter.submit(self._wait, result, since)

    def _wait(self, result: jax.Array, start: float) -> None:
        jax.block_until_ready(result)
        now = time.perf_counter()
        self._busy += now - max(start, self._ready)
        self._ready = now

    def idle_share(self) -> float:
        """Of the time since the last call, the share in which the device waited for the host.

        Waits for what was started.
        """
        self._waiter.submit(int).result()
        now = self._busy, time.perf_counter()
        (busy, since), self._last = self._last, now
        return 1 - (now[0] - busy) / max(now[1] - since, 1e-9)

    def __enter__(self) -> "DeviceClock":
        return self

    def __exit__(self, *_) -> None:
        self._waiter.shutdown()


class CompilationCounter:
    """`count` programs compiled while it is active (a `with` block)."""

    def __init__(self):
        self.count = 0

    def _listen(self, event: str, *_, **__) -> None:
        self.count += event == COMPILE_EVENT

    def __enter__(self) -> "CompilationCounter":
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)


class Terminal:
    """On stderr: a progress bar with the time left, and above it now and then a line of a table.

    Args:
      columns: metric -> its heading; metrics that a row lacks are shown as "-".
    """

    def __init__(self, num_steps: int, step: int, columns: Mapping[str, str], *, quiet: bool = False):
        self._console = Console(stderr=True, highlight=False, quiet=quiet)
        self._columns = columns
        self._num_rows = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=120,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=step)

    def __enter__(self) -> "Terminal":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def row(self, row: Mapping[str, float]) -> None:
        if self._num_rows % 20 == 0:
            self.note(" ".join(f"{heading:>8}" for heading in self._columns.values()))
        self._num_rows += 1
        self.note(" ".join(f"{_short(row.get(name)):>8}" for name in self._columns))


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3g}"
