"""TESTA and BLIP from folders: released `.pth` files, our own safetensors, and Hugging Face's BLIP, whose image tower
becomes a video tower that at first sees every frame alone.

A folder holds vocab.txt of BERT and one of
- config.json with `model_type` "testa", and *.safetensors or one *.pth;
- one *.pth alone: a released file, of the published sizes (ViT-B/16, BERT base);
- config.json with `model_type` "blip" and *.safetensors.
"""

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.torch_files import TorchFile, read_torch
from tspo_jax.checkpoints.weights import Format, Tensors
from tspo_jax.checkpoints.word_pieces import WordPieces
from tspo_jax.models.bert import BertConfig
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.preprocessing import CLIP_MEAN, CLIP_STD, ImageProcessor
from tspo_jax.models.testa import Testa, TestaConfig
from tspo_jax.models.timesformer import TimesformerConfig, merging_schedule

MODEL_TYPE = "testa"
MAX_TEXT = 64  # tokens of a query, as the fine-tuned models were trained with

_BLIP_TOWER = (  # Hugging Face's names -> the released ones
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm([12])\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"visual_encoder.blocks.\1.attn."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1."),
)
TESTA = Format(
    rename=((r"(text_encoder|text_decoder\.bert)\.encoder\.layers\.", r"\1.encoder.layer."),),
    ignored=(
        r"\.position_ids$",
        r"(_m|_queue|queue_ptr)(\.|$)",  # momentum copies and the queues of training
        r"\.temporal_scaling$",  # dropped by the original as well, where the configuration does not ask for it
        r"^text_decoder\.cls\.predictions\.decoder\.bias$",  # a second name of predictions.bias
    ),
    aliases=_BLIP_TOWER,
)


class _Filled:
    """Tensors of a file with some that it lacks taken from others, or constant (weights.Tensors).

    Args:
      same_as: (pattern, replacement) of names that are equal to another one where the file lacks them.
      constant: name -> (shape, value) of tensors that the file lacks.
    """

    def __init__(self, files: Tensors, wanted: Sequence[str], same_as, constant: Mapping[str, tuple]):
        self.folder, self._files = files.folder, files
        self._of = {TESTA.canonical(name): name for name in files.names()}
        for name in wanted:
            for pattern, replacement in same_as:
                other = re.sub(pattern, replacement, name)
                if name not in self._of and other != name and other in self._of:
                    self._of[name] = self._of[other]
        self._constant = {name: x for name, x in constant.items() if name in set(wanted) - self._of.keys()}

    def names(self) -> set[str]:
        return set(self._of) | set(self._constant)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._constant[name][0] if name in self._constant else self._files.shape(self._of[name])

    def type(self, name: str) -> str:
        return "F32" if name in self._constant else self._files.type(self._of[name])

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        if name in self._constant:
            whole = np.full(*self._constant[name], np.float32)
            return whole[index] if index else whole
        return self._files.read(self._of[name], index)


# In a released file the output table has its own name though it is the embedding table; Hugging Face drops it.
_TIED = (r"^(text_decoder)\.cls\.predictions\.decoder\.weight$", r"\1.bert.embeddings.word_embeddings.weight")
# How TESTA starts from BLIP: time is looked at as space is, and nothing of it is added yet.
_FROM_BLIP = (
    (r"^(visual_encoder\.blocks\.\d+)\.temporal_attn\.", r"\1.attn."),
    (r"^(visual_encoder\.blocks\.\d+)\.temporal_norm1\.", r"\1.norm1."),
)


