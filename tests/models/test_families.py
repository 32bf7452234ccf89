"""The table of families: nothing is two families'."""

from tspo_jax.models.families import FAMILIES


def test_names_are_one_familys():
    for names in ("model_types", "templates"):
        every = [name for family in FAMILIES for name in getattr(family, names)]
        assert len(every) == len(set(every))
    rules = [pattern for family in FAMILIES for pattern, _ in family.sharding]
    assert len(rules) == len(set(rules))
