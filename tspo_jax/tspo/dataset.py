"""The dual-style training set of the paper, made of LLaVA-Video-178K and a frame store by stages.

    1_flat.jsonl      multiple-choice questions of stored videos over --min_seconds
    2_few.jsonl       answers from --few_frames uniform frames: right ones are too easy and dropped
    3_many.jsonl      answers from --many_frames uniform frames to the others: wrong ones are too hard and dropped
    4_random.jsonl    with --frame_sets=G: answers from G random sets of --set_frames frames; questions whose reward is
                      the same for all of them teach nothing (a dead group) and are dropped
    5_events.jsonl    descriptions of random moments of the target videos, by --captioner (default: the answerer)
    6_needle.jsonl    four-option questions made of them, for needle samples (data/event_questions.py)
    train.jsonl, heldout.jsonl    both styles mixed, no video in both; README.md is the card, with counts and hashes

Every stage appends to its file and is finished row by row. Several shards answer and describe their part each; a run
without shards joins what they have answered.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.answering.clip_captions import StoredClips, is_captioner
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.adapters import answerer_identity
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.config import MAX_BAD
from tspo_jax.data.event_questions import event_questions
from tspo_jax.data.frame_store import FrameStore, StoreError, publish
from tspo_jax.data.llava_video_178k import MULTIPLE_CHOICE, read_conversations
from tspo_jax.data.questions import Question, QuestionError, question_of_row, read_questions, row
from tspo_jax.data.row_file import RowFile
from tspo_jax.data.shard import Shard
from tspo_jax.data.stages import number, shuffled, split_by_video, write_rows
from tspo_jax.devices import sharding
from tspo_jax.runs import run_folder
from tspo_jax.selection.methods import uniform
from tspo_jax.tspo.rewards import accuracy

CAPTION_PROMPT = "Describe in one detailed sentence what happens in this part of the video."
_SHOWN = 5  # names in one message


def _setting(default: int | float | str, text: str):
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the rows of the stages depend on; the flags of the same names."""

    min_seconds: float = _setting(60.0, "Only videos longer than this.")
    few_frames: int = _setting(4, "Too easy is what is answered right from this many uniform frames.")
    many_frames: int = _setting(64, "Too hard is what is answered wrong from this many uniform frames.")
    frame_sets: int = _setting(0, "Random frame sets for which the reward must vary; 0: no such filter.")
    set_frames: int = _setting(8, "Frames of such a set.")
    num_targets: int = _setting(0, "Videos, drawn at random, to make needle questions about; 0: all.")
    events: int = _setting(3, "Moments of a target video that are described, one in each of as many parts.")
    event_frames: int = _setting(8, "Consecutive frames of a moment.")
    caption_prompt: str = _setting(CAPTION_PROMPT, "What the captioner is asked.")
    max_new_tokens: int = _setting(16, "Tokens of an answer at most.")
    caption_tokens: int = _setting(96, "Tokens of a description at most.")
    num_general: int = _setting(0, "General questions to keep, drawn at random; 0: all.")
    num_specific: int = _setting(0, "Needle questions to keep, drawn at random; 0: all.")
    heldout: float = _setting(0.1, "Share of the videos whose questions are held out.")
    seed: int = _setting(0, "Of all that is random.")

    def __post_init__(self):
        """Raises ValueError for numbers that make no sense."""
        sizes = "few_frames", "many_frames", "set_frames", "events", "event_frames", "max_new_tokens", "caption_tokens"
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("frame_sets", "num_targets", "num_general", "num_specific", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 0")
        if self.frame_sets == 1:
            raise ValueError("--frame_sets=1: the rewards of one frame set cannot vary; give at least 2, or 0")
        if not 0 <= self.heldout < 1:
            raise ValueError(f"--heldout is {self.heldout}; it must be a share of the videos, 0 to below 1")


# ---- (a) what there is ------------------------------------------------------------------------------------


def find_annotations(names: Iterable[str]) -> list[Path]:
    """The files of --annotations; raises ValueError where there are none."""
    files = []
    for path in map(Path, names):
        if path.is_dir():
            found = sorted(file for file in path.rglob("*.json") if "_mc_" in file.name)
            if not found:
                raise ValueError(f"--annotations: no *_mc_*.json in {path}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise ValueError(f"--annotations: {path}: no such file or folder")
    return files


def flatten(files: Iterable[Path], store: FrameStore, min_seconds: float, max_bad: float) -> tuple[list[dict], dict]:
    """TSPO-10K rows of type `general`, each with an `id`, and what was left out: {"errors": [...], counts}.

    Raises QuestionError where more than `max_bad` (a share) of a file is bad, or nothing good; where two questions
    share an id.
    """
    rows, errors = [], []
    for file in files:
        if file.suffix == ".jsonl":
            questions, bad = read_questions(file, strict=False, max_bad=max_bad)
            rows += [
                row(f"{file.stem}:{q.source.rsplit(':', 1)[1]}", q.video, q.query, q.options, q.answer, q.kind)
                for q in questions
                if q.kind == "general"
            ]
        else:
            turns, bad = read_conversations(file, strict=False, max_bad=max_bad)
            turns = [turn for turn in turns if turn.kind == MULTIPLE_CHOICE]
            rows += [row(turn.id, turn.video, turn.stem, turn.options, turn.answer, "general") for turn in turns]
        errors += bad
    names = [line["id"] for line in rows]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise QuestionError(f"--annotations: two questions have the id {twice!r}; is a file or its name there twice?")
    seconds = {line["video"]: _seconds(store, line["video"]) for line in rows}
    absent = sorted(video for video, length in seconds.items() if length is None)
    kept = [line for line in rows if (seconds[line["video"]] or 0.0) > min_seconds]
    return kept, {"errors": errors, "questions": len(rows), "videos_not_in_store": absent}


def _seconds(store: FrameStore, video: str) -> float | None:
    """Length of a stored video, None where it is not in the store."""
    if video not in store:
        return None
    entry = store.video(video)
    return entry.num_video_frames / entry.fps


# ---- (b) what the answerer makes of it --------------------------------------------------------------------

Picks = Callable[[Question, int], np.ndarray]  # (question, frames T of its video) -> int [G,K]
Answer = Callable[[list[Request], int], Iterator[list[tuple[Request, list[str]]]]]  # (requests, max_new_tokens)


def uniform_picks(k: int) -> Picks:
    return lambda question, T: uniform(np.empty(T), k)[None]


def random_picks(num_sets: int, k: int, seed: int) -> Picks:
    """G random sets of K frames, a function of the seed and the question."""

    def picks(question: Question, T: int) -> np.ndarray:
        rng = np.random.default_rng((seed, number(question.source)))
        return np.stack([np.sort(rng.choice(T, min(k, T), replace=False)) for _ in range(num_sets)])

    return picks


def ask(
    path: Path, rows: list[dict], picks: Picks, store: FrameStore, answer: Answer, tokens: int, watch
) -> dict[str, list[float]]:
    """Rewards [G] of every row's question, by its id; {id, video, answers, rewards} is appended to the file."""
    with RowFile(path) as file:
        questions = {line["id"]: question_of_row(line, 0, line["id"], None) for line in rows}
        requests = []
        for name, question in questions.items():
            if name not in file.rows:
                text = f"{question.question}\n{prompts.LETTER_SUFFIX}"
                frames = picks(question, store.video(question.video).num_frames)
                requests.append(Request(name, question.video, frames, text))
        advance = watch(path.stem, len(rows), len(rows) - len(requests))
        for batch in answer(requests, tokens):
            rows = []
            for request, texts in batch:
                asked = questions[request.id]
                rewards = [accuracy(text, asked.answer, len(asked.options)) for text in texts]
                rows.append({"id": request.id, "video": request.video, "answers": texts, "rewards": rewards})
            file.append(rows)
            advance(len(batch))
        return {name: file.rows[name]["rewards"] for name in questions}


# ---- (c) needle items -------------------------------------------------------------------------------------


def event_requests(videos: list[str], store: FrameStore, settings: Settings) -> list[Request]:
    """For every video, runs of consecutive frames to be described: one at a random place of each of its parts."""
    requests = []
    for video in videos:
        T = store.video(video).num_frames
        rng = np.random.default_rng((settings.seed, number(video)))
        for i in range(settings.events):
            low, high = i * T // settings.events, (i + 1) * T // settings.events
            length = min(settings.event_frames, high - low)
            if length:
                first = int(rng.integers(low, high - length, endpoint=True))
                name = f"{video}#{first}-{first + length - 1}"
                requests.append(Request(name, video, np.arange(first, first + length)[None], settings.caption_prompt))
    return requests


def describe(
    path: Path, videos: list[str], store: FrameStore, answer: Answer, settings: Settings, watch
) -> dict[str, list[str]]:
    """Descriptions of the events of every video; {id, video, seconds, description} is appended to the file."""
    with RowFile(path) as file:
        requests = event_requests(videos, store, settings)
        todo = [request for request in requests if request.id not in file.rows]
        advance = watch(path.stem, len(requests), len(requests) - len(todo))
        for batch in answer(todo, settings.caption_tokens):
            file.append(
                [
                    {
                        "id": request.id,
                        "video": request.video,
                        "seconds": store.video(request.video).timestamps[request.picks[0, [0, -1]]].round(2).tolist(),
                        "description": texts[0],
                    }
                    for request, texts in batch
                ]
            )
            advance(len(batch))
        descriptions: dict[str, list[str]] = {video: [] for video in videos}
        for request in requests:
            descriptions[request.video].append(file.rows[request.id]["description"])
        return descriptions


# ---- (d) the mixture --------------------------------------------------------------------------------------


def card(result: dict, settings: Settings) -> str:
    """The data set's card, Markdown."""
    counts = "\n".join(f"| {name.replace('_', ' ')} | {count} |" for name, count in result["counts"].items())
    hashes = "\n".join(f"| {name} | {digest} |" for name, digest in result["sha256"].items())
    values = "\n".join(f"- {name}: {value}" for name, value in dataclasses.asdict(settings).items())
    return (
        "# Questions for keyframe selection, dual-style\n\nMade by `python -m tspo_jax.build_dataset`. Lines are in "
        "the TSPO-10K format: `general` ones passed the difficulty filter, `specific` ones are for needle samples.\n\n"
        f"| questions | number |\n|---|---|\n{counts}\n\n| file | sha256 |\n|---|---|\n{hashes}\n\n"
        f"Answerer {result['answerer']}, captioner {result['captioner']} (identities of the checkpoints).\n\n{values}\n"
    )


# ---- all stages -------------------------------------------------------------------------------------------


def build(
    files: list[Path],
    store: FrameStore,
    output: Path,
    settings: Settings,
    answer: Answer,
    caption: Answer,
    watch: Callable[[str, int, int], Callable[[int], None]],
    shard: Shard,
    max_bad: float = MAX_BAD,
) -> dict:
    """All stages; returns {"counts": {...}, "sha256": {file: digest}, "errors": [...], "videos_not_in_store": [...]}.

    One of several shards answers and describes its part: no files of needle questions or of the mixture.

    Args:
      answer, caption: how requests are answered (frame_answers.answer_requests with the rest bound).
      watch: (stage, total, done) -> function that counts rows, for a progress bar.
    """
    flat, left_out = flatten(files, store, settings.min_seconds, max_bad)
    if not flat:
        absent = left_out["videos_not_in_store"]
        raise StoreError(
            f"--annotations: none of {left_out['questions']} questions is about a video of {store.folder} over "
            f"{settings.min_seconds:g} s; not in the store: {_some(absent)}"
        )
    videos = [{"id": video} for video in dict.fromkeys(line["video"] for line in flat)]
    targets = sorted(video["id"] for video in shuffled(videos, settings.seed, settings.num_targets))
    flat, targets = shard.of(flat), shard.of(targets)
    for path in output.glob("**/1_flat.jsonl"):
        _check_same_questions(path, flat)
    hashes = {"1_flat.jsonl": write_rows(output / "1_flat.jsonl", flat)}
    counts = {"multiple_choice": left_out["questions"], "of_long_enough_videos": len(flat)}

    def rewards_of(name: str, rows: list[dict], picks: Picks) -> dict[str, list[float]]:
        return ask(output / name, rows, picks, store, answer, settings.max_new_tokens, watch)

    few = rewards_of("2_few.jsonl", flat, uniform_picks(settings.few_frames))
    general = [line for line in flat if not few[line["id"]][0]]
    counts["not_too_easy"] = len(general)
    many = rewards_of("3_many.jsonl", general, uniform_picks(settings.many_frames))
    general = [line for line in general if many[line["id"]][0]]
    counts["not_too_hard"] = len(general)
    if settings.frame_sets:
        picks = random_picks(settings.frame_sets, settings.set_frames, settings.seed)
        random = rewards_of("4_random.jsonl", general, picks)
        general = [line for line in general if len(set(random[line["id"]])) > 1]
        counts["frame_sensitive"] = len(general)

    descriptions = describe(output / "5_events.jsonl", targets, store, caption, settings, watch)
    counts["events_described"] = sum(map(len, descriptions.values()))
    rest = {name: left_out[name] for name in ("errors", "videos_not_in_store")}
    if shard.count > 1:
        return {"counts": counts, **rest}

    needle = list(event_questions(descriptions, settings.seed))
    hashes["6_needle.jsonl"] = write_rows(output / "6_needle.jsonl", needle)
    counts["needle_questions"] = len(needle)

    chosen = shuffled(general, settings.seed, settings.num_general)
    chosen += shuffled(needle, settings.seed, settings.num_specific)
    for side, rows in split_by_video(chosen, settings.heldout, settings.seed).items():
        hashes[f"{side}.jsonl"] = write_rows(output / f"{side}.jsonl", rows)
        for kind in ("general", "specific"):
            counts[f"{side}_{kind}"] = sum(line["type"] == kind for line in rows)
    for name in sorted(path.name for path in output.glob("[2345]_*.jsonl")):
        hashes[name] = hashlib.sha256((output / name).read_bytes()).hexdigest()
    return {"counts": counts, "sha256": dict(sorted(hashes.items())), **rest}


def _check_same_questions(path: Path, rows: list[dict]) -> None:
    """Answers are kept by id: raises QuestionError where a question reads otherwise than when it was answered."""
    before = {line["id"]: line for line in map(json.loads, path.read_bytes().splitlines())}
    changed = [line["id"] for line in rows if before.get(line["id"], line) != line]
    if changed:
        raise QuestionError(f"{path}: other questions than now had the ids {_some(changed)}; use another --output")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


def join_shards(output: Path, config: Mapping, may_differ: tuple[str, ...]) -> None:
    """Takes over what the shards in folders of `output` have answered, finished or not.

    Raises RunFolderError where one of them is running, or has other settings or checkpoints.
    """
    for folder in sorted(output.glob("shard-*")):
        with run_folder.in_use(folder):
            run_folder.check_run(folder, config, may_differ)
            for path in sorted(folder.glob("[2345]_*.jsonl")):
                with RowFile(path) as part, RowFile(output / path.name) as whole:
                    whole.append([row for name, row in part.rows.items() if name not in whole.rows])


def run(
    files: list[Path],
    store: FrameStore,
    output: Path,
    settings: Settings,
    folders: Mapping[str, str],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    dtype: jnp.dtype,
    watch: Callable[[str, int, int], Callable[[int], None]],
    shard: Shard,
    max_bad: float = MAX_BAD,
    adapter: str = "",
) -> dict:
    """`build` with MLLMs from folders, as a run that holds its output folder; also writes the card.

    Args:
      folders: of the "answerer" and the "captioner"; the result names their identities.
      adapter: PEFT folder of adapters for the answerer, also where it describes events.
    """

    def adapter_of(folder: str) -> str:
        return adapter if folder == folders["answerer"] else ""

    @functools.cache
    def clip_captioner(folder: str) -> StoredClips:
        return StoredClips(load_captioner(folder), store)

    models = {
        name: clip_captioner(folder).identity if is_captioner(folder) else answerer_identity(folder, adapter_of(folder))
        for name, folder in folders.items()
    }
    # Which questions are kept may change between runs (their number, the share held out), not what an answer means.
    names = ("min_seconds", "num_targets", "num_general", "num_specific", "heldout")
    free = tuple(f"settings.{name}" for name in names)
    record = {"settings": dataclasses.asdict(settings), **models}

    @functools.cache
    def load(folder: str) -> Answerer:
        where = sharding.answerer_sharding(mesh, weights.read_config(folder))
        return load_answerer(folder, dtype, where, adapter=adapter_of(folder))

    def answers_of(folder: str) -> Answer:
        def answers(requests, max_new_tokens):
            if not requests:  # to join shards takes no model
                return iter(())
            if is_captioner(folder):
                return clip_captioner(folder).answers(requests, max_new_tokens)
            model = load(folder)
            rollout = Rollout.of(model, max_new_tokens=max_new_tokens, mesh=mesh)
            return answer_requests(requests, store, model, rollout, mesh, batch_size)

        return answers

    with run_folder.in_use(output):
        run_folder.check_run(output, record, free)
        run_folder.write_run_config(output, record)
        if shard.count == 1:
            join_shards(output, record, free)
        answer, caption = answers_of(folders["answerer"]), answers_of(folders["captioner"])
        result = build(files, store, output, settings, answer, caption, watch, shard, max_bad) | models
    if shard.count == 1:
        publish(output / "README.md", lambda partial: partial.write_text(card(result, settings), encoding="utf-8"))
    return result


def notes(result: Mapping) -> list[str]:
    """What a person should know of a result: what was left out, and that nothing is left."""
    errors, absent = result["errors"], result["videos_not_in_store"]
    said = [f"left out: {message}" for message in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        said.append(f"left out: {len(errors) - _SHOWN} more, which the result lists")
    if absent:
        said.append(f"left out: questions about {len(absent)} video(s) not in the store: {_some(absent)}")
    if not result["counts"].get("train_general", 1) + result["counts"].get("train_specific", 1):
        said.append("no question is left to train on; the counts say which stage dropped them")
    return said
