"""Pairs out of questions with known answers, by stages: the same model answers with the evidence and without it.

    1_evidence.jsonl     answers from K frames with the evidence; right ones are chosen
    2_irrelevant.jsonl   answers from K frames without it, several draws; a wrong one is rejected
    3_incomplete.jsonl   answers from a few of the K frames, several draws; a wrong one is rejected
    train.jsonl, heldout.jsonl    pairs (tpo/pairs.py), no video in both; README.md is the card, with the counts

The rule that rewards answers is the judge. Frames with the evidence are, of a question with `evidence` spans, frames in
the spans and, where those are few, evenly spaced ones; of another question of kind general, evenly spaced ones of its
video; of kind specific (a needle question), those of its own video, while irrelevant frames are those of another video.
In training both answers are shown the whole video; of a needle question that is a mixture of both videos' frames.
A general question without spans has no frames that are irrelevant for certain: it is asked by recipe incomplete only.

Every stage appends to its file and is finished row by row; run again after a kill, it goes on where it stopped.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering.clip_captions import StoredClips
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.writers import open_writer
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.adapters import answerer_identity
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.data.frame_store import FrameStore, publish
from tspo_jax.data.letters import option_letter
from tspo_jax.data.llava_video_178k import MULTIPLE_CHOICE, read_conversations
from tspo_jax.data.needle import NeedleConfig, compose
from tspo_jax.data.questions import IMAGE_TAG, Question, question_of_row, read_questions, row
from tspo_jax.data.row_file import RowFile
from tspo_jax.data.stages import number, shuffled, split_by_video, write_rows
from tspo_jax.devices import sharding
from tspo_jax.runs import run_folder
from tspo_jax.tpo import writing
from tspo_jax.tpo.config import TpoConfig

RECIPES = ("irrelevant", "incomplete")
STYLES = ("own", "letter", "text")
STAGES = {"evidence": "1_evidence.jsonl", "irrelevant": "2_irrelevant.jsonl", "incomplete": "3_incomplete.jsonl"}
NEEDLE = NeedleConfig(group_frames=4, min_true_groups=1, max_true_groups=2, distractor_groups=6)  # of `shown`

Answer = Callable[[list[Request]], Iterator[list[tuple[Request, list[str]]]]]
Watch = Callable[[str, int, int], Callable[[int], None]]  # (stage, total, done) -> counts rows, for a progress bar


@dataclasses.dataclass(frozen=True)
class Asked:
    """A question by its id, and the frames that it is asked with: (video, int [G, K]) of each stage that it is in."""

    id: str
    question: Question
    sets: Mapping[str, tuple[str, np.ndarray]]


def check(config: TpoConfig) -> None:
    """Raises ValueError for settings that make no pairs."""
    b = config.build
    if unknown := [recipe for recipe in b.recipes if recipe not in RECIPES]:
        raise ValueError(f"config.build.recipes has {', '.join(unknown)}; there are {', '.join(RECIPES)}")
    if not b.recipes:
        raise ValueError("config.build.recipes is empty: no answer would be rejected")
    if b.answer_style not in STYLES:
        raise ValueError(f"config.build.answer_style is {b.answer_style!r}, not one of {', '.join(STYLES)}")
    if "incomplete" in b.recipes and b.sparse_frames >= b.frames:
        raise ValueError(
            f"config.build.sparse_frames is {b.sparse_frames}: it must be less than build.frames ({b.frames})"
        )
    if b.captioner and not b.writer:
        raise ValueError("config.build.captioner describes videos to config.build.writer, which is not given")
    if not b.output or bool(b.questions) == bool(b.writer):
        raise ValueError("config.build.output must be given, and one of config.build.questions and config.build.writer")


# ---- frames ----------------------------------------------------------------------------------------------


def frame_sets(asked: Question, name: str, store: FrameStore, videos: Sequence[str], config: TpoConfig) -> Asked:
    """The frames of every stage, a function of the seed and the question's name.

    Args:
      videos: from which those of needle questions' irrelevant frames are drawn.
    """
    b, T = config.build, store.video(asked.video).num_frames
    rng = np.random.default_rng((config.seed, number(name)))
    K = min(b.frames, T)
    inside = in_spans(store.video(asked.video).timestamps, asked.evidence)
    is_needle = asked.kind == "specific" and not asked.evidence
    if inside.any():
        kept = np.flatnonzero(inside)
        kept = kept[np.linspace(0, len(kept) - 1, min(K, len(kept))).astype(int)]
        others = np.setdiff1d(np.linspace(0, T - 1, K).astype(int), kept)[: K - len(kept)]
        with_evidence = np.sort(np.append(kept, others))
    else:
        with_evidence = np.linspace(0, T - 1, K).astype(int)
    sets: dict[str, tuple[str, np.ndarray]] = {"evidence": (asked.video, with_evidence[None])}
    outside = np.flatnonzero(~inside)
    if inside.any() and len(outside) >= K:
        draws = [np.sort(rng.choice(outside, K, replace=False)) for _ in range(b.attempts)]
        sets["irrelevant"] = asked.video, np.stack(draws)
    elif is_needle and len(videos) > 1:
        other = videos[int(rng.integers(len(videos) - 1))]
        other = videos[-1] if other == asked.video else other
        length = store.video(other).num_frames
        draws = [np.sort(rng.choice(length, min(K, length), replace=False)) for _ in range(b.attempts)]
        sets["irrelevant"] = other, np.stack(draws)
    if b.sparse_frames < len(with_evidence):
        draws = [np.sort(rng.choice(with_evidence, b.sparse_frames, replace=False)) for _ in range(b.attempts)]
        sets["incomplete"] = asked.video, np.stack(draws)
    return Asked(name, asked, sets)


def in_spans(timestamps: np.ndarray, spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """Which frames lie in one of the spans: times [T], [[start, end], ...] in seconds -> bool [T]."""
    inside = [(timestamps >= start) & (timestamps < end) for start, end in spans]
    return np.any(inside, axis=0) if inside else np.zeros(len(timestamps), bool)


def shown_frames(asked: Asked, store: FrameStore, videos: Sequence[str], config: TpoConfig) -> list | None:
    """The frames of training of a needle question, mixed with those of other videos; None = the whole video."""
    question = asked.question
    if question.evidence or question.kind != "specific" or len(videos) < 2:
        return None
    lengths = np.array([store.video(video).num_frames for video in videos])
    target = videos.index(question.video)
    sample = compose(config.seed, number(asked.id) % 2**32, target, np.arange(lengths[target]), lengths, NEEDLE)
    return [[videos[v], int(f)] for v, f in zip(sample.video, sample.frame, strict=True)]


# ---- answers ---------------------------------------------------------------------------------------------


def ask(
    path: Path, stage: str, questions: Sequence[Asked], answer: Answer, config: TpoConfig, watch: Watch
) -> dict[str, dict]:
    """Answers to every question from its frame sets of a stage, by id. {id, video, answers, named, right} is appended
    to the file: `named` is the option of each answer (None for none), `right` whether it is the question's."""
    with RowFile(path) as file:
        todo, by_id = [], {asked.id: asked for asked in questions}
        for asked in questions:
            if asked.id not in file.rows:
                video, sets = asked.sets[stage]
                todo.append(Request(asked.id, video, sets, text_of(asked.question, config)))
        advance = watch(path.stem, len(questions), len(questions) - len(todo))
        for batch in answer(todo):
            rows = []
            for request, texts in batch:
                question = by_id[request.id].question
                named = [option_letter(text, len(question.options)) for text in texts]
                right = [letter == question.answer for letter in named]
                of_question = {
                    "id": request.id,
                    "video": request.video,
                    "answers": texts,
                    "named": named,
                    "right": right,
                }
                rows.append(of_question)
            file.append(rows)
            advance(len(batch))
        return {asked.id: file.rows[asked.id] for asked in questions}


