"""OWL-ViT (Minderer et al. 2022): boxes of what short texts name, as Hugging Face's OwlViTForObjectDetection.

CLIP's two towers without pooling: every patch of the image predicts one box, and is compared with every text (query).

    texts -> query embeddings [Q, D]          once per question
    pixels -> patch features [B, S, C] -> logits [B, S, Q] and boxes [B, S, 4]      S patches, row by row
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tspo_jax.models.clip import ClipConfig, TextTransformer, VisionConfig, VisionEmbeddings
from tspo_jax.models.layers import Encoder, LayerNorm, Linear

LARGEST_ID = 2  # TextConfig.eos_token_id by which TextTransformer takes the largest id for the end token
HIDDEN_QUERY = jnp.finfo(jnp.float32).min  # logit of a query that does not count


def config_from_hf(config: dict) -> ClipConfig:
    """The towers of an OWL-ViT folder's config.json; sizes that it leaves unsaid are those of owlvit-base-patch32.

    Raises ValueError where the projection has another width than the text tower: the queries would not fit the head.
    """
    text = {"max_position_embeddings": 16} | (config.get("text_config") or {}) | {"eos_token_id": LARGEST_ID}
    vision = {"image_size": 768} | (config.get("vision_config") or {})
    towers = ClipConfig.from_hf(config | {"text_config": text, "vision_config": vision})
    if towers.projection_dim != towers.text.hidden_size:
        raise ValueError(
            f"config.json: projection_dim is {towers.projection_dim}, but text_config.hidden_size "
            f"{towers.text.hidden_size}: an OWL-ViT detector needs both equal"
        )
    return towers


class PatchTransformer(nnx.Module):
    """CLIP's image tower with all its tokens: pixels [B, H, W, 3] -> [B, 1 + S, C], the class token first."""

    def __init__(self, cfg: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(cfg, rngs=rngs)
        self.pre_layernorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)
        self.encoder = Encoder(cfg.num_hidden_layers, cfg.make_layer(causal=False), rngs=rngs)
        self.post_layernorm = LayerNorm(cfg.hidden_size, epsilon=cfg.layer_norm_eps, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        return self.post_layernorm(self.encoder(self.pre_layernorm(self.embeddings(pixels))))


class ClassHead(nnx.Module):
    """How well each query names each patch: a cosine with a shift and a scale of the patch's own."""

    def __init__(self, width: int, query_width: int, *, rngs: nnx.Rngs):
        self.dense0 = Linear(width, query_width, rngs=rngs)
        self.logit_shift = Linear(width, 1, rngs=rngs)
        self.logit_scale = Linear(width, 1, rngs=rngs)

    def embeddings(self, features: jax.Array) -> jax.Array:
        """[B, S, C] -> unit vectors float32 [B, S, D]."""
        return _unit(self.dense0(features).astype(jnp.float32), 1e-6)

    def __call__(self, features: jax.Array, queries: jax.Array, mask: jax.Array) -> jax.Array:
        """features [B, S, C], queries [Q, D] or [B, Q, D], mask bool [Q] or [B, Q] -> logits float32 [B, S, Q]."""
        queries = jnp.broadcast_to(_unit(queries.astype(jnp.float32), 1e-6), (len(features), *queries.shape[-2:]))
        cosine = jnp.einsum("bsd,bqd->bsq", self.embeddings(features), queries)
        shift, scale = (head(features).astype(jnp.float32) for head in (self.logit_shift, self.logit_scale))
        logits = (cosine + shift) * (jax.nn.elu(scale) + 1)
        return jnp.where(jnp.atleast_2d(mask)[:, None], logits, HIDDEN_QUERY)


class BoxHead(nnx.Module):
    """Centre, width and height of each patch's box, relative to the image."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.dense0 = Linear(width, width, rngs=rngs)
        self.dense1 = Linear(width, width, rngs=rngs)
        self.dense2 = Linear(width, 4, rngs=rngs)

    def __call__(self, features: jax.Array, bias: np.ndarray) -> jax.Array:
        """features [B, S, C], bias [S, 4] -> float32 [B, S, 4] in (0, 1)."""
        h = jax.nn.gelu(self.dense0(features), approximate=False)
        h = jax.nn.gelu(self.dense1(h), approximate=False)
        return jax.nn.sigmoid(self.dense2(h).astype(jnp.float32) + bias)


def box_bias(side: int) -> np.ndarray:
    """Where the boxes of an untrained head lie, before the sigmoid: float32 [side * side, 4].

    The centre is the patch's far corner (not its middle: so it was trained), the size is the patch's.
    """
    far = np.arange(1, side + 1) / side
    column, row = np.tile(far, side), np.repeat(far, side)
    size = np.full(side * side, 1 / side)
    place = np.stack([column, row, size, size], axis=-1)
    return (np.log(place + 1e-4) - np.log1p(-place + 1e-4)).astype(np.float32)


class OwlVit(nnx.Module):
    """The detector. `visual_projection` and `logit_scale` are in its checkpoints, but it does not use them."""

    def __init__(self, cfg: ClipConfig, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(cfg.text, rngs=rngs)
        self.vision_model = PatchTransformer(cfg.vision, rngs=rngs)
        self.text_projection = Linear(cfg.text.hidden_size, cfg.projection_dim, use_bias=False, rngs=rngs)
        self.visual_projection = Linear(cfg.vision.hidden_size, cfg.projection_dim, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.array(2.6592))
        self.layer_norm = LayerNorm(cfg.vision.hidden_size, epsilon=cfg.vision.layer_norm_eps, rngs=rngs)
        self.class_head = ClassHead(cfg.vision.hidden_size, cfg.text.hidden_size, rngs=rngs)
        self.box_head = BoxHead(cfg.vision.hidden_size, rngs=rngs)

    def queries(self, ids: jax.Array) -> jax.Array:
        """Token ids int [Q, N], padded with id 0 behind the end token -> unit vectors float32 [Q, D]."""
        return _unit(self.text_projection(self.text_model(ids)).astype(jnp.float32))

    def features(self, pixels: jax.Array) -> jax.Array:
        """Preprocessed pixels float [B, H, W, 3] -> patch features [B, S, C]."""
        tokens = self.vision_model(pixels)
        return self.layer_norm(tokens[:, 1:] * tokens[:, :1])

    def __call__(self, pixels: jax.Array, queries: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits float32 [B, S, Q] and boxes float32 [B, S, 4], (centre x, centre y, width, height) in (0, 1).

        Args:
          pixels: float [B, H, W, 3], square, preprocessed.
          queries: float [Q, D], or [B, Q, D] for queries of each image's own.
          mask: bool [Q] or [B, Q], False on padding, whose logits are the smallest float32.
        """
        features = self.features(pixels)
        side = round(features.shape[1] ** 0.5)
        return self.class_head(features, queries, mask), self.box_head(features, box_bias(side))


def _unit(x: jax.Array, epsilon: float = 0.0) -> jax.Array:
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + epsilon)


