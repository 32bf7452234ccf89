"""Labels questions with the frames that the frozen answerer needs: evidence without people (after LSTP).

    python -m tspo_jax.label_evidence --config=configs/toy.py --output=toy_data/labelled.jsonl [--coarse=4]

Every candidate frame of a question's video (or --window of a few) is shown to the answerer alone. The span over which
the right option is most probable (or --score=correct: named) becomes the question's `evidence` in a copy of the
question file; a question whose frames are all alike gets none. A run with policy.warm_start_steps learns from it:

    python -m tspo_jax.train --config=configs/toy.py --config.data.questions=toy_data/labelled.jsonl \
        --config.policy.warm_start_steps=40

The answerer, questions, store and mesh are those of the config. The cost is told before: as many answers as there are
frames, so --coarse=4 looks at every fourth first, then at all around the span that they give. What was answered is kept
beside the output (OUTPUT.scores.jsonl); the same command goes on where it was stopped. The result says how many
questions were labelled and, where the file had evidence of its own, how well the two agree (intersection over union).
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from tspo_jax import config as config_module
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.command_line.progress_bar import described
from tspo_jax.config import Config
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.data.questions import Question, read_questions, row
from tspo_jax.devices import sharding
from tspo_jax.tspo.evidence_labels import SCORES, EvidenceLabels, Labelling, overlap


def label_evidence(config: Config, labelling: Labelling, output: Path) -> dict:
    """Writes the labelled questions; returns the result of the entry point."""
    questions, bad = read_questions(config.data.questions, strict=config.data.strict, max_bad=config.data.max_bad)
    for line in bad:
        entry_point.note(f"left out: {line}")
    store = FrameStore(config.data.store)
    if absent := sorted({question.video for question in questions} - set(store.names())):
        raise ValueError(f"{config.data.store} lacks {len(absent)} videos of {config.data.questions}: {absent[:3]} ..")
    mesh = sharding.make_mesh(config.mesh.axes, jax.devices())
    a = config.answerer
    where = sharding.answerer_sharding(mesh, weights.read_config(a.folder), split_over_data=config.mesh.split_over_data)
    answerer = load_answerer(a.folder, jnp.dtype(a.dtype), where, a.video, a.adapter)
    rollout = Rollout.of(answerer, max_new_tokens=a.max_new_tokens, encode_chunk=a.encode_chunk, mesh=mesh)
    data = mesh.shape["data"]
    labels = EvidenceLabels(
        questions,
        store,
        answerer,
        rollout,
        mesh,
        labelling,
        output.with_name(output.name + ".scores.jsonl"),
        batch_size=max(1, config.evaluation.batch_size // labelling.group // data) * data,
        template=a.template,
        option_text=a.option_text,
    )
    cost = labels.cost()
    further = ", and those around the spans that they give" if labelling.coarse > 1 else ""
    entry_point.note(
        f"{cost['answers']:,} answers of {labelling.window} frame(s), {cost['frames']:,} frames encoded, "
        f"{cost['tokens']:,} tokens prefilled{further}"
    )
    lines, agreement, lengths = [], [], []
    with described() as progress:
        task = progress.add_task("answering", total=cost["answers"])
        for question, label in labels.label(lambda answers: progress.advance(task, answers)):
            lines.append(_line(question, label.evidence))
            lengths += [end - start for start, end in label.evidence]
            if question.evidence:
                agreement.append(overlap(question.evidence, label.evidence) if label.evidence else 0.0)
    output.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return {
        "questions": len(questions),
        "labelled": len(lengths),
        "answers": labels.num_answers(),
        "mean_seconds": round(float(np.mean(lengths)), 2) if lengths else None,
        "agreement_with_evidence": round(float(np.mean(agreement)), 4) if agreement else None,
    }


def _line(question: Question, evidence: tuple[tuple[float, float], ...]) -> dict:
    """The question with this evidence in place of its own."""
    line = row(str(question.index), question.video, question.query, question.options, question.answer, question.kind)
    further = {"family": question.family, "targets": list(question.targets), "cues": list(question.cues)}
    further["evidence"] = [list(span) for span in evidence]
    return line | {name: value for name, value in further.items() if value}


def main() -> None:
    args, config = flags.FLAGS, config_module.from_flags()
    if not args.output:
        raise ValueError("--output is missing: the question file to write")
    for name in ("answerer.folder", "data.store", "data.questions"):
        group, field = name.split(".")
        if not getattr(getattr(config, group), field):
            raise ValueError(f"config.{name} is empty")
    if Path(args.output).resolve() == Path(config.data.questions).resolve():
        raise ValueError(f"--output={args.output} is the question file itself; name another")
    labelling = Labelling(args.window, args.coarse, args.group, args.score)
    entry_point.write_result(label_evidence(config, labelling, Path(args.output)), "")


if __name__ == "__main__":
    config_module.define_flag()
    flags.DEFINE_string("output", "", "Question file (jsonl) to write.")
    flags.DEFINE_integer("window", 1, "Frames that are shown together.", lower_bound=1)
    flags.DEFINE_integer("coarse", 1, "Look at every n-th window first, then around the span.", lower_bound=1)
    flags.DEFINE_integer("group", 16, "Windows of a question that are answered in one piece.", lower_bound=1)
    flags.DEFINE_enum("score", "probability", SCORES, "What a frame's score is.")
    entry_point.run(main, check=config_module.check_overrides)
