"""Seconds per training step, split by part: this project against a PyTorch baseline, in one run on one machine.

    python -m benchmarks.step_time [--answer_tokens=8] [--steps=3] [--output=FILE.json]     # CPU, a small configuration
    python -m benchmarks.step_time --gpu [--output=FILE.json]      # one GPU: LLaVA-Video-7B, random bfloat16 weights

Both train on the same needle samples of T frames, with the same random weights. The baseline is written with Hugging
Face's classes in the way in which the original works: CLIP encodes all frames inside the step, the agent's attention is
T x T, the G rollouts of a question run one after another, each preparing and encoding its own K frames, and each answer
is generated on its own. Random weights never end an answer by themselves, so both are held to `--answer_tokens`; as
configured the original would wait for up to 256 tokens and this project for up to 16.

Beside the step, single pieces of the models are timed with the same inputs on both sides: there the ratio is one of
matrix libraries alone.
"""

import argparse
import dataclasses
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from tspo_jax import config as cfg
from tspo_jax.answering.rollout import Rollout, unique_frames
from tspo_jax.checkpoints.folders import Generation, answerer_architecture
from tspo_jax.data.frame_store import encode_jpeg
from tspo_jax.devices import compiling, sharding
from tspo_jax.devices.chips import chip_of
from tspo_jax.devices.program_cost import arithmetic
from tspo_jax.models import attention
from tspo_jax.models.clip import ClipConfig
from tspo_jax.models.layers import abstract_module, merge_params, split_params, take_apart
from tspo_jax.models.preprocessing import ImageProcessor
from tspo_jax.models.qwen2 import KVCache
from tspo_jax.models.temporal_agent import TemporalAgent
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.tspo import programs
from tspo_jax.tspo.programs import TrainState


@dataclasses.dataclass(frozen=True)
class Setting:
    """Sizes of a benchmark: B questions of T candidate frames [height, width, 3], G sets of K frames."""

    answerer: dict  # config.json of LLaVA-Video
    clip: dict  # config.json of CLIP
    dtype: str
    B: int
    T: int
    G: int = 8
    K: int = 16
    frame: tuple[int, int] = (180, 320)
    prompt_tokens: int = 64
    encode_chunk: int = 16
    prefill_chunk: int = 0


SMALL = Setting(
    answerer=dict(
        model_type="llava_qwen",
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=8192,
        rope_theta=1e6,
        mm_patch_merge_type="spatial_unpad",
        mm_newline_position="grid",
        vision_config=dict(
            hidden_size=288, intermediate_size=1076, num_hidden_layers=7, num_attention_heads=4, image_size=126
        ),
    ),
    clip=dict(
        projection_dim=256,
        text_config=dict(hidden_size=192, intermediate_size=768, num_hidden_layers=3, num_attention_heads=3),
        vision_config=dict(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=4, patch_size=28
        ),
    ),
    dtype="float32",
    B=2,
    T=400,
    encode_chunk=8,
    prefill_chunk=4,
)
FULL = Setting(
    answerer=dict(
        model_type="llava_qwen",
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        rope_theta=1e6,
        mm_patch_merge_type="spatial_unpad",
        mm_newline_position="grid",
    ),
    clip=dict(
        projection_dim=768,
        text_config=dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12),
        vision_config=dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
        ),
    ),
    dtype="bfloat16",
    B=1,
    T=832,
    frame=(360, 640),
    prompt_tokens=256,
)


def random_params(abstract: dict, dtype: jnp.dtype) -> dict:
    """Parameters N(0, 0.02^2), scales 1, made on the device."""

    def make(key):
        leaves, treedef = jax.tree_util.tree_flatten_with_path(abstract)
        keys = jax.random.split(key, len(leaves))
        values = [
            jnp.ones(x.shape, dtype) if path[-1].key == "scale" else 0.02 * jax.random.normal(k, x.shape, dtype)
            for (path, x), k in zip(leaves, keys, strict=True)
        ]
        return jax.tree_util.tree_unflatten(treedef, values)

    return jax.jit(make)(jax.random.key(0, impl="rbg"))  # threefry compiles for seconds where leaves are many


