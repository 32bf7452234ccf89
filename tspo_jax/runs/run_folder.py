"""A training run on disk: config.json, checkpoints/<step>/, metrics.jsonl and tensorboard/ in one folder.

A checkpoint after `step` updates holds the state that is trained, one folder per part (agent/ and optimizer/ of
train.py), and the place of the data iterator. Frozen networks are never saved.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from tspo_jax.checkpoints.weights import unflatten

CHECKPOINTS = "checkpoints"
STATE, ITERATOR = "state", "iterator"
BEST = "best"  # a run folder's best checkpoint is called RUN_DIR/best
SCORE = "score"  # by this metric
SETTING = "setting"  # a number for what was evaluated
CONTENT = "content.json"  # what a run computes from
ABSENT = "(no such field)"
State = TypeVar("State")  # a pytree; the fields of a named tuple are parts that can be read alone


class RunFolderError(ValueError):
    """A run folder that belongs to another config, or a checkpoint that cannot be read."""


def check_run(folder: str | Path, config: Mapping[str, Any], may_differ: tuple[str, ...] = ()) -> None:
    """Raises RunFolderError where `folder` holds something else than a run of `config`, listing what differs, or is an
    address.

    Args:
      config: nested mapping of plain values.
      may_differ: fields (dotted, or the name of a group) that a run may change when it is resumed.
    """
    if re.match(r"\w+:/", str(folder)):
        raise RunFolderError(f"{folder}: not a folder of this machine; mount the bucket (docs/running_on_tpu.md)")
    path = Path(folder) / "config.json"
    if path.exists():
        found = {
            name: values
            for name, values in differences(read_run_config(folder), _as_json(config)).items()
            if not any(name == field or name.startswith(f"{field}.") for field in may_differ)
        }
        if found:
            lines = [f"{name}: {there} there, {here} here" for name, (there, here) in found.items()]
            advice = "continue it with its own config, or choose another --run_dir"
            raise RunFolderError("\n  ".join([f"{folder} holds a run of another config ({advice}):", *lines]))
    elif (Path(folder) / CHECKPOINTS).exists():
        raise RunFolderError(
            f"{path} is missing, but there are checkpoints: not a run folder; choose another --run_dir"
        )


def check_content(folder: str | Path, content: Mapping[str, str]) -> None:
    """Raises RunFolderError where a run began with other content than `content`: field of its config -> hash of what
    the file or folder of this name holds. Where that lies is all the same."""
    there = read_content(folder)
    if there and (found := differences(there, dict(content))):
        changed = ", ".join(f"config.{name}" for name in found)
        raise RunFolderError(
            f"{folder} holds a run that began with other content of {changed}: what it computes would be of neither; "
            "give it the former files, or choose another --run_dir"
        )


def read_content(folder: str | Path) -> dict[str, str]:
    """What a run began with, as `check_content` compares it; {} for a run that did not record it."""
    path = Path(folder) / CONTENT
    return json.loads(path.read_text()) if path.is_file() else {}


def write_content(folder: str | Path, content: Mapping[str, str]) -> None:
    partial = Path(folder) / f"{CONTENT}.tmp"
    partial.write_text(json.dumps(dict(content), indent=2) + "\n")
    partial.replace(Path(folder) / CONTENT)


@contextmanager
def in_use(folder: str | Path) -> Iterator[None]:
    """Keeps other processes out of a run folder until the end of the `with` block, or of this process however it ends.

    Raises RunFolderError naming the process that uses it.
    """
    path = Path(folder) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            user = file.read().strip() or "another process"
            raise RunFolderError(
                f"{folder} is in use by {user}; wait for its end, or choose another --run_dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def write_run_config(folder: str | Path, config: Mapping[str, Any]) -> None:
    """Makes `folder` that of a run of `config`: writes its config.json."""
    path = Path(folder) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(_as_json(config), indent=2) + "\n")
    partial.replace(path)


def _as_json(config: Mapping[str, Any]) -> dict:
    return json.loads(json.dumps(config))  # tuples become lists, as they are in the file


def read_run_config(folder: str | Path) -> dict:
    """config.json of a run folder."""
    path = Path(folder) / "config.json"
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise RunFolderError(f"{path}: no such file; is {folder} a run folder?") from None
    except json.JSONDecodeError as error:
        raise RunFolderError(f"{path}: not valid json ({error})") from error


def differences(there: Mapping, here: Mapping, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field -> (value there, value here) of all fields that differ; `ABSENT` where it is missing."""
    found = {}
    for name in [*there, *(name for name in here if name not in there)]:
        a, b = there.get(name, ABSENT), here.get(name, ABSENT)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found[prefix + name] = (a, b)
    return found


