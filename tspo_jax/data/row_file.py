"""Files of rows with an `id` that grow batch by batch and survive a kill."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path


class RowFile:
    """A jsonl file: a batch is written and flushed at once, a line that was cut off is dropped.

    Attributes:
      rows: id -> row, in the order of the file.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self.rows: dict[str, dict] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                row = json.loads(line)
                self.rows[row["id"]] = row
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: no row with an id ({error}); remove the line") from None
        self._path, self._file = path, path.open("ab")
        self._file.truncate(len(whole))

    def append(self, rows: Sequence[Mapping]) -> None:
        """Raises OSError that names the file where the disk is full."""
        try:
            self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            error.filename = str(self._path)
            raise
        self.rows |= {row["id"]: dict(row) for row in rows}

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(self, *_) -> None:
        with contextlib.suppress(OSError):  # what could not be written was told by append
            self._file.close()
