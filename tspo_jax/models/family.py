"""What the rest of the system must know of a family of Video-MLLMs besides its network."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of Video-MLLMs: one at the end of each one's model file, all listed in families.py.

    Attributes:
      model_types: those of config.json.
      model: the network, `model(config, rngs=...)`; models/llava_video.py says what it offers.
      read: (config.json, preprocessor_config.json, VideoOptions) -> the network's config and the processor of its
        frames; ValueError for what is not supported.
      names: how files name its tensors, as checkpoints.weights.Format says: `rename`, `ignored`, `aliases`.
      sharding: how its parameters are split, as devices.sharding.RULES says; the language model's rules are there.
      tower: what the paths of its image tower's parameters begin with.
      stacked: nodes of a path, besides `layers` and `blocks`, whose parameters carry a leading layer axis.
      templates: name of a conversation of one user turn -> its text, with {text} for the user's and a tag of
        video_tags.py for the video; the first is the one that the family was trained on.
    """

    model_types: tuple[str, ...]
    model: type
    read: Callable[[Mapping[str, Any], Mapping[str, Any], Any], tuple[Any, Any]]
    names: Mapping[str, tuple]
    sharding: tuple[tuple[str, tuple[str | None, ...]], ...]
    tower: tuple[str, ...]
    templates: Mapping[str, str]
    stacked: tuple[str, ...] = ()

    @property
    def template(self) -> str:
        return next(iter(self.templates))
