"""An OWL-ViT folder as a thing to call: texts -> queries once, pictures -> boxes in batches of two shapes."""

import dataclasses
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from transformers import CLIPTokenizer, PreTrainedTokenizerBase

from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import read_preprocessing, read_tokenizer
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.devices import sharding
from tspo_jax.models import owlvit
from tspo_jax.models.clip import ClipConfig
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.owlvit import Detections, OwlVit
from tspo_jax.models.preprocessing import ImageProcessor

QUERY_MULTIPLE = 8  # queries are padded to multiples of it, so that few numbers of them are compiled
BATCH_SIZE = 8  # pictures that are looked at together, where there is more than one


@dataclasses.dataclass(frozen=True)
class Queries:
    """Texts as the detector compares them.

    Attributes:
      texts: what to look for, Q of them.
      embeddings: unit vectors float32 [Q', D], Q' = Q rounded up.
      mask: bool [Q'], True on the first Q.
      cut: those of the texts that have more tokens than the detector reads.
    """

    texts: tuple[str, ...]
    embeddings: jax.Array
    mask: np.ndarray
    cut: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Detector:
    """OWL-ViT of a folder, whole on every device of `mesh`, which share the pictures of a batch."""

    folder: Path
    config: ClipConfig
    graphdef: nnx.GraphDef
    params: dict
    tokenizer: PreTrainedTokenizerBase
    processor: ImageProcessor
    mesh: Mesh
    batch_size: int = BATCH_SIZE

    @property
    def max_tokens(self) -> int:
        return self.config.text.max_position_embeddings

    def token_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int32 [Q, max_tokens], cut on the right with the end token kept, padded with 0."""
        ids = np.zeros((len(texts), self.max_tokens), np.int32)
        for row, text in zip(ids, texts, strict=True):
            tokens = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
            row[: len(tokens)] = tokens
        return ids

    def queries(self, texts: Sequence[str]) -> Queries:
        """Texts (at least one) as queries, encoded once for all pictures. Raises ValueError without a text."""
        if not texts:
            raise ValueError("the detector is given nothing to look for")
        Q = -(-len(texts) // QUERY_MULTIPLE) * QUERY_MULTIPLE
        ids = np.pad(self.token_ids(texts), ((0, Q - len(texts)), (0, 0)))
        cut = [text for text in texts if len(self.tokenizer(text, verbose=False)["input_ids"]) > self.max_tokens]
        embeddings = self._encode(self.params, jax.device_put(ids, sharding.replicated(self.mesh)))
        return Queries(tuple(texts), embeddings, np.arange(Q) < len(texts), tuple(cut))

    def detect(self, pictures: Sequence[np.ndarray], queries: Queries) -> list[Detections]:
        """What is found in pictures uint8 [H, W, 3] of any sizes."""
        found, width, num_queries = [], self.mesh.shape["data"], len(queries.texts)
        size = width if len(pictures) <= width else -(-self.batch_size // width) * width
        for start in range(0, len(pictures), size):
            part = pictures[start : start + size]
            pixels = np.stack([self.processor.crop(picture) for picture in part])
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], size - len(part), axis=0)])
            pixels = jax.device_put(pixels, sharding.over_questions(self.mesh))
            logits, boxes = self._detect(self.params, pixels, queries.embeddings, queries.mask)
            for picture, z, box in zip(part, np.asarray(logits), np.asarray(boxes), strict=False):
                found.append(Detections.of(z[:, :num_queries], box, *picture.shape[:2]))
        return found

    @cached_property
    def _encode(self):
        def encode(params, ids):
            return merge_params(self.graphdef, params).queries(ids)

        return jax.jit(encode, out_shardings=sharding.replicated(self.mesh))

    @cached_property
    def _detect(self):
        def detect(params, pixels, queries, mask):
            return merge_params(self.graphdef, params)(self.processor.normalize(pixels), queries, mask)

        return jax.jit(detect)


def load_detector(folder: str | Path, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None) -> Detector:
    """The OWL-ViT of a Hugging Face folder, google/owlvit-base-patch32 and its siblings.

    Args:
      mesh: whose `data` axis shares the pictures; None = the first device alone.
    Raises: CheckpointError where the folder holds something else.
    """
    folder = Path(folder)
    description = weights.read_config(folder)
    if description.get("model_type") != "owlvit":
        raise CheckpointError(
            f"{folder}/config.json: model_type is {description.get('model_type')!r}, not owlvit (a detector, e.g. "
            "google/owlvit-base-patch32)"
        )
    try:
        config = owlvit.config_from_hf(description)
        processor = ImageProcessor.owlvit(read_preprocessing(folder), config.vision.image_size)
    except ValueError as error:
        raise CheckpointError(f"{folder}/{error}") from error
    mesh = mesh or sharding.make_mesh((("data", 1), ("model", 1)), jax.local_devices()[:1])
    graphdef, abstract = abstract_module(lambda rngs: OwlVit(config, rngs=rngs))
    where = sharding.replicated(mesh)
    params = weights.load_params(folder, abstract, weights.OWLVIT, dtype=dtype, sharding=lambda *_: where)
    tokenizer = read_tokenizer(CLIPTokenizer, folder, config.text.vocab_size)
    return Detector(folder, config, graphdef, params, tokenizer, processor, mesh)
