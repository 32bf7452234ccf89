"""Layers that more than one network is made of. Names mirror Hugging Face so that weights map mechanically."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from tspo_jax.models import attention

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """The function that config.json calls `name`; ValueError where it is none of ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act {name!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


Linear = partial(nnx.Linear, kernel_init=nnx.initializers.normal(0.02))
# The fast variance E[x^2] - E[x]^2 loses digits against PyTorch's two-pass form.
LayerNorm = partial(nnx.LayerNorm, use_fast_variance=False)


class Embed(nnx.Module):
    """A table of vectors, looked up in the table's own dtype (nnx.Embed casts to the dtype that it was built with, so a
    checkpoint loaded in bfloat16 would run in float32)."""

    def __init__(self, num_embeddings: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (num_embeddings, width)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        return self.embedding[...][ids]

    def attend(self, x: jax.Array) -> jax.Array:
        """Products of x [..., width] with every vector: the logits of tied embeddings."""
        return x @ self.embedding[...].T


class RMSNorm(nnx.Module):
    """x / rms(x) in float32, cast back to x's dtype, then scaled (Qwen2's order: it matters in bfloat16)."""

    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, -1, keepdims=True) + self.epsilon)
        return self.scale[...] * x32.astype(x.dtype)


class Mlp(nnx.Module):
    """Linear, activation, Linear: the agent's head (relu) and LLaVA's projector (gelu)."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, hidden_act: str, *, rngs: nnx.Rngs):
        self.linear_1 = Linear(d_in, d_hidden, rngs=rngs)
        self.linear_2 = Linear(d_hidden, d_out, rngs=rngs)
        self.activation = activation(hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x)))


def stack_layers(make_layer: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """One layer module whose parameters carry a leading axis [num_layers, ...]; run it with `scan_layers`.

    Stacked layers are compiled once, so compile time does not grow with depth.
    """
    graphdef, _ = nnx.split(make_layer(rngs))
    keys = jax.random.split(rngs.params(), num_layers)
    return nnx.merge(graphdef, jax.vmap(lambda key: nnx.split(make_layer(nnx.Rngs(key)))[1])(keys))


def scan_layers(
    layers: nnx.Module, x: jax.Array, *args, per_layer=None, behind: Callable | None = None
) -> tuple[jax.Array, jax.Array]:
    """Applies stacked `layers` one after another.

    Args:
      layers: from `stack_layers`; each is called as `layer(x, *args)`, with one more argument, its slice
        of `per_layer`, when that is given. It returns the new x, or (new x, output).
      per_layer: pytree with a leading layer axis, e.g. a KV cache.
      behind: (number of the layer, its x) -> what goes on.
    Returns:
      the last x, and the layers' outputs stacked on a leading axis (None where they return x only).
    """
    graphdef, params = nnx.split(layers)

    def step(x, xs):
        i, layer_params, extra = xs
        out = nnx.merge(graphdef, layer_params)(x, *args, *(() if extra is None else (extra,)))
        x, output = out if isinstance(out, tuple) else (out, None)
        return (x if behind is None else behind(i, x)), output

    number = None if behind is None else jnp.arange(len(jax.tree.leaves(params)[0]))
    return jax.lax.scan(step, x, (number, params, per_layer))


def take_apart(layers: nnx.Module, num_layers: int) -> nnx.List:
    """Stacked `layers` as modules with arrays of their own, copied out of the stack where the program says this."""
    return nnx.List([layer_at(layers, i) for i in range(num_layers)])


def layer_at(layers: nnx.Module, index: jax.Array | int) -> nnx.Module:
    """One layer of stacked `layers`, or of those taken apart."""
    if isinstance(layers, nnx.List):
        return layers[index]
    graphdef, params = nnx.split(layers)
    if isinstance(index, int):  # known while tracing: no copy where the compiler can read a part of an array
        return nnx.merge(graphdef, jax.tree.map(lambda p: p[index], params))
    return nnx.merge(graphdef, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params))


class SelfAttention(nnx.Module):
    """Multi-head attention of CLIP and SigLIP: four projections with bias, softmax in float32."""

    def __init__(self, width: int, num_heads: int, *, rngs: nnx.Rngs):
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, rngs=rngs) for _ in range(4))
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, causal: bool) -> jax.Array:
        N = x.shape[1]
        x, is_key = (x, None) if causal else attention.in_whole_blocks(x, self.num_heads)
        q, k, v = (of_heads(p, x, self.num_heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = attention.causal(q, k, v) if causal else attention.bidirectional(q, k, v, is_key)
        return from_heads(self.out_proj, out)[:, :N]


def of_heads(projection: nnx.Linear, x: jax.Array, num_heads: int) -> jax.Array:
    """The projection of [B, N, width] as [B, N, num_heads, d].

    For the TPU's kernel the product itself has these axes, and the compiler may order them as the kernel wants them: it
    writes a product of two axes out and then once more in the order of heads.
    """
    kernel, bias = projection.kernel[...], projection.bias[...]
    if attention.chosen(kernel.shape[-1] // num_heads, x.dtype, x.shape[1]) != "pallas":
        return projection(x).reshape(*x.shape[:2], num_heads, -1)
    return jnp.einsum("bnw,whd->bnhd", x, kernel.reshape(len(kernel), num_heads, -1)) + bias.reshape(num_heads, -1)


def from_heads(projection: nnx.Linear, x: jax.Array) -> jax.Array:
    """The projection [B, N, width] of heads [B, N, num_heads, d] beside each other, the other way round."""
    if attention.chosen(x.shape[-1], x.dtype, x.shape[1]) != "pallas":
        return projection(x.reshape(*x.shape[:2], -1))
    kernel = projection.kernel[...]
    return jnp.einsum("bnhd,hdw->bnw", x, kernel.reshape(*x.shape[2:], -1)) + projection.bias[...]


class FeedForward(nnx.Module):
    def __init__(self, width: int, hidden: int, hidden_act: str, *, rngs: nnx.Rngs):
        self.fc1 = Linear(width, hidden, rngs=rngs)
        self.fc2 = Linear(hidden, width, rngs=rngs)
        self.activation = activation(hidden_act)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(self.activation(self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer block of CLIP (image and text) and SigLIP: x [B, N, width] -> [B, N, width]."""

    def __init__(
        self,
        width: int,
        hidden: int,
        num_heads: int,
        activation: str,
        epsilon: float,
        *,
        causal: bool = False,
        rngs: nnx.Rngs,
    ):
        self.layer_norm1 = LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.self_attn = SelfAttention(width, num_heads, rngs=rngs)
        self.layer_norm2 = LayerNorm(width, epsilon=epsilon, rngs=rngs)
        self.mlp = FeedForward(width, hidden, activation, rngs=rngs)
        self.causal = causal

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.self_attn(self.layer_norm1(x), self.causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """`num_layers` stacked blocks (kept one level down because Hugging Face's keys say `encoder.layers.*`)."""

    def __init__(self, num_layers: int, make_layer: Callable[[nnx.Rngs], nnx.Module], *, rngs: nnx.Rngs):
        self.layers = stack_layers(make_layer, num_layers, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return scan_layers(self.layers, x)[0]


def patch_conv(patch_size: int, width: int, *, use_bias: bool, rngs: nnx.Rngs) -> nnx.Conv:
    """Non-overlapping patches [B, H, W, 3] -> [B, H//p, W//p, width]; border pixels that fill no patch are dropped."""
    return nnx.Conv(3, width, (patch_size, patch_size), patch_size, padding="VALID", use_bias=use_bias, rngs=rngs)


def merge_params(graphdef: nnx.GraphDef, params: dict) -> nnx.Module:
    """The module whose parameters are the plain nested dict `params` (see `split_params`)."""
    return nnx.merge(graphdef, params)


def split_params(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
    """A module as its static structure and a plain nested dict of arrays (or ShapeDtypeStructs)."""
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def abstract_module(make_module: Callable[[nnx.Rngs], nnx.Module]) -> tuple[nnx.GraphDef, dict]:
    """`split_params` of a module that is never allocated: shapes for loading, sharding and compiling ahead of time."""
    return split_params(nnx.eval_shape(lambda: make_module(nnx.Rngs(0))))
