"""What preference training does to the toy answerer, over seeds: the method, two controls, and TSPO's agent with it.

    bash launch/quickstart.sh                                  # makes toy_data
    python -m tspo_jax.build_pairs --config=configs/tpo_toy.py
    python -m benchmarks.preference_study --config=configs/tpo_toy.py --agent_config=configs/toy.py \\
        --questions=toy_data/eval.jsonl --folder=runs/preference_study [--seeds=3 --kinds=tpo --num_questions=192]

Trains answerers from the pairs of --config with the method (tpo), on the chosen answers alone (sft: alpha 0) and by
plain DPO (dpo: gamma 0); and TSPO's agent by --agent_config, against the untuned answerer (agent `before`) and against
that of the method with the same seed (agent `after`). Questions about videos that neither has learnt from are answered
from the frames of training (`full`: the whole video, evenly spaced), from frames with the evidence (`evidence`), from
as many without it (`without`; chance is one in four), and from an agent's picks, as many as in training (`picks`) and
as many as are in `evidence` (`few_picks`).

Every result goes to FOLDER/results.jsonl at once, and what is there is not done again; --seeds=0 adds nothing and only
sums up. stdout has the means with 95 % intervals: Student's t over seeds for what is trained, of the value and of its
difference to the untuned answerer (`gain`); Wilson over questions for the untuned one. `table` has the four
combinations: agent before or after, answerer before (untuned) or after (tpo).
"""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import config_flags
from scipy import stats

from tspo_jax import config as config_module
from tspo_jax import train as agent_training
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import option_letter
from tspo_jax.data.questions import Question, questions_sha256, read_questions
from tspo_jax.data.row_file import RowFile
from tspo_jax.devices import sharding
from tspo_jax.evaluation.statistics import over_seeds
from tspo_jax.runs import run_folder
from tspo_jax.runs.metrics import read_rows
from tspo_jax.runs.preemption import finish
from tspo_jax.selection.methods import uniform
from tspo_jax.selection.scoring import load_scorer, pick
from tspo_jax.tpo import building, trained, training
from tspo_jax.tpo.config import TpoConfig

KINDS = {"tpo": {}, "sft": {"alpha": 0.0}, "dpo": {"gamma": 0.0}}
SHOWN = ("full", "evidence", "without")
PICKED = ("picks", "few_picks")
OF_PAIRS = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_logps/chosen", "eval_ref_logps/chosen")
UNTUNED = "before"

Sets = Mapping[str, np.ndarray]  # kind of frames -> picks int [1, K]


def shown_sets(config: TpoConfig, question: Question, store: FrameStore) -> Sets:
    """The frames of training, those with the evidence, and as many without it."""
    sets = building.frame_sets(question, question.source, store, [question.video], config).sets
    whole = uniform(np.empty(store.video(question.video).num_frames), config.data.num_frames)
    return dict(zip(SHOWN, (whole[None], sets["evidence"][1], sets["irrelevant"][1][:1]), strict=True))


def picked_sets(config: TpoConfig, questions: Sequence[Question], agent: Path) -> list[Sets]:
    """What the agent of a run picks, for each question."""
    scorer, found = load_scorer(agent), []
    store = FrameStore(config.data.store, scorer.clip.identity)
    texts = scorer.clip.text_features([question.query for question in questions])
    for question, text in zip(questions, texts, strict=True):
        scores = scorer(store.features(question.video), text)
        budgets = zip(PICKED, (config.data.num_frames, config.build.frames), strict=True)
        found.append({name: pick("topk", *scores, k)[None] for name, k in budgets})
    return found


