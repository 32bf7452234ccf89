"""Stages of a data set: rows in an order, and on a side, that do not depend on the other rows; files written whole."""

import hashlib
import json
from pathlib import Path

from tspo_jax.data.frame_store import publish


def number(text: str) -> int:
    """A number below 2^60, the same in every run."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:15], 16)


def shuffled(rows: list[dict], seed: int, count: int = 0) -> list[dict]:
    """In an order that does not depend on the other rows; the first `count`, 0 = all."""
    return sorted(rows, key=lambda line: number(f"{seed} {line['id']}"))[: count or None]


def split_by_video(rows: list[dict], heldout: float, seed: int) -> dict[str, list[dict]]:
    """Training and held-out rows, in random order. A video's side depends on its name and the seed alone."""
    sides: dict[str, list[dict]] = {"train": [], "heldout": []}
    for line in shuffled(rows, seed):
        share = number(f"{seed} {line['video']}") / 2**60
        sides["heldout" if share < heldout else "train"].append(line)
    return sides


def write_rows(path: Path, rows: list[dict]) -> str:
    """Writes a jsonl file, whole or not at all; returns its sha256."""
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows).encode()
    publish(path, lambda partial: partial.write_bytes(data))
    return hashlib.sha256(data).hexdigest()
