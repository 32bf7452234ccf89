import pytest

from tspo_jax.selection.search_options import SearchOptions, objects


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "fast"}, "schedule is 'fast'"),
        ({"grid": (0, 4)}, "grid is"),
        ({"grid": (4,)}, "grid is"),
        ({"share": 0.0}, "share is 0.0"),
        ({"share": 1.5}, "share is 1.5"),
        ({"threshold": 1.0}, "threshold is 1.0"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        SearchOptions(**options)


def test_objects():
    assert objects([" cat", "", "dog", "cat"], ["cat", "mat ", "mat"]) == (("cat", "dog"), ("mat",))
