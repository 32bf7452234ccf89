"""The agents of other runs beside that of an evaluation: the rows that they have for the same questions.

A row of theirs keeps its question, frames and answer; its method becomes "topk of NAME", NAME being the folder's.
"""

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from tspo_jax.config import MAY_DIFFER
from tspo_jax.evaluation import results
from tspo_jax.runs import run_folder
from tspo_jax.selection.scoring import AGENT_METHODS

# Of an evaluation's record: what an agent of another run may have otherwise, its answers being comparable all the same.
FREE = ("agent", "agent_folder", "config", "seed", "questions", "clip.folder", "answerer.folder", "answerer.adapter")
FREE += ("search", "frame_idx_sha256", *MAY_DIFFER)


def read_rows(
    evaluations: Sequence[str | Path], record: Mapping, wanted: Set[tuple[str, str, int]]
) -> tuple[list[dict], dict[str, str]]:
    """Rows of the trained agents of other evaluations.

    Args:
      evaluations: their folders, RUN_DIR/evaluation.
      record: what the evaluation at hand depends on (run.settings).
      wanted: its (id, method, k); rows of other questions, methods and budgets are left out.

    Returns: the rows with their new methods, and new method -> method.
    Raises ValueError for an evaluation that is not there, has none of these rows, answered something else or otherwise,
    and for two with one name.
    """
    rows, names = [], {}
    for folder in map(Path, evaluations):
        run_dir = folder.parent
        if not (folder / "rows.jsonl").is_file():
            raise ValueError(f"{folder} holds no evaluation; run python -m tspo_jax.evaluate --run_dir={run_dir} first")
        there, here = run_folder.read_run_config(folder), json.loads(json.dumps(record))
        # The content of a store tells more than its path, where both evaluations had all of their videos.
        free = (*FREE, "store" if "store_sha256" in there and "store_sha256" in here else "store_sha256")
        differing = {
            name: values
            for name, values in run_folder.differences(there, here).items()
            if not any(_is_field(name, field) for field in free)
        }
        if differing:
            lines = [f"{name}: {there} there, {here} here" for name, (there, here) in differing.items()]
            raise ValueError("; ".join([f"{folder} is of other questions, or was answered otherwise", *lines]))
        found = [
            row
            for row in results.read_rows(folder / "rows.jsonl")
            if row["method"] in AGENT_METHODS and (row["id"], row["method"], row["k"]) in wanted
        ]
        if not found:
            raise ValueError(f"{folder} has no answers by a trained agent at these budgets")
        new = {f"{row['method']} of {run_dir.resolve().name}": row["method"] for row in found}
        if twice := new.keys() & names.keys():
            raise ValueError(f"two of the runs beside this one are named alike: {min(twice)}; rename a folder")
        names |= new
        rows += [row | {"method": f"{row['method']} of {run_dir.resolve().name}"} for row in found]
    return rows, names


def _is_field(name: str, field: str) -> bool:
    """Whether a dotted name is a field, or lies in a group of this name."""
    return name == field or name.startswith(f"{field}.")
