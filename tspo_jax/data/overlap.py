"""What a held-out file shares with the questions that are trained on: its numbers are too good then."""

from collections.abc import Iterable

_SHOWN = 3  # names


def shared(trained: Iterable[tuple[str, str]], held_out: Iterable[tuple[str, str]]) -> list[str]:
    """One line on the held-out (video, question) pairs that are trained on as well, one on the other videos that are.

    Questions count as equal where they are about one video in the same words (without their options), whatever the
    letters' case and the spaces between them. No line where nothing is shared.
    """
    trained, held_out = ({(video, _words(question)) for video, question in pairs} for pairs in (trained, held_out))
    of_training, asked_about = ({video for video, _ in pairs} for pairs in (trained, held_out))
    lines = []
    if questions := trained & held_out:
        about = _named({video for video, _ in questions})
        lines.append(
            f"{len(questions)} of the {len(held_out)} held-out questions are trained on as well (about {about})"
        )
    if videos := of_training & asked_about:
        lines.append(
            f"{len(videos)} of the {len(asked_about)} held-out videos are trained on as well ({_named(videos)})"
        )
    return lines


def _words(question: str) -> str:
    return " ".join(question.casefold().split())


def _named(videos: set[str]) -> str:
    more = ", ..." if len(videos) > _SHOWN else ""
    return ", ".join(sorted(videos)[:_SHOWN]) + more
