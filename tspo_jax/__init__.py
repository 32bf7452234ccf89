"""tspo_jax: keyframe selection for long videos, trained by temporal sampling policy optimisation (TSPO) in JAX."""

import os

# transformers would say in every command that PyTorch is absent. Here it reads tokenizers, and PyTorch is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
