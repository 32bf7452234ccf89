"""What a rule of the doctor finds wrong with a run."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A short name, what is wrong and what helps in words, and the numbers that say so."""

    name: str
    text: str
    numbers: dict[str, float]