class Checkpoints:
    """Orbax checkpoints of a run: saved in the background, whole or not at all; the newest `keep` are kept, and the
    one with the best score. `setting` names what is evaluated: scores of another setting are no match for those of this
    one."""

    def __init__(self, folder: str | Path, keep: int, setting: str = ""):
        self._setting = _number(setting)

        def score(metrics):
            return metrics[SCORE] if metrics.get(SETTING, 0) == self._setting else -math.inf

        kept = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(best_fn=score, preservation_policy=kept, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute() / CHECKPOINTS, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest_step(self) -> int:
        """Updates done in the newest checkpoint, 0 where there is none. What the first process sees holds for all:
        others may see an older state of a shared folder."""
        return int(multihost_utils.broadcast_one_to_all(np.int32(self._manager.latest_step() or 0)))

    def save(self, step: int, state: State, iterator: Mapping[str, Any], score: float | None = None) -> None:
        """Starts to save a state; returns as soon as it is copied from the devices.

        Of an array that is split over processes each process writes what its own devices hold: no host holds the whole.
        """
        state = jax.tree.map(_on_host, state)
        items = {name: ocp.args.StandardSave(tree) for name, tree in _parts(state).items()}
        args = ocp.args.Composite(**items, **{ITERATOR: ocp.args.JsonSave(dict(iterator))})
        metrics = None if score is None else {SCORE: score, SETTING: self._setting}
        self._manager.save(step, args=args, metrics=metrics)

    def restore(self, step: int, like: State) -> tuple[State, dict]:
        """State and iterator of the checkpoint after `step` updates, with the shapes and shardings of `like`.

        Raises RunFolderError listing what differs where the state has other arrays there.
        """
        self._manager.wait_until_finished()
        where = self._manager.directory / str(step)
        for name, part in _parts(like).items():
            _check_shapes(where / name, part)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = {name: ocp.args.StandardRestore(tree) for name, tree in _parts(abstract).items()}
        restored = self._manager.restore(step, args=ocp.args.Composite(**items, **{ITERATOR: ocp.args.JsonRestore()}))
        parts = {name: restored[name] for name in items}
        return (like._replace(**parts) if hasattr(like, "_replace") else parts[STATE]), restored[ITERATOR]


def _parts(state: State) -> dict[str, Any]:
    """What is saved in folders of its own: the fields of a named tuple that are not None, or all of another state."""
    named = state._asdict() if hasattr(state, "_asdict") else {STATE: state}
    return {name: tree for name, tree in named.items() if tree is not None}


def _on_host(x: jax.Array) -> np.ndarray | jax.Array:
    """A whole copy, where this process holds all of the array: given device arrays, Orbax compiles programs to cut them
    up. One that is split over processes stays as it is."""
    is_split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    return x if is_split else np.asarray(x)


def _check_shapes(folder: Path, here: Any) -> None:
    if not folder.is_dir():
        raise RunFolderError(f"{folder.parent} has no {folder.name}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        there = checkpointer.metadata(folder).item_metadata.tree
    if found := differences(_shapes(there), _shapes(here)):
        lines = [f"{name}: {a} there, {b} here" for name, (a, b) in found.items()]
        raise RunFolderError("\n  ".join([f"{folder} is of another kind or size:", *lines]))


def _shapes(tree: Any) -> dict:
    """Shapes of the arrays of a pytree as a nested dict; Orbax knows neither named tuples nor what holds no array."""
    leaves = jax.tree.leaves_with_path(tree)
    return unflatten({jax.tree_util.keystr(path, simple=True, separator="."): list(x.shape) for path, x in leaves})


def read_part(checkpoint: str | Path, name: str) -> Any:
    """Part `name` of the state of a checkpoint (nested dict of numpy arrays), on any number of devices.

    Args:
      checkpoint: a run folder (its newest checkpoint), RUN_DIR/best, its `checkpoints` folder, or one checkpoint in it.
    Raises:
      RunFolderError: where there is no checkpoint, or none with this part.
    """
    folder = find_checkpoint(checkpoint) / name
    if not folder.is_dir():
        raise RunFolderError(f"{folder.parent} holds no {name}: a run of another trainer")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=as_numpy)


def find_checkpoint(folder: str | Path) -> Path:
    """The folder of one checkpoint: `folder` itself, or the newest of the run (or of the `checkpoints`) there.

    RUN_DIR/best is the run's checkpoint with the best score of an evaluation during training, among those of the
    setting that was evaluated last.
    """
    folder = Path(folder).absolute()
    if (folder / ITERATOR).is_dir():
        return folder
    if folder.name == BEST and (folder.parent / CHECKPOINTS).is_dir():
        scores = {path: score for path in _steps(folder.parent / CHECKPOINTS) if (score := _score(path)) is not None}
        if not scores:
            raise RunFolderError(f"{folder.parent}: no checkpoint was evaluated (config.held_out.every)")
        *_, (_, setting) = scores.values()
        last = {path: score for path, (score, of) in scores.items() if of == setting}
        return max(reversed(last), key=last.get)  # of equals the newest, as Orbax keeps it
    found = _steps(folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder)
    if not found:
        raise RunFolderError(f"{folder}: holds no checkpoint; give a run folder, or runs/<name>/{CHECKPOINTS}/<step>")
    return found[-1]


def run_of(folder: str | Path) -> Path | None:
    """The run folder that `folder` is, or that it is a checkpoint of (RUN_DIR/best too); None where it is neither."""
    folder = Path(folder).absolute()
    for run in (folder, *folder.parents[:2]):
        if (run / CHECKPOINTS).is_dir() and (run / "config.json").is_file():
            return run
    return None


def _steps(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name))


def _score(checkpoint: Path) -> tuple[float, int] | None:
    """Score and setting."""
    path = checkpoint / "metrics" / "metrics"  # where Orbax puts them
    metrics = json.loads(path.read_text()) if path.is_file() else None
    return None if metrics is None else (metrics[SCORE], metrics.get(SETTING, 0))


def _number(setting: str) -> int:
    """Orbax keeps numbers alone: one that a float holds exactly."""
    return int(hashlib.sha256(setting.encode()).hexdigest()[:12], 16) if setting else 0
