"""SwinBERT from a folder in the published layout: best-checkpoint/model.bin, log/args.json, tokenizer/vocab.txt.

The published folders say no sizes: they are bert-base-uncased's and, by `vidswin_size`, Video Swin's. Other sizes are
in bert_config.json and video_swin.json beside them. What is trained here is written in the same layout with
best-checkpoint/model.safetensors in the place of model.bin.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.torch_files import TorchFile
from tspo_jax.checkpoints.weights import Format, Tensors
from tspo_jax.checkpoints.word_pieces import WordPieces
from tspo_jax.models.bert import BertConfig
from tspo_jax.models.bert_captioner import (
    BertCaptioner,
    CaptionerConfig,
    CaptionTokens,
    beam_captions,
    greedy_captions,
)
from tspo_jax.models.layers import abstract_module, merge_params, split_params
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.models.video_swin import VideoSwin, VideoSwinConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SWIN_SIZES = {
    "tiny": dict(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "small": dict(embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "base": dict(),
    "large": dict(embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48)),
}
VIDEO_SWIN = Format(  # Video Swin's own files, of which `backbone.` is cut off
    rename=((r"^stage(\d+)\.", r"layers.\1."),),
    ignored=(r"\.relative_position_index$",),
)
SWINBERT = Format(
    rename=(
        (r"^swin\.backbone\.stage(\d+)\.", r"swin.backbone.layers.\1."),
        (r"^trans_encoder\.bert\.encoder\.layers\.", "trans_encoder.bert.encoder.layer."),
    ),
    ignored=(
        r"\.relative_position_index$",
        r"\.position_ids$",
        r"^trans_encoder\.bert\.pooler\.",
        r"^trans_encoder\.cls_img_feat\.",
    ),
)


def captioner_config(args: Mapping, bert: Mapping, swin: Mapping, source: str | Path) -> CaptionerConfig:
    """From log/args.json, bert_config.json and video_swin.json ({} where a folder has none).

    Raises: CheckpointError naming `source` where a field is missing or asks for what is not supported.
    """
    needed = ("max_num_frames", "img_res", "max_seq_length", "max_gen_length", "img_feature_dim", "vidswin_size")
    if lost := [name for name in needed if name not in args]:
        raise CheckpointError(f"{source}: lacks {', '.join(lost)}")
    if args.get("tie_weights") or args.get("add_od_labels") or not args.get("grid_feat", True):
        raise CheckpointError(f"{source}: tie_weights, add_od_labels and grid_feat=false are not supported")
    if not swin and args["vidswin_size"] not in SWIN_SIZES:
        raise CheckpointError(f"{source}: vidswin_size {args['vidswin_size']!r} is none of {', '.join(SWIN_SIZES)}")
    mask = "none"
    if args.get("learn_mask_enabled"):
        mask = args.get("learned_mask", "released")
    try:
        return CaptionerConfig(
            BertConfig.from_hf(dict(bert)),
            VideoSwinConfig.from_json(dict(swin)) if swin else VideoSwinConfig(**SWIN_SIZES[args["vidswin_size"]]),
            args["img_feature_dim"],
            args["max_num_frames"],
            args["img_res"],
            args["max_seq_length"],
            args["max_gen_length"],
            mask,
            bool(args.get("sparse_mask_soft2hard", False)),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Captioner:
    """SwinBERT from a folder; `identity` names the checkpoint."""

    folder: Path
    config: CaptionerConfig
    graphdef: nnx.GraphDef
    params: dict
    tokenizer: WordPieces
    processor: ImageProcessor
    identity: str

    @property
    def tokens(self) -> CaptionTokens:
        return CaptionTokens(*(self.tokenizer[name] for name in ("[CLS]", "[SEP]", "[MASK]", "[PAD]")))

    def frame_places(self, num_frames: int) -> np.ndarray:
        """The frames of a clip of `num_frames` that are looked at: evenly, the first and the last included."""
        T = self.config.num_frames
        return np.round(np.arange(T) * (num_frames - 1) / (T - 1)).astype(int) if T > 1 else np.zeros(1, int)

    def caption(self, frames: np.ndarray, beams: int = 1) -> tuple[str, float]:
        """The caption of a clip uint8 [n, H, W, 3] and its confidence, the geometric mean of its words' probabilities
        (of beams: exp of the score that it was kept for)."""
        if not len(frames):
            raise ValueError("a clip without frames has no caption")
        if beams < 1:
            raise ValueError(f"beams is {beams}; it must be at least 1")
        shown = np.stack([self.processor.crop(frames[i]) for i in self.frame_places(len(frames))])[None]
        found = jax.tree.map(np.asarray, self._write(self.params, shown, beams))
        return self.tokenizer.decode(found.ids[0, 1:]), float(np.exp(found.log_prob[0]))

    @cached_property
    def _write(self):
        def run(params, frames, beams):
            model = merge_params(self.graphdef, params)
            video = model.encode(model.video_tokens(self.processor.normalize(frames)))
            if beams == 1:
                return greedy_captions(model, video, self.tokens)[0]
            return beam_captions(model, video, self.tokens, beams)

        return jax.jit(run, static_argnums=2)


def read_captioner_config(folder: str | Path) -> CaptionerConfig:
    folder = Path(folder)
    bert, swin = (
        weights.read_config(folder, name) if (folder / name).is_file() else {}
        for name in ("bert_config.json", "video_swin.json")
    )
    args = weights.read_config(folder, "log/args.json")
    return captioner_config(args, bert, swin, folder / "log" / "args.json")


def load_captioner(
    folder: str | Path, *, hard_mask: bool | None = None, max_caption: int | None = None, dtype: jnp.dtype = jnp.float32
) -> Captioner:
    """SwinBERT of a folder.

    Args:
      hard_mask: of the `released` mask, instead of what args.json says.
      max_caption: tokens of a caption, [CLS] and [SEP] included, instead of what args.json says.
    Raises: CheckpointError listing every missing, unexpected or misshapen tensor.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    config = read_captioner_config(folder)
    if hard_mask is not None:
        config = dataclasses.replace(config, hard_mask=hard_mask)
    if max_caption is not None:
        config = dataclasses.replace(config, max_caption=max_caption)
    files = captioner_tensors(folder)
    graphdef, abstract = abstract_module(partial(_make, config))
    params = weights.load_params(files, abstract, SWINBERT, dtype=dtype)
    tokenizer = WordPieces(folder / "tokenizer", lowercase=_is_lowercase(folder))
    if len(tokenizer) != config.bert.vocab_size:
        raise CheckpointError(
            f"{folder}/tokenizer/vocab.txt: {len(tokenizer)} pieces, the model has {config.bert.vocab_size}"
        )
    identity = weights.tensors_identity(files, json.loads(json.dumps(dataclasses.asdict(config))))
    return Captioner(folder, config, graphdef, params, tokenizer, _processor(config), identity)


