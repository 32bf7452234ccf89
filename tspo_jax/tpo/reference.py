"""Log-probabilities of the answers before training, computed once and stored: rows {id, key, chosen, rejected, tokens}.

They hold for one checkpoint, frames, prompt template and dtype alone, whose identity is the file's first row: other
ones are an error, not a stale number.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.row_file import RowFile
from tspo_jax.devices import sharding
from tspo_jax.tpo.batches import PairBatches, rows_of
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.losses import AnswerLogProbs
from tspo_jax.tpo.programs import Pairs

HEADER = "(what these hold for)"


class StoredReferenceError(ValueError):
    """Stored log-probabilities of something else."""


def identity(config: TpoConfig, answerer: Answerer) -> dict:
    """What the log-probabilities depend on, but for the pairs themselves."""
    a = config.answerer
    return {
        "checkpoint": weights.checkpoint_identity(answerer.folder),
        "num_frames": config.data.num_frames,
        "template": a.template or answerer.template,
        "suffix": config.data.suffix,
        "answer_text": config.data.answer_text,
        "dtype": a.dtype,
        "video": json.loads(json.dumps(dataclasses.asdict(a.video))),
    }


def fill(
    path: Path,
    config: TpoConfig,
    answerer: Answerer,
    batches: PairBatches,
    log_probs: Callable[[Pairs], AnswerLogProbs],
    mesh: jax.sharding.Mesh,
    note: Callable[[str], None] = lambda text: None,
) -> None:
    """Sets `batches.reference` from the file, computing and storing what it lacks, a batch at a time.

    Args:
      log_probs: batch on the devices -> AnswerLogProbs [B, 2].
    Raises: StoredReferenceError for a file of another checkpoint, template, dtype, frames or pairs.
    """
    known = _read(path, identity(config, answerer), batches)
    todo = np.array([i for i, pair in enumerate(batches.pairs) if pair.id not in known], int)
    if len(todo):
        note(f"log-probabilities of {len(todo)} pairs under the reference, stored in {path}")
    size = config.batch_size // config.accumulate
    for start in range(0, len(todo), size):
        index = todo[start : start + size]
        rows = batches.rows(index, size - len(index))
        found = log_probs(sharding.put_batch(mesh, rows))
        total = np.asarray(jax.device_put(found.total, sharding.replicated(mesh)))
        values = total[rows_of(size, sharding.data_slice(mesh)[1])]
        new = []
        for i, of_pair in zip(index, values, strict=False):
            pair, (chosen, rejected) = batches.pairs[i], of_pair.tolist()
            tokens = batches.answer_lengths[i].tolist()
            new.append({"id": pair.id, "key": pair.key, "chosen": chosen, "rejected": rejected, "tokens": tokens})
        if jax.process_index() == 0:
            with RowFile(path) as file:
                file.append(new)
        known |= {row["id"]: row for row in new}
    batches.reference[:] = [[known[pair.id][name] for name in ("chosen", "rejected")] for pair in batches.pairs]


def _read(path: Path, expected: dict, batches: PairBatches) -> dict[str, dict]:
    """The rows of the file by id; it is made where it does not exist."""
    exists = path.is_file() and path.stat().st_size > 0
    if not exists and jax.process_index() == 0:
        with RowFile(path) as file:
            file.append([{"id": HEADER, **expected}])
    if not exists:
        return {}
    with RowFile(path) as file:
        rows = dict(file.rows)
    header = rows.pop(HEADER, {})
    header.pop("id", None)
    if header != expected:
        other = [f"{name}: {header.get(name)} there, {value} here" for name, value in expected.items()]
        changed = [line for line, name in zip(other, expected, strict=True) if header.get(name) != expected[name]]
        raise StoredReferenceError(
            "\n  ".join([f"{path} holds log-probabilities of another reference; choose another file:", *changed])
        )
    keys = {pair.id: pair.key for pair in batches.pairs}
    if changed := [name for name, row in rows.items() if name in keys and row["key"] != keys[name]]:
        raise StoredReferenceError(f"{path}: pair {changed[0]} has other texts or frames there; choose another file")
    return rows
