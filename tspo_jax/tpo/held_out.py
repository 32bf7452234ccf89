"""Evaluation during training: pairs that are not trained on, and the answers to their questions."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from tspo_jax.answering.frame_answers import Request, answer_requests
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.letters import option_letter
from tspo_jax.data.questions import split_options
from tspo_jax.devices import sharding
from tspo_jax.runs.training_log import Evaluated
from tspo_jax.tpo import losses
from tspo_jax.tpo.batches import PairBatches, rows_of
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.losses import AnswerLogProbs, Objective
from tspo_jax.tpo.programs import Model, State


class HeldOutPairs:
    """Held-out pairs after so many updates: what training measures, as eval_*; the score is the share ranked right."""

    def __init__(
        self,
        config: TpoConfig,
        batches: PairBatches,
        log_probs: Callable,
        objective: Objective,
        model: Model,
        answerer: Answerer,
        frozen: dict,
    ):
        self._config, self._batches, self._log_probs = config, batches, log_probs
        self._objective, self._mesh, self._model = objective, model.mesh, model
        self._answerer, self._frozen = answerer, frozen
        a = config.answerer
        self._rollout = Rollout(
            model.graphdef,
            answerer.processor.normalize,
            answerer.generation,
            max_new_tokens=a.max_new_tokens,
            encode_chunk=a.encode_chunk,
            mesh=model.mesh,
            attention=a.attention,
        )

    def __call__(self, done: int, state: State) -> Evaluated:
        policy, before = self._of_all(state)
        weights_of = jnp.ones(len(policy.total))
        loss, parts = losses.total_loss(self._objective, policy, before)
        found = {"loss": loss, **parts} | losses.pair_metrics(self._objective, policy, before, weights_of)
        metrics = {f"eval_{name}": float(value) for name, value in found.items()}
        right = metrics["eval_rewards/accuracies"]
        said = (
            f"held-out pairs after step {done}: {right:.1%} ranked right, margin {metrics['eval_rewards/margins']:.3f}"
        )
        if self._config.held_out.accuracy:
            accuracy = self._accuracy(state)
            metrics |= {f"eval_accuracy/{name}": value for name, value in accuracy.items()}
            said += "; answers right: " + ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items())
        return Evaluated(metrics, said, right)

    def _of_all(self, state: State) -> tuple[AnswerLogProbs, AnswerLogProbs]:
        """Of all held-out pairs, [pairs, 2], under policy and reference."""
        count = sharding.data_slice(self._mesh)[1]
        size = self._config.batch_size // self._config.accumulate
        parts = []
        for index, rows in self._batches.all(size):
            found = self._log_probs(state.trained, self._frozen, sharding.put_batch(self._mesh, rows))
            everywhere = jax.device_put(found, sharding.replicated(self._mesh))
            places = rows_of(size, count)[: len(index)]
            parts.append(jax.tree.map(lambda x, places=places: np.asarray(x)[places], everywhere))
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts)

    def _accuracy(self, state: State) -> dict[str, float]:
        """Share of the held-out questions with a known answer that are answered right: from the training frames, and
        from those that the chosen (`evidence`) and the rejected (`without`) answer were made from."""
        requests, answers, count = [], {}, {}
        for i, pair in enumerate(self._batches.pairs):
            for name, frames in (
                ("full", self._batches.shown(pair)),
                ("evidence", pair.evidence_picks),
                ("without", pair.rejected_picks),
            ):
                videos = {video for video, _ in frames}
                if pair.answer and len(videos) == 1:  # frames of several videos are no request of one
                    picks = np.array([[frame for _, frame in frames]])
                    requests.append(Request((i, name), videos.pop(), picks, pair.prompt))
                    answers[i, name] = pair.answer
                    count[i, name] = len(split_options(pair.prompt)[1])
        answerer = self._with(state)
        right: dict[str, list[bool]] = {}
        a = self._config
        for batch in answer_requests(
            requests, self._batches.store, answerer, self._rollout, self._mesh, a.build.batch_size, a.answerer.template
        ):
            for request, texts in batch:
                letter = option_letter(texts[0], count[request.id])
                right.setdefault(request.id[1], []).append(letter == answers[request.id])
        return {name: float(np.mean(values)) for name, values in sorted(right.items())}

    def _with(self, state: State) -> Answerer:
        params = self._model.params(state.trained, self._frozen)
        return Answerer(**(vars(self._answerer) | {"graphdef": self._model.graphdef, "params": params}))
