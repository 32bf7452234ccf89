"""Backtracking on the scripted world (toy/caption_world.py): a five-second event that no coarse caption names.

    python -m benchmarks.backtracking_toy [--questions=200] [--minutes=10] [--rounds=5]

The captioner notices the event in clips of ten seconds or less, the writer follows simple rules; no model is needed.
Prints one JSON object: accuracy of each strategy with its 95 % interval over the videos, the share by the phase in
which questions ended, and what a question cost in captions and calls of the writer. Chance is 1 of 4.
"""

import argparse
import collections
import json

import numpy as np

from tspo_jax.answering.backtracking import STRATEGIES, Outcome, Settings, run
from tspo_jax.answering.calls import Calls
from tspo_jax.evaluation.statistics import clustered_mean
from tspo_jax.toy.caption_world import Replies, by_keywords, missed_event


def measure(strategy: str, questions: int, minutes: int, settings: Settings) -> dict:
    right, outcomes, made = [], [], 0
    for seed in range(questions):
        asked, facts, world = missed_event(seed, minutes)
        writer = Replies(by_keywords)
        (outcome,) = run([STRATEGIES[strategy](asked, facts, settings, writer)], Calls(None, world, writer))
        dropped = world.events[-1][3].removeprefix("someone drops ")
        right.append(outcome.option == "ABCD"[asked.options.index(dropped)])
        check_cost(outcome, world.made, len(writer.prompts))
        outcomes.append(outcome)
        made += world.made
    value, low, high = clustered_mean(np.array(right), [str(i) for i in range(questions)])
    return {
        "accuracy": round(value, 3),
        "interval": [round(low, 3), round(high, 3)],
        "phases": dict(collections.Counter(outcome.phase for outcome in outcomes)),
        "captions": round(made / questions, 1),
        "writer_calls": round(float(np.mean([outcome.writer_calls for outcome in outcomes])), 1),
        "rounds": round(float(np.mean([outcome.rounds for outcome in outcomes])), 2),
    }


def check_cost(outcome: Outcome, captions: int, writer_calls: int) -> None:
    """What an outcome says that it cost is what the models were asked for."""
    if (outcome.captions, outcome.writer_calls) != (captions, writer_calls):
        raise AssertionError(f"{outcome.id} says {outcome.captions} captions, {captions} were made")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--minutes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    args = parser.parse_args()
    settings = Settings(rounds=args.rounds)
    print(json.dumps({name: measure(name, args.questions, args.minutes, settings) for name in STRATEGIES}, indent=1))


if __name__ == "__main__":
    main()
