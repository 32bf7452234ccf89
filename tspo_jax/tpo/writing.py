"""Pairs for videos without questions: a language model writes them from captions, and judges the answers (TPO's crawled
pairs, arXiv 2501.13919).

    1_captions.jsonl    what our answerer (or config.build.captioner) sees in frames of each part of a video
    2_questions.jsonl   one question and its answer per part and task, by the writer; or none
    3_evidence.jsonl    our answerer with the frames that the question is about; it is chosen
    4_without.jsonl     and without: frames outside of the part (irrelevant), or a few of the video's (incomplete)
    5_judged.jsonl      three calls of the writer, who sees captions and answers, but no frames; each ends in one word

The writer is a function of the user's, or an OpenAI-compatible address (answering/writers.py); without one nothing of
this runs. A reply in another form drops its pair, and is counted.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from tspo_jax.answering.calls import Writer
from tspo_jax.answering.frame_answers import Request
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import IMAGE_TAG
from tspo_jax.data.row_file import RowFile
from tspo_jax.data.stages import number
from tspo_jax.tpo.config import TpoConfig

CAPTION_PROMPT = "Describe in one or two detailed sentences what happens in these frames of a video."
TASKS = (  # the published tasks
    "temporal reasoning",
    "action reasoning",
    "causal reasoning",
    "information extraction",
    "descriptive questions",
    "summarization",
    "object reasoning",
    "spatial reasoning",
)
QUESTION_PROMPT = (
    "Here are descriptions of parts of a video, in their order:\n{captions}\n\nWrite one question about {task} and its "
    "answer, both of which follow from the descriptions, as two lines `Q: ...` and `A: ...`. If the descriptions do "
    "not suit this task, write only None."
)
# call -> (prompt, words that may begin the reply, the one that keeps the pair)
JUDGE = {
    "better": (
        "Descriptions of a video:\n{captions}\n\nQuestion: {question}\nAnswer 1: {chosen}\nAnswer 2: {rejected}\n\n"
        "Going by the descriptions, is answer 1 better than answer 2? Reply with one word: Yes, No or Equally.",
        ("yes", "no", "equally"),
        "yes",
    ),
    "ambiguous": (
        "Descriptions of a video:\n{captions}\n\nQuestion: {question}\nAnswer: {chosen}\n\nDo the question and the "
        "answer contradict the descriptions, or could another answer be right as well? Reply with one word: Yes or No.",
        ("yes", "no"),
        "no",
    ),
    "correct": (
        "Descriptions of a video:\n{captions}\n\nQuestion: {question}\nA known answer: {reference}\n"
        "Answer: {chosen}\n\nIs the answer right? Reply with one word: Yes or No.",
        ("yes", "no"),
        "yes",
    ),
}
PARTS = 4  # of a video, one of which is what an irrelevant pair is about

Answer = Callable[[list[Request]], Iterable[list[tuple[Request, list[str]]]]]  # batch by batch


def read_question(reply: str | None) -> tuple[str, str] | None:
    """The question and answer of a reply `Q: ...`, `A: ...`; None where it has none."""
    match = re.search(r"^\s*Q:\s*(.+?)\s*^\s*A:\s*(.+?)\s*\Z", reply or "", re.MULTILINE | re.DOTALL)
    return (match[1], match[2]) if match else None


def first_word(reply: str | None, allowed: Sequence[str]) -> str | None:
    """The first word of a reply in lower case, None where it is none of the allowed ones."""
    words = re.findall(r"[^\W_]+", reply or "")
    return words[0].lower() if words and words[0].lower() in allowed else None


def judged(writer: Writer, rows: Sequence[Mapping]) -> list[dict[str, str | None]]:
    """What the writer says of each {captions, question, reference, chosen, rejected}: the word of every call."""
    verdicts: list[dict[str, str | None]] = [{} for _ in rows]
    for name, (prompt, allowed, _) in JUDGE.items():
        replies = writer.write([prompt.format(**row) for row in rows])
        for verdict, reply in zip(verdicts, replies, strict=True):
            verdict[name] = first_word(reply.text, allowed)
    return verdicts


def is_kept(verdict: Mapping[str, str | None]) -> bool:
    """Whether all three calls speak for the pair."""
    return all(verdict[name] == keeps for name, (_, _, keeps) in JUDGE.items())


def parts_of(T: int) -> list[np.ndarray]:
    """The frames of each part of a video with T frames."""
    return [part for part in np.array_split(np.arange(T), PARTS) if len(part)]


def spread(frames: np.ndarray, count: int) -> np.ndarray:
    return frames[np.linspace(0, len(frames) - 1, min(count, len(frames))).astype(int)]


def build(
    config: TpoConfig,
    store: FrameStore,
    videos: Sequence[str],
    answer: Answer,
    writer: Writer,
    caption: Answer | None = None,
) -> tuple[list[dict], dict[str, int], dict[str, float]]:
    """The pairs (records of tpo/pairs.py), counts, and the share of what was asked for that gave a pair, by recipe.
    `caption` describes parts of videos where it is not `answer` that does.

    Every stage is filed by rows that are not asked for again; another writer or answerer needs another folder.
    """
    b, output = config.build, Path(config.build.output)
    K, parts = b.frames, {video: parts_of(store.video(video).num_frames) for video in videos}

    def told(path: str, requests: list[Request], answer: Answer = answer) -> dict[str, list[str]]:
        with RowFile(output / path) as file:
            for batch in answer([request for request in requests if request.id not in file.rows]):
                file.append([{"id": request.id, "answers": texts} for request, texts in batch])
            return {request.id: file.rows[request.id]["answers"] for request in requests}

    captions = told(
        "1_captions.jsonl",
        [
            Request(f"{video}#{i}", video, spread(part, K)[None], CAPTION_PROMPT)
            for video, of_video in parts.items()
            for i, part in enumerate(of_video)
        ],
        caption or answer,
    )

    asked = []  # {id, video, recipe, part, captions, task}
    for video, of_video in parts.items():
        rng = np.random.default_rng((config.seed, number(video)))
        lines = [f"{i + 1}. {captions[f'{video}#{i}'][0]}" for i in range(len(of_video))]
        for recipe in b.recipes:
            for n in range(b.questions_per_video):
                part = int(rng.integers(len(of_video)))
                seen = lines[part] if recipe == "irrelevant" else "\n".join(lines)
                task = TASKS[int(rng.integers(len(TASKS)))]
                name = f"{video}:{recipe}:{n}"
                asked.append(
                    {"id": name, "video": video, "recipe": recipe, "part": part, "captions": seen, "task": task}
                )
    with RowFile(output / "2_questions.jsonl") as file:
        todo = [row for row in asked if row["id"] not in file.rows]
        replies = writer.write([QUESTION_PROMPT.format(**row) for row in todo]) if todo else []
        for row, reply in zip(todo, replies, strict=True):
            found = read_question(reply.text)
            said = {"question": found and found[0], "reference": found and found[1], "error": reply.error}
            file.append([row | said])
        questions = [file.rows[row["id"]] for row in asked]
    usable = [row for row in questions if row["question"]]

    def frames_of(row: Mapping, with_evidence: bool) -> np.ndarray:
        rng = np.random.default_rng((config.seed, number(row["id"])))
        of_video = parts[row["video"]]
        everything = np.concatenate(of_video)
        if row["recipe"] == "irrelevant":
            part = of_video[row["part"]]
            return spread(part if with_evidence else np.setdiff1d(everything, part), K)
        shown = spread(everything, K)
        return shown if with_evidence else np.sort(rng.choice(shown, min(b.sparse_frames, len(shown)), replace=False))

    usable = [row for row in usable if len(frames_of(row, False))]
    texts = {}
    for path, with_evidence in (("3_evidence.jsonl", True), ("4_without.jsonl", False)):
        requests = [Request(r["id"], r["video"], frames_of(r, with_evidence)[None], r["question"]) for r in usable]
        texts[with_evidence] = told(path, requests)
    rows = [
        row | {"chosen": texts[True][row["id"]][0].strip(), "rejected": texts[False][row["id"]][0].strip()}
        for row in usable
    ]
    rows = [row for row in rows if row["chosen"] and row["rejected"] and row["chosen"] != row["rejected"]]
    with RowFile(output / "5_judged.jsonl") as file:
        todo = [row for row in rows if row["id"] not in file.rows]
        for row, verdict in zip(todo, judged(writer, todo) if todo else [], strict=True):
            file.append([{"id": row["id"], "judge": verdict}])
        verdicts = {row["id"]: file.rows[row["id"]]["judge"] for row in rows}

    def record(row: Mapping) -> dict:
        picks = {
            name: [[row["video"], int(frame)] for frame in frames_of(row, with_evidence)]
            for name, with_evidence in (("chosen", True), ("rejected", False))
        }
        kept = {name: row[name] for name in ("id", "video", "chosen", "rejected", "recipe")}
        return kept | {"prompt": f"{IMAGE_TAG}\n{row['question']}", "picks": picks, "judge": verdicts[row["id"]]}

    pairs = [record(row) for row in rows if is_kept(verdicts[row["id"]])]
    counts = {"asked": len(asked), "questions": len(usable), "different_answers": len(rows)}
    for name, (_, _, keeps) in JUDGE.items():
        counts[f"judged_{name}"] = sum(verdict[name] == keeps for verdict in verdicts.values())
    counts["judged_unreadable"] = sum(None in verdict.values() for verdict in verdicts.values())
    shares = {}
    for recipe in b.recipes:
        of_recipe = sum(row["recipe"] == recipe for row in asked)
        shares[recipe] = sum(pair["recipe"] == recipe for pair in pairs) / of_recipe if of_recipe else 0.0
    return pairs, counts, shares