def testa_config(description: Mapping, source: str | Path = "config.json", **other) -> TestaConfig:
    """From the fields `vision`, `text`, `embed_dim`, `answers`, `merging_type` and `testa_r` of a config.json; what is
    left out is as published. `other` replaces fields of the tower (num_frames, merging).

    Raises: CheckpointError naming `source` for fields that are unknown or do not fit.
    """
    known = {"vision", "text", "embed_dim", "answers", "merging_type", "testa_r", "model_type", "special"}
    if strange := sorted(description.keys() - known - set(weights.PROVENANCE)):
        raise CheckpointError(f"{source}: unknown fields {', '.join(strange)}")
    kinds = {"vision": Mapping | None, "text": Mapping | None, "testa_r": list | tuple | None}
    kinds |= {"embed_dim": int, "answers": bool}
    for name in kinds.keys() & description.keys():
        if not isinstance(description[name], kinds[name]):
            raise CheckpointError(f"{source}: {name} cannot be {description[name]!r}")
    vision = dict(description.get("vision") or {})
    if "vision_width" in vision:
        vision["width"] = vision.pop("vision_width")
    if vision.pop("attention_type", "divided_space_time") != "divided_space_time":
        raise CheckpointError(f"{source}: vision.attention_type must be divided_space_time")
    names = {field.name for field in dataclasses.fields(TimesformerConfig)}
    if strange := sorted(vision.keys() - names):
        raise CheckpointError(f"{source}: unknown fields vision.{', vision.'.join(strange)}")
    try:
        tower = TimesformerConfig(**vision)
        if numbers := description.get("testa_r"):
            schedule = merging_schedule(description.get("merging_type", "frame&patch"), numbers, tower.depth)
            tower = dataclasses.replace(tower, **schedule)
        tower = dataclasses.replace(tower, **other)
        sizes = {"vocab_size": 30524, "type_vocab_size": 0} | dict(description.get("text") or {})
        text = BertConfig.from_hf(sizes | {"cross_width": tower.width})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error
    return TestaConfig(tower, text, int(description.get("embed_dim", 256)), bool(description.get("answers", False)))


def _blip_description(config: Mapping, source: Path, names: set[str]) -> dict:
    """A config.json of Hugging Face's BLIP in TESTA's fields."""
    vision = {"image_size": 384, "patch_size": 16, "hidden_size": 768, "num_hidden_layers": 12} | dict(
        config.get("vision_config") or {}
    )
    vision = {"num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-5} | vision
    if vision.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"{source}: vision_config.hidden_act is {vision['hidden_act']!r}, not gelu")
    if vision["intermediate_size"] % vision["hidden_size"]:
        raise CheckpointError(f"{source}: vision_config.intermediate_size is no multiple of hidden_size")
    text = {"vocab_size": 30524, "num_attention_heads": 8} | dict(config.get("text_config") or {})
    return {
        "vision": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "width": vision["hidden_size"],
            "depth": vision["num_hidden_layers"],
            "num_heads": vision["num_attention_heads"],
            "mlp_ratio": vision["intermediate_size"] // vision["hidden_size"],
            "layer_norm_eps": vision["layer_norm_eps"],
        },
        "text": text | {"type_vocab_size": 0},
        "embed_dim": config.get("image_text_hidden_size", 256) if "vision_proj.weight" in names else 0,
        "answers": any(name.startswith("text_decoder.") for name in names),
    }


