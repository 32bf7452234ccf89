"""Several processes as one run: how they join, and how all of them end when one of them does."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from tspo_jax.config import Distributed

LOST = 76  # exit status of a process whose run cannot go on because of another one; EX_PROTOCOL of sysexits.h
# How errors of jax's runtime begin when a peer is gone: a status code, or the name of the collectives' library.
_RUNTIME = re.compile(r"^(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b|Gloo|NCCL")


def join(config: Distributed) -> None:
    """Joins the other processes, where the config says that there are any; before any other use of jax."""
    if config.enabled:
        count, index = (n if n >= 0 else None for n in (config.num_processes, config.process_id))
        jax.distributed.initialize(
            config.coordinator or None, count, index, heartbeat_timeout_seconds=config.heartbeat_seconds
        )


@contextmanager
def end_together() -> Iterator[None]:
    """Of several processes, ends this one at once when its block fails, with one line on stderr.

    Cleaning up would wait for the others, which wait for this one in a collective. They notice that it is gone, by the
    broken connection, and end as well; where a collective does not tell, jax ends them by its missing heartbeat.
    """
    try:
        yield
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


def is_lost_peer(error: Exception) -> bool:
    """Whether jax's runtime says so, rather than this program."""
    return bool(_RUNTIME.search(str(error)))
