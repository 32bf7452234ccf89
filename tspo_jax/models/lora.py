"""Low-rank adapters of a language model's projections (LoRA, arXiv 2106.09685): y = x W + scaling (x A) B.

A model with adapters has the parameters that it had, under the same paths, and for each adapted projection two more:

    language_model.layers.self_attn.q_proj.kernel            [L, in, out], frozen
    language_model.layers.self_attn.q_proj.lora_A.kernel     [L, in, r], float32
    language_model.layers.self_attn.q_proj.lora_B.kernel     [L, r, out], float32

so that an adapted answerer is called, sharded and saved as any other. The products are taken with the activations; W +
scaling A B is formed only to merge (`merged`).
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# Where the projections are in a layer of the language model.
TARGETS = {
    **{f"{name}_proj": "self_attn" for name in ("q", "k", "v", "o")},
    **{f"{name}_proj": "mlp" for name in ("gate", "up", "down")},
}
LAYERS = "language_model.layers"
ADAPTER = ("lora_A", "lora_B")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Rank r and alpha of adapters: scaling = alpha / r, or alpha / sqrt(r) where rank-stabilised (`use_rslora`)."""

    r: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = tuple(TARGETS)
    use_rslora: bool = False

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"lora.r is {self.r}; it must be at least 1")
        if unknown := sorted(set(self.targets) - set(TARGETS)):
            raise ValueError(f"lora.targets names {', '.join(unknown)}; there are {', '.join(TARGETS)}")
        if not self.targets:
            raise ValueError("lora.targets is empty: nothing would be trained")

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class Factor(nnx.Module):
    """One of the two matrices of an adapter."""

    def __init__(self, kernel: jax.Array):
        self.kernel = nnx.Param(kernel)


class AdaptedLinear(nnx.Module):
    """A projection (or the stacked ones of all layers) with an adapter; its products are in the dtype of x.

    A is uniform in +-1 / sqrt(in), as PEFT draws it, and B is 0: at first nothing is changed.
    """

    def __init__(self, linear: nnx.Linear, lora: LoraConfig, *, rngs: nnx.Rngs):
        *layers, d_in, d_out = linear.kernel.shape
        self.kernel, self.bias = linear.kernel, linear.bias
        bound = 1 / math.sqrt(d_in)
        self.lora_A = Factor(jax.random.uniform(rngs.params(), (*layers, d_in, lora.r), minval=-bound, maxval=bound))
        self.lora_B = Factor(jnp.zeros((*layers, lora.r, d_out)))
        self.scaling = lora.scaling

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x @ self.kernel[...]
        if self.bias is not None:
            y = y + self.bias[...]
        a, b = (factor.kernel[...].astype(x.dtype) for factor in (self.lora_A, self.lora_B))
        return y + (x @ a) @ b * jnp.asarray(self.scaling, x.dtype)


def with_adapters(model: nnx.Module, lora: LoraConfig, rngs: nnx.Rngs) -> nnx.Module:
    """`model`, changed in place: adapters at `lora.targets` of every layer of its `language_model`."""
    for name in lora.targets:
        part = getattr(model.language_model.layers, TARGETS[name])
        setattr(part, name, AdaptedLinear(getattr(part, name), lora, rngs=rngs))
    return model


def is_adapter(path: str) -> bool:
    """Whether a parameter's path is that of an adapter's matrix."""
    return any(node in ADAPTER for node in path.split("."))


def target_path(name: str) -> str:
    """Path of the projections that TARGETS calls `name`."""
    return f"{LAYERS}.{TARGETS[name]}.{name}"


@partial(jax.jit, static_argnums=3)
def merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scaling: float) -> jax.Array:
    """W + scaling A B of stacked layers, computed in float32, in the dtype of W."""
    with jax.default_matmul_precision("highest"):
        delta = jnp.einsum("lir,lro->lio", a.astype(jnp.float32), b.astype(jnp.float32))
    return (kernel.astype(jnp.float32) + scaling * delta).astype(kernel.dtype)
