"""A process of benchmarks/accelerator.py that measures nothing: how it ends is written here, by stage."""

import os
import time

FIGURES = {"seconds": 2.0, "flops": 10**12, "first_seconds": 3.0}
FOUND = {
    "ceilings": {"matrix": FIGURES, "copy": {"seconds": 1.0, "bytes": 10**9}},
    "answer": {"a question": FIGURES},
    "clip": {"images": FIGURES},
}


def work(connection, names, folder):
    connection.send({"device": "a stone", "versions": {"jax": "1"}})
    for name in names:
        if name == "decode":
            time.sleep(60)
        if name == "trainer":
            os._exit(3)
        connection.send((name, FOUND.get(name), "ValueError: too large" if name == "prefill" else None))
