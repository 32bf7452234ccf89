"""Answers in rounds: captions of a whole video, and closer looks as long as they do not answer the question.

The strategy of VideoLucy (arXiv 2510.12422), without training:

    coarse captions -> answer? -> is a part enough? -> [choose a period -> finer captions -> answer?] x rounds -> guess

Nothing here knows a model. A question is a generator: it yields the calls that it needs next (captions, replies of a
writer), is sent their replies, and returns an `Outcome`; `run` drives many at once, so that their calls make batches.
`flat` asks once about the coarse captions. Where the original fails (a reply out of form ends a question, captions that
no prompt shows, periods that are no windows, ...) this goes on: docs/rounds.md lists the differences.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol

from tspo_jax.answering import agent_prompts, replies
from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.calls import Call, Calls, CaptionCall, Reply, WriterCall
from tspo_jax.answering.caption_memory import COARSE, FINE, ULTRA_FINE, CaptionMemory, Clip, Row, cut, shorten
from tspo_jax.answering.replies import Period

# How a question ended: sure of the coarse captions; sure after a closer look; all rounds were used, or no period was
# left; a budget was; nobody answered. `flat` is the one call of that strategy.
FAILED = "failed"
PHASES = ("coarse", "rounds", "forced", "budget", FAILED, "flat")

_PIXELS = 28 * 28  # of the smallest patch of Qwen2.5-VL, in which the original counts


@dataclasses.dataclass(frozen=True)
class Settings:
    """The original's values. Raises ValueError for one that makes no sense.

    Attributes:
      windows: seconds of a clip: coarse, fine, ultra-fine.
      fps: frames per second of a coarse (and whole fine) clip, a fine and an ultra-fine one.
      max_pixels: of a frame in coarse and in finer clips.
      rounds: closer looks; 0 = none.
      type_question: ask whether a few windows are enough, and leave out the others then.
      captions, writer_calls, writer_tokens: most of a question (tokens of prompts and replies together); None = as many
        as it takes. The last call is kept for the answer, which is then given without being sure.
    """

    windows: tuple[float, float, float] = (60.0, 10.0, 1.0)
    fps: tuple[float, float, float] = (1.0, 2.0, 2.0)
    max_pixels: tuple[int, int] = (128 * _PIXELS, 512 * _PIXELS)
    rounds: int = 5
    type_question: bool = True
    captions: int | None = None
    writer_calls: int | None = None
    writer_tokens: int | None = None

    def __post_init__(self):
        coarse, fine, ultra_fine = self.windows
        if not coarse >= fine >= ultra_fine > 0:
            raise ValueError(f"windows are {self.windows}: coarse, fine and ultra-fine seconds, each at least the next")
        if min(self.fps) <= 0 or min(self.max_pixels) < 1:
            raise ValueError(f"fps {self.fps} and max_pixels {self.max_pixels} must be positive")
        if self.rounds < 0:
            raise ValueError(f"rounds is {self.rounds}; it must be at least 0")
        for field in ("captions", "writer_calls", "writer_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"the budget {field} is {value}: nothing could be answered; at least 1, or leave it")


@dataclasses.dataclass(frozen=True)
class VideoFacts:
    """What the loop must know about a video. `fps` are the frames per second that can be shown of it (1 in a frame
    store made so); clips that ask for more get these, and the trace says so. `identity` tells its content."""

    name: str
    duration: float  # seconds
    fps: float = float("inf")
    identity: str = ""


class Limits(Protocol):
    """What the loop must know about a writer (calls.Writer)."""

    context: int
    max_new_tokens: int

    def count(self, text: str) -> int: ...


@dataclasses.dataclass
class Outcome:
    """What came of a question, and what it cost: JSON by dataclasses.asdict.

    Attributes:
      answer: text; None where nobody gave one.
      option: letter of the option that it names; None for none, and for questions without options.
      phase: of PHASES.
      confident: whether the writer was sure.
      periods: that were looked at closely, in order.
      captions, writer_calls, writer_tokens, seconds: what the question used, also where another shared it.
      failures: errors of models.
      notes: what the loop had to do by rule.
      trace: of every look and every reply, in order.
    """

    id: str
    video: str
    duration: float
    question: str
    options: tuple[str, ...]
    answer: str | None = None
    option: str | None = None
    phase: str = ""
    confident: bool = False
    rounds: int = 0
    periods: list[Period] = dataclasses.field(default_factory=list)
    captions: int = 0
    writer_calls: int = 0
    writer_tokens: int = 0
    seconds: float = 0.0
    failures: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    trace: list[dict] = dataclasses.field(default_factory=list)


Watch = Callable[[Outcome], None]  # is told of a question's outcome after each look and each reply


class _BudgetError(Exception):
    """A budget does not allow the next call beside the last one."""


Steps = Generator[list[Call], list[Reply], Any]


def backtrack(
    asked: Asked, video: VideoFacts, settings: Settings, writer: Limits, watch: Watch = lambda outcome: None
) -> Steps:
    """The calls of a question, a list at a time; returns its Outcome."""
    state = _State(asked, video, settings, writer, watch)
    try:
        yield from state.look_at_all()
        if (yield from state.is_answered("coarse_answer")):
            return state.end("coarse")
        if settings.type_question and not replies.names_ordinal(asked.text):
            yield from state.narrow()
        for _ in range(settings.rounds):
            if (chosen := (yield from state.localize())) is None:
                break
            yield from state.look(*chosen)
            if (yield from state.is_answered("answer")):
                return state.end("rounds")
        phase = "forced"
    except _BudgetError as spent:
        state.note(str(spent))
        phase = "budget"
    yield from state.guess("force")
    return state.end(phase)


def flat(
    asked: Asked, video: VideoFacts, settings: Settings, writer: Limits, watch: Watch = lambda outcome: None
) -> Steps:
    """All coarse captions, one answer; returns its Outcome."""
    state = _State(asked, video, settings, writer, watch)
    phase = "flat"
    try:
        yield from state.look_at_all()
    except _BudgetError as spent:
        state.note(str(spent))
        phase = "budget"
    yield from state.guess("flat")
    return state.end(phase)


STRATEGIES: dict[str, Callable[..., Steps]] = {"flat": flat, "backtrack": backtrack}  # arguments: as of backtrack


class _State:
    """One question on its way. Methods that make calls are generators, as `backtrack` is."""

    def __init__(self, asked: Asked, video: VideoFacts, settings: Settings, writer: Limits, watch: Watch):
        if not 0 < video.duration < float("inf"):
            raise ValueError(f"{video.name}: its duration is {video.duration} s; it must be positive")
        self.asked, self.video, self.settings, self.writer, self._watch = asked, video, settings, writer, watch
        self.memory = CaptionMemory()
        self.outcome = Outcome(asked.id, asked.video, video.duration, asked.text, asked.options)
        self.seen: dict[Period, list[str]] = {}  # period -> instructions of the looks at it
        self.last_guess: str | None = None  # of an answer that was not sure

    def note(self, text: str) -> None:
        if text not in self.outcome.notes:
            self.outcome.notes.append(text)

    def end(self, phase: str) -> Outcome:
        self.outcome.phase = phase if self.outcome.answer is not None else FAILED
        self.outcome.option = replies.named_option(self.outcome.answer or "", self.asked.options)
        self.outcome.seconds = round(self.outcome.seconds, 3)
        return self.outcome

    # ---- looking -----------------------------------------------------------------------------------------------

    def look_at_all(self) -> Steps:
        windows = cut((0.0, self.video.duration), self.settings.windows[0], self._fps(0))
        room = self.settings.captions
        if room is not None and len(windows) > room:
            spread = [i * len(windows) // room for i in range(room)]
            yield from self._caption([(COARSE, "whole", [windows[i] for i in spread])], None)
            raise _BudgetError(
                f"a budget of {room} captions is less than the {len(windows)} windows: {room} were described"
            )
        yield from self._caption([(COARSE, "whole", windows)], None)

    def look(self, period: Period, instruction: str, reason: str) -> Steps:
        """Captions of a chosen period as a whole and in parts, at the level that its length asks for."""
        coarse, fine, ultra_fine = self.settings.windows
        length = period[1] - period[0]
        if length > fine + 1e-6:
            level, whole = FINE, cut(period, coarse, self._fps(0))
            parts = cut(period, fine, self._fps(1))
        else:
            level, whole = ULTRA_FINE, cut(period, fine, self._fps(1))
            parts = cut(period, ultra_fine, self._fps(2))
        parts = [clip for clip in parts if clip.period != period]
        self._allow_captions(len(whole) + len(parts))
        self.outcome.rounds += 1
        self.outcome.periods.append(period)
        self.seen.setdefault(period, []).append(instruction)
        of_level = [(level, "whole", whole), (level, "part", parts)]
        yield from self._caption(of_level, instruction, {"period": period, "reason": reason})

    def _fps(self, level: int) -> float:
        wanted = self.settings.fps[level]
        if wanted > self.video.fps + 1e-6:
            self.note(f"clips at {wanted:g} frames a second were shown at {self.video.fps:g}, all that is stored")
        return min(wanted, self.video.fps)

    def _caption(
        self, of_level: Sequence[tuple[str, str, list[Clip]]], instruction: str | None, about: dict | None = None
    ) -> Steps:
        all_clips = [clip for _, _, clips in of_level for clip in clips]
        pixels = self.settings.max_pixels[instruction is not None]
        text = (
            agent_prompts.COARSE_INSTRUCTION
            if instruction is None
            else agent_prompts.FINE_INSTRUCTION.format(instruction=instruction)
        )
        video, identity = self.video.name, self.video.identity
        made = yield [CaptionCall(video, clip.times, pixels, text, identity) for clip in all_clips]
        self._pay(made)
        self.outcome.captions += len(made)
        step, given = len(self.outcome.trace), iter(made)
        for level, split, clips in of_level:
            self.memory.add(clips, [next(given).text for _ in clips], level, step, split)
        described = [
            {"period": clip.period, "level": level, "split": split, "frames": len(clip.times)}
            for level, split, clips in of_level
            for clip in clips
        ]
        self.outcome.trace.append(
            {
                "kind": "captions",
                "round": self.outcome.rounds,
                "level": of_level[0][0],
                "instruction": instruction,
                **(about or {}),
                "clips": [
                    clip | {"caption": reply.text, "error": reply.error}
                    for clip, reply in zip(described, made, strict=True)
                ],
            }
        )
        self._watch(self.outcome)

    def _allow_captions(self, number: int) -> None:
        if self._left("captions") < number:
            used = f"{self.outcome.captions} of {self.settings.captions} captions are used"
            raise _BudgetError(f"{used}, and {number} more are needed")

    def _pay(self, made: Sequence[Reply]) -> None:
        self.outcome.seconds += sum(reply.seconds for reply in made)
        for error in dict.fromkeys(reply.error for reply in made if reply.error):
            self.outcome.failures.append(error)

    # ---- asking ------------------------------------------------------------------------------------------------

    def is_answered(self, agent: str) -> Steps:
        fields = yield from self._ask(agent, self.memory.rows(), _lacks("confidence", "answer"))
        answer = replies.text_of(fields.get("answer"))
        if _is_none(answer):
            return False  # sure of having no answer is not an answer
        if replies.truth(fields.get("confidence")):
            self.outcome.answer, self.outcome.confident = answer, True
            return True
        self.last_guess = answer
        return False

    def narrow(self) -> Steps:
        """Leaves only the windows that may matter, where the writer says that a few are enough."""
        fields = yield from self._ask("type", self.memory.rows(), _lacks("flag"))
        if replies.truth(fields.get("flag")):
            named = replies.periods_of(fields.get("time period"), self.video.duration)
            kept = self.memory.keep_near(named)
            self.outcome.trace[-1]["kept"] = kept

    def localize(self) -> Steps:
        """The next (period, instruction, reason) to look at; None where none is left."""
        duration = self.video.duration

        def fault(fields: dict) -> str | None:
            if not replies.periods_of(fields.get("time period"), duration):
                return f"Time Period names no time between 0 and {duration:.1f} seconds"

        rows = self.memory.rows(finest=FINE)
        fields = yield from self._ask("localize", rows, fault, excluded=self._looked_at())
        named = replies.periods_of(fields.get("time period"), duration)
        instruction = replies.text_of(fields.get("instruction"))
        reason = replies.text_of(fields.get("reason"))
        if named:
            period = self._whole_enough(named[0])
            before = self.seen.get(period, [])
            if not before or (len(before) == 1 and instruction not in before):
                return period, instruction or self._default_instruction(), reason
            self.note(f"the period {period} was chosen again: the next best one was taken by rule")
        else:
            self.note("no period could be read: the next best one was taken by rule")
        period = self._next_best(instruction)
        return period and (period, instruction or self._default_instruction(), "by rule: " + (reason or "no reply"))

    def _looked_at(self) -> list[Period]:
        """Periods that were looked at, those of the fine level first, as the original lists them."""
        fine = self.settings.windows[1] + 1e-6
        return sorted(self.seen, key=lambda period: period[1] - period[0] <= fine)

    def _default_instruction(self) -> str:
        return f"Look for what answers this: {self.asked.text}"

    def _whole_enough(self, period: Period) -> Period:
        """To a tenth of a second; a moment becomes the fine window that it lies in."""
        start, end = (min(round(t, 1), self.video.duration) for t in period)
        if end - start >= self.settings.windows[2] - 1e-6:
            return start, end
        fine = self.settings.windows[1]
        start = min(start, max(self.video.duration - 1e-3, 0.0)) // fine * fine
        return round(start, 1), min(round(start + fine, 1), self.video.duration)

    def _next_best(self, instruction: str) -> Period | None:
        """The window that was not looked at and whose caption shares most words with the question, kept ones first;
        then the fine windows in them; None where all were seen."""
        words = set(f"{self.asked.text} {instruction}".lower().split())
        windows = [entry for entry in self.memory.entries if entry.level == COARSE]
        kept = self.memory.kept

        def rank(entry) -> tuple:
            is_kept = kept is None or entry.period in kept
            return -is_kept, -len(words & set(entry.text.lower().split())), entry.period

        ranked = [entry.period for entry in sorted(windows, key=rank)]
        ranked += [
            clip.period for window in list(ranked) for clip in cut(window, self.settings.windows[1], self._fps(1))
        ]
        return next((period for period in ranked if period not in self.seen), None)

    def guess(self, agent: str) -> Steps:
        """The answer at the end, with what there is."""
        rows = self.memory.rows(all_windows=True)
        fields, text = yield from self._ask_twice(agent, rows, _lacks("answer"), (), is_last=True)
        if fields is not None and not _is_none(replies.text_of(fields.get("answer"))):
            self.outcome.answer = replies.text_of(fields.get("answer"))
        elif self.last_guess is not None:
            self.outcome.answer = self.last_guess
            self.note("the last answer that was not sure stands")
        elif text is not None:
            self.outcome.answer = text.strip()
            if self.asked.options and replies.named_option(text, self.asked.options) is None:
                self.outcome.answer = f"A. {self.asked.options[0]}"
                self.note("the last reply named no option: the first one stands")

    def _ask(
        self, agent: str, rows: Sequence[Row], fault: Callable[[dict], str | None], excluded: Sequence[Period] = ()
    ) -> Steps:
        """The fields of the reply; {} where none came in form, also when asked again."""
        fields, _ = yield from self._ask_twice(agent, rows, fault, excluded)
        return fields or {}

    def _ask_twice(
        self,
        agent: str,
        rows: Sequence[Row],
        fault: Callable[[dict], str | None],
        excluded: Sequence[Period],
        is_last: bool = False,
    ) -> Steps:
        """(fields or None, text of the last reply or None). Raises _BudgetError unless it is the last question."""
        wrong = text = None
        for attempt in range(2):
            try:
                prompt = self._fitting(agent, rows, excluded, wrong, is_last)
            except _BudgetError as spent:
                if not is_last:
                    raise
                if not attempt:
                    self.note(f"no answer could be asked for: {spent}")
                break  # what was said before stands
            (reply,) = yield [WriterCall(agent, prompt)]
            self._pay([reply])
            self.outcome.writer_calls += 1
            self.outcome.writer_tokens += self.writer.count(prompt) + self.writer.count(reply.text or "")
            text = reply.text
            fields = None if text is None else replies.fields_of(text)
            wrong = reply.error or ("it held no dictionary" if fields is None else fault(fields))
            event = {"kind": "reply", "round": self.outcome.rounds, "agent": agent, "text": text, "fault": wrong}
            self.outcome.trace.append(event | {"fields": {k: _plain(v) for k, v in (fields or {}).items()}})
            self._watch(self.outcome)
            if wrong is None:
                return fields, text
            if reply.error:
                break  # it is down, not confused
        return None, text

    def _fitting(
        self, agent: str, rows: Sequence[Row], excluded: Sequence[Period], fault: str | None, is_last: bool
    ) -> str:
        """The prompt, its captions cut so that it fits the writer. Raises _BudgetError where none may be sent."""

        def prompt_of(agent: str, rows: Sequence[Row]) -> str:
            fine = self.settings.windows[1]
            options = {"fine_window": fine, "excluded": excluded, "fault": fault}
            return agent_prompts.prompt(agent, self.asked, rows, self.video.duration, **options)

        def tokens(agent: str, rows: Sequence[Row]) -> int:
            return self.writer.count(prompt_of(agent, rows)) + self.writer.max_new_tokens

        limit = self.writer.context
        if is_last:
            if self._left("writer_calls") < 1:
                raise _BudgetError("no call is left")
            limit = min(limit, self._left("writer_tokens"))
        fitting, note = shorten(rows, list(self.seen), lambda rows: tokens(agent, rows) <= limit)
        need = tokens(agent, fitting)
        if need > limit:
            raise _BudgetError(f"the prompt takes {need} tokens without captions, more than {limit}")
        if note:
            self.note(note)
        if not is_last:
            if self._left("writer_calls") < 2:
                raise _BudgetError(f"{self.outcome.writer_calls} of {self.settings.writer_calls} calls are used")
            if self.settings.writer_tokens is None:
                return prompt_of(agent, fitting)
            last, _ = shorten(rows, list(self.seen), lambda rows: tokens("force", rows) <= self.writer.context)
            if need + tokens("force", last) > self._left("writer_tokens"):
                raise _BudgetError(f"{self.outcome.writer_tokens} of {self.settings.writer_tokens} tokens are used")
        return prompt_of(agent, fitting)

    def _left(self, budget: str) -> float:
        allowed = getattr(self.settings, budget)
        return float("inf") if allowed is None else allowed - getattr(self.outcome, budget)


def _lacks(*names: str) -> Callable[[dict], str | None]:
    def fault(fields: dict) -> str | None:
        missing = [name.title() for name in names if name not in fields]
        return f"its dictionary lacks {', '.join(missing)}" if missing else None

    return fault


def _is_none(answer: str) -> bool:
    return answer.lower().strip(". ") in ("", "no answer", "none")


def _plain(value: Any) -> Any:
    """A value of a reply as JSON can hold it: a Python literal may be a set or bytes."""
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    return value if isinstance(value, str | bool | int | float) or value is None else repr(value)


# ---- many questions at once ----------------------------------------------------------------------------------------


def run(questions: Iterable[Steps], calls: Calls, together: int = 32) -> Iterator[Outcome]:
    """Drives questions, `together` at a time, and gives each outcome when it is there, not in their order.

    An outcome depends on the replies alone: not on what runs beside it. In every turn each question makes one step,
    and the calls of all of them go to `calls` at once.
    """
    waiting = iter(questions)
    active: list[tuple[Steps, list[Call]]] = []
    while True:
        while len(active) < together and (steps := next(waiting, None)) is not None:
            active.append((steps, next(steps)))
        if not active:
            return
        made = iter(calls([call for _, wanted in active for call in wanted]))
        going_on = []
        for steps, wanted in active:
            try:
                going_on.append((steps, steps.send([next(made) for _ in wanted])))
            except StopIteration as ended:
                yield ended.value
        active = going_on