def drawn(shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """N(0, 1): matrix units run faster on equal numbers, since they draw less power."""
    return jax.random.normal(jax.random.key(0), shape, dtype)


class World:
    """Everything that both sides share: weights, frames as JPEG and as pixels, CLIP's features, prompts."""

    def __init__(self, setting: Setting, answer_tokens: int):
        self.setting, self.answer_tokens = setting, answer_tokens
        dtype, rng = jnp.dtype(setting.dtype), np.random.default_rng(0)
        self.answerer = answerer_architecture(setting.answerer, "the benchmark")
        self.params = random_params(self.answerer.abstract, dtype)
        self.clip_config = ClipConfig.from_hf(setting.clip)
        width = self.clip_config.projection_dim
        self.agent_graphdef, abstract = abstract_module(lambda rngs: TemporalAgent(width, rngs=rngs))
        self.agent = random_params(abstract, jnp.float32)

        self.clip_processor = ImageProcessor.clip({}, self.clip_config.vision.image_size)
        self.text = rng.normal(size=(setting.B, width)).astype(np.float32)
        shape = setting.B, setting.T, width
        self.features = self.text[:, None] + 3 * rng.normal(size=shape).astype(np.float32)
        vocabulary = setting.answerer["vocab_size"]
        self.prompt_ids = rng.integers(0, vocabulary - 1, (setting.B, setting.prompt_tokens)).astype(np.int32)
        self.prompt_ids[:, 5] = VIDEO_TOKEN

    @cached_property
    def frames(self) -> list[np.ndarray]:
        return smooth_pictures(self.setting.T, self.setting.frame)

    @cached_property
    def jpegs(self) -> list[bytes]:
        return [encode_jpeg(frame, quality=90) for frame in self.frames]


def smooth_pictures(count: int, size: tuple[int, int]) -> list[np.ndarray]:
    """uint8 [height, width, 3] each; their JPEGs are as small as those of videos."""
    coarse = np.random.default_rng(0).integers(0, 256, (count, 6, 8, 3)).astype(np.uint8)
    return [np.asarray(Image.fromarray(c).resize(size[::-1], Image.Resampling.BICUBIC)) for c in coarse]


def clock() -> np.ndarray:
    """Seconds on the wall, and of this process's threads on all cores: other load on the machine is in the first."""
    return np.array([time.perf_counter(), time.process_time()])


class Timer:
    """Adds up seconds (see `clock`) by part."""

    def __init__(self):
        self.seconds: dict[str, np.ndarray] = {}

    def __call__(self, part: str, call: Callable):
        start = clock()
        result = call()
        self.seconds[part] = self.seconds.get(part, 0.0) + clock() - start
        return result


class Ours:
    """The programs of train.py on one device, and its fetching of frames from JPEG."""

    def __init__(self, world: World):
        s, self.world = world.setting, world
        values = cfg.default()
        values.policy.group_size, values.batch_size = s.G, s.B
        self.config = cfg.read(values)
        self.mesh = sharding.make_mesh((("data", 1), ("model", 1)), jax.devices()[:1])
        self.sample = programs.make_sample(world.agent_graphdef, self.config, self.mesh)
        self.update = programs.make_update(world.agent_graphdef, self.config, self.mesh)
        self.rollout = self.make_rollout()
        state = TrainState(world.agent, jax.jit(programs.make_optimizer(self.config).init)(world.agent))
        self.state = sharding.put_replicated(self.mesh, jax.tree.map(np.asarray, state))  # the update takes it over
        self.pool = ThreadPoolExecutor(8)

    def make_rollout(self, attention: str = "auto") -> Rollout:
        s = self.world.setting
        return Rollout(
            self.world.answerer.graphdef,
            self.world.answerer.processor.normalize,
            Generation((-1,), 0, 1.0),
            max_new_tokens=self.world.answer_tokens,
            encode_chunk=s.encode_chunk,
            prefill_chunk=s.prefill_chunk,
            attention=attention,
        )

    def step(self, step: int, timer: Timer) -> np.ndarray:
        """One training step; returns the picks [B,G,K]."""
        w, s = self.world, self.world.setting
        batch = sharding.put_batch(
            self.mesh,
            {
                "index": np.arange(s.B, dtype=np.int32),
                "features": w.features,
                "text": w.text,
                "mask": np.ones((s.B, s.T), bool),
            },
        )
        draws = timer(
            "sample", lambda: jax.block_until_ready(self.sample(self.state.agent, batch, np.int32(step), k=s.K))
        )
        picks = np.sort(np.asarray(draws), axis=-1)
        candidates, index = unique_frames(picks)
        frames = timer("fetch", lambda: self.fetch(candidates))
        answers = timer("answer", lambda: jax.block_until_ready(self.rollout(w.params, *self.shown(frames, index))))
        rewards = np.asarray(answers.tokens[..., 0] % 7, np.float32) / 7
        state = self.state
        self.state, _ = timer(
            "update",
            lambda: jax.block_until_ready(self.update(state, batch, draws, {"total": rewards}, np.int32(step))),
        )
        return picks

    def shown(self, frames: np.ndarray, index: np.ndarray) -> tuple:
        s = self.world.setting
        return jnp.asarray(frames), jnp.asarray(index), self.world.prompt_ids, np.full(s.B, s.prompt_tokens, np.int32)

    def fetch(self, candidates: np.ndarray) -> np.ndarray:
        """Every unique frame once; the padding behind them is a copy of the last."""
        w = self.world
        unique = np.unique(candidates)
        read = self.pool.map(
            lambda i: w.answerer.processor.crop(np.asarray(Image.open(io.BytesIO(w.jpegs[i])))), unique
        )
        frames = np.stack(list(read))
        return frames[np.searchsorted(unique, candidates)]

    def encode(self, images: int) -> "Piece":
        """SigLIP on so many frames."""
        graphdef, side = self.world.answerer.graphdef, self.world.answerer.processor.size

        def encode(params, pixels):
            return merge_params(graphdef, params).vision_tower(pixels)

        return Piece(encode, self.world.params, drawn((images, side, side, 3), jnp.float32))

    def prefill(self, prompts: int) -> "Piece":
        """Logits and keys and values of so many prompts with K frames."""
        s, graphdef = self.world.setting, self.world.answerer.graphdef
        N = self.prompt_length
        positions = jnp.broadcast_to(jnp.arange(N), (prompts, N))

        def prefill(params, hidden):
            language = merge_params(graphdef, params).language_model
            out, cache = language.prefill(hidden, positions, jnp.full(prompts, N - 1))
            return language.logits(out), cache.extend(1)

        return Piece(prefill, self.world.params, drawn((prompts, N, s.answerer["hidden_size"]), s.dtype))

    @property
    def prompt_length(self) -> int:
        s = self.world.setting
        return s.prompt_tokens - 1 + self.world.answerer.config.num_visual_tokens(s.K)

    def decode(self, prompts: int) -> "Decoding":
        """One token of each of so many prompts with K frames, behind an empty cache."""
        return Decoding(self, prompts)

    def pieces(self, images: int, prompts: int) -> dict[str, Callable]:
        """Encoding `images` frames, prefilling `prompts` prompts, and one token of each."""
        return {"SigLIP": self.encode(images), "prefill": self.prefill(prompts), "decode": self.decode(prompts)}


def compiled_as_ours(function: Callable, **options):
    """`jax.jit` with the compiler's options of the project's programs."""
    return jax.jit(function, compiler_options=compiling.options(jax.default_backend()), **options)


class Piece:
    """A pure function, or one that `jax.jit` has made, with its arguments: a call runs it and waits for the end."""

    def __init__(self, function: Callable, *args):
        self.function, self.args = function, args
        self.program = function if hasattr(function, "lower") else compiled_as_ours(function)

    def compile(self) -> None:
        self.program = self.program.lower(*self.args).compile()

    def __call__(self):
        return jax.block_until_ready(self.program(*self.args))

    def flops(self) -> float:
        """Floating point operations, counted with attention in blocks of queries, which a kernel would hide."""
        with attention.computed_by("xla"):
            return arithmetic(jax.jit(lambda *args: self.function(*args)).trace(*self.args).jaxpr, {}).flops


class Decoding:
    """A call decodes the next of `length` tokens of each prompt, behind the same one, and waits for it."""

    def __init__(self, ours: Ours, prompts: int):
        world, N = ours.world, ours.prompt_length
        language = merge_params(world.answerer.graphdef, world.params).language_model
        if jax.default_backend() == "cpu":  # as rollout.py does
            language.layers = take_apart(language.layers, language.cfg.num_hidden_layers)
        graphdef, self.params = split_params(language)

        def decode(params, token, cache):
            language = merge_params(graphdef, params)
            out, cache = language(token, jnp.full((prompts, 1), N), cache)
            return language.logits(out[:, 0]), cache

        self.program = compiled_as_ours(decode, donate_argnums=2)  # updated in place, as in the loop of rollout.py
        prefill = ours.prefill(prompts)
        _, self.shapes = jax.eval_shape(prefill.function, *prefill.args)
        self.token = jnp.ones((prompts, 1, world.setting.answerer["hidden_size"]), world.setting.dtype)

    @cached_property
    def cache(self) -> KVCache:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.shapes)

    def compile(self) -> None:
        self.program = self.program.lower(self.params, self.token, self.shapes).compile()

    def __call__(self, length: int = 1) -> jax.Array:
        for _ in range(length):
            logits, self.cache = self.program(self.params, self.token, self.cache)
        return jax.block_until_ready(logits)

    def least_bytes(self) -> int:
        """Of the weights and the cache, each read once; of a table of embeddings of its own nothing is."""
        read = {name: x for name, x in self.params.items() if name != "embed_tokens" or "lm_head" not in self.params}
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((read, self.shapes)))