def text_of(question: Question, config: TpoConfig) -> str:
    """The user's text: question, options and the last line."""
    suffix = "" if config.build.answer_style == "text" else config.build.suffix
    return f"{question.question.rstrip()}\n{suffix}" if suffix else question.question.rstrip()


def pair_of(asked: Asked, recipe: str, evidence: Mapping, without: Mapping, config: TpoConfig, shown) -> dict | None:
    """A pair where the answer with the evidence is right and one without is wrong; None otherwise. An answer that names
    no option is none: it would teach how to write, not what to see."""
    if not evidence["right"][0]:
        return None
    draws = enumerate(zip(without["named"], without["right"], strict=True))
    wrong = [i for i, (named, right) in draws if named and not right]
    if not wrong:
        return None
    question, style, first = asked.question, config.build.answer_style, wrong[0]

    def told(row: Mapping, i: int) -> str:
        letter = row["named"][i]
        if style == "own":
            return row["answers"][i].strip()
        return letter if style == "letter" else question.options[ord(letter) - ord("A")]

    def frames(stage: str, i: int) -> list:
        video, sets = asked.sets[stage]
        return [[video, int(frame)] for frame in sets[i]]

    pair = {
        "id": f"{asked.id}:{recipe}",
        "video": question.video,
        "prompt": f"{IMAGE_TAG}\n{text_of(question, config)}",
        "chosen": told(evidence, 0),
        "rejected": told(without, first),
        "recipe": recipe,
        "answer": question.answer,
        "picks": {"chosen": frames("evidence", 0), "rejected": frames(recipe, first)},
        "judge": {"chosen": "right", "rejected": "wrong", "draws": len(without["right"]), "wrong_draws": len(wrong)},
    }
    return pair | ({"shown": shown} if shown else {})


