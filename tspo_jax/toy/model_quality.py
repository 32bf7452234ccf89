"""How good the tiny checkpoints are on videos that nothing was trained on: what the toy world's reward rests on."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer, ClipEncoder
from tspo_jax.data.questions import question_of_row
from tspo_jax.models.clip import cosine_similarity
from tspo_jax.models.video_prompt import FrameTimes
from tspo_jax.selection.methods import topk
from tspo_jax.toy.questions import questions_for
from tspo_jax.toy.scenes import VideoPlan, World, make_video_plan, render_frame
from tspo_jax.tspo.rewards import accuracy

MAX_NEW_TOKENS = 5  # what is looked for (two words), what was found, its letter, the end


def candidate_times(plan: VideoPlan) -> np.ndarray:
    """Seconds of the 1 fps candidates, by the original's rule: every round(fps)-th frame."""
    frames = np.arange(0, plan.num_frames, round(plan.fps))
    return frames / float(plan.fps)


def measure(clip: ClipEncoder, answerer: Answerer, seeds: Sequence[int], world: World, num_frames: int = 8) -> dict:
    """Per family: the share of right answers from sets with the evidence and without, and what untrained CLIP finds.

    Args:
      seeds: of videos (toy.scenes.video_seed) that neither was trained on.
      num_frames: K, what the answerer sees: up to K / 2 frames of the evidence and other frames of the video, or only
        others.
    Returns: {"spread": mean standard deviation of the cosines of a lookup within its video,
      "families": {family: {"with_evidence", "without_evidence", "clip_topk", "clip_topk_finds", "questions"}}}, shares.
    """
    shown: dict[tuple, list] = defaultdict(list)  # condition -> (frames, their times, question)
    spreads, found = [], defaultdict(list)
    for seed in seeds:
        plan, rng = make_video_plan(seed, world), np.random.default_rng(seed)
        times = candidate_times(plan)
        frames = np.stack([render_frame(plan, time) for time in times])
        features = clip.image_features(frames)
        crops = np.stack([answerer.processor.crop(frame) for frame in frames])
        rows = [question_of_row(row, i, "toy", None) for i, row in enumerate(questions_for(plan, f"{seed}.mp4"))]
        texts = clip.text_features([question.query for question in rows])
        for question, text in zip(rows, texts, strict=True):
            inside = np.any([(times >= start) & (times < end) for start, end in question.evidence], axis=0)
            evidence, others = np.flatnonzero(inside), np.flatnonzero(~inside)
            # Both scenes of a relation: the frames on either side of their border.
            some = evidence[
                np.unique(np.linspace(0, len(evidence) - 1, min(len(evidence), num_frames // 2)).astype(int))
            ]
            with_it = np.concatenate([some, rng.choice(others, num_frames - len(some), replace=False)])
            without = rng.choice(others, num_frames, replace=False)
            scores = np.asarray(cosine_similarity(text, features))
            top = topk(scores, num_frames)
            for name, picks in (("with_evidence", with_it), ("without_evidence", without), ("clip_topk", top)):
                picks = np.sort(picks)
                shown[question.family, name].append((crops[picks], times[picks], question))
            found[question.family].append(inside[top].any())
            if question.family == "lookup":
                spreads.append(scores.std())
    rollout = Rollout.of(answerer, max_new_tokens=MAX_NEW_TOKENS)
    families: dict[str, dict] = {family: {"questions": len(hits)} for family, hits in found.items()}
    for (family, name), sets in shown.items():
        right = _answers(rollout, answerer, sets)
        families[family][name] = float(np.mean(right))
        families[family]["clip_topk_finds"] = float(np.mean(found[family]))
    return {"spread": float(np.mean(spreads)), "families": families}


def _answers(rollout: Rollout, answerer: Answerer, sets: list[tuple], batch_size: int = 32) -> list[float]:
    """Whether each (frames [K, S, S, 3], times [K], question) is answered right, in batches of one shape."""
    rendered = [prompts.render(question.question, answerer.template) for *_, question in sets]
    times = [[FrameTimes.of(seconds)] for _, seconds, _ in sets]
    ids, lengths, steps = prompts.write(rendered, times, answerer, multiple=32)
    rewards = []
    for start in range(0, len(sets), batch_size):
        rows = np.arange(start, start + batch_size) % len(sets)
        frames = np.stack([sets[i][0] for i in rows])
        index = np.broadcast_to(np.arange(frames.shape[1]), (batch_size, 1, frames.shape[1]))
        of_rows = None if steps is None else steps[rows]
        answers = rollout(answerer.params, frames, index, ids[rows], lengths[rows], None, of_rows)
        texts = prompts.decode(np.asarray(answers.tokens), np.asarray(answers.lengths), answerer.tokenizer)
        rewards += [accuracy(text[0], sets[i][2].answer) for i, text in zip(rows, texts, strict=True)]
    return rewards[: len(sets)]