def arithmetic_of_answer(ours: Ours, unique: float) -> float:
    """Floating point operations of the answer program with that many unique frames per question, counted with attention
    in blocks of queries, which a kernel would hide."""
    world, s = ours.world, ours.world.setting
    index = np.arange(s.G * s.K, dtype=np.int32).reshape(1, s.G, s.K).repeat(s.B, 0)
    frames = np.zeros((s.B, s.G * s.K, *world.answerer.processor.crop(world.frames[0]).shape), np.uint8)
    traced = ours.make_rollout("xla").program.trace(world.params, *ours.shown(frames, index))
    trips = {"encode": math.ceil(unique / s.encode_chunk), "decode": world.answer_tokens - 1}
    return arithmetic(traced.jaxpr, trips).flops


def steps_of(sides: dict, num_steps: int) -> tuple[dict, dict]:
    """Mean seconds of a step of each side by part, and the frames that ours picked. The sides take turns."""
    timers, picks = {name: Timer() for name in sides}, []
    for step in range(1, num_steps + 1):
        for name, side in sides.items():
            picked = side.step(step, timers[name])
            if name == "ours":
                picks.append(picked)
    seconds = {name: {part: t / num_steps for part, t in timer.seconds.items()} for name, timer in timers.items()}
    return seconds, picks


