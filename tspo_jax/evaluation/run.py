"""The run of an evaluation: held-out questions answered from the frames of several selection methods, side by side.

select   frame_sets.py     CLIP features of a video, read once for all its questions -> scores -> picks
answer   frame_answers.py  the frozen MLLM answers; frame sets that methods or budgets share are answered once
score    benchmarks.py     answer -> letter -> right or wrong, one line each in RUN_DIR/evaluation/rows.jsonl
sum up   results.py        accuracies and differences with intervals, in RUN_DIR/evaluation/summary.json

Methods flat and backtrack select nothing: they answer from captions, in rounds (rounds.py).
"""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tspo_jax import config as config_module
from tspo_jax.answering import context, prompts
from tspo_jax.answering.backtracking import FAILED, STRATEGIES
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.answering.shapes import RUNGS, Shapes
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.adapters import answerer_identity
from tspo_jax.checkpoints.folders import (
    Answerer,
    ClipEncoder,
    agent_graphdef,
    load_agent,
    load_answerer,
    load_clip,
    read_clip_config,
)
from tspo_jax.command_line.progress_bar import described
from tspo_jax.config import Config
from tspo_jax.data import predecoding
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import LETTERS
from tspo_jax.data.questions import read_questions
from tspo_jax.devices import processes, sharding
from tspo_jax.evaluation import benchmarks, frame_indices, results, rounds
from tspo_jax.evaluation import beside as beside_runs
from tspo_jax.evaluation.benchmarks import Item
from tspo_jax.evaluation.frame_sets import FrameSet, choose, make_searcher, search_options
from tspo_jax.evaluation.results import ResultFile
from tspo_jax.runs import run_folder
from tspo_jax.runs.preemption import Preemption
from tspo_jax.selection import methods
from tspo_jax.selection.scoring import AGENT_METHODS, Scorer, check_clip
from tspo_jax.selection.scoring import read_agent as read_agent_of_run

FOLDER = "evaluation"  # in the run folder
# Of an evaluation's record: where files lie whose content is in it too.
PATHS = ("questions", "clip.folder", "answerer.folder", "answerer.adapter")


