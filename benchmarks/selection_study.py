"""Which way of choosing 8 frames pays on the toy world: accuracy, answerer calls of training, frames read, seconds.

    bash launch/quickstart.sh                                  # makes toy_data
    python -m benchmarks.selection_study --data=toy_data --folder=runs/selection_study [--seeds=3 --ways=own]

Without training: uniform frames, CLIP top-k, and T* with the toy world's detector, which looks for the things that a
question and its options name (evenly spaced frames where the question names none). TSPO by the paper's recipe (`paper`:
configs/toy.py, 300 steps); with what gained most, the first 100 of 300 steps on the world's own evidence (`plus`,
docs/ablations.md); the same with 100 steps on what the answerer says of single frames of --labelled training questions
instead (`own`), before 200 of TSPO on all questions; and a span head (`span`), 300 steps on the labels of `own`. With
the defaults `own` asks the answerer about as often as `paper`, labels counted; asking more often is an error.

Every result goes to FOLDER/results.jsonl at once, and what is there is not done again; --seeds=0 adds nothing and only
sums up. stdout has the table in Markdown: means with Student's 95 % interval over seeds. Frames and seconds are those
of --timed questions, each asked alone, until the frames to show are there, on the video file (cold) and on the frame
store with its features (stored); programs are compiled before.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from benchmarks.ablations import FAMILIES, read_accuracy, text_of
from configs import llava_video_7b_plus, toy
from tspo_jax import config as config_module
from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.command_line import entry_point
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import Question, questions_sha256, read_questions
from tspo_jax.data.row_file import RowFile
from tspo_jax.evaluation.frame_sets import search_options
from tspo_jax.evaluation.run import evaluate
from tspo_jax.evaluation.statistics import over_seeds
from tspo_jax.export import export
from tspo_jax.label_evidence import label_evidence
from tspo_jax.runs import run_folder
from tspo_jax.runs.preemption import finish
from tspo_jax.selection import methods
from tspo_jax.selection.choosing import choose
from tspo_jax.selection.scoring import Candidates, Scorer, load_scorer, read_agent
from tspo_jax.selection.searching import Searcher
from tspo_jax.selection.video_source import Source, file_source, stored_source
from tspo_jax.toy.detector_training import NAMES
from tspo_jax.train import train
from tspo_jax.tspo.evidence_labels import Labelling

K = 8
CLIP, DETECTOR = f"{toy.CHECKPOINTS}/clip", f"{toy.CHECKPOINTS}/owlvit"
GRID, SHARE = (2, 2), 0.25  # a toy video has 72 to 240 candidates: a tenth of them would be few grids
WAYS = {  # name -> (meaning, method of an evaluation)
    "uniform": ("uniform", "uniform"),
    "clip-topk": ("CLIP top-k", "clip-topk"),
    "tstar": ("T*, toy detector", methods.SEARCH),
    "paper": ("TSPO, the paper's recipe", "topk"),
    "plus": ("TSPO, `plus` started on the world's labels", "topk"),
    "own": ("TSPO, `plus` started on the answerer's labels", "topk"),
    "span": ("span head on the answerer's labels", methods.SPAN),
}
UNTRAINED, SEARCHED = ("uniform", "clip-topk"), "tstar"
STEPS = {"paper": (0, 300), "plus": (100, 200), "start": (100, 0), "own": (0, 200), "span": (300, 0)}  # labels, TSPO
LABELS, TIMES = "labels", "times"  # further results
COLD, STORED = "cold video", "stored"


def config_of(way: str, seed: int, data: Path, folder: Path) -> Config:
    """The run of a way, and its evaluation. The run of `own` starts from the agent of `start`."""
    config = toy.get_config()
    if way in ("plus", "own", "start", "span"):
        llava_video_7b_plus.extend(config)
    config.seed, config.held_out.every, config.checkpoint_every = seed, 0, 1000
    config.data.store, config.data.questions = str(data / "frames"), str(data / "train.jsonl")
    config.evaluation.questions, config.evaluation.budgets = str(folder / "eval.jsonl"), (K,)
    config.evaluation.methods = UNTRAINED if way in UNTRAINED else (WAYS[way][1],) if way in WAYS else ()
    if way == SEARCHED:
        config.evaluation.search.update(detector=DETECTOR, grid=GRID, share=SHARE)
    on_labels, config.num_steps = STEPS.get(way, (0, 0))
    config.policy.warm_start_steps, config.num_steps = on_labels, max(1, on_labels + config.num_steps)
    if way in ("start", "span"):
        config.data.questions = str(folder / f"labelled_{seed}.jsonl")
    if way == "span":
        config.agent.kind = "span"
    if way == "own":
        config.agent.init = str(folder / f"start_{seed}_agent")
    return config_module.read(config)


def calls_of(config: Config) -> int:
    """Answers that the rollouts of a run ask for."""
    steps = config.num_steps - config.policy.warm_start_steps
    return steps * config.batch_size * config.policy.group_size


def named(question: Question) -> dict[str, list[str]]:
    """`targets`: what the toy world has and the question names; `cues`: of its options, a colour being a ball's."""
    words = question.query.lower().replace("?", "").replace(",", "").split()
    cues = [name for name in NAMES if name.removesuffix(" ball") in question.options]
    return {"targets": [name for name in NAMES if name in words], "cues": cues}


