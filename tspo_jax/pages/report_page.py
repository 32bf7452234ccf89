"""The report as one HTML page: pure functions from numbers and pictures to text. No network, no script, no files.

The page is well-formed XML after its doctype, so that a test can parse it. Colours are CSS variables with a light and a
dark value; charts are inline SVG that uses them.
"""

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from tspo_jax.evaluation.results import difference_text, notes
from tspo_jax.pages.contact_sheet import clock

THUMBNAIL = 144  # pixels, width


@dataclass(frozen=True)
class Curve:
    """A metric over the steps: its name, colour (CSS class), steps [n] and values [n]."""

    name: str
    colour: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Choice:
    """What a method showed to the answerer.

    Attributes:
      method: name for the reader.
      colour: CSS class.
      times: seconds of the frames [K].
      frames: uint8 pictures [K] of [H, W, 3].
      answer: as written; correct: whether it is right. None where it was not asked for, or is not known.
    """

    method: str
    colour: str
    times: Sequence[float]
    frames: Sequence[np.ndarray]
    answer: str | None
    correct: bool | None


@dataclass(frozen=True)
class Example:
    """A held-out question.

    Attributes:
      family, query, options, answer: the question, its option texts and the right letter; "" where there is none.
      video, duration: name and seconds.
      evidence: spans [(start, end)] in seconds.
      times: of the candidates, seconds [T].
      before, after: scores of the candidates by the untrained and the trained agent [T], or what `curves` says; of
        `before` None there is no curve.
      choices: of the methods.
      curves: names of the two.
    """

    family: str
    query: str
    options: Sequence[str]
    answer: str
    video: str
    duration: float
    evidence: Sequence[tuple[float, float]]
    times: np.ndarray
    before: np.ndarray | None
    after: np.ndarray
    choices: Sequence[Choice]
    curves: tuple[str, str] = ("scores before training", "after")