@dataclasses.dataclass(frozen=True)
class TestaModel:
    """TESTA from a folder; `identity` names the checkpoint and its schedule, which features are tied to."""

    folder: Path
    config: TestaConfig
    graphdef: nnx.GraphDef
    params: dict
    tokenizer: WordPieces
    processor: ImageProcessor
    identity: str

    @property
    def width(self) -> int:
        return self.config.embed_dim

    @property
    def num_frames(self) -> int:
        """Frames of a video, or of a stretch of one, that are seen together."""
        return self.config.vision.num_frames

    def video_features(self, clips: np.ndarray) -> np.ndarray:
        """Unit vectors float32 [n, E] of clips uint8 [n, T, H, W, 3], one clip after another."""
        return np.concatenate([np.asarray(self._features(self.params, self._pixels(clip))) for clip in clips])

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors float32 [len(texts), E]."""
        return np.asarray(self._text(self.params, *self.token_ids(texts, "[CLS]")))

    def token_ids(self, texts: Sequence[str], first: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 [n, N] behind the token `first` ([CLS] for a text alone, [ENC] with a video), and their mask."""
        return self.tokenizer.batch(texts, first, self._max_text)

    def matching(self, clips: np.ndarray, text: str) -> np.ndarray:
        """Logits float32 [n, 2] (no, yes) that a text is about clips uint8 [n, T, H, W, 3]."""
        ids = self.token_ids([text], "[ENC]")
        return np.concatenate([np.asarray(self._match(self.params, self._pixels(clip), *ids)) for clip in clips])

    def answer(self, clip: np.ndarray, question: str, answers: Sequence[str], k: int = 128) -> list[tuple[str, float]]:
        """The answers to a question about a clip uint8 [T, H, W, 3] with their losses, the best first: the `k` that
        begin most likely. Raises ValueError for a model without the decoder, or without answers."""
        if not self.config.answers:
            raise ValueError(f"{self.folder}: holds no decoder of answers")
        if not answers:
            raise ValueError("there are no answers to rank")
        ids, mask = self.tokenizer.batch(
            answers, "[DEC]", 2 + max(len(self.tokenizer.encode(text)) for text in answers)
        )
        question = self.tokenizer.batch([question], "[ENC]", min(35, self._max_text))
        found = jax.tree.map(np.asarray, self._rank(self.params, self._pixels(clip), *question, ids, mask, k))
        order = np.argsort(found.nll[0], kind="stable")
        return [(answers[found.candidates[0, i]], float(found.nll[0, i])) for i in order]

    @property
    def _max_text(self) -> int:
        return min(MAX_TEXT, self.config.text.max_position_embeddings)

    def _pixels(self, clip: np.ndarray) -> np.ndarray:
        return np.stack([self.processor.crop(frame) for frame in clip])[None]

    def _model(self, params):
        return merge_params(self.graphdef, params)

    @cached_property
    def _features(self):
        def run(params, pixels):
            model = self._model(params)
            return model.video_features(model.video_tokens(self.processor.normalize(pixels)))

        return jax.jit(run)

    @cached_property
    def _text(self):
        return jax.jit(lambda params, ids, mask: self._model(params).text_features(ids, mask))

    @cached_property
    def _match(self):
        def run(params, pixels, ids, mask):
            model = self._model(params)
            return model.matching_logits(model.video_tokens(self.processor.normalize(pixels)), ids, mask)

        return jax.jit(run)

    @cached_property
    def _rank(self):
        def run(params, pixels, question, question_mask, ids, mask, k):
            model = self._model(params)
            tokens = model.video_tokens(self.processor.normalize(pixels))
            states = model.question_states(tokens, question, question_mask)
            return model.rank_answers(states, question_mask, ids, mask, k)

        return jax.jit(run, static_argnums=6)


def load_testa(
    folder: str | Path,
    *,
    num_frames: int | None = None,
    testa_r: Sequence[int] | None = None,
    merging_type: str = "frame&patch",
    dtype: jnp.dtype = jnp.float32,
) -> TestaModel:
    """TESTA or BLIP of a folder (see above).

    Args:
      num_frames: seen together; default: as the folder says. Other numbers take the nearest time embeddings.
      testa_r: tokens that each block merges, instead of those that the folder says (models/timesformer.py).
    Raises: CheckpointError listing every missing, unexpected or misshapen tensor, and for a schedule that does not fit.
    """
    folder = Path(folder)
    files, description, is_blip = _open(folder)
    source = folder / "config.json"
    if testa_r is not None:
        description = dict(description) | {"testa_r": list(testa_r), "merging_type": merging_type}
    config = testa_config(description, source)
    if is_blip and num_frames:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_frames=num_frames))
    graphdef, abstract = abstract_module(lambda rngs: Testa(config, rngs=rngs))
    wanted = {
        name: leaf.shape
        for path, leaf in weights.flatten(abstract).items()
        for name in TESTA.file_names(path, leaf.shape)
    }
    tower, constant = config.vision, {}
    if is_blip:
        constant = {
            f"visual_encoder.blocks.{i}.temporal_fc.weight": ((tower.width,) * 2, 0.0) for i in range(tower.depth)
        }
        constant |= {f"visual_encoder.blocks.{i}.temporal_fc.bias": ((tower.width,), 0.0) for i in range(tower.depth)}
        constant |= {"visual_encoder.time_embed": ((1, tower.num_frames, tower.width), 0.0), "temp": ((), 0.07)}
    filled = _Filled(files, list(wanted), (_TIED, *(_FROM_BLIP if is_blip else ())), constant)
    params = weights.load_params(filled, abstract, _without_parts(config), dtype=dtype)
    if num_frames and not is_blip:
        config = dataclasses.replace(config, vision=dataclasses.replace(config.vision, num_frames=num_frames))
        params["visual_encoder"]["time_embed"] = _nearest_rows(params["visual_encoder"]["time_embed"], num_frames)
        graphdef, _ = abstract_module(lambda rngs: Testa(config, rngs=rngs))
    tokenizer = WordPieces(folder, ("[DEC]", "[ENC]"))
    if len(tokenizer) > config.text.vocab_size:
        raise CheckpointError(
            f"{folder}/vocab.txt: {len(tokenizer)} pieces with [DEC] and [ENC], the model has {config.text.vocab_size}"
        )
    identity = weights.tensors_identity(files, json.loads(json.dumps(dataclasses.asdict(config))))
    processor = ImageProcessor(tower.image_size, CLIP_MEAN, CLIP_STD, keep_aspect=False)
    return TestaModel(folder, config, graphdef, params, tokenizer, processor, identity)


