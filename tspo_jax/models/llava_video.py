"""LLaVA-Video: SigLIP tower, projector, 2x2 pooling, newline tokens, Qwen2 (Zhang et al. 2024)."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.family import Family
from tspo_jax.models.layers import Mlp
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.models.qwen2 import KVCache, Qwen2, Qwen2Config, rope_angles
from tspo_jax.models.siglip import SiglipConfig, SiglipVision
from tspo_jax.models.token_budget import Budget, merge_visual, rows_closed
from tspo_jax.models.video_prompt import DEFAULT_VIDEO, FrameTimes, Prompt, VideoOptions, splice
from tspo_jax.models.video_tags import IMAGE_TAG

POOL_MODES = ("bilinear", "average", "max")
NEWLINES = ("grid", "frame", "one_token", "no_token")


@dataclasses.dataclass(frozen=True)
class LlavaVideoConfig:
    language: Qwen2Config
    vision: SiglipConfig
    pool_mode: str = "bilinear"
    newline: str = "grid"
    has_newline_parameter: bool = True
    video: VideoOptions = DEFAULT_VIDEO

    @classmethod
    def from_hf(cls, config: dict) -> "LlavaVideoConfig":
        """From config.json of lmms-lab's layout, or of llava-hf's LLaVA-OneVision (see `from_llava_hf`).

        `vision_config` counts the layers of the published tower, of which the last is never run; without it the tower
        is so400m-patch14-384. A `flat` merge type has no newline; the pooling stride is always 2 (the original ignores
        mm_spatial_pool_stride).
        """
        if config.get("model_type") == "llava_onevision":
            return cls.from_llava_hf(config)
        if config.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
            raise ValueError(f"config.json: mm_projector_type {config['mm_projector_type']!r}, not mlp2x_gelu")
        vision = _vision_fields(config)
        if "num_hidden_layers" in vision:
            vision["num_hidden_layers"] -= 1
        merge = config.get("mm_patch_merge_type", "flat")
        newline = config.get("mm_newline_position", "one_token") if merge.startswith("spatial") else "no_token"
        if newline == "one_token" and "unpad" not in merge:
            newline = "no_token"
        pool_mode = config.get("mm_spatial_pool_mode", "bilinear")
        if pool_mode not in POOL_MODES:
            raise ValueError(f"config.json: mm_spatial_pool_mode {pool_mode!r} is none of {POOL_MODES}")
        if newline not in NEWLINES:
            raise ValueError(f"config.json: mm_newline_position {newline!r} is none of {NEWLINES}")
        if newline != "no_token" and "unpad" not in merge:
            raise ValueError(f"config.json: mm_newline_position {newline!r} needs mm_patch_merge_type spatial_unpad")
        return cls(Qwen2Config.from_hf(config), SiglipConfig(**vision), pool_mode, newline, "unpad" in merge)

    @classmethod
    def from_llava_hf(cls, config: dict) -> "LlavaVideoConfig":
        """From the nested config.json of LlavaOnevisionForConditionalGeneration: its `vision_config` counts the layers
        that run, and a video is bilinearly pooled frames with one newline behind them."""
        expected = {
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
        }
        for field, value in expected.items():
            if config.get(field, value) != value:
                raise ValueError(f"config.json: {field} is {config[field]!r}; only {value!r} is supported")
        text = dict(config.get("text_config") or {})
        text["tie_word_embeddings"] = config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))
        return cls(Qwen2Config.from_hf(text), SiglipConfig(**_vision_fields(config)), "bilinear", "one_token", True)

    @property
    def pooled_side(self) -> int:
        """Tokens per side of a frame after pooling: rounded up for bilinear, down for average and max."""
        return math.ceil(self.vision.side / 2) if self.pool_mode == "bilinear" else self.vision.side // 2

    @property
    def temporal_patch_size(self) -> int:
        """Frames that are encoded together."""
        return 1

    def write_times(self, prompt: str, times: FrameTimes) -> str:
        """A rendered prompt, with the sentence of LLaVA-Video's own evaluation about the video's length and the frames'
        times before the question, where `time_instruction` says so. Raises ValueError where the length is not known.
        """
        if not self.video.time_instruction:
            return prompt
        if times.duration is None:
            raise ValueError("time_instruction says how long the video is, but only its frames are known")
        of_frames = ",".join(f"{second:.2f}s" for second in times.seconds)
        sentence = (
            f"The video lasts for {times.duration:.2f} seconds, and {len(times.seconds)} frames are uniformly sampled "
            f"from it. These frames are located at {of_frames}.Please answer the following questions related to this "
            "video."
        )
        return prompt.replace(f"{IMAGE_TAG}\n", f"{IMAGE_TAG}\n{sentence}\n")

    def time_steps(self, times: FrameTimes) -> None:
        """Nothing: the tokens of frames have no times."""

    def num_visual_tokens(self, num_frames: int, *frame_size: int) -> int:
        """Visual tokens of a prompt with `num_frames` frames, newlines included; all frames are of the tower's size."""
        side = self.pooled_side
        frames, patches = num_frames, side * side
        if self.video.merge:
            frames, patches = Budget.of(self.video.merge).left(frames, patches)
        return {
            "grid": frames * (patches + side),
            "frame": frames * (patches + 1),
            "one_token": frames * patches + 1,
            "no_token": frames * patches,
        }[self.newline]


