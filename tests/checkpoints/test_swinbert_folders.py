import json
import shutil

import jax
import numpy as np
import pytest

from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.swinbert_folders import (
    captioner_config,
    load_captioner,
    load_video_swin,
    save_captioner,
    start_captioner,
)


@pytest.fixture
def folder(golden, tmp_path):
    shutil.copytree(golden / "swinbert_tiny", tmp_path / "model")
    return tmp_path / "model"


def test_round_trip(folder, tmp_path):
    captioner = load_captioner(folder)
    save_captioner(tmp_path / "again", captioner, captioner.params)
    again = load_captioner(tmp_path / "again")
    assert again.config == captioner.config
    jax.tree.map(np.testing.assert_array_equal, again.params, captioner.params)


def test_published_sizes():
    """Without sizes in the folder they are bert-base-uncased's and Swin-B's."""
    args = dict(
        max_num_frames=32, img_res=224, max_seq_length=50, max_gen_length=20, img_feature_dim=512, vidswin_size="base"
    )
    config = captioner_config(args, {}, {}, "args.json")
    assert (config.num_video_tokens, config.bert.vocab_size, config.swin.width) == (784, 30522, 1024)
    assert (
        config.mask == "none" and captioner_config(args | {"learn_mask_enabled": True}, {}, {}, "a").mask == "released"
    )


@pytest.mark.slow
def test_starts(folder):
    """A new mask on old weights; weights drawn anew where there are none, the tower from its own authors' file."""
    torch = pytest.importorskip("torch")
    plain = load_captioner(folder)
    state = torch.load(folder / "best-checkpoint" / "model.bin")
    tower = {f"backbone.{k.removeprefix('swin.backbone.')}": x for k, x in state.items() if k.startswith("swin.")}
    torch.save({"state_dict": tower | {"cls_head.fc_cls.weight": torch.ones(2)}}, folder / "video_swin.pth")
    found = load_video_swin(folder / "video_swin.pth", plain.config.swin)
    jax.tree.map(np.testing.assert_array_equal, found, plain.params["swin"]["backbone"])
    with pytest.raises(CheckpointError, match="would not be used"):
        start_captioner(folder, video_swin=str(folder / "video_swin.pth"))
    assert "learn_vid_att" not in start_captioner(folder, mask="none").params
    del state["learn_vid_att.weight"]
    torch.save(state, folder / "best-checkpoint" / "model.bin")
    drawn = start_captioner(folder, mask="straight_through", seed=1).params["learn_vid_att"]["embedding"]
    assert 0.8 < float(drawn.std()) < 1.2
    shutil.rmtree(folder / "best-checkpoint")
    new = start_captioner(folder, video_swin=str(folder / "video_swin.pth"))
    jax.tree.map(np.testing.assert_array_equal, new.params["swin"], plain.params["swin"])
    assert np.abs(new.params["fc"]["kernel"] - plain.params["fc"]["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(tie_weights=True), "tie_weights"),
        (dict(learned_mask="soft"), "mask is 'soft'"),
        (dict(max_gen_length=1), "max_caption is 1"),
    ],
)
def test_wrong_settings(folder, change, message):
    args = json.loads((folder / "log/args.json").read_text())
    (folder / "log/args.json").write_text(json.dumps(args | change))
    with pytest.raises(CheckpointError, match=message):
        load_captioner(folder)