def save_testa(folder: str | Path, model: TestaModel, params: dict) -> None:
    """Writes a folder that `load_testa` reads: the configuration and vocabulary of `model` with these weights."""
    folder, config = Path(folder), model.config
    weights.save_params(folder, params, TESTA)
    tower = dataclasses.asdict(config.vision)
    schedule, has_flag = tower.pop("merging"), tower.pop("frame_flag")
    description = {
        "model_type": MODEL_TYPE,
        "vision": tower,
        "text": dataclasses.asdict(config.text),
        "embed_dim": config.embed_dim,
        "answers": config.answers,
    }
    if schedule:
        kind = "frame&patch" if has_flag else "frame"
        numbers = [list(pair) if has_flag else pair[0] for pair in schedule]
        description |= {"merging_type": kind, "testa_r": numbers}
    (folder / "config.json").write_text(json.dumps(description, indent=1) + "\n")
    shutil.copy(model.folder / "vocab.txt", folder / "vocab.txt")


def _nearest_rows(time_embed: jax.Array, num_frames: int) -> jax.Array:
    return time_embed[:, jnp.arange(num_frames) * time_embed.shape[1] // num_frames]


def _without_parts(config: TestaConfig) -> Format:
    """The format with the tensors of heads that the model does not have left out."""
    absent = [] if config.answers else [r"^text_decoder\."]
    absent += [] if config.embed_dim else [r"^(vision_proj|text_proj|itm_head)\.", r"^temp$"]
    ignored = TESTA.ignored
    if config.vision.learnable_temporal_scaling:
        ignored = tuple(pattern for pattern in ignored if "temporal_scaling" not in pattern)
    return dataclasses.replace(TESTA, ignored=(*ignored, *absent), aliases=())


def _open(folder: Path) -> tuple[Tensors, Mapping, bool]:
    """The tensors of a folder, its description in TESTA's fields, and whether it is BLIP."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    has_config = (folder / "config.json").is_file()
    config = weights.read_config(folder) if has_config else {}
    kind = config.get("model_type")
    if kind == "blip":
        files = weights.SafetensorsFolder(folder)
        return files, _blip_description(config, folder / "config.json", files.names()), True
    if has_config and kind != MODEL_TYPE:
        raise CheckpointError(f"{folder}/config.json: model_type is {kind!r}, neither {MODEL_TYPE} nor blip")
    released = sorted(folder.glob("*.pth"))
    if not released:
        return weights.SafetensorsFolder(folder), config, False
    if len(released) > 1:
        raise CheckpointError(f"{folder}: holds several .pth files: {', '.join(path.name for path in released)}")
    files = TorchFile(released[0], within=("model",))
    return files, config if has_config else _released_description(released[0], files), False


def _released_description(path: Path, files: TorchFile) -> dict:
    """The published sizes, with the schedule and the parts that a released file says."""
    own = read_torch(path).get("config") or {}
    if not isinstance(own, Mapping):
        raise CheckpointError(f"{path}: 'config' is a {type(own).__name__}, not fields by name")
    description = {name: own[name] for name in ("merging_type", "testa_r") if own.get(name)}
    shape = files.shape("visual_encoder.time_embed") if "visual_encoder.time_embed" in files.names() else (1, 32, 0)
    names = files.names()
    return description | {
        "vision": {"num_frames": shape[1]},
        "embed_dim": 256 if "vision_proj.weight" in names else 0,
        "answers": any(name.startswith("text_decoder.") for name in names),
    }