def _vision_fields(config: dict) -> dict:
    names = {field.name for field in dataclasses.fields(SiglipConfig)}
    return {name: value for name, value in (config.get("vision_config") or {}).items() if name in names}


def pool_2x2(x: jax.Array, mode: str) -> jax.Array:
    """Halves a grid of tokens [F, S, S, W]. Bilinear: no antialiasing, half-pixel centres, ceil(S / 2) per side."""
    F, S, _, W = x.shape
    if mode == "bilinear":
        side = math.ceil(S / 2)
        return jax.image.resize(x, (F, side, side, W), "bilinear", antialias=False)
    side = S // 2
    blocks = x[:, : 2 * side, : 2 * side].reshape(F, side, 2, side, 2, W)
    return blocks.mean((2, 4)) if mode == "average" else blocks.max((2, 4))


def insert_newlines(tokens: jax.Array, newline: jax.Array | None, position: str) -> jax.Array:
    """Frames' tokens [..., K, rows, columns, W] -> the prompt's visual tokens [..., M, W]: frame, row, column."""
    *lead, K, rows, columns, W = tokens.shape
    if position == "no_token":
        return tokens.reshape(*lead, K * rows * columns, W)
    newline = newline.astype(tokens.dtype)
    if position == "grid":
        closed = jnp.concatenate([tokens, jnp.broadcast_to(newline, (*lead, K, rows, 1, W))], axis=-2)
        return closed.reshape(*lead, K * rows * (columns + 1), W)
    if position == "frame":
        frames = tokens.reshape(*lead, K, rows * columns, W)
        frames = jnp.concatenate([frames, jnp.broadcast_to(newline, (*lead, K, 1, W))], axis=-2)
        return frames.reshape(*lead, K * (rows * columns + 1), W)
    flat = tokens.reshape(*lead, K * rows * columns, W)
    return jnp.concatenate([flat, jnp.broadcast_to(newline, (*lead, 1, W))], axis=-2)