# ---- all stages ------------------------------------------------------------------------------------------


def build(
    config: TpoConfig, questions: Mapping[str, Question], store: FrameStore, answer: Answer, watch: Watch, identity: str
) -> dict:
    """All stages; returns {"counts", "yield" (share of the questions asked that gave a pair, by recipe), "sha256"}.

    Args:
      questions: by their ids, of videos in the store.
      answer: how requests are answered.
      identity: of the answerer's checkpoint, for the records.
    Raises: ValueError where no pair came of them.
    """
    check(config)
    output = Path(config.build.output)
    videos = sorted({question.video for question in questions.values()})
    asked = [frame_sets(question, name, store, videos, config) for name, question in questions.items()]
    evidence = ask(output / STAGES["evidence"], "evidence", asked, answer, config, watch)
    right = [a for a in asked if evidence[a.id]["right"][0]]
    counts = {"questions": len(asked), "right_with_evidence": len(right)}
    shares, pairs = {}, []
    for recipe in config.build.recipes:
        possible = [a for a in right if a.sets.get(recipe)]
        without = ask(output / STAGES[recipe], recipe, possible, answer, config, watch)
        found = []
        for a in possible:
            shown = shown_frames(a, store, videos, config)
            if pair := pair_of(a, recipe, evidence[a.id], without[a.id], config, shown):
                found.append(pair | {"model": identity})
        could = sum(1 for a in asked if a.sets.get(recipe))
        counts |= {f"asked_{recipe}": could, f"wrong_{recipe}": len(found)}
        shares[recipe] = len(found) / could if could else 0.0
        pairs += found
    kept = [pair for recipe in config.build.recipes for pair in limited(pairs, recipe, config)]
    return finish(kept, counts, shares, config, identity)


def limited(pairs: Sequence[dict], recipe: str, config: TpoConfig) -> list[dict]:
    """The pairs of a recipe, at most build.max_pairs of them, in random order."""
    return shuffled([pair for pair in pairs if pair["recipe"] == recipe], config.seed, config.build.max_pairs)


def finish(
    pairs: list[dict], counts: dict[str, int], shares: Mapping[str, float], config: TpoConfig, identity: str
) -> dict:
    """Writes the files of pairs and the card; the result as `build` returns it. Raises ValueError without a pair."""
    output, hashes = Path(config.build.output), {}
    for side, rows in split_by_video(pairs, config.build.heldout, config.seed).items():
        hashes[f"{side}.jsonl"] = write_rows(output / f"{side}.jsonl", rows)
        for recipe in config.build.recipes:
            counts[f"{side}_{recipe}"] = sum(row["recipe"] == recipe for row in rows)
    result = {"counts": counts, "yield": shares, "sha256": hashes, "model": identity}
    publish(output / "README.md", lambda partial: partial.write_text(card(result, config), encoding="utf-8"))
    if not pairs:
        said = ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items())
        raise ValueError(f"{output}: no pair came of it ({said}); see README.md there")
    return result


def card(result: Mapping, config: TpoConfig) -> str:
    """The data set's card, Markdown."""
    counts = "\n".join(f"| {name.replace('_', ' ')} | {count} |" for name, count in result["counts"].items())
    shares = "\n".join(f"| {recipe} | {share:.1%} |" for recipe, share in result["yield"].items())
    hashes = "\n".join(f"| {name} | {digest} |" for name, digest in result["sha256"].items())
    values = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(config.build).items())
    return (
        "# Pairs of answers for temporal preference optimisation (arXiv 2501.13919)\n\nMade by `python -m "
        "tspo_jax.build_pairs`. The chosen answer was given with the evidence's frames and is right, the rejected one "
        "without (irrelevant) or with few of them (incomplete) and is wrong.\n\n"
        f"| | number |\n|---|---|\n{counts}\n\n| recipe | questions that give a pair |\n|---|---|\n{shares}\n\n"
        f"| file | sha256 |\n|---|---|\n{hashes}\n\nAnswerer {result['model']} (identity of the checkpoint).\n\n"
        f"{values}\n"
    )


