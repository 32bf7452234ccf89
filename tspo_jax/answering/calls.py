"""Calls of models, and the file that remembers them: cache, resume and replay in one.

A call is what a question's generator asks for next (backtracking.py); its key is a hash of all that its reply depends
on, the model's identity included. A killed run reads its replies from the file and goes on; the coarse captions of a
video are made once for all its questions; and a recorded run can be replayed with no model at all.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from tspo_jax.data.row_file import RowFile


@dataclasses.dataclass(frozen=True)
class CaptionCall:
    """Describe a clip: the frames of `video` at `times` (seconds), each shown with at most `max_pixels`.

    `video_identity` tells the video from another one of this name.
    """

    video: str
    times: tuple[float, ...]
    max_pixels: int
    instruction: str
    video_identity: str = ""

    def content(self) -> list:
        times = [round(t, 3) for t in self.times]
        return ["caption", self.video, self.video_identity, times, self.max_pixels, self.instruction]


@dataclasses.dataclass(frozen=True)
class WriterCall:
    """Reply to a prompt without a video. `agent` says what for, and is no part of the key."""

    agent: str
    prompt: str

    def content(self) -> list:
        return ["write", self.prompt]


Call = CaptionCall | WriterCall


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of a call.

    Attributes:
      text: None where the model gave none.
      error: why, then.
      seconds: its share of the time of its batch, when it was made.
    """

    text: str | None
    error: str | None = None
    seconds: float = 0.0


class Captioner(Protocol):
    identity: str  # of all that a caption depends on: checkpoint, prompt, dtype

    def describe(self, calls: Sequence[CaptionCall]) -> list[Reply]: ...


class Writer(Protocol):
    """A language model without a video (writers.py)."""

    identity: str
    context: int  # tokens of a prompt and its reply together
    max_new_tokens: int  # of a reply

    def count(self, text: str) -> int:
        """Tokens of a text, or an estimate that is no less."""

    def write(self, prompts: Sequence[str]) -> list[Reply]: ...


class ReplayError(RuntimeError):
    """A replay asked for a call that was never recorded."""


class Calls:
    """Makes calls in batches, or finds them in a file (rows {id, kind, video | agent, ..., text, seconds}).

    Args:
      path: jsonl file; None = in memory only.
      captioner, writer: None = replay: a call that is not in the file raises ReplayError. The identities must then be
        given.
      batch_size: captions of one batch; replies do not depend on it.

    Attributes:
      made, found: how many calls were made and found.
    """

    def __init__(
        self,
        path: str | Path | None,
        captioner: Captioner | None,
        writer: Writer | None,
        *,
        batch_size: int = 10,
        captioner_identity: str = "",
        writer_identity: str = "",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self._file = RowFile(path) if path else None
        self._replies: dict[str, Reply] = {}
        for key, row in (self._file.rows if self._file else {}).items():
            if missing := [field for field in ("kind", "text", "seconds", "error") if field not in row]:
                raise ValueError(f"{path}: is no file of calls: its row {key} has no {missing[0]!r}")
            if row["error"] is None:  # a call that failed is made again
                self._replies[key] = Reply(row["text"], None, row["seconds"])
        self._captioner, self._writer, self._batch_size = captioner, writer, batch_size
        self._identity = {
            CaptionCall: captioner.identity if captioner else captioner_identity,
            WriterCall: writer.identity if writer else writer_identity,
        }
        self.made = {CaptionCall: 0, WriterCall: 0}
        self.found = {CaptionCall: 0, WriterCall: 0}

    def key(self, call: Call) -> str:
        content = json.dumps([self._identity[type(call)], *call.content()], ensure_ascii=False)
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()

    def __call__(self, calls: Sequence[Call]) -> list[Reply]:
        """The replies in the order of the calls; equal calls are made once. Every batch is in the file before the
        next one starts."""
        keys = [self.key(call) for call in calls]
        failed: dict[str, Reply] = {}
        missing = {}
        for key, call in zip(keys, calls, strict=True):
            if key in self._replies:
                self.found[type(call)] += 1
            else:
                missing.setdefault(key, call)
        for kind, model in ((CaptionCall, self._captioner), (WriterCall, self._writer)):
            of_kind = {key: call for key, call in missing.items() if isinstance(call, kind)}
            if of_kind and model is None:
                raise ReplayError(f"a replay asks for a {kind.__name__} that was not recorded: {next(iter(of_kind))}")
            # Clips of one number of frames and pixels make one batch.
            groups: dict[tuple, list[str]] = {}
            for key, call in of_kind.items():
                shape = (len(call.times), call.max_pixels) if kind is CaptionCall else ()
                groups.setdefault(shape, []).append(key)
            for group in groups.values():
                for start in range(0, len(group), self._batch_size):
                    batch = group[start : start + self._batch_size]
                    make = model.describe if kind is CaptionCall else model.write
                    failed |= self._make(batch, [of_kind[key] for key in batch], make)
        return [self._replies.get(key) or failed[key] for key in keys]

    def _make(self, keys: list[str], calls: list[Call], make: Callable) -> dict[str, Reply]:
        started = time.monotonic()
        replies = make([call.prompt for call in calls] if isinstance(calls[0], WriterCall) else calls)
        if len(replies) != len(calls):
            raise ValueError(f"{len(calls)} calls were made, but {len(replies)} replies came back")
        seconds = round((time.monotonic() - started) / len(calls), 3)
        rows, failed = [], {}
        for key, call, reply in zip(keys, calls, replies, strict=True):
            text = reply.text and reply.text.encode("utf-8", "replace").decode()  # half of a surrogate pair is no text
            reply = dataclasses.replace(reply, text=text, seconds=seconds)
            self.made[type(call)] += 1
            kind = "caption" if isinstance(call, CaptionCall) else "write"
            rows.append({"id": key, "kind": kind, **vars(call), **vars(reply)})
            if reply.error is None:
                self._replies[key] = reply
            else:
                failed[key] = reply
        if self._file:
            self._file.append(rows)
        return failed
