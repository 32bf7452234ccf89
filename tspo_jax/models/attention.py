"""Attention: the one place that computes it, with the fused kernel of the platform where there is one.

Models call `causal` (a language model's prefill), `bidirectional` (image towers), `windowed` (towers that attend in
windows), `biased` (what has a bias or a gate of its own) and `cached` (new tokens against a cache), all on q
[B, N, H, d] and k, v with as many heads or, but for `biased`, a divisor of them. Which kernel computes it is said
around the call, while a program is traced:

    with attention.computed_by("auto", mesh):
        ...

- `cudnn`: NVIDIA GPUs, in bfloat16 or float16 (jax.nn.dot_product_attention).
- `pallas`: TPUs, the splash attention kernel that JAX ships.
- `xla`: blocks of queries, everywhere. Scores in memory are [B, H, block, N] and never N x N.
- `auto`: the platform's kernel where its limits allow it, else xla.

Scores and softmax are float32 in all of them. Under `jax.grad` each takes memory linear in the tokens: nothing N x N is
kept. A kernel runs on every device for itself: over a mesh the rows are split over `data`, and the heads over `model`,
as the weights of a language model are (`causal`); the images of a tower are dealt out to all devices.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "pallas")
PLATFORMS = {"cudnn": "gpu", "pallas": "tpu"}
HALF = (jnp.bfloat16, jnp.float16)
LANES = 128  # tokens are padded to a multiple of a TPU's vector registers
LARGEST_BLOCK = 768  # tokens of a block of the TPU's kernel: its scores lie in 16 MB of on-chip memory
WINDOWS_BLOCK = 256  # tokens whose windows the TPU's kernel computes together
GRADIENT_BLOCK = 256  # queries whose scores are in memory at once on the way back
FEW = 256  # tokens under which a kernel gains nothing over matrices that stay on the chip
WASTE = 1.1  # of the arithmetic of projections, to spare the traffic of copies


def platform_of(mesh: Mesh | None) -> str:
    """gpu, tpu or cpu: that of a mesh's devices, which need not be here, or (None) that of JAX's default."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


@dataclasses.dataclass(frozen=True)
class Computer:
    """What computes attention: one of IMPLEMENTATIONS, on the devices of a mesh or (None) those of JAX's default.

    `interpret`: run the TPU's kernel step by step on any platform, slowly; for tests.
    """

    implementation: str = "auto"
    mesh: Mesh | None = None
    interpret: bool = False

    @property
    def platform(self) -> str:
        return platform_of(self.mesh)


DEFAULT = Computer()
_computer: ContextVar[Computer] = ContextVar("computer", default=DEFAULT)


@contextlib.contextmanager
def computed_by(implementation: str = "auto", mesh: Mesh | None = None, *, interpret: bool = False) -> Iterator[None]:
    """Attention that is traced in the `with` block is computed so.

    Raises: ValueError where the devices cannot do it.
    """
    computer = Computer(implementation, mesh, interpret)
    check(implementation, computer.platform, interpret=interpret)
    token = _computer.set(computer)
    try:
        yield
    finally:
        _computer.reset(token)


