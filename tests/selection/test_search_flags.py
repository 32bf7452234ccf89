"""Flags that make a search, and those that do not fit, which are refused before anything is loaded."""

from types import SimpleNamespace

import pytest

from tspo_jax.selection import search_flags
from tspo_jax.selection.search_options import SearchOptions


def flags(**changes):
    given = dict(
        method="tstar", detector="D", targets=["a"], cues=[], answerer="", page="", grid=["4", "4"], schedule="mix",
        search_budget=0.1, confidence=0.6,
    )  # fmt: skip
    return SimpleNamespace(**given | changes)


def test_flags():
    assert search_flags.check(flags(grid=["2", "8"], search_budget=0.5, schedule="random")) == SearchOptions(
        "random", (2, 8), 0.5, 0.6
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"detector": ""}, "--method=tstar needs a --detector"),
        ({"targets": [" ", ""]}, "--targets= , names no object"),
        ({"targets": [], "cues": ["a"]}, "--targets= names no object"),
        ({"targets": []}, "needs --targets, or an --answerer"),
        ({"page": "p.html"}, "--page shows an agent's scores"),
        ({"grid": ["4", "x"]}, "--grid=4,x is not rows,columns"),
        ({"grid": ["4"]}, "grid is"),
        ({"search_budget": 0.0}, "share is 0.0"),
        ({"method": "topk"}, "--detector is for --method=tstar"),
        ({"method": "topk", "detector": ""}, "--targets is for --method=tstar"),
    ],
)
def test_flags_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        search_flags.check(flags(**changes))
