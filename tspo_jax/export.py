"""Writes a trained agent and its CLIP as one folder in the layout of TSPO-0.4B, which the original's code loads too.

    python -m tspo_jax.export --checkpoint=runs/toy --clip=DIR --output=DIR

`--checkpoint` is a run folder (its newest checkpoint is taken) or one checkpoint in it, `--clip` the CLIP or TSPO
folder that the run was trained with.
"""

import json
import shutil
from pathlib import Path

from absl import flags

from tspo_jax import entry_point, weights
from tspo_jax.checkpoints import SELECTOR, TRAINING, load_clip
from tspo_jax.models.layers import abstract_module
from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.run_folder import read_agent

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


def export(agent: dict, clip: str | Path, output: str | Path) -> None:
    """Writes CLIP's tensors as they are, the agent's as `selector.*` in CLIP's dtype, and CLIP's other files.

    Args:
      agent: parameters of a TemporalAgent (nested dict).
      clip: CLIP or TSPO folder; an agent in it is replaced.
      output: folder to make; files of an earlier export are overwritten.
    Raises: ValueError where the agent does not fit to CLIP's width, or `output` holds weights of another kind;
      weights.CheckpointError where `clip` is incomplete.
    """
    clip, output = Path(clip), Path(output)
    _check_fit(agent, load_clip(clip).width)
    _check_output(clip, output)
    files = weights.SafetensorsFolder(clip)
    names = [name for name in files.names() if not name.startswith((SELECTOR, TRAINING))]
    tensors = {name: files.read(name, ()) for name in sorted(names)}
    dtype = tensors["visual_projection.weight"].dtype
    tensors |= weights.file_tensors(agent, weights.agent_format(SELECTOR), dtype)
    weights.save_tensors(output, tensors)
    config = weights.read_config(clip) | {"architectures": ["TSPOModel"]}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in TOKENIZER_AND_PROCESSOR:
        if (clip / name).is_file():
            shutil.copyfile(clip / name, output / name)


def _check_fit(agent: dict, width: int) -> None:
    _, abstract = abstract_module(lambda rngs: TemporalAgent(width, num_heads=1, rngs=rngs))
    expected = {path: leaf.shape for path, leaf in weights.flatten(abstract).items()}
    found = {path: leaf.shape for path, leaf in weights.flatten(agent).items()}
    wrong = [
        f"{path} is {found.get(path, 'missing')}, expected {expected.get(path, 'no such parameter')}"
        for path in sorted(expected | found)
        if found.get(path) != expected.get(path)
    ]
    if wrong:
        raise ValueError("\n  ".join([f"the agent does not fit to --clip, of width {width}:", *wrong]))


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
    flags.DEFINE_string("clip", None, "Folder of CLIP.", required=True)
    flags.DEFINE_string("output", None, "Folder to write.", required=True)


def main() -> None:
    args = flags.FLAGS
    export(read_agent(args.checkpoint), args.clip, args.output)


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
