"""The training loop of every trainer: it knows steps, a state and batches, and nothing of what is learned.

A trainer brings its config (a subclass of config.General), a state (a pytree of jax arrays), batches whose place can be
saved, and a function (step, state) -> (new state, metrics). It gets: exact resuming, checkpoints (the newest and the
best), an orderly stop at SIGTERM (exit status 75) and when another process of the run is lost (76), a stop with the
offending batch where a metric is not finite, the log (terminal, metrics.jsonl, TensorBoard, Weights & Biases) with the
time left, and a profile. All of a regression's training (tests/runs/test_loop.py runs it):

    def batch_of(seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.random.default_rng((seed, step)).normal(size=(32, 2)).astype(np.float32)
        return x, x @ np.float32([1.0, -2.0])

    def train(config: General, run_dir: Path) -> bool:
        optimizer = optax.adam(0.05)

        @jax.jit
        def update(state, x, y):
            loss, gradient = jax.value_and_grad(lambda slope: jnp.mean((x @ slope - y) ** 2))(state["slope"])
            updates, moments = optimizer.update(gradient, state["moments"])
            return {"slope": optax.apply_updates(state["slope"], updates), "moments": moments}, {"loss": loss}

        batches = Batches(lambda first: (batch_of(config.seed, step) for step in itertools.count(first)))
        with Loop(run_dir, config, batches) as loop:
            slope = jnp.zeros(2)
            state = loop.restore({"slope": slope, "moments": optimizer.init(slope)})
            return loop.run(state, lambda step, state: update(state, *loop.batch(step)))

    if __name__ == "__main__":
        define_flags()
        entry_point.run(lambda: run_from_flags(General, train), check=partial(check_overrides, kind=General))

Resuming is exact where a step is a function of its number, the state and its batch: randomness is drawn from (seed,
step), as in jax.random.fold_in(jax.random.key(config.seed), step), and needs no state of its own.
"""

import dataclasses
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from absl import flags
from ml_collections import config_flags

from tspo_jax import config as config_module
from tspo_jax.config import GENERAL_MAY_DIFFER, General
from tspo_jax.devices import processes
from tspo_jax.runs.metrics import DeviceClock, Stopwatch
from tspo_jax.runs.preemption import EXIT_STATUS, Preemption
from tspo_jax.runs.run_folder import (
    Checkpoints,
    State,
    check_content,
    check_run,
    in_use,
    write_content,
    write_run_config,
)
from tspo_jax.runs.training_log import COLUMNS, Evaluated, Measured, NotFiniteError, TrainingLog

Step = Callable[[int, State], tuple[State, Mapping[str, jax.Array | float]]]
Evaluation = Callable[[int, State], Evaluated]  # after so many updates


