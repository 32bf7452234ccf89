"""tspo_jax: keyframe selection for long videos, trained by temporal sampling policy optimisation (TSPO) in JAX."""
