"""Adapters of a language model (models/lora.py) in the folders of Hugging Face's PEFT, both ways.

A folder holds adapter_config.json and adapter_model.safetensors. A tensor's name is `base_model.model.`, the module's
name in the model that PEFT wrapped, and `.lora_A.weight` [r, in] or `.lora_B.weight` [out, r]. What PEFT can do and we
cannot is refused by its name; nothing is left out in silence.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tspo_jax.checkpoints.weights import (
    CheckpointError,
    Format,
    checkpoint_identity,
    file_tensors,
    flatten,
    read_config,
    unflatten,
)
from tspo_jax.models.layers import merge_params, split_params
from tspo_jax.models.lora import ADAPTER, TARGETS, LoraConfig, is_adapter, merged, target_path, with_adapters

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WRAPPED = "base_model.model."  # what PEFT puts before a module's name
BASE_IDENTITY = "tspo_jax.base_identity"  # in the tensors' metadata: weights.checkpoint_identity of the base

# Fields of adapter_config.json that change what is computed -> the values that mean that they are not used.
UNSUPPORTED = {
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "fan_in_fan_out": (None, False),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False, {}),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # These draw the first A and B otherwise, which does not matter; those that change the base weights do.
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),
}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Adapters of a model: their ranks and scaling, and their parameters (float32, a subtree of the model's)."""

    lora: LoraConfig
    params: dict


def add(graphdef: nnx.GraphDef, abstract: dict, lora: LoraConfig) -> tuple[nnx.GraphDef, dict]:
    """The structure of a model with adapters, and the shapes of their parameters alone.

    Raises: ValueError where the model has no language model with projections of these names.
    """

    def make(params):
        return with_adapters(merge_params(graphdef, params), lora, nnx.Rngs(0))

    adapted, params = split_params(nnx.eval_shape(make, abstract))
    return adapted, unflatten({path: x for path, x in flatten(params).items() if is_adapter(path)})


def fresh(
    abstract: dict, seed: int, sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None
) -> dict:
    """First parameters of adapters with the shapes that `add` gives: A uniform in +-1 / sqrt(in), B = 0."""
    leaves = flatten(abstract)

    def make():
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        values = {}
        for key, (path, x) in zip(keys, leaves.items(), strict=True):
            bound = 1 / math.sqrt(x.shape[-2])
            is_a = f".{ADAPTER[0]}." in path
            values[path] = jax.random.uniform(key, x.shape, minval=-bound, maxval=bound) if is_a else jnp.zeros(x.shape)
        return unflatten(values)

    places = unflatten({path: sharding(path, x.shape) for path, x in leaves.items()}) if sharding else None
    return jax.jit(make, out_shardings=places)()


