"""What all entry points share: how they start, and how they fail."""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import app, flags, logging


def run(main: Callable[[], int | None], check: Callable[[Sequence[str]], None] | None = None) -> None:
    """Parses the flags, calls `main()` and exits with what it returns.

    A user's mistake (ValueError, OSError) and a device without enough memory are one line `error: ...` on stderr and
    exit status 1, not a traceback; Ctrl-C is the line `stopped` and exit status 130.

    Args:
      check: called with the command line before the flags are parsed; may raise ValueError.
    """

    def parse(argv):
        if check:
            _explained(lambda: check(argv))
        positional = _explained(lambda: flags.FLAGS(argv))[1:]
        if positional:
            _fail(f"unexpected argument {positional[0]!r}; flags are --name=value")

    def call(_):
        logging.set_verbosity(logging.ERROR)  # Orbax and Grain have much to say at lower levels
        return _explained(main)

    app.run(call, flags_parser=parse)


def write_result(result: dict, output: str) -> None:
    """The machine-readable result of an entry point: one JSON object, to the file `output` or, where that is empty, to
    stdout."""
    text = json.dumps(result) + "\n"
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text)
    else:
        sys.stdout.write(text)


def note(text: str) -> None:
    """A line on stderr that a person should read."""
    print(text, file=sys.stderr)


def numbered(path: str, number: int, single: bool) -> Path:
    """The file itself, or one per question: picks.jpg -> picks_0.jpg .."""
    path = Path(path)
    return path if single else path.with_stem(f"{path.stem}_{number}")


def _explained(call):
    try:
        return call()
    except OSError as error:  # what the system says of a file begins with a number
        _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error)
    except (ValueError, flags.Error) as error:
        _fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:  # jax's
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _fail(
            f"a device has too little memory ({str(error).splitlines()[0]}). Less is taken by "
            "answerer.question_chunk=1, answerer.prefill_chunk=1, a smaller answerer.encode_chunk or "
            "evaluation.batch_size, and a larger model axis in mesh.axes"
        )


def _fail(error) -> None:
    text = str(error)
    if missing := re.findall(r"Flag (--\w+) must have a value other than None", text):
        text = f"missing {', '.join(missing)}"
    elif places := re.findall(r'^  File "(.+)", line (\d+)', text, re.MULTILINE):  # a traceback: of a config file
        text = f"{text.partition(': Error whilst')[0]}: {':'.join(places[-1])}: {text.strip().splitlines()[-1]}"
    print(f"error: {text}", file=sys.stderr)
    sys.exit(1)
