"""Which folders hold a model as it was trained, and what the common others are: told in one line with what to do.

Quantised checkpoints, adapters, states of trainers, other programs' formats and pointers to files are no such folders.
"""

import json
from pathlib import Path

_LFS = b"version https://git-lfs"
# Fields of config.json by which quantised checkpoints say so, and files of those that say it elsewhere.
QUANTISED = ("quantization_config", "compression_config", "quantization")
QUANTISED_BY = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
# How files of trainers' states begin.
STATES = (
    "optimizer",
    "scheduler",
    "rng_state",
    "training_args",
    "trainer",
    "scaler",
    "mp_rank",
    "zero_pp",
    "bf16_zero",
)
QUANTISED_ONES = "quantised checkpoints are not supported; take the bfloat16 one"


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, incomplete, damaged or of another model."""


def check_plain(folder: Path) -> None:
    """Raises CheckpointError, in one line with what to do, for the common folders that are not a model as it was
    trained: quantised, an adapter, the state of a trainer, another program's format."""
    config = _json_of(folder / "config.json")
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if field := next((name for name in QUANTISED if part.get(name)), ""):
            method = part[field].get("quant_method", "unknown") if isinstance(part[field], dict) else part[field]
            raise CheckpointError(f"{folder}/config.json: {field} ({method}): {QUANTISED_ONES}")
    for name, method in QUANTISED_BY.items():
        if (folder / name).is_file():
            raise CheckpointError(f"{folder}/{name} ({method}): {QUANTISED_ONES}")
    if "model_type" not in config and (folder / "checkpoints").is_dir():
        raise CheckpointError(f"{folder}: is a run folder, not that of a model")
    own = [path for path in folder.glob("*.safetensors") if not path.name.startswith("adapter_model")]
    if (folder / "adapter_config.json").is_file() and not own:
        base = _json_of(folder / "adapter_config.json").get("base_model_name_or_path") or "the base model"
        raise CheckpointError(f"{folder}: is a PEFT adapter of {base}; give that model's folder and --adapter={folder}")
    if snapshots := sorted(folder.glob("snapshots/*/")):
        raise CheckpointError(f"{folder}: is a folder of Hugging Face's cache; give what is in it, {snapshots[-1]}")
    if files := sorted(folder.glob("*.safetensors")):
        for path in files:
            with path.open("rb") as file:
                if file.read(len(_LFS)) == _LFS:
                    raise CheckpointError(f"{path}: is Git LFS's pointer to a file; git lfs pull fetches the file")
        return

    def first(*patterns: str) -> str:
        return next((path.name for pattern in patterns for path in sorted(folder.glob(pattern))), "")

    if found := first("*.gguf"):
        raise CheckpointError(f"{folder}: holds {found} (GGUF, quantised); take the checkpoint in safetensors")
    if found := first("*.onnx", "onnx/*.onnx"):
        raise CheckpointError(f"{folder}: holds {found} (ONNX), no weights to train or run here; take the safetensors")
    if found := first("openvino_*.xml", "openvino/*.xml"):
        raise CheckpointError(
            f"{folder}: holds {found} (OpenVINO), no weights to train or run here; take the safetensors"
        )
    found = first("pytorch_model*.bin", "*.bin", "*.pt", "*.pth")
    if found and not found.startswith(STATES):
        raise CheckpointError(
            f"{folder}: holds only PyTorch files ({found}), no safetensors; convert them once, where torch is: "
            "model = AutoModel.from_pretrained(DIR); model.save_pretrained(NEW)"
        )
    if found := found or first("*.distcp", "*/*.distcp", "global_step*", "trainer_state.json", "zero_to_fp32.py"):
        raise CheckpointError(f"{folder}: holds a trainer's state ({found}), no weights; take the folder of the model")


def _json_of(path: Path) -> dict:
    """What a json file holds; {} where it is not there or no object, which is told by whoever needs it."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
