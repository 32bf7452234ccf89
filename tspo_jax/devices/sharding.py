"""Which device holds what: the mesh, and one table of rules from a parameter's path to its split.

The mesh has the axes `data` (questions of a batch) and `model` (tensor parallelism of a frozen MLLM). It is built from
an explicit list of devices, so that tests on CPU devices, compilation for an absent TPU and real runs share one path.
The temporal agent, CLIP and image towers are replicated; a frozen language model is split over `model` and, if asked,
a frozen MLLM over `data` too.
"""

import dataclasses
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tspo_jax.models.families import FAMILIES

AXES = ("data", "model")

# Path of a parameter -> what each of its axes is, first match wins, () = replicated. The names are those of
# `ParamSharding.axes`; None is an axis that is never split (stacked layers come first).
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    # Temporal agent, CLIP and SigLIP 2
    (r"temporal\.(Self_q|Self_k|Self_v|ffn_o)\.(kernel|bias)", ()),
    (r"mlp\.linear_[12]\.(kernel|bias)", ()),
    (r"(modulation|match_weight)\.(kernel|bias)|offset_bias|clip_weight", ()),
    (r"(text_model|vision_model)\..*", ()),
    (r"(text_projection|visual_projection)\.kernel|logit_(scale|bias)", ()),
    *(rule for family in FAMILIES for rule in family.sharding),
    # Streaming encoder, whose blocks are Qwen2's
    (r"(feature_mlp|projector)\.linear_1\.kernel", ("width", "hidden")),
    (r"(feature_mlp|projector)\.linear_1\.bias", ("hidden",)),
    (r"(feature_mlp|projector)\.linear_2\.kernel", ("hidden", "width")),
    (r"(feature_mlp|projector)\.linear_2\.bias|(time|question)\.(kernel|bias)", ()),
    # Qwen2
    (r"language_model\.embed_tokens\.embedding", ("vocabulary", "width")),
    (r"language_model\.lm_head\.kernel", ("width", "vocabulary")),
    (r"language_model\..*norm\.scale", ()),
    (r"language_model\..*\.q_proj\.kernel", (None, "width", "heads")),
    (r"language_model\..*\.q_proj\.bias", (None, "heads")),
    (r"language_model\..*\.[kv]_proj\.kernel", (None, "width", "kv_heads")),
    (r"language_model\..*\.[kv]_proj\.bias", (None, "kv_heads")),
    (r"language_model\..*\.o_proj\.kernel", (None, "heads", "width")),
    (r"language_model\..*\.(gate|up)_proj\.kernel", (None, "width", "hidden")),
    (r"language_model\..*\.down_proj\.kernel", (None, "hidden", "width")),
    # Its adapters: the rank is never split
    (r"language_model\..*\.([qkv]|gate|up)_proj\.lora_A\.kernel", (None, "width", None)),
    (r"language_model\..*\.o_proj\.lora_A\.kernel", (None, "heads", None)),
    (r"language_model\..*\.down_proj\.lora_A\.kernel", (None, "hidden", None)),
    (r"language_model\..*\.q_proj\.lora_B\.kernel", (None, None, "heads")),
    (r"language_model\..*\.[kv]_proj\.lora_B\.kernel", (None, None, "kv_heads")),
    (r"language_model\..*\.(gate|up)_proj\.lora_B\.kernel", (None, None, "hidden")),
    (r"language_model\..*\.(o|down)_proj\.lora_B\.kernel", (None, None, "width")),
)


class ShardingError(ValueError):
    """A mesh, parameter or batch that cannot be split as asked."""