def page(
    title: str,
    facts: Mapping[str, str],
    curves: Mapping[str, Sequence[Curve]],
    summary: Mapping,
    names: Mapping[str, str],
    examples: Sequence[Example],
) -> str:
    """The page.

    Args:
      title: of the page.
      facts: what was run, name -> value.
      curves: chart title -> curves; empty where nothing was trained.
      summary: of results.summarize.
      names: method -> its name for the reader, in the order of the table.
      examples: held-out questions.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<dl class='facts'>",
        *(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items()),
        "</dl>",
        _evaluation(summary, names),
    ]
    if curves:
        parts += [
            "<h2>Training</h2>",
            "<p>Thin: each step. Thick: moving average. The loss is zero by construction and says nothing; a group is "
            "dead when all its frame sets earn the same reward, so that nothing can be learned from it.</p>",
            f"<div class='charts'>{''.join(line_chart(name, lines) for name, lines in curves.items())}</div>",
        ]
    if examples:
        parts += [
            "<h2>Held-out questions</h2>",
            "<p>Evenly spaced in the question file, not chosen by their outcome. Scores are shown relative to their "
            "mean over the video; the shaded span is the evidence; frames inside it have a green frame.</p>",
            *map(example_section, examples),
        ]
    return document(title, parts)


def document(title: str, body: Sequence[str]) -> str:
    """An HTML page of these elements."""
    head = (
        "<head><meta charset='utf-8' /><meta name='viewport' content='width=device-width, initial-scale=1' />"
        f"<meta name='color-scheme' content='light dark' /><title>{escape(title)}</title><style>{STYLE}</style></head>"
    )
    return f"<!DOCTYPE html>\n<html lang='en'>{head}<body><main>{chr(10).join(body)}</main></body></html>\n"


# ---- evaluation ------------------------------------------------------------------------------------------


def _evaluation(summary: Mapping, names: Mapping[str, str]) -> str:
    budgets = sorted({row["k"] for row in summary["accuracy"]})
    text = (
        f"<h2>Evaluation</h2><p>{summary['num_questions']} held-out questions about {summary['num_videos']} videos. "
        "Intervals are 95 %, from a bootstrap over videos.</p>"
    )
    text += "".join(f"<p>{escape(note)}.</p>" for note in notes(summary))
    return text + "".join(_budget(summary, names, k) for k in budgets)


def _budget(summary: Mapping, names: Mapping[str, str], k: int) -> str:
    accuracy = [row for row in summary["accuracy"] if row["k"] == k]
    gains = [row for row in summary["differences"] if row["k"] == k]
    methods = [method for method in names if any(row["method"] == method for row in accuracy)]
    pairs = list(dict.fromkeys((row["method"], row["baseline"]) for row in gains))
    headings = [f"<th>{escape(names[m])}</th>" for m in methods]
    headings += [f"<th>{escape(names[a])}<br />− {escape(names[b])}</th>" for a, b in pairs]
    lines = []
    for grouping, label in dict.fromkeys((row["grouping"], row["label"]) for row in accuracy):
        here = {row["method"]: row for row in accuracy if (row["grouping"], row["label"]) == (grouping, label)}
        gained = {(r["method"], r["baseline"]): r for r in gains if (r["grouping"], r["label"]) == (grouping, label)}
        n = max(row["n"] for row in here.values())
        cells = [f"<td>{_interval(here[m], n) if m in here else ''}</td>" for m in methods]
        for pair in pairs:
            row = gained.get(pair)
            noise = "noise" if row and row["inside_noise"] else ""
            note = "<span class='tag'>inside the noise</span>" if noise else ""
            cells.append(f"<td class='{noise}'>{difference_text(row).removeprefix('~ ') if row else ''}{note}</td>")
        lines.append(f"<tr><th>{escape(label)} <small>({n})</small></th>{''.join(cells)}</tr>")
    return (
        f"<div class='scroll'><table><caption>Accuracy in %, differences in points; K = {k} frames</caption>"
        f"<thead><tr><th></th>{''.join(headings)}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _interval(row: Mapping, n: int) -> str:
    """An accuracy as a number above a bar from 0 to 100 with the interval on it; its questions unless they are n."""
    low, value, high = (100 * (row["accuracy"] if row[x] is None else row[x]) for x in ("low", "accuracy", "high"))
    bar = (
        "<svg class='bar' viewBox='0 0 100 8' preserveAspectRatio='none' aria-hidden='true'>"
        f"<rect class='track' x='0' y='3' width='100' height='2' />"
        f"<rect class='range' x='{low:.1f}' y='2' width='{max(high - low, 0.5):.1f}' height='4' />"
        f"<rect class='value' x='{value - 0.6:.1f}' y='0' width='1.2' height='8' /></svg>"
    )
    span = f" <small>[{low:.0f}, {high:.0f}]</small>" if row["low"] is not None else ""
    count = "" if row["n"] == n else f" <small>({row['n']})</small>"
    return f"<b>{value:.1f}</b>{span}{count}{bar}"


# ---- charts ----------------------------------------------------------------------------------------------


def smooth(values: Sequence[float]) -> np.ndarray:
    """Moving average [n] over a twelfth of the curve (at least 5 values), centred, so that it does not lag."""
    values = np.asarray(values, float)
    half = max(2, len(values) // 24)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    start, stop = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[stop] - total[start]) / (stop - start)


def line_chart(title: str, curves: Sequence[Curve], width: int = 420, height: int = 210) -> str:
    """Curves over steps, raw and smoothed, several with a legend; the axis of what stays in [0, 1] goes from 0 to 1."""
    left, right, top, bottom = 44, 10, 10, 24
    steps = np.concatenate([np.asarray(c.steps, float) for c in curves])
    values = np.concatenate([np.asarray(c.values, float) for c in curves])
    is_share = values.min() >= 0 and values.max() <= 1
    ticks = [0, 0.25, 0.5, 0.75, 1] if is_share else _ticks(float(values.min()), float(values.max()))
    x = _Scale(steps.min(), max(steps.max(), steps.min() + 1), left, width - right)
    y = _Scale(ticks[0], ticks[-1], height - bottom, top)
    parts = [
        f"<line class='grid' x1='{left}' x2='{width - right}' y1='{y(t):.1f}' y2='{y(t):.1f}' />"
        f"<text class='tick' x='{left - 6}' y='{y(t) + 3.5:.1f}' text-anchor='end'>{t:g}</text>"
        for t in ticks
    ]
    ends = ((steps.min(), "start"), (steps.max(), "end"))
    parts += [
        f"<text class='tick' x='{x(s):.1f}' y='{height - 7}' text-anchor='{anchor}'>step {s:g}</text>"
        for s, anchor in ends
    ]
    for curve in curves:
        for values, kind in ((curve.values, "raw"), (smooth(curve.values), "smooth")):
            parts.append(f"<polyline class='{kind} {curve.colour}' points='{_points(curve.steps, values, x, y)}' />")
    legend = "".join(f"<span class='key {c.colour}'>{escape(c.name)}</span>" for c in curves) if len(curves) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}{legend}</figcaption><svg viewBox='0 0 {width} {height}' role='img'>"
        f"<title>{escape(title)}</title>{''.join(parts)}</svg></figure>"
    )


def score_chart(example: Example, width: int = 880, height: int = 190) -> str:
    """Scores over time before and after training, the evidence shaded, a row of ticks per method below."""
    left, right, top = 10, 10, 8
    row_height = 13
    bottom = 22 + row_height * len(example.choices)
    x = _Scale(0, example.duration, left, width - right)
    lines = [(example.before, "before"), (example.after, "after")]
    centred = [(np.asarray(scores, float) - np.mean(scores), kind) for scores, kind in lines if scores is not None]
    extent = np.concatenate([scores for scores, _ in centred])
    y = _Scale(extent.min(), max(extent.max(), extent.min() + 1e-9), height - bottom, top)
    parts = [
        f"<rect class='evidence' x='{x(start):.1f}' width='{max(x(end) - x(start), 1.5):.1f}' y='0' "
        f"height='{height - 18}'><title>evidence {clock(start)} – {clock(end)}</title></rect>"
        for start, end in example.evidence
    ]
    parts += [f"<polyline class='score {kind}' points='{_points(example.times, s, x, y)}' />" for s, kind in centred]
    for row, choice in enumerate(example.choices):
        middle = height - bottom + 4 + row_height * (row + 0.5)
        parts += [
            f"<rect class='pick {choice.colour}' x='{x(t) - 1.5:.1f}' y='{middle - 4.5:.1f}' width='3' height='9'>"
            f"<title>{escape(choice.method)} {clock(t)}</title></rect>"
            for t in choice.times
        ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        anchor = {0: "start", 1: "end"}.get(share, "middle")
        at = share * example.duration
        parts.append(
            f"<text class='tick' x='{x(at):.1f}' y='{height - 4}' text-anchor='{anchor}'>{clock(at)[:-2]}</text>"
        )
    keys = [(kind, name) for (scores, kind), name in zip(lines, example.curves, strict=True) if scores is not None]
    keys += [(choice.colour, choice.method) for choice in example.choices]
    legend = "".join(f"<span class='key {kind}'>{escape(name)}</span>" for kind, name in keys)
    return (
        f"<figure class='wide'><svg viewBox='0 0 {width} {height}' role='img'>"
        f"<title>Scores over time: {escape(example.query)}</title>{''.join(parts)}</svg>"
        f"<figcaption>{legend}</figcaption></figure>"
    )


@dataclass(frozen=True)
class _Scale:
    """Maps [low, high] to [start, end] pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (float(value) - self.low) / (self.high - self.low) * (self.end - self.start)


