"""What all entry points share: how they start, and how they fail."""

import sys
from collections.abc import Callable, Sequence

from absl import app


def run(main: Callable[[], int | None], check: Callable[[Sequence[str]], None] | None = None) -> None:
    """Parses the flags, calls `main()` and exits with what it returns.

    A user's mistake (ValueError, OSError) is one line `error: ...` on stderr and exit status 1, not a traceback.

    Args:
      check: called with the command line before the flags are parsed; may raise ValueError.
    """

    def parse(argv):
        if check:
            _explained(lambda: check(argv))
        positional = app.parse_flags_with_usage(argv)[1:]
        if positional:
            _fail(f"unexpected argument {positional[0]!r}; flags are --name=value")

    app.run(lambda _: _explained(main), flags_parser=parse)


def _explained(call):
    try:
        return call()
    except (ValueError, OSError) as error:
        _fail(error)


def _fail(error) -> None:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