def check(implementation: str, platform: str, dtype: jnp.dtype | None = None, *, interpret: bool = False) -> None:
    """Raises ValueError, saying why, where `implementation` cannot run on a platform, or not with values of `dtype`."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}, not one of {', '.join(IMPLEMENTATIONS)}")
    needed = PLATFORMS.get(implementation, platform)
    if platform != needed and not interpret:
        raise ValueError(
            f"attention is {implementation!r}, a kernel for {needed.upper()}s, but the devices are "
            f"{platform.upper()}s; take auto or xla"
        )
    if implementation == "cudnn" and dtype is not None and jnp.dtype(dtype) not in map(jnp.dtype, HALF):
        raise ValueError(
            f"attention is 'cudnn', which computes in bfloat16 or float16, but the values are {jnp.dtype(dtype)}; "
            "take auto, xla or another dtype"
        )


def chosen(head_dim: int, dtype: jnp.dtype, num_tokens: int) -> str:
    """The implementation (not `auto`) for heads of this width, values of this dtype and so many tokens of a row.

    Raises: ValueError where one was asked for that cannot compute it.
    """
    computer = _computer.get()
    if computer.implementation != "auto":
        check(computer.implementation, computer.platform, dtype, interpret=computer.interpret)
        if computer.implementation == "cudnn" and not _fits_cudnn(head_dim):
            raise ValueError(f"attention is 'cudnn', whose heads are multiples of 8 up to 128 wide, not {head_dim}")
        return computer.implementation
    if jnp.dtype(dtype) not in map(jnp.dtype, HALF) or num_tokens < FEW:
        return "xla"
    if computer.platform == "gpu" and _fits_cudnn(head_dim) and _has_cudnn(computer):
        return "cudnn"
    return "pallas" if computer.platform == "tpu" else "xla"


def _fits_cudnn(head_dim: int) -> bool:
    return head_dim % 8 == 0 and head_dim <= 128


def _has_cudnn(computer: Computer) -> bool:
    """Whether a GPU is an NVIDIA one of the Ampere generation or later; it says "8.0" there, and gfx... on AMD's."""
    device = jax.devices()[0] if computer.mesh is None else computer.mesh.devices.flat[0]
    major = str(getattr(device, "compute_capability", "")).partition(".")[0]
    return major.isdigit() and int(major) >= 8


