"""Says in words, with numbers, why a run learns nothing or slowly, from its log.

    python -m tspo_jax.doctor RUN_DIR

The findings are printed on stderr and, as one JSON object, on stdout: {"steps": n, "findings": [{"name", "text",
"numbers"}]}. Each rule of tspo/doctor.py (runs of train) and tpo/doctor.py (of train_answerer) looks at one illness; a
healthy run has no finding.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.run_folder import read_run_config
from tspo_jax.tpo import doctor as of_preferences
from tspo_jax.tspo import doctor as of_agents


def main(argv: Sequence[str]) -> int:
    if len(argv) != 2 or argv[1].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 1
    try:
        config = read_run_config(argv[1])
        rows = read_rows(Path(argv[1]) / "metrics.jsonl")
        of_run = of_preferences if "preference" in config else of_agents
        findings = of_run.diagnose(rows, config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyError as error:
        print(f"error: {argv[1]} is a run of another version: it has no field {error}", file=sys.stderr)
        return 1
    steps = len({row["step"] for row in rows})
    for finding in findings:
        print(f"{finding.name}: {finding.text}", file=sys.stderr)
    if not findings:
        print(f"nothing is wrong in the {steps} steps of {argv[1]}", file=sys.stderr)
    print(json.dumps({"steps": steps, "findings": [finding._asdict() for finding in findings]}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