def _points(xs: Iterable[float], ys: Iterable[float], x: _Scale, y: _Scale) -> str:
    return " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in zip(xs, ys, strict=True))


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around [low, high]."""
    span = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 2))
    step = next(unit * m for m in (1, 2, 5, 10) if span / (unit * m) <= 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * i, 12) for i in range(first, max(last, first + 1) + 1)]


# ---- questions -------------------------------------------------------------------------------------------


def example_section(example: Example) -> str:
    """A question with the scores over its video and the frames of every method."""
    options = "".join(
        f"<li class='{'right' if letter == example.answer else 'option'}'>{letter}. {escape(option)}</li>"
        for letter, option in zip("ABCDEFGH", example.options, strict=False)
    )
    rows = "".join(_choice(choice, example.evidence) for choice in example.choices)
    family = f"<span class='tag'>{escape(example.family)}</span> " if example.family else ""
    return (
        f"<section><h3>{family}{escape(example.query)}</h3>"
        f"<ul class='options'>{options}</ul><p class='video'>{escape(example.video)}, {clock(example.duration)}</p>"
        f"{score_chart(example)}{rows}</section>"
    )


def _choice(choice: Choice, evidence: Sequence[tuple[float, float]]) -> str:
    pictures = []
    for seconds, frame in zip(choice.times, choice.frames, strict=True):
        hit = any(start <= seconds <= end for start, end in evidence)
        pictures.append(
            f"<figure class='{'hit' if hit else 'frame'}'><img src='{jpeg_uri(frame)}' "
            f"alt='{escape(choice.method)}, frame at {clock(seconds)}{', evidence' if hit else ''}' />"
            f"<figcaption>{clock(seconds)}</figcaption></figure>"
        )
    verdict = {True: "right", False: "wrong", None: ""}[choice.correct]
    said = "" if choice.answer is None else f"“{escape(_printable(choice.answer))}”"
    if verdict:
        said = f"{'✓' if choice.correct else '✗'} {verdict}: {said}"
    return (
        f"<div class='choice'><h4><span class='key {choice.colour}'>{escape(choice.method)}</span>"
        f"<span class='{verdict}'>{said}</span></h4>"
        f"<div class='strip'>{''.join(pictures)}</div></div>"
    )


def _printable(text: str) -> str:
    """Without control characters, which a page may not hold."""
    return "".join(c if c.isprintable() else "�" for c in text)


def jpeg_uri(frame: np.ndarray, width: int = THUMBNAIL) -> str:
    """uint8 [H, W, 3] -> data URI of a JPEG that is `width` pixels wide."""
    height = round(frame.shape[0] * width / frame.shape[1])
    buffer = io.BytesIO()
    Image.fromarray(frame).resize((width, height)).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """
