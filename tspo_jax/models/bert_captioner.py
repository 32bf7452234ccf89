"""SwinBERT (Lin et al. 2022, arXiv 2111.13196): Video Swin's features are read by a BERT that fills in the words of a
caption, one after another.

The video's tokens never look at the text, so they go through BERT alone, once (`encode`); the words read their keys and
values (`words`). Between the video's tokens a sparse mask can be learned:

- `released`: as published. The bias (1 - m) * -10000 lets nothing through but m within 1e-4 of 1, so that captions
  teach it nothing; for released weights.
- `straight_through`: weights are multiplied by 1 where m >= .5, else 0, and made to sum to 1 again; gradients see m.
  What is trained is what runs, and closed edges can open again.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models.bert import MASKED, BertConfig, BertEmbeddings, BertEncoder, BertHead, Dropout, visible_bias
from tspo_jax.models.layers import Embed, Linear
from tspo_jax.models.video_swin import VideoSwin, VideoSwinConfig

MASKS = ("none", "released", "straight_through")


@dataclasses.dataclass(frozen=True)
class CaptionerConfig:
    """Sizes and settings; the defaults are the published model's.

    Attributes:
      image_size: side of the square that frames are cropped to.
      max_text: tokens of a caption in training, [CLS] and [SEP] included.
      max_caption: of a caption that is written.
      mask: one of MASKS, of attention between the video's tokens.
      hard_mask: of `released`: an edge counts fully or not at all, by m >= .5 (the original's sparse_mask_soft2hard).
    """

    bert: BertConfig = BertConfig()
    swin: VideoSwinConfig = VideoSwinConfig()
    feature_width: int = 512
    num_frames: int = 32
    image_size: int = 224
    max_text: int = 50
    max_caption: int = 20
    mask: str = "none"
    hard_mask: bool = False

    def __post_init__(self):
        if self.mask not in MASKS:
            raise ValueError(f"mask is {self.mask!r}, none of {', '.join(MASKS)}")
        for name in ("max_text", "max_caption"):
            if not 2 <= getattr(self, name) <= self.bert.max_position_embeddings:
                limit = self.bert.max_position_embeddings
                raise ValueError(f"{name} is {getattr(self, name)}; it must be 2 to {limit}, BERT's positions")

    @property
    def num_video_tokens(self) -> int:
        D, H, W = self.swin.grid(self.num_frames, self.image_size, self.image_size)
        return D * H * W


class VideoKeys(NamedTuple):
    """Keys and values of the video's tokens in every layer: [layers, B, M, heads, head_dim]."""

    keys: jax.Array
    values: jax.Array


class SwinTower(nnx.Module):
    def __init__(self, cfg: VideoSwinConfig, *, rngs: nnx.Rngs):
        self.backbone = VideoSwin(cfg, rngs=rngs)


class VideoBert(nnx.Module):
    def __init__(self, cfg: CaptionerConfig, *, rngs: nnx.Rngs):
        self.embeddings = BertEmbeddings(cfg.bert, rngs=rngs)
        self.img_embedding = Linear(cfg.feature_width, cfg.bert.hidden_size, rngs=rngs)
        self.encoder = BertEncoder(cfg.bert, rngs=rngs)


class TransEncoder(nnx.Module):
    def __init__(self, cfg: CaptionerConfig, *, rngs: nnx.Rngs):
        self.bert = VideoBert(cfg, rngs=rngs)
        self.cls = BertHead(cfg.bert, rngs=rngs)


class BertCaptioner(nnx.Module):
    def __init__(self, cfg: CaptionerConfig, *, rngs: nnx.Rngs):
        self.swin = SwinTower(cfg.swin, rngs=rngs)
        self.fc = Linear(cfg.swin.width, cfg.feature_width, rngs=rngs)
        self.trans_encoder = TransEncoder(cfg, rngs=rngs)
        if cfg.mask != "none":
            self.learn_vid_att = Embed(cfg.num_video_tokens**2, 1, rngs=rngs)
            # N(0, 1), as an embedding of the original's starts
            self.learn_vid_att.embedding[...] = self.learn_vid_att.embedding[...] / 0.02
        self.cfg = cfg

    def video_tokens(self, pixels: jax.Array) -> jax.Array:
        """Normalised pixels float [B, T, H, W, 3] -> tokens [B, M, hidden]: no position, no norm."""
        features = self.swin.backbone(pixels)
        features = features.reshape(len(features), -1, features.shape[-1])
        return self.trans_encoder.bert.img_embedding(self.fc(features))

    def edges(self) -> jax.Array:
        """How open each edge between the video's tokens is, row to column: float32 [M, M] in 0..1, the diagonal 1."""
        M = self.cfg.num_video_tokens
        m = jax.nn.sigmoid(self.learn_vid_att.embedding[...].astype(jnp.float32)).reshape(M, M)
        return jnp.where(jnp.eye(M, dtype=bool), 1.0, m)

    def sparsity(self) -> jax.Array:
        """The regulariser: the mean over all M * M edges, of which the diagonal counts as 0."""
        M = self.cfg.num_video_tokens
        return jnp.where(jnp.eye(M, dtype=bool), 0.0, self.edges()).mean()

    def _video_mask(self) -> tuple[jax.Array | None, jax.Array | None]:
        """Bias and gate of attention between the video's tokens."""
        if self.cfg.mask == "none":
            return None, None
        M = self.cfg.num_video_tokens
        if self.cfg.mask == "straight_through":
            m = self.edges()
            return None, m + jax.lax.stop_gradient((m >= 0.5) - m)
        w = self.learn_vid_att.embedding[...].astype(jnp.float32).reshape(M, M)
        # sigmoid(-w) instead of 1 - sigmoid(w), of which little is left where w is large
        closed = jnp.where(w >= 0, 0.0, 1.0) if self.cfg.hard_mask else jax.nn.sigmoid(-w)
        return jnp.where(jnp.eye(M, dtype=bool), 0.0, closed) * MASKED, None

    def encode(self, tokens: jax.Array, dropout: tuple[float, jax.Array | None] = (0.0, None)) -> VideoKeys:
        """The video's part of BERT, of tokens [B, M, hidden]; needed once per video."""
        bias, gate = self._video_mask()
        rate, key = dropout
        tokens = Dropout(rate, key)(tokens)

        def layer_step(layer, x, number):
            drop = Dropout(rate, None if key is None else jax.random.fold_in(key, number + 1))
            keys, values = layer.attention.self.keys_values(x)
            read = layer.attention.self.attend(x, keys, values, bias, gate)
            x = layer.attention.output(read, x, drop)
            return layer.feed_forward(x, drop), VideoKeys(keys, values)

        return self._through_layers(layer_step, tokens, jnp.arange(self.cfg.bert.num_hidden_layers))[1]

    def words(
        self,
        ids: jax.Array,
        lengths: jax.Array,
        video: VideoKeys,
        dropout: tuple[float, jax.Array | None] = (0.0, None),
    ) -> jax.Array:
        """Hidden states [B, L, hidden] of captions int [B, L] of which the first `lengths` int [B] tokens count: each
        sees the words up to itself and the whole video. What is behind the length is noise."""
        L = ids.shape[1]
        counts = jnp.arange(L) < lengths[:, None]  # [B, L]
        visible = jnp.tril(jnp.ones((L, L), bool)) & counts[:, None] & counts[..., None]
        of_video = jnp.broadcast_to(counts[..., None], (*ids.shape, video.keys.shape[2]))
        bias = visible_bias(jnp.concatenate([visible, of_video], axis=-1))[:, None]
        rate, key = dropout

        def layer_step(layer, x, xs):
            number, (video_keys, video_values) = xs
            drop = Dropout(rate, None if key is None else jax.random.fold_in(key, number + 1))
            keys, values = layer.attention.self.keys_values(x)
            keys = jnp.concatenate([keys, video_keys], axis=1)
            values = jnp.concatenate([values, video_values], axis=1)
            x = layer.attention.output(layer.attention.self.attend(x, keys, values, bias), x, drop)
            return layer.feed_forward(x, drop), None

        h = Dropout(rate, key)(self.trans_encoder.bert.embeddings(ids))
        return self._through_layers(layer_step, h, (jnp.arange(self.cfg.bert.num_hidden_layers), video))[0]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states [..., hidden] -> float32 [..., V]."""
        return self.trans_encoder.cls.predictions(hidden)

    def step(self, ids: jax.Array, place: jax.Array, words: VideoKeys, video: VideoKeys) -> tuple[jax.Array, VideoKeys]:
        """The next word: logits float32 [B, V] at [MASK].

        Two rows are computed: the last word, whose row was [MASK] before, and the new [MASK].

        Args:
          ids: int [B, 2], the last word and [MASK].
          place: int [], the place of the last word.
          words: keys and values of the words before, [layers, B, max_caption, heads, head_dim]; the two rows' are
            written to their places.
        """
        places = place + jnp.arange(2)
        slots = jnp.arange(words.keys.shape[2])
        seen = slots <= places[:, None]  # [2, slots]
        bias = visible_bias(jnp.concatenate([seen, jnp.ones((2, video.keys.shape[2]), bool)], axis=-1))[None, None]

        def layer_step(layer, x, xs):
            (word_keys, word_values), (video_keys, video_values) = xs
            keys, values = layer.attention.self.keys_values(x)
            put = jax.lax.dynamic_update_slice_in_dim
            kept = VideoKeys(put(word_keys, keys, place, axis=1), put(word_values, values, place, axis=1))
            keys = jnp.concatenate([kept.keys, video_keys], axis=1)
            values = jnp.concatenate([kept.values, video_values], axis=1)
            x = layer.attention.output(layer.attention.self.attend(x, keys, values, bias), x, Dropout())
            return layer.feed_forward(x), kept

        h = self.trans_encoder.bert.embeddings(ids, places)
        h, words = self._through_layers(layer_step, h, (words, video))
        return self.logits(h[:, 1]), words

    def no_words(self, video: VideoKeys) -> VideoKeys:
        """Room for the keys and values of a caption."""
        layers, B, _, *head = video.keys.shape
        return VideoKeys(*(jnp.zeros((layers, B, self.cfg.max_caption, *head), x.dtype) for x in video))

    def _through_layers(self, layer_step, x, per_layer):
        graphdef, params = nnx.split(self.trans_encoder.bert.encoder.layers)

        def step(x, xs):
            layer_params, own = xs
            return layer_step(nnx.merge(graphdef, layer_params), x, own)

        return jax.lax.scan(step, x, (params, per_layer))


def masked_loss(logits: jax.Array, targets: jax.Array, weight: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean loss over the masked words: KL of labels smoothed by `smoothing` against the prediction (cross-entropy
    where that is 0).

    Args:
      logits: float32 [..., V]; targets: int [...]; weight: [...], 1 where a word was masked, at least one.
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    V = logits.shape[-1]
    right = jnp.take_along_axis(log_probs, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    loss = -right
    if smoothing:
        other = smoothing / (V - 1)
        loss = -(1 - smoothing) * right - other * (log_probs.sum(-1) - right)
        loss = loss + (1 - smoothing) * jnp.log(1 - smoothing) + smoothing * jnp.log(other)
    weight = weight.astype(jnp.float32)
    return jnp.sum(loss * weight) / jnp.maximum(weight.sum(), 1.0)


class Captions(NamedTuple):
    """Captions that were written.

    Attributes:
      ids: int32 [B, max_caption], [CLS] first, [SEP] last, then padding.
      log_prob: float32 [B], the mean log-probability of the words produced; of beams, the score it was kept for.
    """

    ids: jax.Array
    log_prob: jax.Array


@dataclasses.dataclass(frozen=True)
class CaptionTokens:
    """Ids of the special tokens."""

    start: int
    end: int
    mask: int
    pad: int


def greedy_captions(model: BertCaptioner, video: VideoKeys, tokens: CaptionTokens) -> tuple[Captions, jax.Array]:
    """The likeliest word at every place; and the logits of all places float32 [B, max_caption - 1, V].

    A caption that has not ended at the limit gets [SEP] in the place of its last word, as in the original.
    """
    B, limit = video.keys.shape[1], model.cfg.max_caption
    start = jnp.full((B, limit), tokens.pad, jnp.int32).at[:, 0].set(tokens.start)

    def one(state, place):
        ids, words, ended, total, count = state
        last = jnp.stack([ids[:, place], jnp.full(B, tokens.mask, jnp.int32)], axis=1)
        logits, words = model.step(last, place, words, video)
        log_probs = jax.nn.log_softmax(logits)
        word = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        total = total + jnp.where(ended, 0.0, jnp.take_along_axis(log_probs, word[:, None], axis=1)[:, 0])
        count = count + ~ended
        word = jnp.where(ended, tokens.pad, word)
        ended = ended | (word == tokens.end)
        return (ids.at[:, place + 1].set(word), words, ended, total, count), logits

    state = start, model.no_words(video), jnp.zeros(B, bool), jnp.zeros(B), jnp.zeros(B, jnp.int32)
    (ids, _, ended, total, count), logits = jax.lax.scan(one, state, jnp.arange(limit - 1))
    ids = ids.at[:, -1].set(jnp.where(ended, ids[:, -1], tokens.end))
    return Captions(ids, total / count), jnp.swapaxes(logits, 0, 1)


def beam_captions(
    model: BertCaptioner, video: VideoKeys, tokens: CaptionTokens, beams: int, length_penalty: float = 1.0
) -> Captions:
    """The caption with the highest sum of log-probabilities / length ^ penalty that `beams` parallel ones find.

    The original's rules: a caption's length counts [CLS] and not [SEP]; at the limit every running caption closes
    without the word that would have come, whose log-probability counts; a video is done when its best closed caption
    beats the best running sum / (max_caption - 1) ^ penalty.
    """
    _, B, _, *_ = video.keys.shape
    limit, V = model.cfg.max_caption, model.cfg.bert.vocab_size
    video = VideoKeys(*(jnp.repeat(x, beams, axis=1) for x in video))
    ids = jnp.full((B, beams, limit), tokens.pad, jnp.int32).at[:, :, 0].set(tokens.start)

    def one(state, place):
        ids, words, scores, best_ids, best, done = state
        flat = ids.reshape(B * beams, limit)
        last = jnp.stack([flat[:, place], jnp.full(B * beams, tokens.mask, jnp.int32)], axis=1)
        logits, words = model.step(last, place, words, video)
        sums = (scores[..., None] + jax.nn.log_softmax(logits).reshape(B, beams, V)).reshape(B, -1)
        top, index = jax.lax.top_k(sums, 2 * beams)  # [B, 2 * beams], best first
        beam, word = index // V, (index % V).astype(jnp.int32)
        length = (place + 1).astype(jnp.float32)
        done = done | (best >= top[:, 0] / (limit - 1) ** length_penalty)
        closes = (word == tokens.end) | (place + 2 == limit)
        # The search stops looking at continuations once `beams` of them go on.
        before = jnp.cumsum(~closes, axis=1) - ~closes
        closed = jnp.where(closes & (before < beams), top / length**length_penalty, -jnp.inf)
        which = jnp.argmax(closed, axis=1)
        score = jnp.take_along_axis(closed, which[:, None], axis=1)[:, 0]
        is_better = ~done & (score > best)
        source = jnp.take_along_axis(ids, jnp.take_along_axis(beam, which[:, None], axis=1)[..., None], axis=1)[:, 0]
        source = jnp.where(jnp.arange(limit) == place + 1, tokens.end, source)
        best_ids = jnp.where(is_better[:, None], source, best_ids)
        best = jnp.where(is_better, score, best)

        # The best `beams` that go on, in order.
        order = jnp.argsort(jnp.where(closes, 1, 0), axis=1, stable=True)[:, :beams]
        beam, word, scores = (jnp.take_along_axis(x, order, axis=1) for x in (beam, word, top))
        ids = jnp.take_along_axis(ids, beam[..., None], axis=1).at[:, :, place + 1].set(word)
        rows = (jnp.arange(B)[:, None] * beams + beam).reshape(-1)
        words = VideoKeys(*(x[:, rows] for x in words))
        return (ids, words, scores, best_ids, best, done), None

    state = (
        ids,
        model.no_words(video),
        jnp.full((B, beams), -1e9).at[:, 0].set(0.0),  # all beams are the same at first: one of them counts
        ids[:, 0],
        jnp.full(B, -jnp.inf),
        jnp.zeros(B, bool),
    )
    (_, _, _, best_ids, best, _), _ = jax.lax.scan(one, state, jnp.arange(limit - 1))
    return Captions(best_ids, best)