def fastest(sides: dict[str, dict[str, Callable]], repeats: int = 7) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of each side's pieces, the fastest of some runs in turns, after one that warms up."""
    best = {name: {} for name in sides}
    for _ in range(repeats):
        for part in next(iter(sides.values())):
            for name, pieces in sides.items():
                pieces[part]()  # its data is in the caches, and the other side's threads have gone to sleep
                timer = Timer()
                timer(part, pieces[part])
                best[name][part] = np.minimum(best[name].get(part, np.inf), timer.seconds[part])
    return best


def ratios(seconds: dict[str, dict[str, np.ndarray]]) -> dict:
    """For each part and the sum: both sides' seconds, and PyTorch's over ours, on the wall and of the processor."""
    ours, theirs = seconds["ours"], seconds.get("pytorch", {})

    def row(a, b):
        found = {name: x.tolist() for name, x in (("ours", a), ("pytorch", b)) if x is not None}
        return found | ({"ratio": (b / a).tolist()} if len(found) == 2 else {})

    rows = {part: row(ours.get(part), theirs.get(part)) for part in dict.fromkeys([*theirs, *ours])}
    return rows | {"sum": row(sum(ours.values()), sum(theirs.values()) if theirs else None)}


def show(title: str, rows: dict) -> None:
    print(f"\n{title:24}{'ours s':>10}{'PyTorch s':>11}{'ratio':>8}{'of CPU time':>13}", file=sys.stderr)
    for part, row in rows.items():
        wall = [f"{row[side][0]:.4f}" if side in row else "-" for side in ("ours", "pytorch")]
        ratio = [f"{x:.2f}" for x in row.get("ratio", ())] or ["", ""]
        print(f"{part:24}{wall[0]:>10}{wall[1]:>11}{ratio[0]:>8}{ratio[1]:>13}", file=sys.stderr)


