"""Descriptions (config.json) of models whose weights are not there, at full size or cut to a few layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.plain_folders import CheckpointError


def read_architecture(folder: str, descriptions: Path) -> tuple[Mapping[str, Any], Path]:
    """config.json of a checkpoint folder, or, where that is not there, its description under the folder's name."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        path = descriptions / f"{Path(folder).name}.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no config.json, and there is no {path} either")
    return weights.read_config(path.parent, path.name), path


def shallow(description: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
    """A config.json with the language model and the image tower cut to `num_layers` layers, all else as it is."""
    vision = dict(description.get("vision_config") or {})
    depth = "depth" if "depth" in vision else "num_hidden_layers"
    vision[depth] = num_layers + (depth == "num_hidden_layers")  # the last layer of a SigLIP tower never runs
    if "deepstack_visual_indexes" in vision:
        vision["deepstack_visual_indexes"] = [i for i in vision["deepstack_visual_indexes"] if i < num_layers]
    cut = {"num_hidden_layers": num_layers}
    if "text_config" in description:
        cut = {"text_config": {**description["text_config"], **cut}}
    return {**description, **cut, "vision_config": vision}
