"""A trained streaming encoder as a folder: config.json and model.safetensors, bound to the answerer that it sees by."""

import dataclasses
import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.models.layers import abstract_module
from tspo_jax.models.llava_video import LlavaVideoConfig
from tspo_jax.models.streaming import StreamingConfig, StreamingEncoder

MODEL_TYPE = "video_streaming"
IN_RUN = "encoder"  # folder of it in a run folder


@dataclasses.dataclass(frozen=True)
class Encoder:
    """`identity` tells encoders, and what they see by, apart: memories of one are nothing to another."""

    config: StreamingConfig
    graphdef: nnx.GraphDef
    params: dict
    identity: str


def graphdef_of(config: StreamingConfig) -> tuple[nnx.GraphDef, dict]:
    """Structure and shapes."""
    return abstract_module(lambda rngs: StreamingEncoder(config, rngs=rngs))


def check_answerer(answerer: Answerer) -> None:
    """Raises ValueError for a model whose visual tokens a memory cannot take the place of."""
    if not isinstance(answerer.config, LlavaVideoConfig):
        raise ValueError(
            f"{answerer.folder}: a streaming memory stands in the place of LLaVA-Video's visual tokens; the answerer "
            "must be of that family"
        )


def identity_of(answerer: Answerer) -> str:
    """What an encoder is trained with: a checkpoint, and the adapters on it."""
    return f"{weights.checkpoint_identity(answerer.folder)} {adapters.identity(answerer.params)}".strip()


def save(folder: str | Path, config: StreamingConfig, params: dict, answerer: Answerer) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    flat = {path: np.asarray(jax.device_get(leaf), np.float32) for path, leaf in weights.flatten(params).items()}
    save_file(flat, folder / "model.safetensors", {"format": "np"})
    record = {"model_type": MODEL_TYPE, "answerer": identity_of(answerer)}
    (folder / "config.json").write_text(json.dumps(record | dataclasses.asdict(config), indent=1) + "\n")


def load(folder: str | Path, answerer: Answerer) -> Encoder:
    """The encoder of a folder, or of the run that trained it. Raises CheckpointError for no such folder, a
    damaged one, and one that was trained with another answerer."""
    folder = Path(folder)
    folder = folder / IN_RUN if (folder / IN_RUN).is_dir() else folder
    record = weights.read_config(folder)
    if record.pop("model_type", None) != MODEL_TYPE:
        raise CheckpointError(f"{folder}/config.json: is of no streaming encoder")
    seen_by, identity = record.pop("answerer", ""), identity_of(answerer)
    if seen_by != identity:
        raise CheckpointError(f"{folder}: was trained with the answerer {seen_by}, not {identity} ({answerer.folder})")
    try:
        config = StreamingConfig(**record)
        flat = load_file(folder / "model.safetensors")
    except (TypeError, ValueError, OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error})") from error
    graphdef, abstract = graphdef_of(config)
    shapes = {path: leaf.shape for path, leaf in weights.flatten(abstract).items()}
    if wrong := [
        path for path in shapes.keys() | flat.keys() if shapes.get(path) != getattr(flat.get(path), "shape", 0)
    ]:
        raise CheckpointError(f"{folder}: {sorted(wrong)[0]} is not as config.json says ({len(wrong)} differ)")
    digest = hashlib.sha256(identity.encode())
    for path in sorted(flat):
        digest.update(flat[path].tobytes())
    params = weights.unflatten({path: jnp.asarray(leaf) for path, leaf in flat.items()})
    return Encoder(config, graphdef, params, digest.hexdigest()[:16])
