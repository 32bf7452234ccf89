"""A share of the work on many videos or questions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Shard:
    """One of `count` runs that share the work."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence) -> list:
        return list(items[self.index :: self.count])

    def path(self, folder: Path, stem: str, suffix: str = "") -> Path:
        """FOLDER/STEM-I-of-N.SUFFIX, without numbers where there is one shard."""
        return folder / (stem + (f"-{self.index:05d}-of-{self.count:05d}" if self.count > 1 else "") + suffix)
