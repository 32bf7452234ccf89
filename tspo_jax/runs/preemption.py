"""SIGTERM, which machines that are taken back send: the run saves after the step it is in and exits with a status of
its own, so that a scheduler can tell "run it again" from an error."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


def finish(is_done: bool) -> None:
    """Ends the program with EXIT_STATUS where a run was stopped before its end."""
    if not is_done:
        raise SystemExit(EXIT_STATUS)


class Preemption:
    """While it is active (a `with` block in the main thread), SIGTERM no longer ends the process.

    With several processes jax's coordination service listens, so that all of them stop after the same step, whichever
    got the signal.
    """

    def __enter__(self) -> "Preemption":
        self._received = False
        self._is_alone = jax.process_count() == 1
        if self._is_alone:
            self._before = signal.signal(signal.SIGTERM, self._receive)
        return self

    def __exit__(self, *_) -> None:
        if self._is_alone:
            signal.signal(signal.SIGTERM, self._before)

    def _receive(self, *_) -> None:
        self._received = True

    def must_stop(self, step: int) -> bool:
        """Whether to save and stop after `step` updates; asked once per step, by all processes."""
        return self._received if self._is_alone else multihost_utils.reached_preemption_sync_point(step)
