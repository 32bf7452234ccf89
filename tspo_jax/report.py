"""One self-contained HTML page about a run: what was run, how training went, what it gained, and what it looks like.

    python -m tspo_jax.report RUN_DIR        writes RUN_DIR/report.html

Needs the run's evaluation (python -m tspo_jax.evaluate); the training curves are left out where nothing was trained.
During training the same page is renewed with every evaluation (config.held_out).
"""

import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2 or (argv[1].startswith("-") and not argv[1].startswith("--run_dir=")):
        print(__doc__, file=sys.stderr)
        return 1
    from absl import logging

    from tspo_jax.pages.report import write_report

    logging.set_verbosity(logging.ERROR)  # Orbax has much to say at lower levels
    try:
        path = write_report(argv[1].removeprefix("--run_dir="))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"report: {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
