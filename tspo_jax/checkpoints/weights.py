"""Hugging Face safetensors folders <-> parameters, both ways: complete, or an error that lists every offending name.

A parameter's name in a file follows from its path in our tree: stacked layers get their number back, `kernel`, `scale`
and `embedding` become `weight`, kernels are transposed, and a short table of prefixes per format does the rest. Only
the bytes that this process's devices hold are read, a few layers at a time, into the (possibly sharded) arrays: the
host holds little more than what is being read.
"""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tspo_jax.checkpoints.plain_folders import CheckpointError, check_plain
from tspo_jax.models import llava_video, qwen2_5_vl, qwen3_vl
from tspo_jax.models.families import FAMILIES

# Nodes of a path whose parameters carry a leading layer axis.
STACKED = ("layers", "blocks", *(node for family in FAMILIES for node in family.stacked))
SELECTOR, TRAINING = "selector.", "multiModal_align."  # the agent's prefix in TSPO-0.4B and in training checkpoints
QUESTION_AWARE = "question_aware_selector."  # that of the other kind of agent, which the original's code cannot load
SPAN = "span_selector."  # and that of an agent that predicts spans
AGENTS = {SELECTOR: "paper", TRAINING: "paper", QUESTION_AWARE: "question_aware", SPAN: "span"}  # prefix -> kind
PROVENANCE = ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path")  # fields of config.json
# Axes of the file's tensor in our order: Linear, Conv2d, Conv3d (which keeps the order of a flattened patch).
KERNEL_AXES = {2: (1, 0), 4: (2, 3, 1, 0), 5: (1, 2, 3, 4, 0)}
FLOATING = ("F64", "F32", "F16", "BF16")  # types of tensors that are numbers as they stand
SHOWN = 6  # problems of a kind that are listed; of the rest only the number is told
READ_BYTES = 256 * 2**20  # of a stacked parameter that are read at a time, at least one layer


@dataclasses.dataclass(frozen=True)
class Format:
    """How a family of checkpoints names its tensors.

    rename: (pattern, replacement) pairs, the first that matches our dotted path, with the number of a stacked layer in
      it, wins (paths without a match are kept).
    ignored: patterns of tensors in the file that have no parameter here.
    aliases: (pattern, replacement) pairs for files of the same family that name their tensors otherwise: the first that
      matches a file's name turns it into the name that `rename` gives.
    """

    rename: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()

    def without_head(self) -> "Format":
        """For models whose head is the embedding table: a copy of it in the file is not looked at."""
        return dataclasses.replace(self, ignored=(*self.ignored, r"^lm_head\."))

    def file_names(self, path: str, shape: tuple[int, ...]) -> list[str]:
        """The tensors of the file that parameter `path` of `shape` is made of: one, or one per stacked layer."""
        *parents, leaf = path.split(".")
        names = [".".join([*parents, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])]
        if is_stacked(path):
            before, node, after = re.split(rf"\.({'|'.join(STACKED)})\.", f".{names[0]}", maxsplit=1)
            names = [f"{before}.{node}.{i}.{after}"[1:] for i in range(shape[0])]
        return [_substitute(self.rename, name) for name in names]

    def canonical(self, name: str) -> str:
        """The name that `file_names` gives to a tensor that a file of this family calls `name`."""
        return _substitute(self.aliases, name)


def _substitute(pairs: tuple[tuple[str, str], ...], name: str) -> str:
    for pattern, replacement in pairs:
        new, hits = re.subn(pattern, replacement, name, count=1)
        if hits:
            return new
    return name


CLIP = Format(ignored=(r"\.position_ids$", *(f"^{re.escape(prefix)}" for prefix in AGENTS)))
OWLVIT = Format(
    rename=((r"^(text_model\.|vision_model\.|text_projection\.|visual_projection\.|logit_scale$)", r"owlvit.\1"),),
    ignored=(r"\.embeddings\.position_ids$",),
)
SIGLIP2 = Format(
    rename=(
        (r"\.head\.in_proj\.(weight|bias)$", r".head.attention.in_proj_\1"),
        (r"\.head\.out_proj\.", ".head.attention.out_proj."),
    ),
    ignored=CLIP.ignored,
)
AGENT_RENAME = ((r"^mlp\.linear_1\.", "mlp.0."), (r"^mlp\.linear_2\.", "mlp.2."))


