"""A trained answerer out of a run folder: as a PEFT folder, or merged, as a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from tspo_jax import config as config_module
from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.adapters import Adapter
from tspo_jax.checkpoints.folders import answerer_architecture
from tspo_jax.models.lora import LoraConfig
from tspo_jax.runs.run_folder import find_checkpoint, read_part, read_run_config
from tspo_jax.tpo.config import TpoConfig

PART = "trained"  # of a checkpoint: programs.State.trained


def is_run(folder: str | Path) -> bool:
    """Whether a checkpoint (of a run folder, or in one) is of an answerer's training."""
    return (find_checkpoint(folder) / PART).is_dir()


def run_config(checkpoint: str | Path) -> TpoConfig:
    """The config of the run that a checkpoint is part of."""
    return config_module.read(read_run_config(find_checkpoint(checkpoint).parent.parent), TpoConfig)


def lora_of(config: TpoConfig) -> LoraConfig:
    return LoraConfig(config.lora.r, config.lora.alpha, config.lora.targets, config.lora.use_rslora)


def write_adapter(checkpoint: str | Path, output: str | Path) -> None:
    """The adapters of a run as a PEFT folder. Raises ValueError for a run of full fine-tuning."""
    config = run_config(checkpoint)
    if config.full:
        raise ValueError(f"{checkpoint}: a run of full fine-tuning has no adapters; export it merged (--merge)")
    folder = config.answerer.folder
    description = weights.read_config(folder)
    fmt = answerer_architecture(description, folder).format
    adapter = Adapter(lora_of(config), read_part(checkpoint, PART))
    adapters.write(output, adapter, fmt, folder, description, weights.checkpoint_identity(folder))


def write_merged(
    checkpoint: str | Path, output: str | Path, dtype: np.dtype = weights.BFLOAT16, note: Callable[[str], None] = print
) -> None:
    """The whole answerer of a run as a Hugging Face folder: the base's files with the trained weights in the place of
    its own, in `dtype`. A layer is merged in float32 before it is cast; what the cast swallows is said."""
    config = run_config(checkpoint)
    base, output = Path(config.answerer.folder), Path(output)
    if output.exists() and output.samefile(base):
        raise ValueError(f"--output is the answerer's own folder {base}; choose another one")
    description = weights.read_config(base)
    a = answerer_architecture(description, base)
    trained = weights.flatten(read_part(checkpoint, PART))
    params = weights.flatten(weights.load_params(base, a.abstract, a.format, dtype=jnp.float32))
    if config.full:
        merged = weights.unflatten(params | trained)
    else:
        merged = adapters.merge(weights.unflatten(params | trained), lora_of(config))
    lost = _lost(params, weights.flatten(merged), dtype)
    note(f"of the change of the weights, {lost:.1%} (root mean square) is lost by rounding to {np.dtype(dtype).name}")
    names = _names_in_file(base, weights.file_tensors(merged, a.format, dtype), a.format)
    weights.save_tensors(output, names)
    description["torch_dtype"] = np.dtype(dtype).name
    (output / "config.json").write_text(json.dumps(description, indent=2) + "\n")
    for file in base.iterdir():  # tokenizer, processor, generation_config.json
        if file.is_file() and file.name != "config.json" and ".safetensors" not in file.name:
            shutil.copyfile(file, output / file.name)


def _lost(before: dict, after: dict, dtype: np.dtype) -> float:
    """Share of the change that is gone once both are rounded."""
    change = lost = 0.0
    for path, x in after.items():
        a, b = np.asarray(before[path], np.float32), np.asarray(x, np.float32)
        if (a != b).any():
            rounded = b.astype(dtype).astype(np.float32) - a.astype(dtype).astype(np.float32)
            change += float(((b - a) ** 2).sum())
            lost += float((((b - a) - rounded) ** 2).sum())
    return (lost / change) ** 0.5 if change else 0.0


def _names_in_file(base: Path, tensors: dict[str, np.ndarray], fmt: weights.Format) -> dict[str, np.ndarray]:
    """The tensors under the names that the base's own files have for them, with what else those hold."""
    files = weights.SafetensorsFolder(base)
    written = {}
    for name in sorted(files.names()):
        canonical = fmt.canonical(name)
        written[name] = tensors[canonical] if canonical in tensors else files.read(name, ())
    return written