class Place(Protocol):
    """Endless batches (pytrees of arrays of this process) whose place a checkpoint can hold, as JSON."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Mapping[str, Any]: ...

    def set_state(self, state: Mapping[str, Any]) -> None: ...


class Batches(Iterator):
    """The simplest Place: the number of the next batch.

    Args:
      start: number -> iterator over the batches from there on, always the same ones. Where batch n is a function of n,
        nothing has to be drawn again; a generator that can only begin at 0 is `lambda n: islice(generator, n, None)`.
    """

    def __init__(self, start: Callable[[int], Iterator]):
        self._start, self._next, self._iterator = start, 0, None

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start(self._next)
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        self._next, self._iterator = state["next_batch"], None


class _Taken(NamedTuple):
    place: Mapping[str, Any]  # before it
    batch: Any  # as the iterator gave it
    given: Any  # as steps get it


class Loop(ExitStack):
    """One start of a run (a `with` block), which goes on from the newest checkpoint of its folder.

    `start` is the number of updates that were done before, `state` the newest one, `clock` the device's, `watch` the
    stopwatch of the step in progress, and `note` writes a line to the terminal.

    Args:
      run_dir: made where it does not exist.
      config: config.json holds it; a folder of another one is refused, see `may_differ`.
      batches: batch n, counted from 0, is that of step n.
      put: batch -> what `batch(step)` gives, made ahead while the device still works (say, its arrays on the devices).
      shape_of: (step, batch) -> what steps that take equally long have in common; None says nothing of other steps.
      may_differ: fields of the config that another start may change.
      content: field of the config -> hash of what the file or folder that it names holds. Another start may find the
        same content under another path, not other content.
      setting: names what `evaluate` of `run` measures; only scores of one setting are compared.
      columns, report, quiet: of the log (TrainingLog).
    Raises: RunFolderError for a folder in use, of another config, or none of this machine.
    """

    def __init__(
        self,
        run_dir: Path,
        config: General,
        batches: Place,
        *,
        put: Callable[[Any], Any] = lambda batch: batch,
        shape_of: Callable[[int, Any], Hashable | None] = lambda step, batch: "",
        may_differ: tuple[str, ...] = GENERAL_MAY_DIFFER,
        content: Mapping[str, str] | None = None,
        setting: str = "",
        columns: Mapping[str, str] = COLUMNS,
        report: Callable[[Mapping[str, float]], None] | None = None,
        quiet: bool = False,
    ):
        super().__init__()
        self._run_dir, self._config, self._batches, self._may_differ = Path(run_dir), config, batches, may_differ
        self._put, self._shape_of = put, shape_of
        self._content, self._setting = content or {}, setting
        self._log_options = {"columns": columns, "report": report, "quiet": quiet}
        self._taken: dict[int, _Taken] = {}  # batches of steps that are not done, by step
        self.watch = Stopwatch()

    def __enter__(self) -> "Loop":
        with ExitStack() as stack:  # closes what is open where something here fails
            record = dataclasses.asdict(self._config)
            check_run(self._run_dir, record, (*self._may_differ, *self._content))
            check_content(self._run_dir, self._content)
            if jax.process_index() == 0:
                stack.enter_context(in_use(self._run_dir))
                write_run_config(self._run_dir, record)
                if self._content:
                    write_content(self._run_dir, self._content)
            self._checkpoints = stack.enter_context(
                Checkpoints(self._run_dir, self._config.keep_checkpoints, self._setting)
            )
            self.start = self._checkpoints.latest_step()
            self.clock = stack.enter_context(DeviceClock())
            options = self._log_options
            self._log = stack.enter_context(TrainingLog(self._run_dir, self._config, self.start, self.clock, **options))
            self.note, self.expect = self._log.note, self._log.expect
            self.push(stack.pop_all())
        return self

    @property
    def is_done(self) -> bool:
        return self.start >= self._config.num_steps

    def restore(self, state: State) -> State:
        """The state of the newest checkpoint with the shapes and shardings of `state`, or `state` where there is none.

        Raises RunFolderError where the checkpoint has other arrays.
        """
        self._next = self.start
        if self.start:
            state, place = self._checkpoints.restore(self.start, like=state)
            self._batches.set_state(place)
        if self.is_done:
            self.note(f"{self._run_dir}: all {self._config.num_steps} steps are done")
        elif self.start:
            self.note(f"{self._run_dir}: resuming after step {self.start}")
        self.state = state
        return state

    def batch(self, step: int) -> Any:
        """What `put` makes of the batch of a step: the one in progress, or a later one that is looked at ahead.

        The first call for a step loads it, and then waits for the metrics of the step before.
        """
        while step not in self._taken:
            with self.watch("data"):
                place, batch = self._batches.get_state(), next(self._batches)
                self._taken[self._next] = _Taken(place, batch, self._put(batch))
            self._next += 1
            self._log.finish_row()  # of the last step, whose update has had the time of loading to run
            self._since = time.perf_counter()
        return self._taken[step].given

    def run(self, state: State, step: Step, evaluate: Evaluation | None = None, evaluate_every: int = 0) -> bool:
        """Does the steps that are left, from a restored state. Returns False where SIGTERM stopped it; then the last
        step is saved.

        Args:
          step: takes its batch by `batch(step)`, and starts the computation of the new state and of scalar metrics
            without waiting for them. The old state may be donated. Where it does not measure by `with loop.watch(PART)`
            where its time goes, all of it is that of PART update.
          evaluate: called after every `evaluate_every` updates and after the last one, where that is not 0. The
            checkpoint with the best score is kept, as RUN_DIR/best.
        Raises: NotFiniteError where a metric of a step is nan or infinite; no checkpoint holds it.
        """
        config = self._config
        if self.is_done:
            return True
        profiled = range(self.start + 2, self.start + 2 + config.profile_steps)
        with ExitStack() as stack:
            preemption = stack.enter_context(Preemption())
            profile = stack.enter_context(ExitStack())
            stack.enter_context(processes.end_together(agreed=NotFiniteError))
            for number in range(self.start, config.num_steps):
                if profiled and number == profiled[0]:
                    profile.enter_context(jax.profiler.trace(str(self._run_dir / "profile")))
                self.state = state = self._step(number, state, step)
                if profiled and number == profiled[-1]:
                    profile.close()
                done = number + 1
                is_last, must_stop = done == config.num_steps, preemption.must_stop(done)
                is_evaluated = bool(evaluate_every) and not must_stop and (is_last or done % evaluate_every == 0)
                if must_stop or is_last or is_evaluated or done % config.checkpoint_every == 0:
                    self._log.finish_row()
                    score = None
                    if is_evaluated:
                        found = evaluate(done, state)
                        self._log.add(done, found)
                        score = found.score
                    ahead = self._taken.get(done)
                    self._checkpoints.save(done, state, ahead.place if ahead else self._batches.get_state(), score)
                if must_stop and not is_last:
                    self.note(
                        f"{self._run_dir}: stopped by SIGTERM, saved after step {done}; run the same command to go on"
                    )
                    return False
        return True

    def _step(self, number: int, state: State, step: Step) -> State:
        self.watch = watch = Stopwatch()
        self._since = time.perf_counter()
        state, metrics = step(number, state)
        since = time.perf_counter()
        if watch.seconds.keys() <= {"data"}:  # the step is one program
            watch.seconds["update"] = since - self._since
            since = self._since
        self.clock.started(next(iter(metrics.values())), since)
        self.batch(number)  # where the step did not ask for it: batch n stays that of step n
        batch = self._taken.pop(number).batch
        self._log.finish_row()  # of the last step, where this one's batch was taken before that was done
        self._log.start_row(Measured(number + 1, batch, metrics, watch, self._shape_of(number, batch)))
        return state


# ---- command line ----------------------------------------------------------------------------------------


def fit(
    run_dir: Path, config: General, start: Callable[[int], Iterator], state: State, update: Callable, **options: Any
) -> tuple[bool, State]:
    """A training whose every step is one update of the state from one batch.

    Args:
      start: as Batches takes it.
      state: before the first update; a run that has begun goes on from its own.
      update: (step, state, batch) -> (state, metrics).
      options: of Loop.
    Returns: whether all steps are done (False where SIGTERM stopped it before), and the newest state.
    """
    with Loop(run_dir, config, Batches(start), **options) as loop:
        step = lambda number, state: update(np.int32(number), state, loop.batch(number))  # noqa: E731
        return loop.run(loop.restore(state), step), loop.state


def define_flags() -> None:
    """--config and --run_dir, of every trainer."""
    config_module.define_flag()
    flags.DEFINE_string("run_dir", "", "Folder of the run; default: runs/<name of the config file>.")


def run_from_flags(kind: type[General], train: Callable[[Any, Path], bool]) -> int:
    """Joins the other processes of the run and trains as the flags say: `train(config, run_dir)` returns what Loop.run
    does. Returns the exit status."""
    config = config_module.from_flags(kind)
    processes.join(config.distributed)
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    with processes.end_together():
        is_done = train(config, Path(flags.FLAGS.run_dir or f"runs/{name}"))
    return 0 if is_done else EXIT_STATUS