def read_known(path: Path, strict: bool, max_bad: float) -> tuple[dict[str, Question], list[str]]:
    """Questions with known answers by their ids, and a message for each that is bad: of a TSPO-10K file, or
    multiple-choice ones of LLaVA-Video-178K."""
    if path.suffix == ".json" and "_mc_" in path.name:
        turns, bad = read_conversations(path, strict, max_bad)
        turns = [turn for turn in turns if turn.kind == MULTIPLE_CHOICE]
        rows = [row(turn.id, turn.video, turn.stem, turn.options, turn.answer, "general") for turn in turns]
        return {line["id"]: question_of_row(line, i, line["id"], None) for i, line in enumerate(rows)}, bad
    questions, bad = read_questions(path, strict=strict, max_bad=max_bad)
    return {f"{path.stem}:{question.source.rsplit(':', 1)[1]}": question for question in questions}, bad


def stored_questions(config: TpoConfig, store: FrameStore) -> tuple[dict[str, Question], list[str]]:
    """The questions that are about videos of the store, by id, and a message for each that is left out."""
    known, left_out = read_known(Path(config.build.questions), config.data.strict, config.data.max_bad)
    absent = {name: question.video for name, question in known.items() if question.video not in store}
    left_out += [f"{name}: video {video} is not in {store.folder}" for name, video in absent.items()]
    known = {name: question for name, question in known.items() if name not in absent}
    if not known:
        raise ValueError(f"{config.build.questions}: no question is about a video of {store.folder}: {left_out[0]}")
    return known, left_out


def run(config: TpoConfig, devices: Sequence[jax.Device], watch: Watch) -> dict:
    """Everything that build_pairs does: reads the questions, loads the answerer when it is needed, and builds."""
    check(config)
    a, output = config.answerer, Path(config.build.output)
    store, known, left_out = FrameStore(config.data.store), {}, []
    if config.build.questions:
        known, left_out = stored_questions(config, store)
    writer = None
    if config.build.writer:
        writer = open_writer(config.build.writer, model=config.build.writer_model)
    mesh = sharding.make_mesh(config.mesh.axes, devices)
    identity = answerer_identity(a.folder, a.adapter)

    @functools.cache
    def answerer() -> Answerer:
        description = weights.read_config(a.folder)
        where = sharding.answerer_sharding(mesh, description, split_over_data=config.mesh.split_over_data)
        return load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, a.adapter)

    @functools.cache
    def rollout() -> Rollout:
        chunks = {"encode_chunk": a.encode_chunk, "prefill_chunk": a.prefill_chunk, "attention": a.attention}
        return Rollout.of(answerer(), max_new_tokens=a.max_new_tokens, mesh=mesh, **chunks)

    def answer(requests: list[Request]) -> Iterator[list[tuple[Request, list[str]]]]:
        if not requests:
            return iter(())
        return answer_requests(requests, store, answerer(), rollout(), mesh, config.build.batch_size, a.template)

    names = "output", "batch_size", "heldout", "max_pairs", "recipes"  # that change no answer
    built = {name: value for name, value in dataclasses.asdict(config.build).items() if name not in names}
    record = {
        "build": built,
        "answerer": identity,
        "store": config.data.store,
        "seed": config.seed,
    }
    with run_folder.in_use(output):
        run_folder.check_run(output, record, ())
        run_folder.write_run_config(output, record)
        if writer:
            clips = config.build.captioner and StoredClips(load_captioner(config.build.captioner), store)
            caption = functools.partial(clips.answers, max_new_tokens=a.max_new_tokens) if clips else None
            pairs, counts, shares = writing.build(config, store, store.names(), answer, writer, caption)
            model = f"{identity}, writer {writer.identity}" + (f", captioner {clips.identity}" if clips else "")
            pairs = [
                pair | {"model": model} for recipe in config.build.recipes for pair in limited(pairs, recipe, config)
            ]
            return finish(pairs, counts, shares, config, model) | {"left_out": left_out}
        return build(config, known, store, answer, watch, identity) | {"left_out": left_out}
