"""Reader of files that `torch.save` writes (.pth, .bin), without torch and without running what is in them.

Such a file is a zip archive: `ROOT/data.pkl`, a pickle that describes the tensors, and `ROOT/data/KEY`, the raw bytes
of each storage. A pickle may name any function of any module; here it may name the few that tensors are made of, and
everything else is refused by its name.
"""

import collections
import dataclasses
import math
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tspo_jax.checkpoints.plain_folders import CheckpointError

_STORAGES = {
    "FloatStorage": np.float32,
    "DoubleStorage": np.float64,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor of the file: elements `offset`, with `stride`, of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage, offset, shape, stride, *_) -> StoredTensor:
    """What stands for torch._utils._rebuild_tensor_v2."""
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _parameter(tensor, *_) -> StoredTensor:
    """What stands for torch._utils._rebuild_parameter."""
    return tensor


class _Unpickler(pickle.Unpickler):
    _names = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): tuple,
        **{("torch", name): np.dtype(dtype) for name, dtype in _STORAGES.items()},
    }

    def __init__(self, file, path: Path):
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._names:
            raise CheckpointError(
                f"{self._path}: names {module}.{name}, which is no tensor; a file that runs code is not read"
            )
        return self._names[module, name]

    def persistent_load(self, ident: Any) -> _Storage:
        match ident:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count)):
                return _Storage(dtype, key, count)
        raise CheckpointError(f"{self._path}: a reference to {ident!r} instead of a storage")


def read_torch(path: str | Path) -> Any:
    """What a file holds, with a StoredTensor in the place of each tensor, and no tensor read.

    Raises: CheckpointError where it is no archive of torch.save, is damaged, or names anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive, archive.open(_root(archive, path) + "data.pkl") as file:
            return _Unpickler(file, path).load()
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path}: truncated, or no zip archive as torch.save has written since 1.6 ({error})"
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # whatever damaged bytes make a pickle do
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error


def _root(archive: zipfile.ZipFile, path: Path) -> str:
    roots = [name.removesuffix("data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise CheckpointError(f"{path}: no archive of torch.save (no ROOT/data.pkl)")
    order = roots[0] + "byteorder"
    if order in archive.namelist() and archive.read(order) != b"little":
        raise CheckpointError(f"{path}: written by a big-endian machine")
    return roots[0]


class TorchFile:
    """The tensors of a file by name (weights.Tensors): those of a flat mapping in it.

    Args:
      within: keys that lead from the file's object to the mapping, e.g. ("model",) for {"model": {...}, ...}.
      prefix: of the names that are meant; it is cut off, and other tensors are left out.
    Raises: CheckpointError as read_torch, and where there is no such mapping.
    """

    def __init__(self, path: str | Path, within: tuple[str, ...] = (), prefix: str = ""):
        self.folder = Path(path)
        found = read_torch(path)
        for key in within:
            if not isinstance(found, Mapping) or key not in found:
                raise CheckpointError(f"{path}: holds no {'.'.join(within)!r}")
            found = found[key]
        if not isinstance(found, Mapping):
            raise CheckpointError(f"{path}: holds a {type(found).__name__}, not tensors by name")
        strange = [name for name, x in found.items() if not isinstance(name, str) or not isinstance(x, StoredTensor)]
        if strange:
            raise CheckpointError(f"{path}: {strange[0]!r} is no tensor")
        self._tensors = {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)}
        if not self._tensors:
            raise CheckpointError(f"{path}: holds no tensors {prefix}*")

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def type(self, name: str) -> str:
        """As safetensors calls it."""
        dtype = self._tensors[name].storage.dtype
        return "BF16" if dtype == ml_dtypes.bfloat16 else f"{dtype.kind.upper()}{8 * dtype.itemsize}"

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        tensor = self._tensors[name]
        storage = tensor.storage
        last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        is_inside = math.prod(tensor.shape) == 0 or (
            tensor.offset >= 0 and min(tensor.stride, default=0) >= 0 and last < storage.count
        )
        try:
            with zipfile.ZipFile(self.folder) as archive:
                data = archive.read(f"{_root(archive, self.folder)}data/{storage.key}")
        except (KeyError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{self.folder}: the bytes of {name} are missing or damaged ({error})") from error
        if not is_inside or len(data) < storage.count * storage.dtype.itemsize:
            raise CheckpointError(f"{self.folder}: {name} reaches beyond its bytes")
        flat = np.frombuffer(data, storage.dtype.newbyteorder("<"), storage.count)
        steps = tuple(step * storage.dtype.itemsize for step in tensor.stride)
        whole = np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, steps, writeable=False)
        return whole[index] if index else whole.copy()