def evaluate(
    config: Config,
    run_dir: str | Path,
    agent_folder: str | Path | None = None,
    allow_missing: bool = False,
    beside: Sequence[str | Path] = (),
) -> dict | None:
    """Evaluates the agent as `config.evaluation` says; returns the summary of results.summarize and writes it, or None
    where SIGTERM stopped it before; then the answers so far are kept.

    Several processes share the work (config.distributed): each chooses the frames of its share of the videos, and
    reads the frames of its share of every batch. The first one writes, and each gets the summary.

    With `allow_missing`, questions whose video is not in the store are left out, and the summary says so; those
    without a row of the index file have no such method. `beside` are run folders whose agents have been evaluated
    on the same questions and stand in the summary too. Raises ValueError for a config, question file, store,
    earlier evaluation in `run_dir` or run beside it that does not fit.
    """
    console = Console(stderr=True, highlight=False, quiet=not processes.is_first())
    asked = config.evaluation
    check(asked)
    items = read_items(config)
    check_processes(asked, items)
    clip = load_clip(config.agent.clip, config.agent.clip_dtype)
    if asked.videos:
        asked = dataclasses.replace(asked, store=asked.store or str(Path(run_dir) / "frames"))
        config = dataclasses.replace(config, evaluation=asked)
        with described() as progress:
            names = {item.video for item in items}
            predecoding.add_videos(Path(asked.store), Path(asked.videos), names, clip, progress)
    store = FrameStore(asked.store or config.data.store, clip.identity)
    videos = {item.video for item in items}
    if absent := sorted(video for video in videos if not store.has_features(video)):
        listed = ", ".join(absent[:5]) + (" ..." if len(absent) > 5 else "")
        if not allow_missing:
            raise ValueError(
                f"{store.folder} lacks {len(absent)} videos of {asked.questions}, or their features: {listed}; run "
                "python -m tspo_jax.predecode, or score the rest with --allow_missing"
            )
        if len(absent) == len(videos):
            raise ValueError(f"{store.folder} has none of the videos of {asked.questions}: {listed}")
        console.print(f"{len(absent)} videos are not in {store.folder}, their questions are left out: {listed}")
        items = [item for item in items if item.video not in absent]
    chosen = read_index_file(config, store, items, allow_missing) if asked.frame_idx else {}
    check_clip(agent_folder or run_dir, clip.identity, clip.folder)
    agent = read_agent(config, agent_folder or run_dir)
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    sharding.check_batch_size(mesh, asked.batch_size * sharding.data_slice(mesh)[1])

    folder = Path(run_dir) / FOLDER
    record = settings(config, clip, agent) | {
        "agent_folder": str(agent_folder or ""),
        "config": dataclasses.asdict(config),
    }
    if not absent:
        record["store_sha256"] = store.features_sha256(videos)
    may_differ = ("agent_folder", "config", *PATHS, *config_module.MAY_DIFFER)
    # An index file, a strategy or a search may come later; a former one's rows stay, and with them what they were made
    # by.
    before = run_folder.read_run_config(folder) if (folder / "config.json").is_file() else {}
    if "store_sha256" in record and "store_sha256" in before:
        may_differ = (*may_differ, "store")
    for late in ("frame_idx_sha256", "rounds", "search", "store_sha256"):
        if late not in before:
            may_differ = (*may_differ, late)
        elif late not in record:
            record[late] = before[late]
    run_folder.check_run(folder, record, may_differ)
    of_frames = [method for method in (*asked.methods, *asked.controls) if method not in STRATEGIES]
    wanted = {(item.id, m, k) for item in items for m in of_frames for k in asked.budgets}
    others, renamed = beside_runs.read_rows([Path(run) / FOLDER for run in beside], record, wanted)
    most = max(map(len, chosen.values()), default=0)
    wanted |= {(item_id, results.INDEX_FILE, most) for item_id in chosen}
    in_rounds = {(item.id, m, results.NO_BUDGET) for item in items for m in asked.methods if m in STRATEGIES}
    wanted |= in_rounds
    with ExitStack() as stack:
        file = None
        if processes.is_first():
            stack.enter_context(run_folder.in_use(folder))
            run_folder.write_run_config(folder, record)
            file = stack.enter_context(ResultFile(folder / "rows.jsonl"))
        progress, preemption = stack.enter_context(_progress(console)), stack.enter_context(Preemption())
        # Not read by each: another process may see an older state of the file.
        todo = wanted - {tuple(key) for key in processes.of_first(sorted(file.keys()) if file else [])}
        task = progress.add_task("evaluating", total=len(wanted), completed=len(wanted) - len(todo))
        if todo:
            answerer = _load_answerer(config, mesh)
            searcher = (
                make_searcher(config, answerer) if any(method == methods.SEARCH for _, method, _ in todo) else None
            )
            sets = choose(items, store, Scorer(clip, agent), todo - in_rounds, chosen, config.seed, searcher)
            a = config.answerer
            rollout = Rollout.of(
                answerer,
                max_new_tokens=a.max_new_tokens,
                encode_chunk=a.encode_chunk,
                mesh=mesh,
                attention=a.attention,
                float32_precision=a.float32_precision,
            )
            batches = answer(sets, items, store, answerer, config, rollout, mesh, map(len, chosen.values()))
            of_sets = (
                [row for frame_set, text in batch for row in to_rows(frame_set, text, store, config)]
                for batch in (batches if todo - in_rounds else ())
            )
            of_rounds = ([row] for row in rounds.answer(items, todo & in_rounds, store, answerer, config, mesh, folder))
            for number, rows in enumerate(itertools.chain(of_sets, of_rounds), start=1):
                if file:
                    file.append(rows)
                progress.advance(task, len(rows))
                todo = todo - {(row["id"], row["method"], row["k"]) for row in rows}
                if preemption.must_stop(number) and todo:
                    console.print(f"{folder}: stopped by SIGTERM; run the same command to go on")
                    return None
        summary = None
        if file:
            rows = [row for row in file.rows if (row["id"], row["method"], row["k"]) in wanted]
            macro = benchmarks.lookup(asked.benchmark).macro if asked.benchmark else None
            summary = results.summarize(rows + others, AGENT_METHODS, config.seed, macro, renamed)
            summary["missing_videos"] = absent
            if failed := sum(row.get("phase") == FAILED for row in rows):
                console.print(f"{failed} questions got no answer; the same command asks them again")
            if (periods := rounds.write_periods(folder, rows)) is not None:
                console.print(f"what was looked at closely is in {periods}, an index file")
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
            console.print(results.table(summary))
        return processes.of_first(summary)


