"""What preference training does to the toy answerer, over seeds: the method and its two controls.

    python -m benchmarks.preference_study --config=configs/tpo_toy.py --questions=toy_data/eval.jsonl \
        --folder=runs/preference_study [--seeds=3 --kinds=tpo --num_questions=192]

Trains from the pairs of the config (build_pairs made them) with the method (tpo), on the chosen answers alone (sft:
alpha 0) and by plain DPO (dpo: gamma 0). Before and after, questions of videos that no pair is about are answered from
the frames of training (`full`: the whole video, evenly spaced), from frames with the evidence (`evidence`) and from as
many without it (`without`; chance is one in four). Every result goes to FOLDER/results.jsonl at once, and what is there
is not done again; stdout has, per kind, the means and the 95 % intervals (Student's t over seeds for what is trained,
Wilson over questions for the untrained).
"""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy import stats

from tspo_jax import config as config_module
from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.letters import option_letter
from tspo_jax.data.questions import read_questions
from tspo_jax.data.row_file import RowFile
from tspo_jax.devices import sharding
from tspo_jax.evaluation.statistics import over_seeds
from tspo_jax.runs.metrics import read_rows
from tspo_jax.selection.methods import uniform
from tspo_jax.tpo import building, trained, training
from tspo_jax.tpo.config import TpoConfig

KINDS = {"tpo": {}, "sft": {"alpha": 0.0}, "dpo": {"gamma": 0.0}}
SHOWN = ("full", "evidence", "without")


def accuracies(config: TpoConfig, questions, adapter: str) -> dict[str, float]:
    """Share of the questions answered right from each kind of frames, and the number of questions."""
    store, a = FrameStore(config.data.store), config.answerer
    videos = sorted({question.video for question in questions})
    requests, answers = [], {}
    for i, question in enumerate(questions):
        asked = building.frame_sets(question, f"{question.source}", store, videos, config)
        T = store.video(question.video).num_frames
        sets = {
            "full": uniform(np.empty(T), config.data.num_frames)[None],
            "evidence": asked.sets["evidence"][1],
            "without": asked.sets["irrelevant"][1][:1],
        }
        for name, picks in sets.items():
            text = building.text_of(question, config)
            requests.append(Request((i, name), question.video, picks, text))
            answers[i, name] = question.answer
    mesh = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
    where = sharding.answerer_sharding(mesh, weights.read_config(a.folder))
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, adapter)
    rollout = Rollout.of(answerer, max_new_tokens=a.max_new_tokens, mesh=mesh)
    right = {name: [] for name in SHOWN}
    for batch in answer_requests(requests, store, answerer, rollout, mesh, config.build.batch_size):
        for request, texts in batch:
            right[request.id[1]].append(option_letter(texts[0]) == answers[request.id])
    return {name: float(np.mean(values)) for name, values in right.items()} | {"questions": len(questions)}


def measure(config: TpoConfig, questions, folder: Path, num_seeds: int, kinds, note) -> list[dict]:
    """All results, made or known: the untrained answerer, and every kind with every seed."""
    with RowFile(folder / "results.jsonl") as file:
        if "before" not in file.rows:
            file.append([{"id": "before", **accuracies(config, questions, "")}])
            note(json.dumps(file.rows["before"]))
        for seed in range(num_seeds):
            for kind in kinds:
                name = f"{kind} {seed}"
                if name in file.rows:
                    continue
                preference = dataclasses.replace(config.preference, **KINDS[kind])
                of_run = dataclasses.replace(config, seed=seed, preference=preference)
                run_dir = folder / name.replace(" ", "_")
                training.train(of_run, run_dir, jax.devices()[:1])
                trained.write_adapter(run_dir, run_dir / "adapter")
                last = [row for row in read_rows(run_dir / "metrics.jsonl") if "eval_loss" in row][-1]
                pairs = {key: value for key, value in last.items() if key.startswith("eval_")}
                file.append([{"id": name, **accuracies(config, questions, str(run_dir / "adapter")), **pairs}])
                note(json.dumps(file.rows[name]))
        return list(file.rows.values())


def summarise(rows: list[dict]) -> dict:
    """Means and 95 % intervals by kind."""
    (before,) = [row for row in rows if row["id"] == "before"]
    found = {"before": {name: _wilson(before[name], before["questions"]) for name in SHOWN}}
    for kind in KINDS:
        of_kind = [row for row in rows if row["id"].split()[0] == kind]
        names = (
            *SHOWN,
            "eval_rewards/accuracies",
            "eval_rewards/margins",
            "eval_logps/chosen",
            "eval_ref_logps/chosen",
        )
        if of_kind:
            found[kind] = {name: over_seeds([row[name] for row in of_kind])._asdict() for name in names}
    return found


def _wilson(share: float, n: int) -> dict:
    low, high = stats.binomtest(round(share * n), n).proportion_ci(method="wilson")
    return {"value": share, "low": low, "high": high, "questions": n}


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_string("questions", None, "Questions with evidence, of other videos than the pairs.", required=True)
    flags.DEFINE_string("folder", None, "Folder of the runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Runs of each kind.", lower_bound=1)
    flags.DEFINE_multi_enum("kinds", list(KINDS), list(KINDS), "What is trained.")
    flags.DEFINE_integer("num_questions", 192, "Questions, evenly spaced.", lower_bound=1)


def main() -> int:
    args = flags.FLAGS
    config = config_module.from_flags(TpoConfig)
    questions, _ = read_questions(args.questions)
    questions = [question for question in questions if question.evidence]
    places = np.linspace(0, len(questions), min(len(questions), args.num_questions), endpoint=False).astype(int)
    asked = [questions[i] for i in places]
    rows = measure(config, asked, Path(args.folder), args.seeds, args.kinds, entry_point.note)
    entry_point.write_result(summarise(rows), "")
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=partial(config_module.check_overrides, kind=TpoConfig))
