"""Several processes as one run: how they join, and how all of them end when one of them does."""

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tspo_jax.config import Distributed

LOST = 76  # exit status of a process whose run cannot go on because of another one; EX_PROTOCOL of sysexits.h
# How errors of jax's runtime begin when a peer is gone: a status code, or the name of the collectives' library.
_RUNTIME = re.compile(r"^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b|Gloo|NCCL")


def join(config: Distributed) -> None:
    """Joins the other processes, where the config says that there are any; before any other use of jax.

    Ends this one, with one line on stderr, where they do not come in `join_seconds`.
    """
    if not config.enabled:
        return
    _keep_stdout_for_results()
    count, index = (n if n >= 0 else None for n in (config.num_processes, config.process_id))
    # jax would end the process without a word of what is missing.
    late = threading.Timer(config.join_seconds, _end_alone, [config])
    late.start()
    try:
        jax.distributed.initialize(
            config.coordinator or None,
            count,
            index,
            initialization_timeout=config.join_seconds + 60,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
        )
    finally:
        late.cancel()


def _keep_stdout_for_results() -> None:
    """What is not written by Python goes to stderr from now on: Gloo tells whom it is connected to."""
    sys.stdout.flush()
    results = os.dup(1)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(results, "w")


def _end_alone(config: Distributed) -> None:
    where = f" at {config.coordinator}" if config.coordinator else ""
    print(
        f"error: not all processes of the run have met{where} after {config.join_seconds} s "
        "(config.distributed.join_seconds): start the same command in every one; the output of one that failed says "
        "why",
        file=sys.stderr,
        flush=True,
    )
    os._exit(LOST)


@contextmanager
def end_together(agreed: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Of several processes, ends this one at once when its block fails, with one line on stderr.

    Cleaning up would wait for the others, which wait for this one in a collective. They notice that it is gone, by the
    broken connection, and end as well; where a collective does not tell, jax ends them by its missing heartbeat.

    Args:
      agreed: an error that all processes raise in the same step. It is passed on, for all can clean up.
    """
    try:
        yield
    except agreed:
        raise
    except Exception as error:
        if jax.process_count() == 1:
            raise
        if is_lost_peer(error):
            reason = str(error).splitlines()[0][:300]
            me = f"process {jax.process_index()} of {jax.process_count()}"
            print(
                f"error: {me}: another process has ended or cannot be reached ({reason}); run the same command again "
                "in all of them to go on",
                file=sys.stderr,
            )
            status = LOST
        else:
            print(f"error: {error}", file=sys.stderr)
            status = 1
        sys.stderr.flush()
        os._exit(status)


def is_first() -> bool:
    """Whether this process writes what one writes for all."""
    return jax.process_index() == 0


def of_all(value: Any) -> list:
    """What each process gives, in all of them, in the order of the processes. Values that JSON can hold; called by all
    in the same order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(data)))
    padded = multihost_utils.process_allgather(np.pad(data, (0, int(sizes.max()) - len(data))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(padded, sizes, strict=True)]


def of_first(value: Any) -> Any:
    """What the first process gives, in all (see `of_all`); what the others give is not looked at."""
    return of_all(value if is_first() else None)[0]


def is_lost_peer(error: Exception) -> bool:
    """Whether jax's runtime says so, rather than this program."""
    return bool(_RUNTIME.search(str(error)))
