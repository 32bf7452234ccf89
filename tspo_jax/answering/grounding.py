"""A Video-MLLM names the objects that a question is about, from a few frames: what T* searches for."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.detector import load_detector
from tspo_jax.checkpoints.folders import Answerer, load_answerer
from tspo_jax.data.questions import split_options
from tspo_jax.selection import grounding
from tspo_jax.selection.search_options import SearchOptions, objects
from tspo_jax.selection.searching import Ground, Searcher

AGAIN = "\nYour last reply could not be read. Reply with exactly two lines, names separated by commas."


def grounder(answerer: Answerer) -> Ground:
    """(frames, question with its options) -> targets and cues, by an answerer.

    An answer that cannot be read is asked for once more; where that cannot be read either, ValueError says so.
    """
    rollout = Rollout.of(answerer, max_new_tokens=grounding.MAX_NEW_TOKENS)

    def ground(frames: Sequence[np.ndarray], question: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        stem, options = split_options(question)
        request = grounding.request(stem or question, options)
        for text in (request, request + AGAIN):
            reply = answer(answerer, rollout, frames, prompts.render(text, answerer.template, ""))["answer"]
            try:
                return grounding.parse(reply)
            except ValueError as error:
                reason = error
        raise ValueError(f"the answerer named no objects to search for, asked twice ({reason})")

    return ground


def make_searcher(
    detector: str,
    options: SearchOptions,
    targets: Sequence[str] = (),
    cues: Sequence[str] = (),
    answerer: Answerer | str = "",
    adapter: str = "",
) -> Searcher:
    """A searcher with the detector of a folder. Where no targets are given, an answerer names them, or that of a folder
    (loaded only then, with the adapters of a PEFT folder if given)."""
    loaded = load_detector(detector)
    targets, cues = objects(targets, cues)
    ground = None
    if not targets and answerer:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        if isinstance(answerer, str):
            answerer = load_answerer(answerer, dtype, adapter=adapter)
        ground = grounder(answerer)
    return Searcher(loaded, options, targets, cues, ground)