def beside(
    params: dict,
    of_adapters: dict,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict:
    """The parameters of a model and those of its adapters as one tree, the latter put on the devices."""
    leaves = flatten(of_adapters)
    if sharding:
        placed = {path: jax.device_put(x, sharding(path, x.shape)) for path, x in leaves.items()}
    else:
        placed = {path: jnp.asarray(x) for path, x in leaves.items()}
    return unflatten(flatten(params) | placed)


# ---- names -----------------------------------------------------------------------------------------------


def module_prefix(config: Mapping[str, Any]) -> str:
    """What stands before `layers.N` in the names of PEFT's modules, by the base's config.json.

    lmms-lab's class has `model.layers`; Hugging Face's Video-MLLMs have `model.language_model.layers` since
    transformers 4.52.
    """
    return "model." if config.get("model_type") in ("llava_qwen", "qwen2") else "model.language_model."


def to_tensors(params: dict, fmt: Format, prefix: str) -> dict[str, np.ndarray]:
    """Adapters as the tensors of a PEFT folder, float32."""
    only = unflatten({path: x for path, x in flatten(params).items() if is_adapter(path)})
    tensors = file_tensors(only, fmt, np.float32)
    return {WRAPPED + prefix + name.removeprefix("model."): x for name, x in tensors.items()}


def target_expression(lora: LoraConfig, prefix: str) -> str:
    """The `target_modules` of adapter_config.json: a regular expression for a module's whole name. A list of names
    would match the projections of a SigLIP tower too."""
    parts = {part: [n.removesuffix("_proj") for n in lora.targets if TARGETS[n] == part] for part in TARGETS.values()}
    each = "|".join(rf"{part}\.({'|'.join(names)})_proj" for part, names in parts.items() if names)
    return rf"(.*\.)?{re.escape(prefix)}layers\.\d+\.({each})"


# ---- writing ---------------------------------------------------------------------------------------------


def write(
    folder: str | Path, adapter: Adapter, fmt: Format, base: str | Path, base_config: Mapping[str, Any], identity: str
) -> None:
    """Writes a PEFT folder. `base` is the folder that the adapters belong to, `base_config` its config.json and
    `identity` its weights.checkpoint_identity."""
    folder, lora = Path(folder), adapter.lora
    prefix = module_prefix(base_config)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.r,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.use_rslora,
        "target_modules": target_expression(lora, prefix),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_tensors(adapter.params, fmt, prefix)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt", BASE_IDENTITY: identity})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


# ---- reading ---------------------------------------------------------------------------------------------


def identity(params: dict) -> str:
    """Tells the adapters among a model's parameters apart: a short hash, "" without any."""
    found = {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}
    digest = hashlib.sha256()
    for path in sorted(found):
        digest.update(np.asarray(found[path], np.float32).tobytes())
    return digest.hexdigest()[:12] if found else ""


def read(folder: str | Path, abstract: dict, fmt: Format, identity: str = "") -> Adapter:
    """The adapters of a PEFT folder, for the model with parameters `abstract` and names `fmt`.

    Ranks and alphas of single modules (`rank_pattern`, `alpha_pattern`) become one rank, smaller ones filled up with
    zeros, and one scaling, the rest of which goes into B.

    Args:
      identity: of the base's checkpoint; an adapter that says it is for another one is refused.
    Raises: CheckpointError naming what is missing, of another model or not supported.
    """
    folder = Path(folder)
    config = read_config(folder, CONFIG)
    check_supported(config, folder / CONFIG)
    path = folder / TENSORS
    if not path.is_file():
        others = [file.name for file in folder.glob("adapter_model.*")]
        found = f"; {', '.join(others)} cannot be read, save it as safetensors" if others else ""
        raise CheckpointError(f"{path}: no such file{found}")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).astype(np.float32) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
    if identity and metadata.get(BASE_IDENTITY, identity) != identity:
        raise CheckpointError(
            f"{folder}: an adapter of other weights (those of {config.get('base_model_name_or_path')}): it was trained "
            f"on checkpoint {metadata[BASE_IDENTITY]}, this is {identity}"
        )
    return from_tensors(tensors, config, abstract, fmt, folder)


def folder_identity(folder: str | Path) -> str:
    """A short hash of the adapters in a PEFT folder, wherever they and their base lie. Raises CheckpointError."""
    folder = Path(folder)
    config = read_config(folder, CONFIG)
    config.pop("base_model_name_or_path", None)
    if not (folder / TENSORS).is_file():
        raise CheckpointError(f"{folder / TENSORS}: no such file")
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update((folder / TENSORS).read_bytes())
    return digest.hexdigest()[:16]


def answerer_identity(folder: str | Path, adapter: str | Path = "") -> str:
    """What a text of the Video-MLLM of a folder depends on: its checkpoint, and the adapters of a PEFT folder on it."""
    own = checkpoint_identity(folder)
    return f"{own} with adapters {folder_identity(adapter)}" if adapter else own