def _processor(config: CaptionerConfig) -> ImageProcessor:
    size = config.image_size
    return ImageProcessor(size, IMAGENET_MEAN, IMAGENET_STD, True, size, Image.Resampling.BILINEAR)


def start_captioner(folder: str | Path, *, mask: str = "", video_swin: str = "", seed: int = 0) -> Captioner:
    """What training starts from: the model of a folder, or, where that has no best-checkpoint, one of random weights.

    Args:
      mask: of bert_captioner.MASKS, instead of what args.json says; one that a file lacks starts from N(0, 1).
      video_swin: file of Video Swin's own authors that a new model's tower comes from.
    """
    folder = Path(folder)
    config = read_captioner_config(folder)
    config = dataclasses.replace(config, mask=mask or config.mask)
    has_weights = (folder / "best-checkpoint").is_dir()
    if has_weights and video_swin:
        raise CheckpointError(f"{folder}: has weights of its own (best-checkpoint); {video_swin} would not be used")
    if has_weights:
        graphdef, abstract = abstract_module(partial(_make, config))
        files = captioner_tensors(folder)
        has_mask = "learn_vid_att.weight" in files.names()
        mask_only = {} if has_mask or config.mask == "none" else {"learn_vid_att": abstract.pop("learn_vid_att")}
        ignored = SWINBERT.ignored if config.mask != "none" else (*SWINBERT.ignored, r"^learn_vid_att\.")
        params = weights.load_params(files, abstract, dataclasses.replace(SWINBERT, ignored=ignored))
        params |= jax.tree.map(lambda x: jax.random.normal(jax.random.key(seed), x.shape, x.dtype), mask_only)
    else:
        graphdef, params = split_params(_make(config, nnx.Rngs(seed)))
        if video_swin:
            params["swin"]["backbone"] = load_video_swin(video_swin, config.swin)
    tokenizer = WordPieces(folder / "tokenizer", lowercase=_is_lowercase(folder))
    return Captioner(folder, config, graphdef, params, tokenizer, _processor(config), "")


def save_captioner(folder: str | Path, captioner: Captioner, params: dict) -> None:
    """Writes a folder that `load_captioner` reads: the settings and tokenizer of `captioner` with these weights."""
    folder, config = Path(folder), captioner.config
    weights.save_params(folder / "best-checkpoint", params, SWINBERT)
    args = weights.read_config(captioner.folder, "log/args.json")
    args |= {"learn_mask_enabled": config.mask != "none", "learned_mask": config.mask}
    for name, fields in (
        ("log/args.json", args),
        ("bert_config.json", dataclasses.asdict(config.bert)),
        ("video_swin.json", dataclasses.asdict(config.swin)),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(fields, indent=1) + "\n")
    shutil.copytree(captioner.folder / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)


def _make(config: CaptionerConfig, rngs: nnx.Rngs) -> BertCaptioner:
    return BertCaptioner(config, rngs=rngs)


def captioner_tensors(folder: Path) -> Tensors:
    inside = folder / "best-checkpoint"
    if (inside / "model.bin").is_file():
        return TorchFile(inside / "model.bin")
    return weights.SafetensorsFolder(inside)


def _is_lowercase(folder: Path) -> bool:
    return bool(weights.read_config(folder, "log/args.json").get("do_lower_case", True))


def load_video_swin(path: str | Path, config: VideoSwinConfig) -> dict:
    """Parameters of Video Swin from a file of its own authors, e.g. swin_base_patch244_window877_kinetics600_22k.pth:
    what training a captioner starts from."""
    files = TorchFile(path, within=("state_dict",), prefix="backbone.")
    _, abstract = abstract_module(lambda rngs: VideoSwin(config, rngs=rngs))
    return weights.load_params(files, abstract, VIDEO_SWIN)
