"""Hugging Face safetensors folders <-> parameters, both ways: complete, or an error that lists every offending name.

A parameter's name in a file follows from its path in our tree: stacked layers get their number back, `kernel`, `scale`
and `embedding` become `weight`, kernels are transposed, and a short table of prefixes per format does the rest. Only
the bytes that this process's devices hold are read, straight into the (possibly sharded) arrays.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

STACKED = ("layers", "blocks")  # nodes of a path whose parameters carry a leading layer axis
SELECTOR, TRAINING = "selector.", "multiModal_align."  # the agent's prefix in TSPO-0.4B and in training checkpoints
PROVENANCE = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")  # fields of config.json
KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # axes of the file's tensor in our order: Linear, Conv2d


class CheckpointError(ValueError):
    """A checkpoint folder that is missing, incomplete, damaged or of another model."""


@dataclasses.dataclass(frozen=True)
class Format:
    """How a family of checkpoints names its tensors.

    rename: (pattern, replacement) pairs, the first that matches our dotted path wins (paths without a match are kept).
    ignored: patterns of tensors in the file that have no parameter here.
    """

    rename: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()

    def file_names(self, path: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors of the file that parameter `path` of `shape` is made of: one, or one per stacked layer."""
        *parents, leaf = path.split(".")
        name = ".".join([*parents, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])
        for pattern, replacement in self.rename:
            name, hits = re.subn(pattern, replacement, name, count=1)
            if hits:
                break
        if not is_stacked(path):
            return [name]
        before, node, after = re.split(rf"\.({'|'.join(STACKED)})\.", f".{name}", maxsplit=1)
        return [f"{before}.{node}.{i}.{after}"[1:] for i in range(shape[0])]


CLIP = Format(ignored=(r"\.position_ids$", r"^selector\.", r"^multiModal_align\."))
AGENT_RENAME = ((r"^mlp\.linear_1\.", "mlp.0."), (r"^mlp\.linear_2\.", "mlp.2."))


def agent_format(prefix: str) -> Format:
    """The agent's tensors behind `prefix`, SELECTOR or TRAINING; whatever else is in the folder is not looked at."""
    rename = tuple((pattern, prefix + name) for pattern, name in AGENT_RENAME)
    return Format((*rename, (r"^", prefix)), (rf"^(?!{re.escape(prefix)})",))


LLAVA_VIDEO = Format(
    rename=(
        (r"^language_model\.lm_head\.", "lm_head."),
        (r"^language_model\.", "model."),
        (r"^vision_tower\.", "model.vision_tower.vision_tower."),
        (r"^mm_projector\.linear_1\.", "model.mm_projector.0."),
        (r"^mm_projector\.linear_2\.", "model.mm_projector.2."),
        (r"^image_newline$", "model.image_newline"),
    ),
    ignored=(r"\.rotary_emb\.inv_freq$", r"\.position_ids$", r"^multiModal_align\."),
)


def is_stacked(path: str) -> bool:
    return any(node in STACKED for node in path.split("."))


def flatten(params: dict) -> dict[str, jax.Array]:
    """Nested dict -> {"dotted.path": leaf}, sorted by path."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {".".join(str(k.key) for k in path): leaf for path, leaf in leaves}


def unflatten(leaves: dict[str, jax.Array]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


class SafetensorsFolder:
    """Lazy reader of the `*.safetensors` files of a folder: names, shapes, and slices of tensors."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: holds no *.safetensors file")
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            named = set(read_config(self.folder, index.name).get("weight_map", {}).values())
            if not named:
                raise CheckpointError(f"{index}: weight_map is missing or empty")
            if lost := sorted(named - {p.name for p in paths}):
                raise CheckpointError(f"{index}: names files that are not there: {', '.join(lost)}")
            paths = [p for p in paths if p.name in named]
        self._file_of: dict[str, Path] = {}
        self._open: dict[Path, safe_open] = {}
        for path in paths:
            try:
                self._open[path] = safe_open(path, framework="numpy")
            except SafetensorError as error:
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
            for name in self._open[path].keys():  # noqa: SIM118 (not a dict)
                if name in self._file_of:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._file_of[name].name}")
                self._file_of[name] = path

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if not index:  # a scalar cannot be sliced
            return self._open[self._file_of[name]].get_tensor(name)
        return self._slice(name)[index]

    def _slice(self, name: str):
        return self._open[self._file_of[name]].get_slice(name)


