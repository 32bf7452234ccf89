"""The families of Video-MLLMs. A further one is one model file, and one entry here."""

from tspo_jax.models import llava_video, qwen2_5_vl, qwen3_vl
from tspo_jax.models.family import Family

FAMILIES: tuple[Family, ...] = (llava_video.FAMILY, qwen2_5_vl.FAMILY, qwen3_vl.FAMILY)
