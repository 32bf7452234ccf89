"""Toy questions from as many visual tokens, with and without merging: does it pay to show twice the frames and merge?

    bash launch/quickstart.sh                                  # makes toy_data and runs/toy_plus
    python -m tspo_jax.toy.train_models --output=toy_2x2 --answerer=llava_video_2x2 --clip=tspo_jax/toy/checkpoints/clip
    python -m benchmarks.merging_toy --answerer=toy_2x2/llava_video_2x2 --questions=toy_data/eval.jsonl \\
        --store=toy_data/frames --agent=runs/toy_plus --output=runs/merging_toy.jsonl

Each question is answered from K frames (--num_frames), and from 2 K of which half the tokens go: alike frames or alike
patches of a frame are merged (answerer.merge), or random ones are dropped, which only this benchmark can do. `twice` is
2 K frames untouched, at twice the tokens. Frames are evenly spaced (uniform) and an agent's top-k (agent).

Each result goes to --output at once, and what is there is not done again. stdout has a table: accuracy with 95 %
intervals (bootstrap over videos), and its differences to K frames and to random dropping on the same questions.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.prompts import LETTER_SUFFIX
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import option_letter
from tspo_jax.data.questions import Question, questions_sha256, read_questions
from tspo_jax.data.row_file import RowFile
from tspo_jax.devices import sharding
from tspo_jax.evaluation.run import parameters_sha256
from tspo_jax.evaluation.statistics import clustered_mean, paired_difference
from tspo_jax.models import llava_video
from tspo_jax.models.token_budget import Budget, Merged
from tspo_jax.models.video_prompt import DEFAULT_VIDEO
from tspo_jax.selection.methods import uniform
from tspo_jax.selection.scoring import Scorer, check_method, load_scorer, pick
from tspo_jax.toy.model_quality import MAX_NEW_TOKENS

BATCH_SIZE = 32


class Arm(NamedTuple):
    """`times` K frames are shown; `frames` and `patches` are the shares of them that go."""

    meaning: str
    times: int = 2
    frames: float = 0.0
    patches: float = 0.0
    is_random: bool = False


PLAIN = "plain"
ARMS = {
    PLAIN: Arm("K frames", 1),
    "frames": Arm("2 K, frames merged", frames=0.5),
    "patches": Arm("2 K, patches merged", patches=0.5),
    "random_frames": Arm("2 K, random frames dropped", frames=0.5, is_random=True),
    "random_patches": Arm("2 K, random patches dropped", patches=0.5, is_random=True),
    "twice": Arm("2 K, untouched"),
}


def keep_random(tokens: jax.Array, budget: Budget) -> Merged:
    """What token_budget.merge_visual gives, with random frames and patches dropped instead of merged."""
    *lead, K, L, _ = tokens.shape
    frames_left, patches_left = budget.left(K, L)
    of_frames, of_patches = jax.random.split(jax.random.key(0))

    def draw(key, shape, left):
        return jnp.sort(jnp.argsort(jax.random.uniform(key, shape), axis=-1)[..., :left], axis=-1)

    frames = draw(of_frames, (*lead, K), frames_left)
    places = draw(of_patches, (*lead, frames_left, L), patches_left)
    tokens = jnp.take_along_axis(tokens, frames[..., None, None], axis=-3)
    return Merged(jnp.take_along_axis(tokens, places[..., None], axis=-2), frames, places)


Picker = Callable[[Question, int], np.ndarray]


def evenly_spaced(store: FrameStore) -> Picker:
    return lambda question, k: uniform(np.empty(store.video(question.video).num_frames), k)


def of_agent(scorer: Scorer, questions: Sequence[Question], store: FrameStore) -> Picker:
    store = FrameStore(store.folder, scorer.clip.identity)
    texts = scorer.clip.text_features([question.query for question in questions])
    scores = [scorer(store.features(q.video), text) for q, text in zip(questions, texts, strict=True)]
    place = {question.index: i for i, question in enumerate(questions)}
    return lambda question, k: pick("topk", *scores[place[question.index]], k)


def ask(folder: Path, arm: Arm, k: int, questions: Sequence[Question], picker: Picker, store: FrameStore) -> dict:
    """The visual tokens of a prompt (newlines included), and which questions are answered right."""
    mesh = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
    load = partial(load_answerer, folder, jnp.float32, sharding.answerer_sharding(mesh, weights.read_config(folder)))
    config = load(DEFAULT_VIDEO).config
    if not isinstance(config, llava_video.LlavaVideoConfig):
        raise ValueError(f"{folder}: this benchmark drops tokens of LLaVA-Video alone")
    merge = round(arm.frames * arm.times * k), round(arm.patches * config.pooled_side**2)
    if (arm.frames or arm.patches) and not any(merge):
        raise ValueError(f"{folder}: a frame is one token, of which none can go; leave {arm.meaning!r} out (--arms)")
    answerer = load(dataclasses.replace(DEFAULT_VIDEO, merge=merge if any(merge) else ()))
    rollout = Rollout.of(answerer, max_new_tokens=MAX_NEW_TOKENS, mesh=mesh)
    requests = [
        Request(i, question.video, picker(question, arm.times * k)[None], f"{question.question}\n{LETTER_SUFFIX}")
        for i, question in enumerate(questions)
    ]
    right = np.zeros(len(questions), int)
    with mock.patch.object(llava_video, "merge_visual", keep_random) if arm.is_random else nullcontext():
        for batch in answer_requests(requests, store, answerer, rollout, mesh, BATCH_SIZE):
            for request, texts in batch:
                right[request.id] = option_letter(texts[0]) == questions[request.id].answer
    return {"tokens": answerer.config.num_visual_tokens(arm.times * k), "right": right.tolist()}


def table(rows: Sequence[dict], videos: Sequence[str]) -> str:
    lines = [
        "| frames | shown | visual tokens | right | minus K frames | minus random |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    right = {(row["picks"], row["arm"]): row["right"] for row in rows}
    for (picks, arm), row in zip(right, rows, strict=True):
        share = "{:.3f} [{:.3f}, {:.3f}]".format(*clustered_mean(row["right"], videos))
        gains = []
        for other in (PLAIN, f"random_{arm}"):
            found = arm != other and right.get((picks, other))
            difference = found and paired_difference(row["right"], found, videos)
            gains.append("{:+.3f} [{:+.3f}, {:+.3f}]".format(*difference[:3]) if difference else "")
        lines.append(f"| {picks} | {ARMS[arm].meaning} | {row['tokens']} | {share} | {' | '.join(gains)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answerer", type=Path, required=True, help="folder of a LLaVA-Video")
    parser.add_argument("--questions", required=True)
    parser.add_argument("--store", required=True, help="frame store of the questions' videos")
    parser.add_argument("--agent", type=Path, help="run of an agent; none = evenly spaced frames only")
    parser.add_argument("--num_frames", type=int, default=8, help="K")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--output", type=Path, default=Path("runs/merging_toy.jsonl"))
    args = parser.parse_args()
    names, rows = args.arms.split(","), []
    if unknown := set(names) - set(ARMS):
        parser.error(f"no arm {', '.join(sorted(unknown))}; there are {', '.join(ARMS)}")
    questions, store = read_questions(args.questions)[0], FrameStore(args.store)
    pickers, whose = {"uniform": lambda: evenly_spaced(store)}, {"uniform": ""}
    if args.agent:
        scorer = load_scorer(args.agent)
        check_method(scorer, "topk")
        pickers["agent"] = lambda: of_agent(scorer, questions, store)
        whose["agent"] = parameters_sha256(scorer.agent[1])
    asked = f"{weights.checkpoint_identity(args.answerer)} {questions_sha256(questions)} {args.num_frames}"
    with RowFile(args.output) as file:
        for picks, make in pickers.items():
            ids = {name: f"{asked} {picks} {whose[picks]} {name}" for name in names}
            missing = [name for name in names if ids[name] not in file.rows]
            picker = make() if missing else None
            for name in missing:
                found = ask(args.answerer, ARMS[name], args.num_frames, questions, picker, store)
                file.append([{"id": ids[name], "picks": picks, "arm": name} | found])
            rows += [file.rows[ids[name]] for name in names]
    print(table(rows, [question.video for question in questions]))


if __name__ == "__main__":
    main()