def in_whole_blocks(x: jax.Array, num_heads: int) -> tuple[jax.Array, jax.Array | None]:
    """Tokens [B, N, width] of a tower as they are best projected for `bidirectional` or `windowed`, and `is_key`, bool
    [B, M]: as they are (None), or with padding behind them where a kernel would pad queries, keys and values by little.
    That takes some more arithmetic and spares the memory copies of all three.
    """
    B, N, width = x.shape
    if chosen(width // num_heads, x.dtype, N) != "pallas":
        return x, None
    padded = _padded(x, _block_size(N))
    if not N < padded.shape[1] <= WASTE * N:
        return x, None
    return padded, jnp.broadcast_to(jnp.arange(padded.shape[1]) < N, (B, padded.shape[1]))


def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention of each of N tokens to itself and those before: [B, N, H, d].

    q [B, N, H, d], k and v [B, N, num_key_value_heads, d].
    """
    implementation = chosen(q.shape[-1], q.dtype, q.shape[1])
    if implementation == "cudnn":
        return _on_each_device(partial(_cudnn, causal=True), q, k, v, split_heads=True)
    if implementation == "pallas":
        return _on_each_device(partial(_splash, causal=True), q, k, v, split_heads=True)
    return _in_blocks(q, k, v, causal=True)


def bidirectional(q: jax.Array, k: jax.Array, v: jax.Array, is_key: jax.Array | None = None) -> jax.Array:
    """Attention of each token to all: [B, N, H, d].

    Args:
      q: [B, N, H, d].
      k, v: [B, S, num_key_value_heads, d].
      is_key: bool [B, S], the keys that count, at least one in a row; None = all.
    """
    implementation = chosen(q.shape[-1], q.dtype, q.shape[1])
    keys = () if is_key is None else (is_key,)
    if implementation == "cudnn":
        return _on_each_device(partial(_cudnn, causal=False), q, k, v, *keys)
    if implementation == "pallas":
        return _on_each_device(partial(_splash, causal=False), q, k, v, *keys)
    return _in_blocks(q, k, v, is_key, causal=False)


def windowed(q: jax.Array, k: jax.Array, v: jax.Array, lengths: Sequence[int]) -> jax.Array:
    """Attention inside windows of successive tokens: [B, N, H, d] of q, k and v of that shape.

    lengths: of the windows, N in all.
    """
    B, N, H, d = q.shape
    implementation = chosen(d, q.dtype, N)
    lengths = np.array(lengths)
    if implementation == "pallas":
        window = np.repeat(np.arange(len(lengths)), lengths)
        return _on_each_device(partial(_splash, causal=False, window=window), q, k, v)
    first, W, n = np.cumsum(lengths) - lengths, len(lengths), lengths.max()
    is_token = np.arange(n) < lengths[:, None]  # [W, n]
    place = np.where(is_token, first[:, None] + np.arange(n), 0)
    rows = (x[:, place].reshape(B * W, n, H, d) for x in (q, k, v))
    is_key = jnp.broadcast_to(is_token, (B, W, n)).reshape(B * W, n)
    if implementation == "cudnn":
        out = _on_each_device(partial(_cudnn, causal=False), *rows, is_key)
    else:
        out = _in_blocks(*rows, is_key, causal=False)
    return out.reshape(B, W * n, H, d)[:, np.flatnonzero(is_token)]


def cached(
    q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, new: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
    """Attention of new tokens to a cache: [B, N, H, d].

    It reads every key and value once, in the order in which they lie. One new token of each row that is in the cache
    already is what cuDNN's kernel takes; TPUs need none, there is little arithmetic to fuse.

    Args:
      q: [B, N, H, d].
      k, v: [B, num_key_value_heads, S, d].
      slots: int [B, N], each token's own; it sees the slots up to that.
      new: keys and values [B, num_key_value_heads, N, d] of the tokens, in successive slots, where the cache does not
        hold them yet. Then nothing that is read has just been written, and the cache need not move for it.
    """
    if q.shape[1] == 1 and new is None and chosen(q.shape[-1], q.dtype, k.shape[2]) == "cudnn":
        return _on_each_device(_cudnn_cached, q, k.swapaxes(1, 2), v.swapaxes(1, 2), slots, split_heads=True)
    return _read_once(q, k, v, slots, new)


def biased(
    q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array | None, gate: jax.Array | None = None
) -> jax.Array:
    """Attention with something added to its scores, of texts and of windows of few tokens: [B, N, H, d].

    Args:
      q [B, N, H, d], k and v [B, S, H, d].
      bias: float, broadcast to [B, H, N, S]; None = nothing.
      gate: float, broadcast to [B, H, N, S], what is left of each weight before they are made to sum to 1 again; no row
        may be closed altogether.
    """
    if gate is None:
        return jax.nn.dot_product_attention(q, k, v, bias=None if bias is None else bias.astype(k.dtype))
    scores = jnp.einsum("bnhd,bshd->bhns", q, k).astype(jnp.float32) / q.shape[-1] ** 0.5
    scores = scores if bias is None else scores + bias
    # What is closed changes no output, but the sum behind the gate vanishes where it has the highest scores, and a
    # learned gate's gradient is divided by that sum. So a closed one counts as the highest open one at most.
    highest = jnp.max(jnp.where(gate > 0, scores, -jnp.inf), axis=-1, keepdims=True)
    scores = jnp.where(gate > 0, scores, jnp.minimum(scores, jax.lax.stop_gradient(highest)))
    weights = jax.nn.softmax(scores, axis=-1) * gate
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bhns,bshd->bnhd", weights.astype(v.dtype), v)


# ---- XLA -------------------------------------------------------------------------------------------------


def _in_blocks(q: jax.Array, k: jax.Array, v: jax.Array, is_key: jax.Array | None = None, *, causal: bool) -> jax.Array:
    if q.shape[1] <= _block(q.shape[1], causal):
        return _seen(q, k, v, is_key, 0, causal)
    return _forward_blocks(causal, q, k, v, is_key)


def _block(num_tokens: int, causal: bool) -> int:
    """Queries at a time: tiles of a matrix unit, and few scores in memory. If causal about 8 blocks, since a block does
    not look at the keys behind it, which saves almost half of the arithmetic."""
    if causal:
        return min(LANES * -(-num_tokens // 1024), 512)
    return num_tokens if num_tokens < 1024 else 512


def _seen(q, k, v, is_key, start, causal: bool) -> jax.Array:
    """Attention of successive queries, the first of which is number `start`."""
    mask = None if is_key is None else is_key[:, None, None]
    if causal:
        is_before = jnp.arange(k.shape[1]) <= start + jnp.arange(q.shape[1])[:, None]
        mask = is_before[None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forward_blocks(causal: bool, q, k, v, is_key) -> jax.Array:
    N = q.shape[1]
    block = _block(N, causal)
    parts = []
    for start in range(0, N, block):
        seen = min(start + block, N) if causal else k.shape[1]
        parts.append(_seen(q[:, start : start + block], k[:, :seen], v[:, :seen], is_key, start, causal))
    return jnp.concatenate(parts, axis=1)


def _remember(causal: bool, q, k, v, is_key):
    """As `_forward_blocks`, but one block after another: what is merely written in sequence may all be in memory at
    once, as the compiler orders it."""
    parts = []
    for blocks, seen in _runs(causal, q.shape[1], k.shape[1]):

        def step(_, block, seen=seen):
            q, start = block
            return None, _seen(q, k[:, :seen], v[:, :seen], is_key, start, causal)

        parts.append(jax.lax.scan(step, None, (_cut(q)[blocks], _starts(q)[blocks]))[1])
    return _uncut(parts, q), (q, k, v, is_key)


def _gradients(causal: bool, remembered, gradient):
    """Of q, k and v. Each block's scores are computed again, one block after another."""
    q, k, v, is_key = remembered
    of_q, of_k, of_v = [], *(jnp.zeros(x.shape, jnp.float32) for x in (k, v))
    for blocks, seen in _runs(causal, q.shape[1], k.shape[1]):

        def step(sums, block, seen=seen):
            q, gradient, start = block
            _, pull = jax.vjp(lambda q, k, v: _seen(q, k, v, is_key, start, causal), q, k[:, :seen], v[:, :seen])
            of_q, *of_kv = pull(gradient)
            return tuple(total + part for total, part in zip(sums, of_kv, strict=True)), of_q

        in_blocks = _cut(q)[blocks], _cut(gradient)[blocks], _starts(q)[blocks]
        sums, part = jax.lax.scan(step, (of_k[:, :seen], of_v[:, :seen]), in_blocks)
        of_k, of_v = (
            jnp.concatenate([new, old[:, seen:]], axis=1) for new, old in zip(sums, (of_k, of_v), strict=True)
        )
        of_q.append(part)
    return _uncut(of_q, q), of_k.astype(k.dtype), of_v.astype(v.dtype), None


_forward_blocks.defvjp(_remember, _gradients)


def _runs(causal: bool, N: int, S: int) -> list[tuple[slice, int]]:
    """Blocks of GRADIENT_BLOCK queries that look at equally many keys, and how many: up to four runs of several blocks
    if causal."""
    num_blocks = -(-N // GRADIENT_BLOCK)
    length = max(2, -(-num_blocks // 4)) if causal else num_blocks
    firsts = range(0, num_blocks, length)
    return [(slice(i, i + length), min((i + length) * GRADIENT_BLOCK, S) if causal else S) for i in firsts]


def _cut(x: jax.Array) -> jax.Array:
    """[B, N, ...] -> [blocks, B, GRADIENT_BLOCK, ...], padded with zeros."""
    x = _padded(x, GRADIENT_BLOCK)
    return x.reshape(len(x), -1, GRADIENT_BLOCK, *x.shape[2:]).swapaxes(0, 1)


def _uncut(parts: list[jax.Array], like: jax.Array) -> jax.Array:
    return jnp.concatenate(parts).swapaxes(0, 1).reshape(len(like), -1, *like.shape[2:])[:, : like.shape[1]]


def _starts(q: jax.Array) -> jax.Array:
    """Numbers of the blocks' first queries. Tied to q: else the masks, which follow from them, would be taken out of a
    rematerialised layer and kept for all blocks, N x N in all."""
    return jax.lax.optimization_barrier((jnp.arange(0, q.shape[1], GRADIENT_BLOCK), q))[0]


def _read_once(q, k, v, slots, new=None) -> jax.Array:
    """`cached` without a kernel."""
    B, N, H, d = q.shape
    heads, S = k.shape[1:3]
    q = q.reshape(B, N, heads, H // heads, d)
    is_seen = jnp.arange(S) <= slots[..., None] if new is None else jnp.arange(S) < slots[:, :1, None]
    parts = [(k, v, jnp.broadcast_to(is_seen, (B, N, S)))]
    if new is not None:
        parts.append((*new, slots[:, None] <= slots[..., None]))

    def scores(k, is_seen):
        product = jnp.einsum("bnhgd,bhsd->bhgns", q, k, preferred_element_type=jnp.float32) / np.sqrt(d)
        return jnp.where(is_seen[:, None, None], product, jnp.finfo(jnp.float32).min)

    weights = jax.nn.softmax(jnp.concatenate([scores(k, is_seen) for k, _, is_seen in parts], axis=-1), axis=-1)
    weights = weights.astype(v.dtype)
    sums = [
        jnp.einsum("bhgns,bhsd->bnhgd", of_part, v)
        for of_part, (_, v, _) in zip((weights[..., :S], weights[..., S:]), parts, strict=False)
    ]
    return sum(sums).reshape(B, N, H, d)


# ---- kernels ---------------------------------------------------------------------------------------------


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_key: jax.Array | None = None,
    *,
    causal: bool,
    implementation: str = "cudnn",
) -> jax.Array:
    """cuDNN's kernel on [B, N, H, d]. That for gradients takes even numbers of tokens only: others are padded there."""

    def compute(q, k, v, is_key=None):
        mask = None if is_key is None else jnp.broadcast_to(is_key[:, None, None], (len(q), 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation=implementation)

    def compute_padded(q, k, v, is_key=None):
        (B, S), N = k.shape[:2], q.shape[1]
        if is_key is None and not causal and S % 2:
            is_key = jnp.ones((B, S), bool)
        keys = () if is_key is None else (_padded(is_key, 2, False),)
        return compute(*(_padded(x, 2) for x in (q, k, v)), *keys)[:, :N]

    args = (q, k, v) if is_key is None else (q, k, v, is_key)
    if q.shape[1] % 2 == k.shape[1] % 2 == 0:
        return compute(*args)
    return _differentiated_as(compute_padded, compute)(*args)


def _differentiated_as(form: Callable, kernel: Callable) -> Callable:
    """`kernel`, but under differentiation `form`, which computes the same."""
    computed = jax.custom_vjp(lambda *args: kernel(*args))
    computed.defvjp(lambda *args: jax.vjp(form, *args), lambda pull, gradient: pull(gradient))
    return computed


def _cudnn_cached(
    q: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, implementation: str = "cudnn"
) -> jax.Array:
    """One token of each row, [B, 1, H, d], against k and v [B, S, heads, d] up to its slot, int [B, 1].

    A cache lies as [B, heads, S, d]: its heads are rows to the kernel, which wants none beside another, and what
    shares a head's keys are that row's heads, so that nothing is turned round. It has no gradients for one token.
    """

    def compute(q, k, v, slots):
        (B, _, H, d), (S, heads) = q.shape, k.shape[1:3]
        rows = q.reshape(B * heads, 1, H // heads, d)
        k, v = (x.swapaxes(1, 2).reshape(B * heads, S, 1, d) for x in (k, v))
        lengths = jnp.repeat(slots[:, 0] + 1, heads).astype(jnp.int32)
        out = jax.nn.dot_product_attention(rows, k, v, key_value_seq_lengths=lengths, implementation=implementation)
        return out.reshape(q.shape)

    def compute_in_xla(q, k, v, slots):
        return _read_once(q, k.swapaxes(1, 2), v.swapaxes(1, 2), slots)

    return _differentiated_as(compute_in_xla, compute)(q, k, v, slots)


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    is_key: jax.Array | None = None,
    *,
    causal: bool,
    window: np.ndarray | None = None,
) -> jax.Array:
    """The TPU's kernel on [B, N, H, d], padded to whole blocks.

    window: int [N], in place of is_key: tokens see those of their own window only. Blocks that no window is in both of
    are not computed.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes long, and few runs need it

    (N, H, d), S = q.shape[1:], k.shape[1]
    block_q, block_kv = (_block_size(N), _block_size(S)) if window is None else (WINDOWS_BLOCK,) * 2
    if causal:  # blocks on the diagonal
        block_q = block_kv = max(block_q, block_kv)
    q, (k, v) = _padded(q, block_q), (_padded(x, block_kv) for x in (k, v))
    shape = q.shape[1], k.shape[1]
    one_head = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    if window is not None:
        window = np.pad(window, (0, shape[0] - N), constant_values=-1)
        blocks = window.reshape(-1, block_q)
        meets = np.array([[np.isin(a, b).any() for b in blocks] for a in blocks])
        one_head = splash.NumpyMask(np.kron(meets, np.ones((block_q, block_kv), bool)))
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_kv_dkv_compute=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one_head] * H),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=_computer.get().interpret,
    )
    ids = None
    if window is not None:
        ids = splash.SegmentIds(*(jnp.broadcast_to(window.astype(np.int32), (len(q), shape[0])),) * 2)
    elif is_key is not None or (shape[1] != S and not causal):
        of_q, of_k = (jnp.zeros((len(q), n), jnp.int32) for n in (N, S))
        of_k = of_k if is_key is None else jnp.where(is_key, of_k, -1)
        ids = splash.SegmentIds(_padded(of_q, block_q, -2), _padded(of_k, block_kv, -1))
    # The kernel does not scale. In bfloat16 the scale would cost the queries a rounding in the product's place.
    q = (q.astype(jnp.float32) / np.sqrt(d)).astype(q.dtype)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    with jax.named_scope("causal_kernel" if causal else "kernel"):  # devices/program_cost.py counts by this name
        out = jax.vmap(kernel)(q, k, v) if ids is None else jax.vmap(kernel)(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :N]


def _block_size(num_tokens: int) -> int:
    """The multiple of LANES up to LARGEST_BLOCK that pads least; of equal ones the largest."""
    sizes = range(LANES, LARGEST_BLOCK + 1, LANES)
    return min(sizes, key=lambda size: (-(-num_tokens // size) * size - num_tokens, -size))


def _padded(x: jax.Array, block: int, value: int = 0) -> jax.Array:
    pad = ((0, 0), (0, -x.shape[1] % block)) + ((0, 0),) * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=value)


def _on_each_device(
    kernel: Callable, q: jax.Array, k: jax.Array, v: jax.Array, *more: jax.Array, split_heads: bool = False
) -> jax.Array:
    """`kernel(q, k, v, *more)` on each device's rows (axis 0) and heads (the last axis but one), which depend on no
    others. The compiler, which does not know what is in the kernel, would gather them.

    split_heads: rows over `data` and heads over `model`; else rows over both. What is not divisible is not split.
    """
    mesh = _computer.get().mesh
    if mesh is None or mesh.size == 1:
        return kernel(q, k, v, *more)
    model = mesh.shape["model"]
    if split_heads:
        rows = "data" if len(q) % mesh.shape["data"] == 0 else None
        heads = "model" if q.shape[-2] % model == 0 else None
        if heads and k.shape[-2] % model:  # replicated, as their weights are: every device takes those of its queries
            k, v = (jnp.repeat(x, q.shape[-2] // x.shape[-2], axis=-2) for x in (k, v))
    else:
        rows = next((axes for axes in (("data", "model"), "data") if len(q) % _size(mesh, axes) == 0), None)
        heads = None
    spec = PartitionSpec(rows, *[None] * (q.ndim - 3), heads, None)
    specs = (spec, spec, spec) + (PartitionSpec(rows),) * len(more)
    return jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, *more)


def _size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    return int(np.prod([mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes)]))
