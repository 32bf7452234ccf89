"""A trained streaming encoder on questions about stored videos that it has not seen: each video is encoded once.

    python -m benchmarks.streaming_videos --answerer=tspo_jax/toy/checkpoints/llava_video --encoder=runs/stream \\
        --store=toy_data/frames --questions=toy_data/eval.jsonl [--output=FILE.json]

Prints, for all questions and each family, the share answered right (Wilson's 95 % interval over questions) and the
share of those with evidence whose picked clips show it; how many clips were encoded, in how many seconds, beside the
seconds of answering.
"""

import argparse
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from scipy import stats

from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import Question, read_questions
from tspo_jax.selection.video_source import stored_source
from tspo_jax.stream import encode
from tspo_jax.streaming import folders
from tspo_jax.streaming.stream import Stream


def found(question: Question, clips: list[list[float]]) -> bool:
    """Whether one of the picked clips [start s, end s] shows some of the evidence."""
    return any(start < e and end > s for start, end in clips for s, e in question.evidence)


def measure(answerer: str, encoder: str, store: FrameStore, questions: list[Question]) -> dict:
    model = load_answerer(answerer, jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    trained = folders.load(encoder, model)
    stream = Stream(trained, model, max_new_tokens=2)
    nothing, rows, seconds = stream.remembered, [], {"encoding": 0.0, "answering": 0.0}
    for video in sorted({question.video for question in questions}):
        stream.remembered = nothing
        start = time.perf_counter()
        encode(stored_source(store, video), stream)
        between = time.perf_counter()
        for question in (question for question in questions if question.video == video):
            answer = stream.ask(question.question)
            rows.append((question, answer["option"] == question.answer, found(question, answer["clips"])))
        seconds["encoding"] += between - start
        seconds["answering"] += time.perf_counter() - between
    result = {"clips_encoded": stream.num_pushes, "seconds": seconds}
    for family in ["all", *sorted({question.family for question in questions})]:
        of_family = [row for row in rows if family in ("all", row[0].family)]
        right = sum(is_right for _, is_right, _ in of_family)
        low, high = stats.binomtest(right, len(of_family)).proportion_ci(method="wilson")
        labelled = [is_found for question, _, is_found in of_family if question.evidence]
        result[family] = {"questions": len(of_family), "right": right / len(of_family), "low": low, "high": high}
        if labelled:
            result[family]["evidence_found"] = sum(labelled) / len(labelled)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, text in (
        ("answerer", "folder of the LLaVA-Video that the encoder was trained with"),
        ("encoder", "run of train_streaming, or its encoder's folder"),
        ("store", "frame store"),
        ("questions", "question file"),
    ):
        parser.add_argument(f"--{name}", required=True, help=text)
    parser.add_argument("--output", default="", help="JSON file; stdout if empty")
    args = parser.parse_args()
    result = measure(args.answerer, args.encoder, FrameStore(args.store), read_questions(args.questions)[0])
    text = json.dumps(result, indent=1) + "\n"
    if args.output:
        Path(args.output).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