def agent_format(prefix: str) -> Format:
    """The agent's tensors behind `prefix`, one of AGENTS; whatever else is in the folder is not looked at."""
    rename = tuple((pattern, prefix + name) for pattern, name in AGENT_RENAME)
    return Format((*rename, (r"^", prefix)), (rf"^(?!{re.escape(prefix)})",))


LLAVA_VIDEO, QWEN2_5_VL, QWEN3_VL = (Format(**f.FAMILY.names) for f in (llava_video, qwen2_5_vl, qwen3_vl))


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


class Tensors(Protocol):
    """Tensors by name, each read when it is asked for; `folder` is what errors call it."""

    folder: Path

    def names(self) -> set[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def type(self, name: str) -> str: ...  # as safetensors calls it, e.g. F32

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray: ...


class SafetensorsFolder:
    """Lazy reader of the `*.safetensors` files of a folder: names, shapes, and slices of tensors."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(f"{folder}: no such checkpoint folder")
        check_plain(self.folder)
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder}: holds no *.safetensors file")
        index = self.folder / "model.safetensors.index.json"
        file_of = read_config(self.folder, index.name).get("weight_map", {}) if index.is_file() else {}
        if index.is_file():
            named = set(file_of.values())
            if not named:
                raise CheckpointError(f"{index}: weight_map is missing or empty")
            if lost := sorted(named - {p.name for p in paths}):
                raise CheckpointError(f"{index}: names files that are not there: {', '.join(lost)}")
            paths = [p for p in paths if p.name in named]
        else:
            _check_shards(paths)
        self._file_of: dict[str, Path] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        self._type: dict[str, str] = {}
        for path in paths:
            try:
                with safe_open(path, framework="numpy") as file:
                    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                    self._type |= {name: part.get_dtype() for name, part in slices.items()}
            except SafetensorError as error:
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({error})") from error
            for name in shapes:
                if name in self._file_of:
                    raise CheckpointError(f"{path}: tensor {name} is also in {self._file_of[name].name}")
                if file_of.get(name, path.name) != path.name:
                    raise CheckpointError(f"{path}: holds {name}, which {index.name} places in {file_of[name]}")
                self._file_of[name] = path
            self._shape |= shapes

    def names(self) -> set[str]:
        return set(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def type(self, name: str) -> str:
        """As safetensors calls it: F32, BF16, I8, F8_E4M3 .."""
        return self._type[name]

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if self._type[name].startswith(("F8", "F4")):
            raise CheckpointError(
                f"{self._file_of[name]}: {name} is {self._type[name]}: quantised, take the bfloat16 one"
            )
        # A file is mapped while it is open: opened for each read, no more of it stays in memory than was asked for.
        with safe_open(self._file_of[name], framework="numpy") as file:
            return file.get_slice(name)[index] if index else file.get_tensor(name)  # a scalar cannot be sliced


def _check_shards(paths: list[Path]) -> None:
    """Raises CheckpointError where files that call themselves shards (NAME-00001-of-00004) are not one whole set."""
    shards = [re.fullmatch(r"(.*)-(\d+)-of-(\d+)\.safetensors", path.name) for path in paths]
    sets = {(shard[1], shard[3]) for shard in shards if shard}
    if len(sets) > 1 or (sets and not all(shards)):
        raise CheckpointError(
            f"{paths[0].parent}: mixed files of several checkpoints: {', '.join(p.name for p in paths)}"
        )
    for name, count in sets:
        expected = [f"{name}-{i:0{len(count)}}-of-{count}.safetensors" for i in range(1, int(count) + 1)]
        if lost := sorted(set(expected) - {path.name for path in paths}):
            raise CheckpointError(f"{paths[0].parent}: incomplete, {', '.join(lost)} of {count} files are missing")


def load_params(
    folder: str | Path | Tensors,
    abstract: dict,
    fmt: Format,
    *,
    dtype: np.dtype | None = None,
    sharding: Callable[[str, tuple[int, ...]], jax.sharding.Sharding] | None = None,
) -> dict:
    """The parameters `abstract` (nested dict of ShapeDtypeStructs), read from the safetensors of `folder`, or
    from tensors of another kind of file.

    Args:
      dtype: of the arrays made (default: that of `abstract`); the file may hold any floating type.
      sharding: (path, shape) -> Sharding; by default everything lies on the first device.
    Raises:
      CheckpointError: listing every missing, unexpected or wrongly shaped tensor.
    """
    files = SafetensorsFolder(folder) if isinstance(folder, str | Path) else folder
    leaves = flatten(abstract)
    sources = {path: fmt.file_names(path, leaf.shape) for path, leaf in leaves.items()}
    name_in_file = _check_complete(files, leaves, sources, fmt)
    single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def load(path: str, leaf) -> jax.Array:
        axes = _kernel_axes(path, leaf.shape)
        wanted = np.dtype(dtype or leaf.dtype)
        where = sharding(path, leaf.shape) if sharding else single
        names = [name_in_file[name] for name in sources[path]]

        def read(name: str, index: tuple[slice, ...]) -> np.ndarray:
            """The part `index` of our parameter, or of one of its layers."""
            in_file = tuple(index[axes.index(i)] for i in range(len(axes)))
            return files.read(name, in_file).transpose(axes).astype(wanted, copy=False)

        if not is_stacked(path):
            return _make_array(leaf.shape, where, lambda index: read(names[0], index))

        def read_layers(start: int, count: int) -> jax.Array:
            def read_all(index):
                return np.stack([read(name, index[1:]) for name in names[start : start + count][index[0]]])

            return _make_array((count, *leaf.shape[1:]), where, read_all)

        num_layers = leaf.shape[0]
        at_a_time = max(1, READ_BYTES * num_layers // (leaf.size * wanted.itemsize))
        if at_a_time >= num_layers:
            return read_layers(0, num_layers)
        array = jnp.zeros(leaf.shape, wanted, device=where)
        for start in range(0, num_layers, at_a_time):
            layers = read_layers(start, min(at_a_time, num_layers - start))
            array = jax.block_until_ready(_writer(where)(array, layers, start))
        return array

    return unflatten({path: load(path, leaf) for path, leaf in leaves.items()})


def _make_array(
    shape: tuple[int, ...], where: jax.sharding.Sharding, read: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """An array of which this process reads only the parts that its devices hold, each part once and one at a time."""
    devices_of: dict[tuple, list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        devices_of.setdefault(tuple(part.indices(n) for part, n in zip(index, shape, strict=True)), []).append(device)
    parts = []
    for index, devices in devices_of.items():
        part = read(tuple(slice(*bounds) for bounds in index))
        parts += jax.block_until_ready([jax.device_put(part, device) for device in devices])
    return jax.make_array_from_single_device_arrays(shape, where, parts)


@functools.cache
def _writer(where: jax.sharding.Sharding):
    """(array [L, ...], layers [n, ...], start) -> the array with the layers from `start` on replaced, in place."""
    write = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=0)
    return jax.jit(write, donate_argnums=0, out_shardings=where)


def save_params(folder: str | Path, params: dict, fmt: Format, dtype: np.dtype | None = None) -> None:
    """Writes `params` as `folder`/model.safetensors, in the names and layout that `load_params` reads."""
    save_tensors(folder, file_tensors(params, fmt, dtype))


def file_tensors(params: dict, fmt: Format, dtype: np.dtype | None = None) -> dict[str, np.ndarray]:
    """`params` as the tensors of a safetensors file."""
    tensors = {}
    with ThreadPoolExecutor() as pool:  # turning matrices round takes the longest
        for path, leaf in flatten(params).items():
            back = tuple(np.argsort(_kernel_axes(path, leaf.shape)))
            array = np.asarray(leaf)
            layers = [layer.transpose(back) for layer in (array if is_stacked(path) else [array])]
            turned = pool.map(functools.partial(np.array, dtype=dtype or array.dtype, order="C"), layers)
            tensors |= zip(fmt.file_names(path, leaf.shape), turned, strict=True)  # waits: one leaf's copy at a time
    return tensors


def save_tensors(folder: str | Path, tensors: dict[str, np.ndarray]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read_config(folder: str | Path, name: str = "config.json") -> dict:
    """A json file of a checkpoint folder."""
    path = Path(folder) / name
    if not path.parent.is_dir():
        raise CheckpointError(
            f"{folder}: no such checkpoint folder; one of Hugging Face's: hf download NAME --local-dir={folder}"
        )
    if not path.is_file():
        if name == "config.json":
            check_plain(path.parent)
        raise CheckpointError(f"{path}: no such file")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid json ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: holds a {type(config).__name__}, not an object")
    if name == "config.json" and "model_type" not in config:
        check_plain(path.parent)
    return config


def checkpoint_identity(folder: str | Path) -> str:
    """A short hash of a checkpoint's configuration and weights: what cached features are tied to.

    The first and last row of every tensor are read, so that it is fast at any size. An agent that travels with CLIP,
    the split into files and who wrote the folder make no difference.
    """
    return tensors_identity(SafetensorsFolder(folder), read_config(folder))


def tensors_identity(files: Tensors, config: dict) -> str:
    """`checkpoint_identity` of tensors of any kind of file, with what describes them."""
    kept = {key: value for key, value in config.items() if key not in PROVENANCE}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(name for name in files.names() if not name.startswith(tuple(AGENTS))):
        shape = files.shape(name)
        digest.update(f"{name} {shape}".encode())
        for row in (slice(0, 1), slice(-1 % shape[0], None)) if shape else ():
            digest.update(files.read(name, (row, *(slice(None) for _ in shape[1:]))).tobytes())
    return digest.hexdigest()[:16]


def _kernel_axes(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Axes of the file's tensor in the order of our parameter (its layer axis apart)."""
    rank = len(shape) - is_stacked(path)
    return KERNEL_AXES[rank] if path.endswith("kernel") else tuple(range(rank))


def _check_complete(
    files: SafetensorsFolder, leaves: dict, sources: dict[str, list[str]], fmt: Format
) -> dict[str, str]:
    """The names that `fmt` gives -> those in the file, where nothing is missing, unexpected or of a wrong shape."""
    name_in_file, problems = {}, []
    for name in sorted(files.names()):
        other = name_in_file.setdefault(fmt.canonical(name), name)
        if other != name:
            problems.append(f"twice: {other}, {name}")
    for path, names in sources.items():
        shape = leaves[path].shape[1:] if is_stacked(path) else leaves[path].shape
        axes = _kernel_axes(path, leaves[path].shape)
        in_file = tuple(shape[axes.index(i)] for i in range(len(shape)))
        for name in names:
            if name not in name_in_file:
                problems.append(f"missing: {name} {list(in_file)}")
            elif (found := files.shape(name_in_file[name])) != in_file:
                problems.append(f"wrong shape: {name_in_file[name]} is {list(found)}, expected {list(in_file)}")
            elif (kind := files.type(name_in_file[name])) not in FLOATING:
                problems.append(f"wrong type: {name_in_file[name]} is {kind}, not one of {', '.join(FLOATING)}")
    wanted = {name for names in sources.values() for name in names}
    for name in sorted(name_in_file.keys() - wanted):
        if not any(re.search(pattern, name) for pattern in fmt.ignored):
            problems.append(f"unexpected: {name_in_file[name]} {list(files.shape(name_in_file[name]))}")
    if problems:
        raise CheckpointError(
            "\n  ".join([f"{files.folder}: does not fit its configuration: {_counts(problems)}"] + _some(problems))
        )
    return name_in_file


def _counts(problems: list[str]) -> str:
    """How many there are of each kind, which stands before the colon."""
    kinds = Counter(problem.partition(":")[0] for problem in problems)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _some(problems: list[str]) -> list[str]:
    """The first few of each kind."""
    shown, seen = [], Counter()
    for problem in problems:
        kind = problem.partition(":")[0]
        seen[kind] += 1
        if seen[kind] <= SHOWN:
            shown.append(problem)
    return shown + (["..."] if len(shown) < len(problems) else [])


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