def write_rows(path: Path, rows: Sequence[Mapping]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Study:
    """The runs of a folder. Every method makes a result, unless it is there."""

    def __init__(self, data: Path, folder: Path, file: RowFile, *, labelled: int, coarse: int, timed_questions: int):
        """`labelled`: training questions that the answerer labels, at first every `coarse`-th frame of their videos.
        `timed_questions`: whose frames are chosen one by one. Raises RunFolderError for a folder with results of other
        settings or questions."""
        questions = {name: read_questions(data / f"{name}.jsonl")[0] for name in ("train", "eval")}
        record = {"labelled": labelled, "coarse": coarse, "timed": timed_questions}
        record |= {name: questions_sha256(of_file) for name, of_file in questions.items()}
        run_folder.check_run(folder, record)
        run_folder.write_run_config(folder, record)
        self._data, self._folder, self._file = data, folder, file
        self._labelled, self._coarse, self._timed = labelled, coarse, timed_questions
        rows = read_lines(data / "eval.jsonl")
        rows = [row | named(question) for row, question in zip(rows, questions["eval"], strict=True)]
        write_rows(folder / "eval.jsonl", rows)

    def measure(self, ways: Sequence[str], seeds: int) -> None:
        """Every result of these ways, each with the first seed before any with the next."""
        if set(ways) & set(UNTRAINED):
            self._untrained()
        for seed in range(seeds):
            for way in ways:
                if way == SEARCHED:
                    self._search(seed)
                elif way not in UNTRAINED:
                    self._agent(way, seed)
        self._times(ways)

    def _untrained(self) -> None:
        """Uniform and CLIP top-k, in one evaluation."""
        if any(way not in self._file.rows for way in UNTRAINED):
            self._evaluate("untrained", self._config("uniform", 0), CLIP, UNTRAINED)

    def _search(self, seed: int) -> None:
        if f"{SEARCHED} {seed}" not in self._file.rows:
            self._evaluate(f"{SEARCHED} {seed}", self._config(SEARCHED, seed), CLIP)

    def _labels(self, seed: int) -> dict:
        """The answerer's labels of some training questions."""
        name = f"{LABELS} {seed}"
        if name not in self._file.rows:
            rows = [row for row in read_lines(self._data / "train.jsonl") if row["type"] == "general"]
            drawn = np.random.default_rng(seed).permutation(len(rows))[: self._labelled]
            asked, config = self._folder / f"asked_{seed}.jsonl", self._config("start", seed)
            write_rows(asked, [rows[i] for i in sorted(drawn)])
            labelled = Path(config.data.questions)
            config = dataclasses.replace(config, data=dataclasses.replace(config.data, questions=str(asked)))
            self._append(name, label_evidence(config, Labelling(coarse=self._coarse), labelled))
        return self._file.rows[name]

    def _agent(self, way: str, seed: int) -> None:
        """Trains and evaluates an agent. Raises ValueError where `own` asks the answerer more often than `paper`."""
        name = f"{way} {seed}"
        if name in self._file.rows:
            return
        config, run_dir = self._config(way, seed), self._run_dir(name)
        calls, allowed = calls_of(config), calls_of(self._config("paper", seed))
        if way in ("own", "span"):
            calls += self._labels(seed)["answers"]
            if calls > allowed:
                raise ValueError(f"{way} asks the answerer {calls} times, paper {allowed} times; lower --labelled")
        if way == "own":
            finish(train(self._config("start", seed), self._run_dir(f"start {seed}"), jax.devices()[:1]))
            export(read_agent(self._run_dir(f"start {seed}")), CLIP, config.agent.init)
        finish(train(config, run_dir, jax.devices()[:1]))
        self._evaluate(name, config, run_dir, calls=calls)

    def _times(self, ways: Sequence[str]) -> None:
        """Seconds and frames of each way until the frames of a question are chosen and read, with seed 0's agents."""
        questions = read_questions(self._folder / "eval.jsonl")[0]
        drawn = np.random.default_rng(0).permutation(len(questions))[: self._timed + 1]
        for way in ways:
            name = f"{TIMES} {way}"
            if name not in self._file.rows:
                agent = CLIP if way in (*UNTRAINED, SEARCHED) else self._run_dir(f"{way} 0")
                config, scorer = self._config(way, 0), load_scorer(agent)
                pick = chooser(way, scorer, config)
                show = lambda source, question, pick=pick: source.pictures(pick(source, question))  # noqa: E731
                store = FrameStore(self._data / "frames", scorer.clip.identity)
                found = {}
                for where, opened in (
                    (COLD, lambda video, clip=scorer.clip: file_source(self._data / video, video, clip)),
                    (STORED, lambda video, store=store: stored_source(store, video)),
                ):
                    measured = [timed(opened, show, questions[i], where == COLD) for i in drawn][1:]  # one compiles
                    frames, seconds, _ = np.transpose(measured)
                    found[where] = {"seconds": float(np.median(seconds)), "frames": float(frames.mean())}
                self._append(name, found)

    def _config(self, way: str, seed: int) -> Config:
        return config_of(way, seed, self._data, self._folder)

    def _evaluate(self, name: str, config: Config, agent: str | Path, ways: Sequence[str] = (), calls: int = 0) -> None:
        run_dir = self._run_dir(name)
        finish(evaluate(config, run_dir, agent) is not None)
        accuracy = read_accuracy(run_dir / "evaluation" / "summary.json")
        for way in ways or (name,):
            self._append(way, {"accuracy": accuracy[WAYS[way.split()[0]][1]], "calls": calls})

    def _append(self, name: str, row: Mapping) -> None:
        self._file.append([{"id": name} | row])
        entry_point.note(json.dumps(self._file.rows[name]))

    def _run_dir(self, name: str) -> Path:
        return self._folder / name.replace(" ", "_")


def chooser(way: str, scorer: Scorer, config: Config) -> Callable[[Source, Question], Sequence[int]]:
    """(video, question) -> the K candidates that a way shows."""
    if way == "uniform":
        return lambda source, _: methods.uniform(source.frame_idx, K).tolist()
    if way == SEARCHED:
        searcher = Searcher(
            load_detector(config.evaluation.search.detector), search_options(config.evaluation.search, 0)
        )

        def search(source: Source, question: Question) -> Sequence[int]:
            if not question.targets:
                return methods.uniform(source.frame_idx, K).tolist()
            return searcher(source, question.query, K, question.targets, question.cues).picks.tolist()

        return search
    return lambda source, question: choose(source, scorer, question.question, K, WAYS[way][1])


class Timed(NamedTuple):
    """Different frames that were read, and seconds, of the clock and of the processor (all cores)."""

    frames: int
    seconds: float
    cpu_seconds: float


def timed(
    opened: Callable[[str], Source], ask: Callable[[Source, Question], object], question: Question, scoring_reads: bool
) -> Timed:
    """From opening a question's video until `ask` is done with it. All frames count as read where candidates are scored
    and that reads them."""
    started, read = np.array([time.perf_counter(), time.process_time()]), set()
    source = opened(question.video)

    def candidates() -> Candidates:
        if scoring_reads:
            read.update(range(len(source.frame_idx)))
        return source.candidates()

    def pictures(which: Sequence[int]) -> list[np.ndarray]:
        read.update(which)
        return source.pictures(which)

    ask(dataclasses.replace(source, candidates=candidates, pictures=pictures), question)
    return Timed(len(read), *(np.array([time.perf_counter(), time.process_time()]) - started))


def table(rows: Mapping[str, Mapping]) -> str:
    """Markdown, a line for each way that has results."""
    head = ["frames from", "runs", *(f"{family}, %" for family in FAMILIES), "answerer calls of training"]
    head += [f"{what}, {where}" for what in ("frames read", "seconds") for where in (COLD, STORED)]
    lines = [head, ["---"] * len(head)]
    for way, (meaning, _) in WAYS.items():
        runs = [row for name, row in rows.items() if name.split()[0] == way]
        if runs:
            cells = [text_of(over_seeds([run["accuracy"][family] for run in runs])) for family in FAMILIES]
            cells.append(f"{np.mean([run['calls'] for run in runs]):,.0f}")
            times = rows.get(f"{TIMES} {way}")
            for what, form in (("frames", ".0f"), ("seconds", ".2f")):
                cells += [f"{times[where][what]:{form}}" if times else "" for where in (COLD, STORED)]
            lines.append([meaning, str(len(runs)), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def define_flags() -> None:
    flags.DEFINE_string("data", "toy_data", "Folder that launch/quickstart.sh made.")
    flags.DEFINE_string("folder", None, "Folder of the runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Runs of each way.", lower_bound=0)
    flags.DEFINE_multi_enum("ways", list(WAYS), list(WAYS), "What is measured.")
    flags.DEFINE_integer("labelled", 92, "Training questions that the answerer labels.", lower_bound=1)
    flags.DEFINE_integer("coarse", 3, "At first every n-th frame of their videos (label_evidence).", lower_bound=1)
    flags.DEFINE_integer("timed", 24, "Questions whose frames are chosen one by one.", lower_bound=1)


def main() -> int:
    args = flags.FLAGS
    folder = Path(args.folder)
    with RowFile(folder / "results.jsonl") as file:
        if args.seeds:
            sizes = {"labelled": args.labelled, "coarse": args.coarse, "timed_questions": args.timed}
            Study(Path(args.data), folder, file, **sizes).measure(args.ways, args.seeds)
        print(table(file.rows))
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
