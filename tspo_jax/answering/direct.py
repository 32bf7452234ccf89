"""Questions about videos, each answered from one look at chosen frames (`answer --strategy=direct`)."""

import dataclasses

from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints.folders import Answerer
from tspo_jax.data.questions import split_options
from tspo_jax.selection.choosing import choose, picks_of
from tspo_jax.selection.scoring import Scorer
from tspo_jax.selection.searching import Searcher, search_frames
from tspo_jax.selection.video_source import Source


@dataclasses.dataclass(frozen=True)
class DirectAnswers:
    """An answerer, and what chooses its frames.

    Attributes:
      scorer, method: an agent and how it chooses; evenly spaced frames where there is no scorer.
      searcher: looks for objects instead.
      num_frames: of a video, at most.
      template: of the conversation; None = the answerer's own.
      suffix: last line of the user's text.
      max_new_tokens: at which an answer is cut.
    """

    answerer: Answerer
    scorer: Scorer | None = None
    method: str = "topk"
    searcher: Searcher | None = None
    num_frames: int = 16
    template: str | None = None
    suffix: str = prompts.LETTER_SUFFIX
    max_new_tokens: int = 256

    def __post_init__(self):
        object.__setattr__(self, "_rollout", Rollout.of(self.answerer, max_new_tokens=self.max_new_tokens))

    def of_video(self, source: Source, question: str) -> tuple[dict, list[int]]:
        """The answer as given_frames.answer reports it, with `frame_idx` and maybe `searched`; and the candidates that
        were shown."""
        found = {}
        if self.searcher:
            chosen = search_frames(self.searcher, source, question, self.num_frames)
            picks, found = picks_of(chosen, source), {"searched": chosen["searched"]}
        else:
            picks = choose(source, self.scorer, question, self.num_frames, self.method)
        result = self.of_frames(source.pictures(picks), source.times(picks), question, self.num_frames)
        return result | {"frame_idx": source.frame_idx[picks].tolist()} | found, picks

    def of_frames(self, frames, times, question: str, num_frames: int = 0) -> dict:
        """The answer from frames uint8 [H, W, 3] and their FrameTimes, None where nobody knows them; `num_frames` as in
        given_frames.answer."""
        prompt = prompts.render(question, self.template or self.answerer.template, self.suffix)
        return answer(self.answerer, self._rollout, frames, prompt, split_options(question)[1], times, num_frames)