class LlavaVideo(nnx.Module):
    """The answering Video-MLLM. Frames are encoded apart from the prompts, so that a frame that several prompts show
    is encoded once: `encode_frames`, then a gather, then `prompt`, `prefill` and `decode` (rollout.py)."""

    def __init__(self, cfg: LlavaVideoConfig, *, rngs: nnx.Rngs):
        self.vision_tower = SiglipVision(cfg.vision, rngs=rngs)
        width = cfg.language.hidden_size
        self.mm_projector = Mlp(cfg.vision.hidden_size, width, width, "gelu", rngs=rngs)
        if cfg.has_newline_parameter:
            self.image_newline = nnx.Param(0.02 * jax.random.normal(rngs.params(), (width,)))
        self.language_model = Qwen2(cfg.language, rngs=rngs)
        self.cfg = cfg

    def encode_frames(self, pixels: jax.Array) -> jax.Array:
        """Preprocessed frames float [F, S, S, 3] -> pooled tokens [F, s, s, hidden]."""
        return self.project(self.tower(pixels))

    def tower(self, pixels: jax.Array) -> jax.Array:
        """What the image tower alone makes of the frames: features [F, side * side, width]."""
        return self.vision_tower(pixels)

    def project(self, features: jax.Array) -> jax.Array:
        """The tower's features as visual tokens [F, s, s, hidden] of the language model."""
        return self.pool(self.mm_projector(features))

    def pool(self, tokens: jax.Array) -> jax.Array:
        """Projected tokens of frames [F, side * side, hidden] -> [F, s, s, hidden]."""
        side = self.cfg.vision.side
        return pool_2x2(tokens.reshape(-1, side, side, tokens.shape[-1]), self.cfg.pool_mode)

    def embed_prompt(self, frame_tokens: jax.Array, ids: jax.Array, used: jax.Array | None = None) -> jax.Array:
        """Text embeddings with the visual tokens spliced in where `ids` says VIDEO_TOKEN.

        Args:
          frame_tokens: [P, K, s, s, hidden], the frames of each of P prompts.
          ids: int [P, N], right padded, exactly one VIDEO_TOKEN per row.
          used: int [P], visual tokens of those frames that are no padding; None = of all.
        Returns:
          [P, N - 1 + M, hidden] with M visual tokens.
        """
        newline = self.image_newline[...] if self.cfg.has_newline_parameter else None
        visual = self._visual(frame_tokens, newline)
        if used is not None and self.cfg.newline == "one_token":  # it stands behind the last frame
            visual = visual.at[jnp.arange(len(used)), used - 1].set(newline.astype(visual.dtype))
        return splice(self.language_model.embed_tokens(jnp.maximum(ids, 0)), visual[:, None], ids, used)

    def _visual(self, tokens: jax.Array, newline: jax.Array | None) -> jax.Array:
        """Frames' tokens [P, K, s, s, hidden] -> the prompt's visual tokens [P, M, hidden], merged where that is asked
        for."""
        budget = Budget.of(self.cfg.video.merge)
        if not any(budget):
            return insert_newlines(tokens, newline, self.cfg.newline)
        P, K, side, _, W = tokens.shape
        merged = merge_visual(tokens.reshape(P, K, side * side, W), budget)
        if self.cfg.newline == "grid":
            return rows_closed(merged.tokens, merged.places, newline.astype(tokens.dtype), side)
        return insert_newlines(merged.tokens[..., None, :], newline, self.cfg.newline)

    def prompt(
        self,
        frame_tokens: jax.Array,
        ids: jax.Array,
        lengths: jax.Array,
        steps: jax.Array | None = None,
        num_frames: jax.Array | None = None,
    ) -> Prompt:
        """`embed_prompt` with lengths int [P], of the ids. `steps` are not looked at. Only the first num_frames int [P]
        of each prompt's frames are shown, if given; they cannot be merged then."""
        used = None if num_frames is None else self.cfg.num_visual_tokens(num_frames)
        embeddings = self.embed_prompt(frame_tokens, ids, used)
        P, N, _ = embeddings.shape
        lengths = lengths + (N - ids.shape[1] if used is None else used - 1)
        return Prompt(embeddings, jnp.broadcast_to(jnp.arange(N), (P, N)), lengths, following=lengths)

    def angles(self, positions: jax.Array) -> jax.Array:
        """Rotary angles float32 [P, N, head_dim // 2] of a prompt's or an answer's positions, int [P, N]."""
        return rope_angles(positions, self.cfg.language.head_dim, self.cfg.language.rope_theta)

    def prefill(self, prompt: Prompt) -> tuple[jax.Array, KVCache, jax.Array]:
        """Logits float32 [P, V] at each prompt's last token, the keys and values of all N slots, and the position of
        the next token, int [P]."""
        hidden, cache = self.language_model.prefill(prompt.embeddings, prompt.positions, prompt.lengths - 1)
        return self.language_model.logits(hidden), cache, prompt.following

    def decode(self, token: jax.Array, position: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """One step: tokens int [P] at positions int [P] -> logits float32 [P, V] of the next, and the cache."""
        hidden, cache = self.language_model(self.language_model.embed_tokens(token[:, None]), position[:, None], cache)
        return self.language_model.logits(hidden[:, 0]), cache


# ---- the family ------------------------------------------------------------------------------------------


def read(description: Mapping, preprocessing: Mapping, video: VideoOptions):
    """The network's config and processor; see models/family.py."""
    Budget.of(video.merge)
    if video.merge and video.merge[0] and video.time_instruction:
        raise ValueError("time_instruction tells the time of every frame; which of them merge is not known before")
    if dataclasses.replace(video, time_instruction=False, merge=()) != DEFAULT_VIDEO:
        raise ValueError(
            "LLaVA-Video shows every frame at its tower's size, and times by time_instruction alone: it cannot do "
            f"{video}"
        )
    config = dataclasses.replace(LlavaVideoConfig.from_hf(description), video=video)
    return config, ImageProcessor.siglip(config.vision.image_size)


FAMILY = Family(
    model_types=("llava_qwen", "llava_onevision"),
    model=LlavaVideo,
    read=read,
    names=dict(
        rename=(
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^language_model\.", "model."),
            (r"^vision_tower\.", "model.vision_tower.vision_tower."),
            (r"^mm_projector\.linear_1\.", "model.mm_projector.0."),
            (r"^mm_projector\.linear_2\.", "model.mm_projector.2."),
            (r"^image_newline$", "model.image_newline"),
        ),
        ignored=(
            r"\.rotary_emb\.inv_freq$",
            r"\.position_ids$",
            r"^multiModal_align\.",
            r"^model\.vision_tower\.vision_tower\.vision_model\.head\.",
        ),
        aliases=(  # llava-hf's names, those that transformers gives them since 4.52 and since 5
            (r"^language_model\.lm_head\.", "lm_head."),
            (r"^(language_model\.model|model\.language_model)\.", "model."),
            (
                r"^(model\.)?vision_tower\.(?!vision_tower\.)(vision_model\.)?",
                "model.vision_tower.vision_tower.vision_model.",
            ),
            (r"^(model\.)?multi_modal_projector\.linear_1\.", "model.mm_projector.0."),
            (r"^(model\.)?multi_modal_projector\.linear_2\.", "model.mm_projector.2."),
            (r"^image_newline$", "model.image_newline"),
        ),
    ),
    sharding=(
        # SigLIP: whole on every device, which encode different frames; split over `model` it would spend as long on
        # sums
        (r"vision_tower\..*\.(embeddings\..*|layer_norm[12]\..*|post_layernorm\..*)", ()),
        (r"vision_tower\..*\.([qkv]_proj|fc1)\.kernel", (None, "width", None)),
        (r"vision_tower\..*\.(out_proj|fc2)\.kernel", (None, None, "width")),
        (r"vision_tower\..*\.bias", ()),
        # LLaVA-Video's projector
        (r"mm_projector\.linear_1\.kernel", ("width", None)),
        (r"mm_projector\.linear_2\.kernel", (None, "width")),
        (r"mm_projector\.linear_[12]\.bias|image_newline", ()),
    ),
    tower=("vision_tower.",),
    templates={
        # Of training and of the demo, and of the published evaluation numbers, exactly as the original has them.
        "qwen_1_5": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\n{text}<|im_end|>\n<|im_start|>assistant\n",
        "chatml_direct": "<|im_start|>system\nAnswer the questions.<|im_end|>"
        "<|im_start|>user\n<image>\n{text}<|im_end|><|im_start|>assistant\n",
    },
)