def baseline(world: World, device: jax.Device):
    """The other side, warm; None where PyTorch is not installed, has no such device, or it has too little memory."""
    try:
        import torch
    except ImportError:
        return None
    if device.platform == "gpu" and not torch.cuda.is_available():
        return None
    from benchmarks.pytorch_baseline import Baseline

    try:
        side = Baseline(world, "cuda" if device.platform == "gpu" else "cpu")
        side.step(0, Timer())
    except torch.OutOfMemoryError as error:
        print(f"the baseline does not fit: {error}", file=sys.stderr)
        return None
    return side


def measure(setting: Setting, answer_tokens: int, num_steps: int, images: int, prompts: int) -> dict:
    """All numbers; pairs are seconds on the wall and of the processor."""
    world = World(setting, answer_tokens)
    device = jax.devices()[0]
    sides = {"ours": Ours(world)}
    sides["ours"].step(0, Timer())  # compiles
    if other := baseline(world, device):
        sides["pytorch"] = other
    seconds, picks = steps_of(sides, num_steps)
    pieces = fastest({name: side.pieces(images, prompts) for name, side in sides.items()})
    unique = float(np.mean([len(np.unique(of_question)) for picked in picks for of_question in picked]))
    result = {
        "device": f"{device.platform}: {device.device_kind}",
        "answer_tokens": answer_tokens,
        "unique_frames": unique,
        "step": ratios(seconds),
        "step without CLIP": ratios({name: {p: t for p, t in s.items() if p != "CLIP"} for name, s in seconds.items()}),
        "pieces": ratios(pieces),
    }
    if chip := chip_of(device):
        flops = arithmetic_of_answer(sides["ours"], unique)
        result["answer_flops"] = flops
        result["fraction_of_peak"] = flops / seconds["ours"]["answer"][0] / chip.flops
        result["peak_bytes"] = device.memory_stats()["peak_bytes_in_use"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="LLaVA-Video-7B in bfloat16 on the first GPU")
    parser.add_argument("--answer_tokens", type=int, default=8, help="Length of every answer.")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--output", default="", help="File for the JSON; default: stdout.")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves memory for PyTorch
    if args.gpu != (jax.devices()[0].platform == "gpu"):
        sys.exit(f"error: --gpu is {args.gpu}, but jax runs on {jax.devices()[0].platform}")
    images, prompts = (64, 8) if args.gpu else (32, 8)
    result = measure(FULL if args.gpu else SMALL, args.answer_tokens, args.steps, images, prompts)
    for part in ("step", "step without CLIP", "pieces"):
        show(part, result[part])
    text = json.dumps(result, indent=1)
    if args.output:
        with open(args.output, "w") as file:
            file.write(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
