"""The pairs of tests/golden/tpo_trajectory.npz as batches of the trainer, and its checkpoint."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.tpo.programs import Model, Pairs


class Trajectory:
    def __init__(self, golden: Path):
        with np.load(golden / "tpo_trajectory.npz") as arrays:
            self.arrays = {name: arrays[name] for name in arrays.files}
        self.meta = json.loads(str(self.arrays["meta"]))
        self.folder = golden / self.meta["folder"]
        self.num_pairs = len(self.arrays["full/ref_logps"])

    def of(self, prefix: str) -> dict[str, np.ndarray]:
        """The arrays whose names begin with `prefix`, without it."""
        return {name.removeprefix(prefix): x for name, x in self.arrays.items() if name.startswith(prefix)}

    def answerer(self, **kwargs) -> Answerer:
        return load_answerer(self.folder, **kwargs)

    def pairs(self, indices, reference: np.ndarray | None = None, fill: int = 0) -> Pairs:
        """The batch of these pairs, and `fill` rows of weight 0 behind them; `reference` float [num_pairs, 2]."""
        rows = [*indices, *[indices[0]] * fill]
        frames = np.stack([self.arrays[f"pair{i}/frames"] for i in rows])
        longest = max(len(self.arrays[f"pair{i}/prompt_ids"]) for i in range(self.num_pairs))
        ids, lengths = prompts.pad([self.arrays[f"pair{i}/prompt_ids"] for i in rows], 0, longest)
        names = ("chosen_ids", "rejected_ids")
        answers = [self.arrays[f"pair{i}/{name}"] for i in rows for name in names]
        longest = max(len(self.arrays[f"pair{i}/{name}"]) for i in range(self.num_pairs) for name in names)
        answers, answer_lengths = prompts.pad(answers, 0, longest)
        weights = np.array([1.0] * len(indices) + [0.0] * fill, np.float32)
        reference = np.zeros((self.num_pairs, 2), np.float32) if reference is None else reference
        return Pairs(
            frames,
            ids,
            lengths,
            answers.reshape(len(rows), 2, -1),
            answer_lengths.reshape(-1, 2),
            weights,
            np.asarray(reference, np.float32)[rows],
        )


def model_of(answerer: Answerer, graphdef=None, mesh: jax.sharding.Mesh | None = None, encode_chunk: int = 2) -> Model:
    graphdef = answerer.graphdef if graphdef is None else graphdef
    return Model(graphdef, answerer.processor.normalize, jnp.float32, encode_chunk, mesh)