def accuracies(config: TpoConfig, questions: Sequence[Question], sets: Sequence[Sets], adapter: str) -> dict:
    """Share of questions that are answered right, by kind of frames and by "KIND FAMILY" of questions; and their
    number."""
    store, a = FrameStore(config.data.store), config.answerer
    requests = [
        Request((i, name), question.video, picks, building.text_of(question, config))
        for i, question in enumerate(questions)
        for name, picks in sets[i].items()
    ]
    mesh = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
    where = sharding.answerer_sharding(mesh, weights.read_config(a.folder))
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, adapter)
    rollout = Rollout.of(answerer, max_new_tokens=a.max_new_tokens, mesh=mesh)
    right: dict[str, list[bool]] = {}
    for batch in answer_requests(requests, store, answerer, rollout, mesh, config.build.batch_size):
        for request, texts in batch:
            i, name = request.id
            for group in (name, f"{name} {questions[i].family}"):
                right.setdefault(group, []).append(option_letter(texts[0]) == questions[i].answer)
    return {name: float(np.mean(values)) for name, values in right.items()} | {"questions": len(questions)}


class Study:
    """The runs of a folder. Every method makes a result, unless it is there."""

    def __init__(self, config: TpoConfig, agent: Config, questions: Sequence[Question], folder: Path, file: RowFile):
        """Raises RunFolderError for a folder with results of other configs or questions."""
        configs = {"config": dataclasses.asdict(config), "agent_config": dataclasses.asdict(agent)}
        record = configs | {"questions": questions_sha256(questions)}
        run_folder.check_run(folder, record)
        run_folder.write_run_config(folder, record)
        self._config, self._agent, self._questions, self._folder = config, agent, questions, folder
        self._file, self._store = file, FrameStore(config.data.store)

    def answerer(self, name: str) -> None:
        """`before`, or "KIND SEED": trained where it is not, and asked."""

        def make() -> dict:
            adapter, of_pairs = "", {}
            if name != UNTUNED:
                run_dir, (kind, seed) = self._run_dir(name), name.split()
                preference = dataclasses.replace(self._config.preference, **KINDS[kind])
                held_out = dataclasses.replace(self._config.held_out, accuracy=False)  # asked below, more questions
                config = dataclasses.replace(self._config, seed=int(seed), preference=preference, held_out=held_out)
                finish(training.train(config, run_dir, jax.devices()[:1]))
                adapter = run_dir / "adapter"
                trained.write_adapter(run_dir, adapter)
                last = [row for row in read_rows(run_dir / "metrics.jsonl") if "eval_loss" in row][-1]
                of_pairs = {key: value for key, value in last.items() if key.startswith("eval_")}
            sets = [shown_sets(self._config, question, self._store) for question in self._questions]
            return accuracies(self._config, self._questions, sets, str(adapter)) | of_pairs

        self._once(name, make)

    def picks(self, answerer: str, agent: str) -> None:
        """An answerer asked about the picks of an agent, "before SEED" or "after SEED", that is trained where it is
        not."""

        def make() -> dict:
            run_dir, (when, seed) = self._run_dir(f"agent {agent}"), agent.split()
            against = "" if when == UNTUNED else self._adapter(f"tpo {seed}")
            of_answerer = dataclasses.replace(self._agent.answerer, adapter=against)
            config = dataclasses.replace(self._agent, seed=int(seed), answerer=of_answerer)
            finish(agent_training.train(config, run_dir, jax.devices()[:1]))
            sets = picked_sets(self._config, self._questions, run_dir)
            return accuracies(self._config, self._questions, sets, self._adapter(answerer))

        self._once(f"{answerer} | {agent}", make)

    def _once(self, name: str, make: Callable[[], dict]) -> None:
        if name not in self._file.rows:
            self._file.append([{"id": name} | make()])
            entry_point.note(json.dumps(self._file.rows[name]))

    def _run_dir(self, name: str) -> Path:
        return self._folder / name.replace(" ", "_")

    def _adapter(self, answerer: str) -> str:
        return "" if answerer == UNTUNED else str(self._run_dir(answerer) / "adapter")


def measure(study: Study, seeds: range, kinds: Sequence[str], agents: bool) -> None:
    """Every result of these seeds and kinds."""
    study.answerer(UNTUNED)
    for kind in kinds:
        for seed in seeds:
            study.answerer(f"{kind} {seed}")
    for kind in kinds if agents else ():
        for seed in seeds:
            study.picks(UNTUNED, f"before {seed}")
            study.picks(f"{kind} {seed}", f"before {seed}")
            if kind == "tpo":
                study.picks(f"tpo {seed}", f"after {seed}")
                study.picks(UNTUNED, f"after {seed}")


