"""Answers in rounds as one HTML page: a time line of what was looked at, why, the captions, the answer, the cost."""

from collections.abc import Mapping, Sequence

from tspo_jax.pages import templates
from tspo_jax.pages.contact_sheet import clock

AGENTS = {
    "coarse_answer": "Is it answered by the windows?",
    "type": "Are a few windows enough?",
    "localize": "Where to look next?",
    "answer": "Is it answered now?",
    "force": "The best answer there is",
    "flat": "The answer from all windows",
}
WIDTH = 1000  # of the time line


def page(outcomes: Sequence[Mapping], title: str = "Answers in rounds") -> str:
    """The page of outcomes (backtracking.Outcome as dictionaries, also as read from JSON)."""
    shown = [{**outcome, "bars": bars(outcome)} for outcome in outcomes]
    return templates.render("trace.html", title=title, outcomes=shown, agents=AGENTS)


def part(outcome: Mapping) -> str:
    """One outcome for a page that is there already, also while the question is being answered."""
    return templates.render("found_in_rounds.html", one={**outcome, "bars": bars(outcome)}, agents=AGENTS)


def bars(outcome: Mapping) -> list[list[dict]]:
    """The time line: a row a look, a bar a clip."""
    looks = [event for event in outcome["trace"] if event["kind"] == "captions"]
    scale = WIDTH / outcome["duration"]

    def title(clip: Mapping) -> str:
        return f"{clock(clip['period'][0])} to {clock(clip['period'][1])}: {clip['caption'] or clip['error']}"

    return [
        [
            {
                "level": event["level"],
                "x": round(clip["period"][0] * scale, 1),
                "width": round((clip["period"][1] - clip["period"][0]) * scale, 1),
                "y": 14 * row,
                "title": title(clip),
            }
            for clip in event["clips"]
            if clip["split"] == "whole" or event["level"] != "coarse"
        ]
        for row, event in enumerate(looks)
    ]