@dataclasses.dataclass(frozen=True)
class Detections:
    """What was found in one picture, one row per patch, in their order.

    Attributes:
      boxes: float [S, 4], (x0, y0, x1, y1) in pixels of the picture; they may stick out of it.
      scores: float [S, Q] in [0, 1], how surely each query names the box, each on its own.
    """

    boxes: np.ndarray
    scores: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray, boxes: np.ndarray, height: int, width: int) -> "Detections":
        """Of one picture of height x width pixels: logits [S, Q] and relative boxes [S, 4] as `OwlVit` gives them."""
        centre, half = boxes[:, :2], boxes[:, 2:] / 2
        corners = np.concatenate([centre - half, centre + half], axis=-1)
        # 1 / (1 + exp(-x)) overflows for queries that are masked.
        scores = np.exp(-np.logaddexp(0, -np.asarray(logits, np.float32)))
        return cls(corners * np.array([width, height, width, height], np.float32), scores)

    @property
    def labels(self) -> np.ndarray:
        """int [S], the query that names each box best, the first one of equals."""
        return self.scores.argmax(axis=-1)

    @property
    def confidence(self) -> np.ndarray:
        """float [S], the score of that query."""
        return self.scores.max(axis=-1)

    def above(self, threshold: float) -> "Detections":
        """The boxes whose confidence is greater than `threshold`, as in Hugging Face's post-processing (which neither
        cuts them at the border nor merges any)."""
        kept = self.confidence > threshold
        return Detections(self.boxes[kept], self.scores[kept])