# ---- what is evaluated -----------------------------------------------------------------------------------


def check(asked: config_module.Evaluation) -> None:
    """Raises ValueError for fields of config.evaluation that make no sense."""
    if not asked.questions:
        raise ValueError("config.evaluation.questions is empty: name a jsonl file of questions or annotation file")
    if unknown := set(asked.methods) - {*methods.NAMES, *STRATEGIES}:
        known = ", ".join([*methods.NAMES, *STRATEGIES])
        raise ValueError(f"config.evaluation.methods has {sorted(unknown)[0]!r}, which is not one of {known}")
    if unknown := set(asked.controls) - set(results.CONTROLS):
        known = ", ".join(results.CONTROLS)
        raise ValueError(f"config.evaluation.controls has {sorted(unknown)[0]!r}, which is not one of {known}")
    if results.PERMUTED in asked.controls and "uniform" not in asked.methods:
        raise ValueError("config.evaluation.controls: permuted is compared with method uniform, which methods lacks")
    if not asked.methods or not asked.budgets or any(type(k) is not int or k < 1 for k in asked.budgets):
        raise ValueError("config.evaluation: at least one method and one budget (frames, at least 1) are needed")
    if STRATEGIES.keys() & set(asked.methods):
        rounds.settings_of(asked.rounds)
    if methods.SEARCH in asked.methods:
        search_options(asked.search, 0)
        if not asked.search.detector:
            raise ValueError(
                f"config.evaluation.search.detector is empty: method {methods.SEARCH} needs an OWL-ViT folder"
            )
    if asked.frame_pixels and (len(asked.frame_pixels) != 2 or not 0 < asked.frame_pixels[0] <= asked.frame_pixels[1]):
        raise ValueError(
            f"config.evaluation.frame_pixels is {asked.frame_pixels}, not the least and the most of a frame"
        )
    if asked.protocol not in benchmarks.PROTOCOLS:
        raise ValueError(f"config.evaluation.protocol is {asked.protocol!r}, not {' or '.join(benchmarks.PROTOCOLS)}")


def check_processes(asked: config_module.Evaluation, items: Sequence[Item]) -> None:
    """Raises ValueError for what several processes cannot share."""
    if jax.process_count() == 1:
        return
    if asked.videos:
        raise ValueError(
            "config.evaluation.videos: several processes read a frame store; make it with python -m tspo_jax.predecode "
            "(which they can share), and name it as config.evaluation.store"
        )
    if alone := sorted(STRATEGIES.keys() & set(asked.methods)):
        raise ValueError(f"config.evaluation.methods: {alone[0]} asks call after call, which one process does alone")
    nameless = sum(not item.targets for item in items)
    if methods.SEARCH in asked.methods and nameless:
        raise ValueError(
            f"config.evaluation.methods: {methods.SEARCH} needs targets in the lines of the questions where several "
            f"processes share them; {nameless} have none, and one process alone can ask the answerer for them"
        )


def read_items(config: Config) -> list[Item]:
    """The questions: of a benchmark's annotation file, or of a jsonl file like that of training."""
    asked = config.evaluation
    if asked.benchmark:
        return benchmarks.read_items(asked.benchmark, asked.questions, asked.protocol)
    return [
        Item(
            id=str(q.index),
            video=q.video,
            query=q.query,
            prompt=f"{q.question}\n{prompts.LETTER_SUFFIX}",
            options=q.options,
            answer=q.answer,
            groups={"family": (q.family,)} if q.family else {},
            moments=q.evidence,
            targets=q.targets,
            cues=q.cues,
        )
        for q in read_questions(asked.questions)[0]
    ]


