"""Writes what a run has trained as a folder that other programs load.

    python -m tspo_jax.export --checkpoint=runs/toy --clip=DIR --output=DIR
    python -m tspo_jax.export --checkpoint=runs/tpo_toy --output=DIR [--merge]

`--checkpoint` is a run folder (its newest checkpoint is taken), RUN_DIR/best, or one checkpoint. Of a run of train: the
agent and its CLIP (`--clip`, the CLIP or TSPO folder that the run was trained with) in the layout of TSPO-0.4B, which
the original's code loads too; but a question-aware agent's tensors are `question_aware_selector.*`, which this project
alone loads. Of a run of train_answerer: the adapters as a PEFT folder, which `--adapter=DIR` takes, or with --merge
(and always of full fine-tuning) the whole answerer in bfloat16, as a folder like that which it was trained from.
"""

import json
import shutil
from pathlib import Path

from absl import flags

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import agent_graphdef, agent_kind, load_clip
from tspo_jax.command_line import entry_point
from tspo_jax.selection.scoring import check_clip, read_agent
from tspo_jax.tpo import trained

TOKENIZER_AND_PROCESSOR = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
)


LAYOUTS = {  # kind of agent -> prefix of its tensors, architecture in config.json
    "paper": (weights.SELECTOR, "TSPOModel"),
    "question_aware": (weights.QUESTION_AWARE, "QuestionAwareTSPOModel"),
    "span": (weights.SPAN, "SpanTSPOModel"),
}


def export(agent: dict, clip: str | Path, output: str | Path) -> None:
    """Writes CLIP's tensors as they are, the agent's behind their prefix in CLIP's dtype, and CLIP's other files.

    Args:
      agent: parameters of a temporal agent (nested dict).
      clip: CLIP or TSPO folder; an agent in it is replaced.
      output: folder to make; files of an earlier export are overwritten.
    Raises: ValueError where the agent does not fit to CLIP's width, or `output` holds weights of another kind;
      CheckpointError where `clip` is incomplete.
    """
    clip, output = Path(clip), Path(output)
    if (model_type := weights.read_config(clip).get("model_type")) != "clip":
        raise ValueError(f"--clip: {clip} is a {model_type!r} model; the original's code reads agents of CLIP alone")
    num_heads, window = agent["offset_bias"].shape if "offset_bias" in agent else (1, 1)  # else in no parameter
    agent_graphdef(agent, load_clip(clip).width, num_heads=num_heads, window=window)
    _check_output(clip, output)
    files = weights.SafetensorsFolder(clip)
    names = [name for name in files.names() if not name.startswith(tuple(weights.AGENTS))]
    tensors = {name: files.read(name, ()) for name in sorted(names)}
    dtype = tensors["visual_projection.weight"].dtype
    prefix, architecture = LAYOUTS[agent_kind(agent)]
    tensors |= weights.file_tensors(agent, weights.agent_format(prefix), dtype)
    weights.save_tensors(output, tensors)
    config = weights.read_config(clip) | {"architectures": [architecture]}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_AND_PROCESSOR:
        if (clip / name).is_file():
            shutil.copyfile(clip / name, output / name)


def _check_output(clip: Path, output: Path) -> None:
    if output.exists() and output.samefile(clip):
        raise ValueError(f"--output is the --clip folder {clip}; choose another one")
    others = [p.name for p in output.glob("*.safetensors*") if p.name != "model.safetensors"]
    if others:
        raise ValueError(
            f"--output: {output} holds other weights ({', '.join(sorted(others))}); choose an empty folder"
        )


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Run folder, or one of its checkpoints.", required=True)
    flags.DEFINE_string("clip", "", "Folder of CLIP, for an agent.")
    flags.DEFINE_bool("merge", False, "Of an answerer: the merged weights instead of the adapters.")
    flags.DEFINE_string("output", None, "Folder to write.", required=True)


def main() -> None:
    args = flags.FLAGS
    if trained.is_run(args.checkpoint):
        if args.clip:
            raise ValueError("--clip belongs to an agent; this is a run of an answerer")
        if args.merge or trained.run_config(args.checkpoint).full:
            return trained.write_merged(args.checkpoint, args.output, note=entry_point.note)
        return trained.write_adapter(args.checkpoint, args.output)
    if not args.clip:
        raise ValueError("--clip is missing: the folder of CLIP that the agent was trained with")
    if args.merge:
        raise ValueError("--merge is for a run of an answerer; this is one of an agent")
    check_clip(args.checkpoint, weights.checkpoint_identity(args.clip), args.clip)
    export(read_agent(args.checkpoint), args.clip, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
