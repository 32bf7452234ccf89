"""A world of events with a captioner that notices them only in short clips, and a writer that follows simple rules:
backtracking without a model (VideoLucy's loop, answering/backtracking.py)."""

import random
import re
from collections.abc import Callable, Sequence

from tspo_jax.answering.agent_prompts import Asked
from tspo_jax.answering.backtracking import VideoFacts
from tspo_jax.answering.calls import CaptionCall, Reply


class World:
    """Events [start s, end s, longest clip in which they are noticed, text]; a caption names what is noticed in it.

    `made` counts the captions.
    """

    identity = "a scripted world"

    def __init__(self, events: Sequence[Sequence], fps: float = 1.0):
        self.events, self.fps, self.made = events, fps, 0

    def describe(self, calls: Sequence[CaptionCall]) -> list[Reply]:
        self.made += len(calls)
        return [Reply(self.caption(call)) for call in calls]

    def caption(self, call: CaptionCall) -> str:
        start = call.times[0]
        step = call.times[1] - start if len(call.times) > 1 else 1 / self.fps
        end = start + len(call.times) * step
        seen = [text for s, e, longest, text in self.events if s < end and e > start and end - start <= longest]
        return f"{start:.1f} to {end:.1f}: " + "; ".join(seen)


class Replies:
    """A writer whose replies are a function of the prompt; `prompts` are those that it got, tokens are words."""

    context = 1_000_000
    max_new_tokens = 100

    def __init__(self, reply: Callable[[str], Reply | str], identity: str = "scripted"):
        self.reply, self.identity, self.prompts = reply, identity, []

    def count(self, text: str) -> int:
        return len(text.split())

    def write(self, prompts: Sequence[str]) -> list[Reply]:
        self.prompts += prompts
        made = [self.reply(prompt) for prompt in prompts]
        return [reply if isinstance(reply, Reply) else Reply(reply) for reply in made]


def agent_of(prompt: str) -> str:
    """Which agent a prompt is for, by the fields that it asks for."""
    form = prompt[prompt.rindex("Reply with one flat dictionary") :]
    for agent, field in (("answer", '"Confidence"'), ("type", '"Flag"'), ("localize", '"Instruction"')):
        if field in form:
            return agent
    return "force"


def by_keywords(prompt: str) -> str:
    """A writer of simple rules: sure of the option that a description names, else it takes a new window."""
    options = dict(re.findall(r"^([A-Z])\. (.+)$", prompt, re.MULTILINE))
    lines = re.findall(r"^\s*(?:\d+\.|-) \[([\d.]+) s to ([\d.]+) s\](.*)$", prompt, re.MULTILINE)
    named = [letter for letter, option in options.items() if any(option in text for *_, text in lines)]
    agent = agent_of(prompt)
    if agent == "answer":
        return f'{{"Confidence": {len(named) == 1}, "Answer": "{named[0] if named else "No Answer"}"}}'
    if agent == "type":
        return '{"Flag": False, "Time Period": "No Time"}'
    if agent == "force":
        return f'{{"Answer": "{named[0] if named else "A"}"}}'
    before = re.findall(r"\(([\d.]+), ([\d.]+)\)", prompt.partition("Looked at before")[2].partition("\n")[0])
    words = set(re.search(r"Question: (.*)", prompt)[1].lower().strip("?").split())
    if not lines:
        return "There is nothing to choose from."
    windows = [line for line in lines if line[:2] not in before and float(line[1]) - float(line[0]) > 10]
    best = max(windows or lines, key=lambda line: len(words & set(line[2].lower().replace(";", "").split())))
    return f'{{"Time Period": [({best[0]}, {best[1]})], "Instruction": "Look closely.", "Reason": "words"}}'


def keyword_writer(prompts: Sequence[str]) -> list[str]:
    """`by_keywords` as a writer of the command line: tspo_jax.toy.caption_world:keyword_writer."""
    return [by_keywords(prompt) for prompt in prompts]


THINGS = ["key", "hat", "bag", "cup", "rope", "drum", "kite", "lamp", "coin", "boot", "fish", "flag"]
COLOURS = ["red", "blue", "green", "grey", "white", "black"]
PLACES = ["harbour", "kitchen", "garden", "station", "market", "library", "forest", "workshop"]


def missed_event(seed: int, minutes: int = 10, longest_noticed: float = 10.0) -> tuple[Asked, VideoFacts, World]:
    """A question about the one thing that is dropped in a video, for five seconds, and nothing else: no clip above
    `longest_noticed` seconds names it. Each minute is at a place of its own, which the question names."""
    rng = random.Random(seed)
    places = [f"{place} {number}" for number in (1, 2) for place in PLACES][:minutes]
    rng.shuffle(places)
    minute, second = rng.randrange(minutes), rng.randrange(56)
    options = [f"a {colour} {rng.choice(THINGS)}" for colour in rng.sample(COLOURS, 4)]
    start = 60 * minute + second
    events = [(60 * i, 60 * i + 60, 1e9, place) for i, place in enumerate(places)]
    events.append((start, start + 5, longest_noticed, f"someone drops {rng.choice(options)}"))
    duration = 60.0 * minutes
    asked = Asked(f"missed {seed}", f"video {seed}", f"What does someone drop at {places[minute]}?", tuple(options))
    return asked, VideoFacts(asked.video, duration), World(events)