def make_mesh(axes: Sequence[tuple[str, int]], devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of `devices`, e.g. axes [("data", -1), ("model", 4)]; -1 takes the devices that are left.

    Raises ShardingError where the axes are not `AXES` or their sizes do not multiply to the number of devices.
    """
    axes = [tuple(axis) for axis in axes]
    names, sizes = [name for name, _ in axes], [size for _, size in axes]
    if tuple(names) != AXES:
        raise ShardingError(f"mesh is {axes}: its axes must be {', '.join(AXES)}, in this order")
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ShardingError(f"mesh is {axes}: sizes must be at least 1, and at most one may be -1 (the rest)")
    fixed = math.prod(size for size in sizes if size != -1)
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise ShardingError(
            f"mesh is {axes}: this does not make {len(devices)} devices; for all of them to share the questions, each "
            'with the whole answerer: --config.mesh.axes=\'(("data",-1),("model",1))\''
        )
    # jax.make_mesh cuts no physical axis of most TPUs: 8 of a v5p-128 with its 4 x 4 x 4 chips would be an error.
    placed = mesh_utils.create_device_mesh(sizes, list(devices), allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@dataclasses.dataclass(frozen=True)
class ParamSharding:
    """(path, shape) -> NamedSharding by `RULES`: what `weights.load_params` asks for each parameter.

    Attributes:
      axes: name of a parameter's axis in `RULES` -> mesh axis; names that are absent are not split.
    """

    mesh: Mesh
    axes: Mapping[str, str]

    def __call__(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """Raises ShardingError naming `path` where no rule matches, two of its axes would share a mesh axis, or a
        dimension is not divisible."""
        names = next((names for pattern, names in RULES if re.fullmatch(pattern, path)), None)
        if names is None:
            raise ShardingError(f"{path} {list(shape)}: no sharding rule matches; add one to RULES in sharding.py")
        if names and len(names) != len(shape):
            raise ShardingError(f"{path} {list(shape)}: its sharding rule {names} has another number of axes")
        spec = [self.axes.get(name) for name in names]
        used = [axis for axis in spec if axis is not None]
        if len(used) != len(set(used)):
            raise ShardingError(f"{path} {list(shape)}: {names} would split two dimensions over one mesh axis {spec}")
        for size, name, axis in zip(shape, names, spec, strict=False):
            if axis is not None and size % self.mesh.shape[axis]:
                raise ShardingError(
                    f"{path} {list(shape)}: {name} ({size}) is not divisible by mesh axis {axis} "
                    f"({self.mesh.shape[axis]}); choose a smaller {axis} axis"
                )
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def answerer_sharding(mesh: Mesh, config: Mapping[str, Any], *, split_over_data: bool = False) -> ParamSharding:
    """Tensor parallelism of a frozen MLLM over `model`.

    Args:
      config: the checkpoint's config.json, for its numbers of heads: heads are never cut. Key and value heads that are
        fewer than the `model` axis, or no multiple of it, are replicated.
      split_over_data: split the other dimension of each matrix over `data` too; it is gathered layer by layer when it
        is used. For models that do not fit otherwise.
    Raises:
      ShardingError: where `model` does not divide the attention heads.
    """
    config = config.get("text_config") or config
    model, heads = mesh.shape["model"], config["num_attention_heads"]
    if heads % model:
        raise ShardingError(f"mesh axis model ({model}) does not divide num_attention_heads ({heads}) of the answerer")
    split = ["heads", "hidden", "vocabulary"]
    if config["num_key_value_heads"] % model == 0:
        split.append("kv_heads")
    return ParamSharding(mesh, {name: "model" for name in split} | ({"width": "data"} if split_over_data else {}))


def check_memory(shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype, where: ParamSharding) -> None:
    """Raises ShardingError where this process's devices have too little free memory for parameters of these shapes
    (by path), before any is read. Devices that do not tell how much they have, CPUs, share the host's."""
    need = (
        sum(math.prod(where(path, shape).shard_shape(shape)) for path, shape in shapes.items())
        * np.dtype(dtype).itemsize
    )
    devices = [device for device in where.mesh.devices.flat if device.process_index == jax.process_index()]
    if stats := devices[0].memory_stats():
        free, holder = min(_free(device.memory_stats() or stats) for device in devices), "a device"
    else:
        need, free, holder = need * len(devices), free_host_memory(), "this machine"
    if need > free:
        raise ShardingError(
            f"the answerer's weights take {need / 2**30:.1f} GiB of {holder}, but {free / 2**30:.1f} GiB are free: "
            f"{(need - free) / 2**30:.1f} GiB are missing. Take a larger model axis, more devices, "
            "--config.mesh.split_over_data=True or --config.answerer.dtype=bfloat16"
        )


def _free(stats: Mapping[str, int]) -> int:
    return stats["bytes_limit"] - stats["bytes_in_use"]


def free_host_memory() -> int:
    """Bytes that the host can still give out."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def optimizer_sharding(optimizer: optax.GradientTransformation, trained: Mapping, mesh: Mesh) -> Any:
    """Where the optimiser's state lies: each moment as its parameter. `trained` are arrays or shapes with shardings."""
    abstract = jax.eval_shape(optimizer.init, trained)
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, parameter: parameter.sharding,
        abstract,
        trained,
        transform_non_params=lambda _: replicated(mesh),
    )