def summarise(rows: Sequence[Mapping]) -> dict:
    """Means, gains over the untuned answerer, and 95 % intervals, by kind; and the table of the four combinations."""
    by_id = {row["id"]: row for row in rows}
    before = by_id[UNTUNED]
    found: dict = {UNTUNED: {name: _wilson(before[name], before["questions"]) for name in SHOWN}}
    for kind in KINDS:
        of_kind = {
            int(name.split()[1]): row for name, row in by_id.items() if name.split()[0] == kind and "|" not in name
        }
        if not of_kind:
            continue
        found[kind] = {name: _over([row[name] for row in of_kind.values()]) for name in (*SHOWN, *OF_PAIRS)}
        found[kind]["families"] = _families(of_kind.values())
        for name in SHOWN:
            found[kind][name]["gain"] = _over([row[name] - before[name] for row in of_kind.values()])
        pairs = [
            (by_id[tuned], by_id[untuned])
            for seed in of_kind
            if (tuned := f"{kind} {seed} | before {seed}") in by_id
            and (untuned := f"{UNTUNED} | before {seed}") in by_id
        ]
        for name in PICKED if pairs else ():
            found[kind][name] = _over([tuned[name] for tuned, _ in pairs])
            found[kind][name]["gain"] = _over([tuned[name] - untuned[name] for tuned, untuned in pairs])
    found[UNTUNED]["families"] = _families([before])
    found["table"] = {}
    for agent in (UNTUNED, "after"):
        for answerer in (UNTUNED, "after"):
            kind = UNTUNED if answerer == UNTUNED else "tpo"
            cell = [
                row for name, row in by_id.items() if "|" in name and (name.split()[0], _agent(name)) == (kind, agent)
            ]
            if cell:
                of_cell = {name: _over([row[name] for row in cell]) for name in PICKED}
                found["table"][f"agent {agent}, answerer {answerer}"] = of_cell
    return found


def _families(rows: Collection[Mapping]) -> dict[str, float]:
    """Mean shares by "KIND FAMILY"."""
    names = [name for name in next(iter(rows)) if name.partition(" ")[0] in SHOWN and " " in name]
    return {name: float(np.mean([row[name] for row in rows])) for name in names}


def _agent(name: str) -> str:
    return name.partition("| ")[2].split()[0]


def _over(values: Sequence[float]) -> dict:
    return over_seeds(list(values))._asdict()


def _wilson(share: float, n: int) -> dict:
    low, high = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return {"value": share, "low": low, "high": high, "questions": n}


def define_flags() -> None:
    config_module.define_flag()
    config_flags.DEFINE_config_file("agent_config", "configs/toy.py", "Of TSPO's agent; overrides as with --config.")
    flags.DEFINE_string("questions", None, "Questions with evidence, of other videos than the pairs.", required=True)
    flags.DEFINE_string("folder", None, "Folder of the runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Runs of each kind.", lower_bound=0)
    flags.DEFINE_multi_enum("kinds", list(KINDS), list(KINDS), "What is trained.")
    flags.DEFINE_bool("agents", True, "Train TSPO's agents too, and answer from their picks.")
    flags.DEFINE_integer("num_questions", 192, "Questions, drawn at random.", lower_bound=1)


def main() -> int:
    args = flags.FLAGS
    config, agent = config_module.from_flags(TpoConfig), config_module.read(args.agent_config, Config)
    questions = [question for question in read_questions(args.questions)[0] if question.evidence]
    # At random: evenly spaced ones of a file with eight questions a video are always the same two of them.
    places = np.random.default_rng(0).permutation(len(questions))[: args.num_questions]
    asked = [questions[i] for i in sorted(places)]
    with RowFile(Path(args.folder) / "results.jsonl") as file:
        measure(Study(config, agent, asked, Path(args.folder), file), range(args.seeds), args.kinds, args.agents)
        rows = list(file.rows.values())
    entry_point.write_result(summarise(rows), "")
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=partial(config_module.check_overrides, kind=TpoConfig))