def load_params(
    folder: str | Path,
    abstract: dict,
    fmt: Format,
    *,
    dtype: np.dtype | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict:
    """The parameters `abstract` (nested dict of ShapeDtypeStructs), read from the safetensors of `folder`.

    Args:
      dtype: of the arrays made (default: that of `abstract`); the file may hold any floating type.
      sharding: (path, shape) -> Sharding; by default everything lies on the first device.
    Raises:
      CheckpointError: listing every missing, unexpected or wrongly shaped tensor.
    """
    files = SafetensorsFolder(folder)
    leaves = flatten(abstract)
    sources = {path: fmt.file_names(path, leaf.shape) for path, leaf in leaves.items()}
    _check_complete(files, leaves, sources, fmt)
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, leaf) -> jax.Array:
        axes = _kernel_axes(path, leaf.shape)
        wanted = np.dtype(dtype or leaf.dtype)

        def read(index: tuple[slice, ...]) -> np.ndarray:
            inner = index[1:] if is_stacked(path) else index
            in_file = tuple(inner[axes.index(i)] for i in range(len(axes)))
            names = sources[path][index[0]] if is_stacked(path) else sources[path]
            tensors = [files.read(name, in_file).transpose(axes).astype(wanted) for name in names]
            return np.stack(tensors) if is_stacked(path) else tensors[0]

        where = sharding(path, leaf.shape) if sharding else single
        return jax.make_array_from_callback(leaf.shape, where, read)

    return unflatten({path: load(path, leaf) for path, leaf in leaves.items()})


def save_params(folder: str | Path, params: dict, fmt: Format, dtype: np.dtype | None = None) -> None:
    """Writes `params` as `folder`/model.safetensors, in the names and layout that `load_params` reads."""
    save_tensors(folder, file_tensors(params, fmt, dtype))


def file_tensors(params: dict, fmt: Format, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """`params` as the tensors of a safetensors file."""
    tensors = {}
    for path, leaf in flatten(params).items():
        axes = _kernel_axes(path, leaf.shape)
        back = tuple(np.argsort(axes))
        array = np.asarray(leaf)
        array = array.astype(dtype or array.dtype)
        names = fmt.file_names(path, leaf.shape)
        for name, tensor in zip(names, array if is_stacked(path) else [array], strict=True):
            tensors[name] = np.array(tensor.transpose(back), order="C")
    return tensors


def save_tensors(folder: str | Path, tensors: dict[str, np.ndarray]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: str | Path, name: str = "config.json") -> dict:
    """A json file of a checkpoint folder."""
    path = Path(folder) / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid json ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, not an object")
    return config


def checkpoint_identity(folder: str | Path) -> str:
    """A short hash of a checkpoint's configuration and weights: what cached features are tied to.

    The first and last row of every tensor are read, so that it is fast at any size. An agent that travels with CLIP,
    the split into files and who wrote the folder make no difference.
    """
    files, config = SafetensorsFolder(folder), read_config(folder)
    kept = {key: value for key, value in config.items() if key not in PROVENANCE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(name for name in files.names() if not name.startswith((SELECTOR, TRAINING))):
        shape = files.shape(name)
        digest.update(f"{name} {shape}".encode())
        for row in (slice(0, 1), slice(-1 % shape[0], None)) if shape else ():
            digest.update(files.read(name, (row, *(slice(None) for _ in shape[1:]))).tobytes())
    return digest.hexdigest()[:16]


def _kernel_axes(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the file's tensor in the order of our parameter (its layer axis apart)."""
    rank = len(shape) - is_stacked(path)
    return KERNEL_AXES[rank] if path.endswith("kernel") else tuple(range(rank))


def _check_complete(files: SafetensorsFolder, leaves: dict, sources: dict[str, list[str]], fmt: Format) -> None:
    present, problems = files.names(), []
    for path, names in sources.items():
        shape = leaves[path].shape[1:] if is_stacked(path) else leaves[path].shape
        axes = _kernel_axes(path, leaves[path].shape)
        in_file = tuple(shape[axes.index(i)] for i in range(len(shape)))
        for name in names:
            if name not in present:
                problems.append(f"missing: {name} {list(in_file)}")
            elif files.shape(name) != in_file:
                problems.append(f"wrong shape: {name} is {list(files.shape(name))}, expected {list(in_file)}")
    wanted = {name for names in sources.values() for name in names}
    for name in sorted(present - wanted):
        if not any(re.search(pattern, name) for pattern in fmt.ignored):
            problems.append(f"unexpected: {name} {list(files.shape(name))}")
    if problems:
        raise CheckpointError("\n  ".join([f"{files.folder}: does not fit its configuration:", *problems]))


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