def over_questions(mesh: Mesh) -> NamedSharding:
    """Of batches: the first axis, B, over `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def split_questions(mesh: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """Inside a compiled program: arrays whose `axis` is B, or B * something, stay split over `data` there.

    The compiler chooses how their other axes lie. Without it, weights that are split over `data` as well could make it
    gather the activations instead of the weights. Without a mesh nothing is split.
    """
    return jax.tree.map(lambda x: _constrain(mesh, x, axis, "data"), tree)


def split_frames(mesh: Mesh | None, frames: jax.Array) -> jax.Array:
    """Inside a compiled program: frames [B * u, ...] are dealt out to all devices of a question, where that is even."""
    is_even = mesh is not None and frames.shape[0] % mesh.size == 0
    return _constrain(mesh, frames, 0, AXES) if is_even else split_questions(mesh, frames)


def split_tokens(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Inside a compiled program: the residual stream [B, N, hidden] of training, the tokens of a question dealt out to
    its devices where that is even, since it is kept for the way back."""
    if mesh is None or x.shape[1] % mesh.shape["model"]:
        return split_questions(mesh, x)
    where = NamedSharding(mesh, PartitionSpec("data", "model", PartitionSpec.UNCONSTRAINED))
    return jax.lax.with_sharding_constraint(x, where)


def _constrain(mesh: Mesh | None, x: jax.Array, axis: int, over: str | tuple[str, ...]) -> jax.Array:
    if mesh is None:
        return x
    spec = [PartitionSpec.UNCONSTRAINED] * x.ndim
    spec[axis] = over
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def check_batch_size(mesh: Mesh, batch_size: int, field: str = "batch_size") -> None:
    """Raises ShardingError where `batch_size` questions cannot be dealt out evenly; `field` of a config says so."""
    if batch_size < 1 or batch_size % mesh.shape["data"]:
        raise ShardingError(f"{field} is {batch_size}: it must be a multiple of mesh axis data ({mesh.shape['data']})")


def put_batch(mesh: Mesh, rows: Any) -> Any:
    """Host arrays [B / processes, ...] of this process -> global arrays [B, ...] over `data` (any pytree)."""
    where = over_questions(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(where, np.asarray(x)), rows)


def abstract_batch(mesh: Mesh, rows: Any) -> Any:
    """Shapes, dtypes and splits of what `put_batch` gives, for compiling ahead."""
    share = data_slice(mesh)[1]

    def of(x):
        return jax.ShapeDtypeStruct((len(x) * share, *x.shape[1:]), x.dtype, sharding=over_questions(mesh))

    return jax.tree.map(of, rows)


def put_replicated(mesh: Mesh, tree: Any) -> Any:
    """Arrays that are equal in every process -> replicated arrays (any pytree)."""
    where = replicated(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(np.shape(x), where, np.asarray(x).__getitem__), tree)


def local_rows(x: jax.Array) -> np.ndarray:
    """The rows [B / processes, ...] of a global array over `data` that belong to this process; waits for them."""
    if x.is_fully_addressable:
        return np.asarray(x)
    shards = {shard.index[0].start or 0: shard for shard in x.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def data_slice(mesh: Mesh) -> tuple[int, int]:
    """(index, count): this process feeds every count-th question, from index on.

    Processes whose devices lie in the same rows of the mesh feed the same questions. Raises ShardingError where a
    process holds part of a row's share only, which the data pipeline cannot serve.
    """
    process = jax.process_index()
    rows = [r for r, row in enumerate(mesh.devices) if any(d.process_index == process for d in row.flat)]
    count, rest = divmod(mesh.shape["data"], len(rows))
    if rest or rows != list(range(rows[0], rows[0] + len(rows))) or rows[0] % len(rows):
        raise ShardingError(
            f"the devices of process {process} lie in rows {rows} of the mesh: choose another model axis"
        )
    return rows[0] // len(rows), count
