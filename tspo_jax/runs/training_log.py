"""What a training run says while it goes on: rows of metrics, the terminal, Weights & Biases."""

import dataclasses
import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from tspo_jax.config import General
from tspo_jax.runs.estimate import Pace, Steps, said
from tspo_jax.runs.metrics import CompilationCounter, DeviceClock, MetricsLog, Stopwatch, Terminal

COLUMNS = {  # of the table on the terminal: metric -> heading
    "step": "step",
    "loss": "loss",
    "grad_norm": "gradient",
    "learning_rate": "rate",
    "seconds/data": "data",
    "seconds/update": "update",
    "device_idle": "idle",
    "compilations": "programs",
}


class NotFiniteError(ValueError):
    """A step whose metrics are nan or infinite."""


class Evaluated(NamedTuple):
    """What an evaluation during training found: metrics for the log, a sentence for the terminal, and, where it says
    which checkpoint is best, the higher the better, a score."""

    metrics: Mapping[str, float]
    said: str
    score: float | None = None


class Measured(NamedTuple):
    """A step whose metrics are still computed: number of updates with it, batch (of the host), metrics, seconds, and
    the shape that it shares with the steps that take as long (None: it is like no other)."""

    step: int
    batch: Any
    metrics: Mapping[str, jax.Array | float]
    watch: Stopwatch
    shape: Hashable


class TrainingLog(ExitStack):
    """Writes a row of metrics per step, in the first process only.

    The values of an update are waited for one step late, after the next batch was loaded, so that the host does not
    stand still while the device works.

    Args:
      start: steps that are done.
      clock: of the device.
      columns: of the table on the terminal, metric -> heading.
      report: called with every row, in every process.
      quiet: whether nothing goes to the terminal.
    """

    def __init__(
        self,
        run_dir: Path,
        config: General,
        start: int,
        clock: DeviceClock,
        columns: Mapping[str, str] = COLUMNS,
        report: Callable[[Mapping[str, float]], None] | None = None,
        quiet: bool = False,
    ):
        super().__init__()
        is_first = jax.process_index() == 0
        self._run_dir, self._config, self._clock, self._report = run_dir, config, clock, report
        self._log = self.enter_context(MetricsLog(run_dir, start)) if is_first else None
        self._terminal = self.enter_context(Terminal(config.num_steps, start, columns, quiet=quiet or not is_first))
        self._compilations = self.enter_context(CompilationCounter())
        self.note = self._terminal.note
        self._wandb = start_wandb(config.wandb, run_dir, config, self.note) if config.wandb and is_first else None
        if self._wandb:
            self.callback(self._wandb.finish)
        self._pace = Pace(config.num_steps)
        self._pending = None
        self._recent: list[dict] = []  # rows since the last line on the terminal

    def start_row(self, measured: Measured) -> None:
        self._pending = measured

    def expect(self, steps: Sequence[Steps]) -> None:
        """Says what the steps will need, before the first one."""
        self._pace.expect(steps)
        self.note(said(steps, self._config.num_steps))

    def add(self, step: int, evaluated: Evaluated) -> None:
        """An evaluation, as a row of its own; its time is no step's."""
        self._write({"step": step, **evaluated.metrics})
        self.note(evaluated.said)
        self._clock.idle_share()

    def finish_row(self) -> None:
        """Writes the row that was started, if there is one.

        Raises NotFiniteError where a metric is nan or infinite; the batch is then in a file of the run folder.
        """
        if self._pending is None:
            return
        step, batch, metrics, watch, shape = self._pending
        self._pending = None
        with watch("update"):
            values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        row = {"step": step} | values | {f"seconds/{part}": seconds for part, seconds in watch.seconds.items()}
        row |= {"device_idle": self._clock.idle_share(), "compilations": self._compilations.count}
        row |= self._pace.row(step, shape, sum(watch.seconds.values()), self._compilations.count)
        self._write(row)
        if broken := [name for name, value in row.items() if not np.isfinite(value)]:
            path = self._run_dir / f"not_finite_step_{step}_process_{jax.process_index()}.npz"
            np.savez(path, **_by_path(batch))
            raise NotFiniteError(
                f"step {step}: {', '.join(broken)} not finite; its batch is in {path}, and no checkpoint holds this "
                "step. Where the batch is finite, a lower optimizer.learning_rate may help"
            )
        if self._report:
            self._report(row)
        if time_left := self._pace.said():
            self.note(time_left)
        self._recent.append(row)
        if step % self._config.log_every == 0:
            names = dict.fromkeys(name for row in self._recent for name in row)
            values = {name: [row[name] for row in self._recent if name in row] for name in names}
            means = {name: float(np.mean(v)) if isinstance(v[0], float) else v[-1] for name, v in values.items()}
            self._terminal.row(means)
            self._recent = []
        self._terminal.advance(step)

    def _write(self, row: Mapping[str, float]) -> None:
        if self._log:
            self._log.write(row)
        if self._wandb:
            self._wandb.log(row, step=row["step"])


def _by_path(batch: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree by the names or positions that lead to them."""
    leaves = jax.tree.leaves_with_path(batch)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in leaves}


def start_wandb(project: str, run_dir: Path, config: General, note):
    """A run of Weights & Biases that a rerun of the same folder continues; None, with a note, where there can be none.

    No account is needed with WANDB_MODE=offline.
    """
    try:
        import wandb
    except ImportError:
        note("wandb is not installed (pip install wandb); training goes on without it")
        return None
    try:
        return wandb.init(
            project=project,
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(run_dir),
            config=dataclasses.asdict(config),
            settings=wandb.Settings(init_timeout=30, silent=True),
        )
    except Exception as error:  # of many kinds: no login, no network, a server that says no
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        note(f"wandb does not work ({reason}); training goes on without it. WANDB_MODE=offline needs no server")
        return None