def read_index_file(
    config: Config, store: FrameStore, items: Sequence[Item], allow_missing: bool
) -> dict[str, tuple[int, ...]]:
    """The candidates (item id -> indices) that are nearest to the frames of config.evaluation.frame_idx.

    Raises ValueError for frames behind the end of their video and, unless `allow_missing`, for a file without one of
    the questions.
    """
    asked = config.evaluation
    selections = frame_indices.read(asked.frame_idx, asked.benchmark, read_items(config), allow_missing=True)
    missing = [item.id for item in items if item.id not in selections]
    if missing and not allow_missing:
        raise ValueError(f"{asked.frame_idx}: no row for question {missing[0]} ({len(missing)} are missing)")
    chosen = {}
    for item in items:
        if item.id not in selections:
            continue
        selection, video = selections[item.id], store.video(item.video)
        try:
            selection.check_inside(video.num_video_frames)
        except ValueError as error:
            raise ValueError(f"{asked.frame_idx}: {error}") from None
        distance = np.abs(video.frame_idx[:, None] - np.asarray(selection.frame_idx))
        chosen[item.id] = tuple(np.unique(distance.argmin(axis=0)).tolist())
    return chosen


def read_agent(config: Config, folder: str | Path) -> tuple:
    """(graphdef, params) of a run folder, a checkpoint in it, or a TSPO or CLIP folder."""
    shape = {"window": config.agent.window, "num_heads": config.agent.num_heads}
    if any(Path(folder).glob("*.safetensors")):
        return load_agent(folder, **shape)
    params = jax.device_put(read_agent_of_run(folder))
    return agent_graphdef(params, read_clip_config(config.agent.clip).projection_dim, **shape), params


def settings(config: Config, clip: ClipEncoder, agent: tuple) -> dict:
    """What the rows of an evaluation depend on; methods and budgets may be added later, the rest may not change."""
    asked = config.evaluation
    found = {
        "benchmark": asked.benchmark,
        "questions": asked.questions,
        "questions_sha256": _sha256(asked.questions),
        "store": asked.store or config.data.store,
        "clip": {"folder": config.agent.clip, "identity": clip.identity},
        "agent": {
            "parameters_sha256": parameters_sha256(agent[1]),
            "window": config.agent.window,
            "num_heads": config.agent.num_heads,
        },
        "answerer": dataclasses.asdict(config.answerer)
        | {"identity": answerer_identity(config.answerer.folder, config.answerer.adapter)},
        "protocol": asked.protocol,
        "seed": config.seed,
    }
    if asked.frame_pixels:
        found["frame_pixels"] = list(asked.frame_pixels)
    if asked.frame_idx:
        found["frame_idx_sha256"] = _sha256(asked.frame_idx)
    if STRATEGIES.keys() & set(asked.methods):
        found["rounds"] = dataclasses.asdict(asked.rounds)
    if asked.search.detector:
        found["search"] = dataclasses.asdict(asked.search)
        found["search"]["identity"] = weights.checkpoint_identity(asked.search.detector)
    return found


def parameters_sha256(agent: dict) -> str:
    """Tells agents apart."""
    digest = hashlib.sha256()
    for _, leaf in sorted(weights.flatten(agent).items()):
        digest.update(np.asarray(leaf, np.float32).tobytes())
    return digest.hexdigest()[:16]


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


# ---- answer and score ------------------------------------------------------------------------------------


def answer(
    sets: Iterable[FrameSet],
    items: Sequence[Item],
    store: FrameStore,
    answerer: Answerer,
    config: Config,
    rollout: Rollout,
    mesh: jax.sharding.Mesh,
    further: Iterable[int] = (),
) -> Iterator[list[tuple[FrameSet, str]]]:
    """Frame sets of `items` with the answers to them, batch by batch, in a few shapes. `further` are numbers of frames
    of sets that no budget asks for."""
    template = config.answerer.template or answerer.template
    check_context(items, store, answerer, config)
    of_all = shapes_of(items, store, answerer, config, further)
    requests = (Request(s, s.item.video, np.array([s.picks]), s.item.prompt, s.blank) for s in sets)
    size = config.evaluation.batch_size
    for batch in answer_requests(requests, store, answerer, rollout, mesh, size, template, of_all):
        yield [(request.id, text) for request, (text,) in batch]


