import pickle
import zipfile

import numpy as np
import pytest

from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.torch_files import TorchFile, read_torch


def test_golden_file(golden):
    """Every tensor of the published layout, int64 ones too; sums as torch reads them in the parity test below."""
    file = TorchFile(golden / "swinbert_tiny/best-checkpoint/model.bin")
    assert "learn_vid_att.weight" in file.names()
    for name in file.names():
        x = file.read(name, ())
        assert x.shape == file.shape(name) and np.isfinite(x.astype(np.float64)).all()
    assert file.read("swin.backbone.layers.0.blocks.0.attn.relative_position_index", ()).dtype == np.int64


def test_torch_reads_the_same(tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "plain": base,
        "transposed": base.T,
        "view": base[1:3, ::2],
        "half": torch.randn(5).half(),
        "bfloat": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(0.07),
        "whole": torch.arange(3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 3),
    }
    torch.save({"model": tensors, "config": {"testa_r": [1, 12]}, "epoch": 3}, tmp_path / "x.pth")
    assert read_torch(tmp_path / "x.pth")["config"] == {"testa_r": [1, 12]}
    file = TorchFile(tmp_path / "x.pth", within=("model",))
    assert file.names() == set(tensors)
    for name, expected in tensors.items():
        np.testing.assert_array_equal(
            file.read(name, ()).astype(np.float32), expected.detach().float().numpy(), err_msg=name
        )
    np.testing.assert_array_equal(file.read("transposed", (slice(1, 3), slice(None))), base.T[1:3].numpy())
    torch.save({f"backbone.{name}": x for name, x in tensors.items()} | {"cls_head.w": base}, tmp_path / "y.pth")
    assert TorchFile(tmp_path / "y.pth", prefix="backbone.").names() == set(tensors)


class Harm:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def archive(path, obj, data=None):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickle.dumps(obj, protocol=2))
        for key, content in (data or {}).items():
            file.writestr(f"x/data/{key}", content)
    return path


def test_code_is_refused_by_name(tmp_path):
    import os

    marker = tmp_path / "marker"
    for function, args, name in (
        (os.mkdir, (str(marker),), "posix.mkdir"),
        (eval, ("1",), "eval"),
        (getattr, ("", "upper"), "getattr"),
    ):
        path = archive(tmp_path / "x.pth", {"model": Harm(function, *args)})
        with pytest.raises(CheckpointError, match=rf"x.pth: names \w+.{name.split('.')[-1]}"):
            read_torch(path)
    assert not marker.exists()


def test_wrong_files(tmp_path, golden):
    with pytest.raises(CheckpointError, match="no such file"):
        read_torch(tmp_path / "none.pth")
    (tmp_path / "old.pth").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="no zip archive"):
        read_torch(tmp_path / "old.pth")
    whole = (golden / "swinbert_tiny/best-checkpoint/model.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="truncated"):
        read_torch(tmp_path / "cut.bin")
    with pytest.raises(CheckpointError, match="ROOT/data.pkl"):
        with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
            file.writestr("a/b.txt", "")
        read_torch(tmp_path / "other.zip")
    with pytest.raises(CheckpointError, match="holds a list"):
        TorchFile(archive(tmp_path / "list.pth", [1, 2]))
    with pytest.raises(CheckpointError, match="'epoch' is no tensor"):
        TorchFile(archive(tmp_path / "number.pth", {"epoch": 3}))
    with pytest.raises(CheckpointError, match="holds no 'model'"):
        TorchFile(archive(tmp_path / "flat.pth", {"epoch": 3}), within=("model",))


@pytest.mark.parametrize("loss", ["bytes", "file"])
def test_tensors_without_their_bytes(tmp_path, loss):
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.ones(100)}, tmp_path / "a.pth")
    with zipfile.ZipFile(tmp_path / "a.pth") as there, zipfile.ZipFile(tmp_path / "b.pth", "w") as damaged:
        for name in there.namelist():
            if name.endswith("data/0") and loss == "file":
                continue
            damaged.writestr(name, there.read(name)[:200] if name.endswith("data/0") else there.read(name))
    with pytest.raises(CheckpointError, match="missing|beyond"):
        TorchFile(tmp_path / "b.pth").read("a", ())


@pytest.mark.slow
def test_fuzz(tmp_path, golden):
    """Flipped bytes of the description give an error of ours or a readable file, never another exception."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(golden / "swinbert_tiny/best-checkpoint/model.bin") as file:
        description = np.frombuffer(file.read("model/data.pkl"), np.uint8)
    refused = 0
    for _ in range(15):
        damaged = description.copy()
        damaged[rng.integers(0, len(damaged), 3)] = rng.integers(0, 256, 3)
        with zipfile.ZipFile(tmp_path / "x.bin", "w") as file:
            file.writestr("model/data.pkl", damaged.tobytes())
        try:
            TorchFile(tmp_path / "x.bin")
        except CheckpointError:
            refused += 1
    assert refused > 0