def check_supported(config: Mapping[str, Any], source: Path) -> None:
    """Raises CheckpointError naming a feature of PEFT in an adapter_config.json that is not supported."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{source}: peft_type is {config.get('peft_type')!r}; only LORA is supported")
    for field, unused in UNSUPPORTED.items():
        value = config.get(field)
        if not any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in unused):
            raise CheckpointError(f"{source}: {field} is {value!r:.80}, which is not supported")


def from_tensors(
    tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], abstract: dict, fmt: Format, source: Path | str
) -> Adapter:
    """Adapters from tensors in PEFT's names, as `config` (an adapter_config.json) describes them. See `read`."""
    shapes = {path: x.shape for path, x in flatten(abstract).items()}
    names, unknown = _by_projection(tensors, shapes, fmt)
    problems = [f"no such projection: {name} {list(tensors[name].shape)}" for name in unknown]
    r, alpha = config.get("r", 8), float(config.get("lora_alpha", 8))
    power = 0.5 if config.get("use_rslora") else 1.0
    ranks, found = {}, {}
    for (target, layer), (module, parts) in sorted(names.items()):
        d_in, d_out = shapes[f"{target_path(target)}.kernel"][1:]
        if absent := [name for name in ADAPTER if name not in parts]:
            problems.append(f"missing: {module}.{absent[0]}.weight")
            continue
        a, b = (tensors[parts[name]] for name in ADAPTER)
        rank = ranks[target, layer] = int(_by_pattern(config.get("rank_pattern"), module, r))
        for name, tensor, shape in (("lora_A", a, (rank, d_in)), ("lora_B", b, (d_out, rank))):
            if tensor.shape != shape:
                problems.append(f"wrong shape: {parts[name]} is {list(tensor.shape)}, expected {list(shape)}")
        found[target, layer] = a, b, _by_pattern(config.get("alpha_pattern"), module, alpha) / rank**power
    for module in _missing(config, names, shapes, fmt):
        problems.append(f"missing: {module}, which target_modules names")
    if not tensors:
        problems.append("it holds no tensors")
    if problems:
        raise CheckpointError("\n  ".join([f"{source}: does not fit the model:", *problems]))

    rank = max(ranks.values())
    targets = tuple(name for name in TARGETS if any(target == name for target, _ in found))
    lora = LoraConfig(rank, alpha * (rank / r) ** power, targets, bool(config.get("use_rslora")))
    leaves = {}
    for name in targets:
        L, d_in, d_out = shapes[f"{target_path(name)}.kernel"]
        a, b = np.zeros((L, d_in, rank), np.float32), np.zeros((L, rank, d_out), np.float32)
        for layer in range(L):
            if (name, layer) in found:
                of_a, of_b, scaling = found[name, layer]
                a[layer, :, : len(of_a)] = of_a.T
                b[layer, : len(of_a)] = of_b.T * (scaling / lora.scaling if scaling != lora.scaling else 1)
        for factor, value in zip(ADAPTER, (a, b), strict=True):
            leaves[f"{target_path(name)}.{factor}.kernel"] = value
    return Adapter(lora, unflatten(leaves))


def _by_projection(tensors, shapes, fmt: Format) -> tuple[dict, list[str]]:
    """(target, layer) -> (module's name in the file, {"lora_A": tensor's name, ..}); and names that fit nothing."""
    place_of = {}
    for name in TARGETS:
        kernel = f"{target_path(name)}.kernel"
        if kernel in shapes:
            for layer, module in enumerate(fmt.file_names(kernel, shapes[kernel])):
                place_of[module.removesuffix(".weight")] = name, layer
    found, unknown = {}, []
    for name in tensors:
        match = re.fullmatch(rf"{re.escape(WRAPPED)}(.*)\.({'|'.join(ADAPTER)})\.weight", name)
        place = match and place_of.get(fmt.canonical(f"{match[1]}.weight").removesuffix(".weight"))
        if place:
            found.setdefault(place, (match[1], {}))[1][match[2]] = name
        else:
            unknown.append(name)
    return found, sorted(unknown)


def _missing(config, names, shapes, fmt: Format) -> list[str]:
    """Modules of the language model that the configuration says are adapted and that the file does not hold."""
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if not names or wanted is None or config.get("exclude_modules") or config.get("layers_pattern"):
        return []
    prefix = next(iter(names.values()))[0].partition("layers.")[0]
    absent = []
    for name in TARGETS:
        shape = shapes.get(f"{target_path(name)}.kernel", (0,))
        for layer in range(shape[0]):
            module = f"{prefix}layers.{layer}.{TARGETS[name]}.{name}"
            if isinstance(wanted, str):
                is_wanted = wanted == "all-linear" or re.fullmatch(wanted, module)
            else:
                is_wanted = any(module == w or module.endswith(f".{w}") for w in wanted)
            if layers is not None:
                is_wanted = is_wanted and layer in ([layers] if isinstance(layers, int) else layers)
            if is_wanted and (name, layer) not in names:
                absent.append(module)
    return absent


def _by_pattern(patterns: Mapping[str, float] | None, module: str, default: float) -> float:
    """The value of the first pattern that the end of a module's name matches, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


# ---- merging ---------------------------------------------------------------------------------------------


def merge(params: dict, lora: LoraConfig) -> dict:
    """The parameters of a model with adapters -> those of the same model without: W + scaling A B, in float32, in the
    dtype of W."""
    leaves = flatten(params)
    plain = {path: x for path, x in leaves.items() if not is_adapter(path)}
    for name in lora.targets:
        path = target_path(name)
        a, b = (leaves[f"{path}.{factor}.kernel"] for factor in ADAPTER)
        plain[f"{path}.kernel"] = merged(leaves[f"{path}.kernel"], a, b, lora.scaling)
    return unflatten(plain)