def shapes_of(
    items: Sequence[Item], store: FrameStore, answerer: Answerer, config: Config, further: Iterable[int] = ()
) -> Shapes:
    """What the prompts of an evaluation are padded to: the fewer candidates a video has, the fewer of its budget's
    frames there are."""
    template, budgets = config.answerer.template or answerer.template, config.evaluation.budgets
    videos = {name: store.video(name) for name in {item.video for item in items}}

    def visual_tokens(k: int) -> int:
        size_of = answerer.processor.for_frames(k).size_of
        sizes = [size_of(video.height, video.width) for video in videos.values()]
        return int(np.median([answerer.config.num_visual_tokens(k, *size) for size in sizes]))

    return Shapes.of(
        answerer,
        [prompts.render(item.prompt, template, "") for item in items],
        [*(min(k, videos[item.video].num_frames) for item in items for k in budgets), *further],
        max(video.duration for video in videos.values()),
        visual_tokens,
        RUNGS + len(budgets) - 1,
    )


def check_context(items: Sequence[Item], store: FrameStore, answerer: Answerer, config: Config) -> None:
    """Raises ValueError that lists the questions whose prompts, with the most frames, the answerer cannot read."""
    most, template = max(config.evaluation.budgets), config.answerer.template or answerer.template
    rendered = [(f"question {item.id}", prompts.render(item.prompt, template, "")) for item in items]
    videos = [store.video(name) for name in {item.video for item in items}]
    size_of = answerer.processor.for_frames(most).size_of
    size = max(size_of(video.height, video.width) for video in videos)
    if lines := context.beyond(answerer, rendered, most, *size, new=config.answerer.max_new_tokens):
        more = f"\n... and {len(lines) - 5} more" if len(lines) > 5 else ""
        listed = "\n".join(lines[:5]) + more
        raise ValueError(f"prompts are too long; show fewer frames (config.evaluation.budgets):\n{listed}")


def to_rows(frame_set: FrameSet, text: str, store: FrameStore, config: Config) -> list[dict]:
    """The lines of rows.jsonl for an answered frame set, one for each method and budget that chose it."""
    item, asked = frame_set.item, config.evaluation
    letter = benchmarks.answer_letter(asked.benchmark, item, text, asked.protocol, config.seed)
    original = dict(zip(LETTERS, (LETTERS[i] for i in frame_set.order), strict=False))
    video = store.video(item.video)
    picks = list(frame_set.picks)
    row = {
        "id": item.id,
        "video": item.video,
        "candidate_idx": picks,
        "frame_idx": video.frame_idx[picks].tolist(),
        "timestamps": [round(t, 3) for t in video.timestamps[picks].tolist()],
        "answer": text,
        "fps": video.fps,
        "scores": [round(score, 5) for score in frame_set.scores],
        "letter": original.get(letter, letter),
        "solution": original[item.answer],
        "correct": letter == item.answer,
        "groups": {name: list(labels) for name, labels in item.groups.items()},
    }
    rows = []
    for choice in frame_set.choices:
        method, k = choice
        searched = {"searched": frame_set.searched[choice]} if choice in frame_set.searched else {}
        rows.append(row | {"method": method, "k": k} | searched)
    return rows


def _load_answerer(config: Config, mesh: jax.sharding.Mesh) -> Answerer:
    if not config.answerer.folder:
        raise ValueError("config.answerer.folder is empty: name the folder of a Video-MLLM")
    split = sharding.answerer_sharding(
        mesh, weights.read_config(config.answerer.folder), split_over_data=config.mesh.split_over_data
    )
    a = config.answerer
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), split, a.video, a.adapter)
    if not config.evaluation.frame_pixels:
        return answerer
    if not hasattr(answerer.processor, "keeping_aspect"):
        raise ValueError("config.evaluation.frame_pixels: this answerer shows every frame at its tower's size")
    processor = answerer.processor.keeping_aspect(*config.evaluation.frame_pixels)
    return dataclasses.replace(answerer, processor=processor)


def _progress(console: Console) -> Progress:
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
    return Progress(TextColumn("{task.description}"), *columns, console=console)