:root { --page: #fbfbfa; --ink: #1c1c1a; --soft: #6b6b66; --rule: #dcdcd6; --panel: #ffffff;
  --trained: #1f5fbf; --clip: #b4570b; --uniform: #77776f; --second: #7a3fa8; --evidence: #2e9e5b; --wrong: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --ink: #ecece8; --soft: #a0a09a; --rule: #3a3a37;
  --panel: #1f1f1d; --trained: #7fb0ff; --clip: #f0a050; --uniform: #a5a59d; --second: #c79bee; --evidence: #5fd08f;
  --wrong: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 28px; margin: 0 0 16px; } h2 { font-size: 21px; margin: 44px 0 8px; }
h3 { font-size: 17px; margin: 0 0 6px; } h4 { font-size: 14px; margin: 14px 0 6px; display: flex; gap: 16px; }
p { margin: 6px 0 14px; max-width: 70ch; } small, .video { color: var(--soft); font-size: 13px; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 10px 20px; margin: 0; }
dt { color: var(--soft); font-size: 13px; } dd { margin: 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13px; padding: 6px 0; }
th, td { padding: 8px 12px; text-align: left; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; } .noise { color: var(--soft); }
.tag { display: inline-block; font-size: 12px; font-weight: 600; color: var(--soft); border: 1px solid var(--rule);
  border-radius: 10px; padding: 0 8px; } td .tag { display: table; margin-top: 3px; }
.bar { display: block; width: 100%; min-width: 90px; height: 8px; margin-top: 4px; } .track { fill: var(--rule); }
.range { fill: var(--trained); opacity: 0.45; } .value { fill: var(--trained); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 18px; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--soft); }
.charts figure, section { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 14px; }
section { margin: 18px 0; } svg { display: block; width: 100%; } .charts figcaption { color: var(--ink); }
.grid { stroke: var(--rule); } .tick { fill: var(--soft); font: 11px system-ui, sans-serif; }
polyline { fill: none; stroke: currentColor; } .raw { stroke-width: 0.8; opacity: 0.35; } .smooth { stroke-width: 2; }
.trained, .after { color: var(--trained); } .clip { color: var(--clip); } .uniform, .before { color: var(--uniform); }
.second { color: var(--second); } .other { color: var(--second); }
.score { stroke-width: 1.4; } .score.before { stroke-dasharray: 4 3; }
.score.after { stroke-width: 1.8; } .pick { fill: currentColor; }
.evidence { fill: var(--evidence); opacity: 0.22; }
.key { margin-right: 14px; font-weight: 600; } .key::before { content: ''; display: inline-block; width: 12px;
  height: 3px; margin: 0 6px 4px 0; background: currentColor; } .charts .key { margin: 0 0 0 14px; font-weight: 400; }
.options { list-style: none; padding: 0; margin: 0 0 4px; display: flex; flex-wrap: wrap; gap: 4px 18px; }
.right { color: var(--evidence); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(92px, 1fr)); gap: 6px; }
.strip img { display: block; width: 100%; border-radius: 4px; border: 3px solid transparent; }
.hit img { border-color: var(--evidence); } .hit figcaption { color: var(--evidence); font-weight: 600; }
"""
