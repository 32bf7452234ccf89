"""A training run on disk: config.json, checkpoints/<step>/, metrics.jsonl and tensorboard/ in one folder.

A checkpoint after `step` updates holds the agent, the optimiser's state and the place of the data iterator. The frozen
networks are never saved, and randomness needs no state: it is a function of (seed, step, question index).
"""

import fcntl
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

CHECKPOINTS = "checkpoints"
AGENT, OPTIMIZER, ITERATOR = "agent", "optimizer", "iterator"
ABSENT = "(no such field)"


class RunFolderError(ValueError):
    """A run folder that belongs to another config, or a checkpoint that cannot be read."""


def check_run(folder: str | Path, config: Mapping[str, Any], may_differ: tuple[str, ...] = ()) -> None:
    """Raises RunFolderError where `folder` holds something else than a run of `config`, listing what differs.

    Args:
      config: nested mapping of plain values.
      may_differ: fields (dotted, or the name of a group) that a run may change when it is resumed.
    """
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


class TrainState(NamedTuple):
    """What an update changes: the agent's parameters and the optimiser's state."""

    agent: Any
    optimizer: Any


class Checkpoints:
    """Orbax checkpoints of a run: saved in the background, whole or not at all, the newest `keep` are kept."""

    def __init__(self, folder: str | Path, keep: int):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(Path(folder).absolute() / CHECKPOINTS, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        self._manager.close()

    def latest_step(self) -> int | None:
        """Updates done in the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, iterator: Mapping[str, Any]) -> None:
        """Starts to save a replicated state; returns as soon as it is copied from the devices."""
        state = jax.tree.map(np.asarray, state)  # given device arrays, Orbax compiles programs to cut them up
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    AGENT: ocp.args.StandardSave(state.agent),
                    OPTIMIZER: ocp.args.StandardSave(state.optimizer),
                    ITERATOR: ocp.args.JsonSave(dict(iterator)),
                }
            ),
        )

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """State and iterator of the checkpoint after `step` updates, with the shapes and shardings of `like`."""
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{
                    AGENT: ocp.args.StandardRestore(abstract.agent),
                    OPTIMIZER: ocp.args.StandardRestore(abstract.optimizer),
                    ITERATOR: ocp.args.JsonRestore(),
                }
            ),
        )
        return TrainState(restored[AGENT], restored[OPTIMIZER]), restored[ITERATOR]


def read_agent(checkpoint: str | Path) -> dict:
    """The agent's parameters (nested dict of numpy arrays) of a checkpoint, on any number of devices.

    Args:
      checkpoint: a run folder (its newest checkpoint), its `checkpoints` folder, or one checkpoint in it.
    Raises:
      RunFolderError: where there is no checkpoint.
    """
    folder = find_checkpoint(checkpoint) / AGENT
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(folder, restore_args=as_numpy)


def find_checkpoint(folder: str | Path) -> Path:
    """The folder of one checkpoint: `folder` itself, or the newest of the run (or of the `checkpoints`) there."""
    folder = Path(folder).absolute()
    if (folder / AGENT).is_dir():
        return folder
    inside = folder / CHECKPOINTS if (folder / CHECKPOINTS).is_dir() else folder
    steps = [int(p.name) for p in inside.iterdir() if p.name.isdigit()] if inside.is_dir() else []
    if not steps:
        raise RunFolderError(f"{folder}: holds no checkpoint; give a run folder, or runs/<name>/{CHECKPOINTS}/<step>")
    return inside / str(max(steps))
