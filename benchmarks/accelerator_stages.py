"""What benchmarks/accelerator.py measures, stage by stage, and its sizes: LARGE on an accelerator, TINY on a CPU."""

import dataclasses
import json
import math
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cached_property, partial, wraps
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import step_time
from benchmarks.load_memory import write_checkpoint
from benchmarks.step_time import FULL, SMALL, Decoding, Piece, Setting, drawn, random_params, smooth_pictures
from configs import llava_video_7b
from tspo_jax import config as cfg
from tspo_jax import train
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import ENCODERS
from tspo_jax.data import frame_store, questions
from tspo_jax.models import attention
from tspo_jax.models.clip import Clip
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.qwen2_5_vl import QwenVision, read_vision_config
from tspo_jax.runs.metrics import read_rows
from tspo_jax.toy import tokenizers

REPEATS = 5  # of what is timed; the median counts
COMPILE_SECONDS = 300  # for all programs of a process


@dataclasses.dataclass(frozen=True)
class Scale:
    """Sizes of everything that is measured.

    Attributes:
      setting: of the models and prompts.
      matrix: rows and columns of the matrices whose product is the ceiling of arithmetic.
      copied_bytes: of the array whose copy is the ceiling of memory traffic.
      prompts: prefilled at a time, and
      decoded: prompts that are decoded at a time.
      tokens: of an answer.
      unique: different frames among the G * K of a question.
      images: encoded at a time.
      qwen: vision_config of Qwen2.5-VL, and
      qwen_frame: height and width that it sees.
      attended: name -> (kind, B, N, H, key and value heads, head width); of windows: W windows of n tokens are (W, n).
      trained: fields of the trainer's config.
    """

    setting: Setting
    matrix: int
    copied_bytes: int
    prompts: int
    decoded: tuple[int, ...]
    tokens: int
    unique: int
    images: int
    qwen: Mapping[str, object]
    qwen_frame: tuple[int, int]
    attended: Mapping[str, tuple]
    trained: Mapping[str, object]


QWEN = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584, window_size=112)
QWEN |= dict(
    tokens_per_second=2,
    patch_size=14,
    spatial_merge_size=2,
    temporal_patch_size=2,
    fullatt_block_indexes=[7, 15, 23, 31],
)
LARGE = Scale(
    setting=FULL,
    matrix=8192,
    copied_bytes=4 * 2**30,
    prompts=8,
    decoded=(8, 32, 64),
    tokens=8,
    unique=70,
    images=64,
    qwen=QWEN,
    qwen_frame=(364, 644),
    attended={
        "Qwen2, causal": ("causal", 1, 3615, 28, 4, 128),
        "SigLIP": ("bidirectional", 2, 729, 16, 16, 72),
        "CLIP L/14": ("bidirectional", 2, 257, 16, 16, 64),
        "CLIP L/14, 336 pixels": ("bidirectional", 2, 577, 16, 16, 64),
        "Qwen2.5-VL, windows": ("windowed", 1, (24, 64), 16, 16, 80),
        "Qwen2, a token": ("cached", 8, 3623, 28, 4, 128),
    },
    trained={"num_steps": 4, "batch_size": 8, "answerer.prefill_chunk": 0},
)
TINY_VISION = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=42)
TINY = Scale(
    setting=dataclasses.replace(
        SMALL,
        answerer=SMALL.answerer
        | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=1024)
        | dict(vision_config=TINY_VISION),
        clip=dict(
            projection_dim=32,
            text_config=dict(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=1024
            ),
            vision_config=dict(
                hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, patch_size=56
            ),
        ),
        B=1,
        G=2,
        K=3,
        frame=(48, 64),
        prompt_tokens=16,
        encode_chunk=2,
    ),
    matrix=128,
    copied_bytes=2**20,
    prompts=2,
    decoded=(2, 4),
    tokens=3,
    unique=5,
    images=2,
    qwen=QWEN | dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, fullatt_block_indexes=[1]),
    qwen_frame=(56, 84),
    attended={
        "Qwen2, causal": ("causal", 1, 40, 4, 2, 16),
        "SigLIP": ("bidirectional", 1, 50, 2, 2, 8),
        "Qwen2.5-VL, windows": ("windowed", 1, (3, 16), 2, 2, 8),
        "Qwen2, a token": ("cached", 2, 40, 4, 2, 16),
    },
    trained={
        "num_steps": 2,
        "batch_size": 2,
        "answerer.max_new_tokens": 2,
        "policy.group_size": 2,
        "data.min_frames": 0,
        "data.max_frames": 16,
        "data.buckets": (40,),
        "data.specific.k": 3,
        "data.specific.group_frames": 5,
        "data.specific.distractor_groups": 4,
        "data.specific.max_distractor_groups": 4,
    },
)


class Bench:
    """What the stages of one process share."""

    def __init__(self, scale: Scale, folder: str):
        self.scale, self.folder = scale, folder

    @cached_property
    def ours(self) -> step_time.Ours:
        return step_time.Ours(step_time.World(self.scale.setting, self.scale.tokens))


Measuring = Generator[list[Piece | Decoding], None, dict]  # what is to be compiled; at the end, what was found


def measured(
    names: Sequence[str], bench: Bench, seconds: float = COMPILE_SECONDS
) -> Iterator[tuple[str, dict | None, Exception | None] | None]:
    """None when all that the stages run is compiled, which is done first and side by side; then (stage, what it found,
    what went wrong) of each. What has not been compiled after so many seconds is not measured."""
    runs, compiling, failed = {name: STAGES[name].run(bench) for name in names}, {}, {}
    pool, start = ThreadPoolExecutor(16), time.perf_counter()
    for name, run in runs.items():
        try:
            compiling |= {pool.submit(piece.compile): name for piece in next(run)}
        except Exception as error:  # whatever it is, the other stages go on
            failed[name] = error
    done, others = wait(compiling, max(0, start + seconds - time.perf_counter()))
    failed |= {compiling[piece]: TimeoutError(f"not compiled after {seconds:g} s") for piece in others}
    failed |= {compiling[piece]: piece.exception() for piece in done if piece.exception()}
    pool.shutdown(wait=False, cancel_futures=True)
    print(f"compiled in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    yield None
    for name in names:
        try:
            if name in failed:
                raise failed[name]
            next(runs[name])
        except StopIteration as end:
            yield name, end.value, None
        except Exception as error:
            yield name, None, error


def timed(call: Callable[[], object], repeats: int = REPEATS) -> dict[str, float]:
    """Seconds of a call, the median but for the first."""
    seconds = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[1:])}


def by(implementation: str, function: Callable) -> Callable:
    """A function whose attention is computed so."""

    @wraps(function)
    def computed(*args):
        with attention.computed_by(implementation):
            return function(*args)

    return computed


def ceilings(bench: Bench) -> Measuring:
    """A product of two square matrices in bfloat16, and copying an array.

    Also the product of equal numbers, which takes less power, so that matrix units run faster than with any real ones.
    """
    n, count = bench.scale.matrix, bench.scale.copied_bytes // 4
    drawn_matrix, ones = drawn((n, n), jnp.bfloat16), jnp.ones((n, n), jnp.bfloat16)
    product = Piece(lambda a, b: a @ b, drawn_matrix, drawn_matrix)
    copy = Piece(lambda x: x + 1, drawn((count,), jnp.float32))
    yield [product, copy]
    found = {"matrix": in_a_row(product)}
    product.args = ones, ones
    found["matrix of ones"] = in_a_row(product)
    found = {name: row | {"flops": 2 * n**3} for name, row in found.items()}
    return found | {"copy": in_a_row(copy) | {"bytes": 2 * 4 * count}}


def in_a_row(piece: Piece, length: int = 10) -> dict[str, float]:
    """Of a call among `length`, waited for at the end: starting one takes a part of a millisecond."""

    def calls():
        for _ in range(length):
            last = piece.program(*piece.args)
        jax.block_until_ready(last)

    return {"seconds": timed(calls)["seconds"] / length}


def prefill(bench: Bench) -> Measuring:
    """All prompts of a question as one batch, with the platform's attention, also of equal numbers (see `ceilings`),
    and with XLA's."""
    s, piece = bench.scale.setting, bench.ours.prefill(bench.scale.prompts)
    chosen = attention.chosen(bench.ours.world.answerer.config.language.head_dim, s.dtype, bench.ours.prompt_length)
    pieces = {chosen: piece}
    if chosen != "xla":
        pieces["xla"] = Piece(by("xla", piece.function), *piece.args)
    yield list(pieces.values())
    found, flops = {name: timed(of_name) for name, of_name in pieces.items()}, piece.flops()
    piece.args = piece.args[0], jnp.ones_like(piece.args[1])
    found[f"{chosen}, equal numbers"] = timed(piece)
    return {f"{bench.scale.prompts} prompts, {name}": row | {"flops": flops} for name, row in found.items()}


def decode(bench: Bench) -> Measuring:
    """A token of each of so many prompts, in runs of 16 tokens."""
    decodings, length = {prompts: Decoding(bench.ours, prompts) for prompts in bench.scale.decoded}, 16
    yield list(decodings.values())
    found = {}
    for prompts in list(decodings):
        decoding = decodings.pop(prompts)  # with its cache
        seconds = timed(lambda decoding=decoding: decoding(length))["seconds"] / length
        found[f"{prompts} prompts"] = {"seconds": seconds, "bytes": decoding.least_bytes()}
    return found


def answer(bench: Bench) -> Measuring:
    """The whole answer program for a question: frames encoded, prompts prefilled, tokens decoded."""
    ours, s = bench.ours, bench.scale.setting
    picks = np.sort((np.arange(s.G * s.K) % bench.scale.unique).reshape(1, s.G, s.K), axis=-1)
    candidates, index = step_time.unique_frames(picks)
    side = ours.world.answerer.processor.size
    frames = np.random.default_rng(0).integers(0, 256, (*candidates.shape, side, side, 3)).astype(np.uint8)
    piece = Piece(ours.rollout.program, ours.world.params, *ours.shown(frames, index))
    yield [piece]
    return {"a question": timed(piece, 3) | {"flops": step_time.arithmetic_of_answer(ours, bench.scale.unique)}}


def siglip(bench: Bench) -> Measuring:
    piece = bench.ours.encode(bench.scale.images)
    yield [piece]
    return {f"{bench.scale.images} frames": timed(piece) | {"flops": piece.flops()}}


def numerics(bench: Bench) -> Measuring:
    """Error of each kernel that is chosen in bfloat16, and of XLA's form, against float32, of outputs and gradients:
    the root mean square error over the root mean square."""
    pieces = {}  # of a name, by (form, dtype)
    for name, (kind, B, N, H, heads, d) in bench.scale.attended.items():
        windows, N = ([N[1]] * N[0], math.prod(N)) if isinstance(N, tuple) else ([], N)
        keys = zip(jax.random.split(jax.random.key(0), 4), (H, heads, heads, H), strict=True)
        q, k, v, weight = (jax.random.normal(key, (B, N, n, d), jnp.bfloat16) for key, n in keys)
        compute = getattr(attention, kind)
        if kind == "windowed":
            compute = partial(compute, lengths=windows)
        if kind == "cached":  # the last tokens alone, of which one row is shorter
            q, weight, k, v = q[:, :1], weight[:, :1], k.swapaxes(1, 2), v.swapaxes(1, 2)
            compute = partial(compute, slots=N - 1 - jnp.arange(B)[:, None])
        forms = dict.fromkeys((("xla", jnp.float32), (attention.chosen(d, q.dtype, N), q.dtype), ("xla", q.dtype)))
        pieces[name] = {
            (form, dtype): Piece(outputs_and_gradients(compute, form, dtype), q, k, v, weight) for form, dtype in forms
        }
    yield [piece for of_name in pieces.values() for piece in of_name.values()]
    found = {}
    for name, of_name in pieces.items():
        exact, *rounded = ((form, jax.tree.map(np.asarray, piece())) for (form, _), piece in of_name.items())
        for form, values in rounded:
            error, *of_gradients = map(_error, values, exact[1])
            found[f"{name}, {form}"] = {"error": error, "gradient_error": max(of_gradients)}
    return found


def outputs_and_gradients(compute: Callable, implementation: str, dtype: jnp.dtype) -> Callable:
    """(q, k, v, weight) -> float32 each: what `compute` gives for q, k and v of a dtype, and the gradients of its
    weighted sum."""

    def weighted(q, k, v, weight):
        out = compute(q, k, v)
        return (out * weight.astype(out.dtype)).astype(jnp.float32).sum(), out

    def run(q, k, v, weight):
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            q, k, v = (x.astype(dtype) for x in (q, k, v))
            gradients, out = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v, weight)
        return [x.astype(jnp.float32) for x in (out, *gradients)]

    return by(implementation, run)


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.sqrt(np.mean((found - exact) ** 2) / np.mean(exact**2)))


def trainer(bench: Bench) -> Measuring:
    """train.py with checkpoints and needle questions that are written here: the median step but for the first."""
    yield []
    with TemporaryDirectory(dir=bench.folder or None) as folder:
        config = world_to_train(Path(folder), bench.scale)
        start = time.perf_counter()
        train.train(config, Path(folder) / "run", jax.devices()[:1])
        total = time.perf_counter() - start
        rows = read_rows(Path(folder) / "run" / "metrics.jsonl")
    seconds = [1 / row["steps_per_second"] for row in rows[1:]]
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "a step": {
            "seconds": statistics.median(seconds),
            "questions": config.batch_size,
            "first_seconds": total - sum(seconds),
            "device_idle": statistics.median(row["device_idle"] for row in rows[1:]),
            "fetch_seconds": statistics.median(row["seconds/fetch"] for row in rows[1:]),
            "peak_bytes": stats.get("peak_bytes_in_use"),
        }
    }


def world_to_train(folder: Path, scale: Scale) -> cfg.Config:
    """Writes random checkpoints of CLIP and LLaVA-Video, a frame store and needle questions."""
    s = scale.setting
    needed = 18e9 if s is FULL else 1e8
    if (free := shutil.disk_usage(folder).free) < needed:
        raise OSError(f"{folder}: {free / 1e9:.1f} GB are free, {needed / 1e9:.0f} are needed; see --folder")
    rows = [
        questions.row(
            f"q{i}", f"{i % 16}.mp4", f"What is shown at moment {i}?", ["one", "two", "three"], "B", "specific"
        )
        for i in range(scale.trained["num_steps"] * scale.trained["batch_size"])
    ]
    texts = [row["original_question"] for row in rows]
    tokenizer = tokenizers.qwen2_tokenizer(texts, 32768)
    tokenizer.save_pretrained(folder / "answerer")
    write_checkpoint(folder / "answerer", s.answerer | {"eos_token_id": tokenizer.eos_token_id})
    tokenizers.clip_tokenizer(texts, 77).save_pretrained(folder / "clip")
    clip_config = {"model_type": "clip"} | s.clip
    (folder / "clip" / "config.json").write_text(json.dumps(clip_config))
    _, abstract = abstract_module(lambda rngs: Clip(ENCODERS["clip"].config(clip_config), rngs=rngs))
    weights.save_params(folder / "clip", random_params(abstract, jnp.float32), ENCODERS["clip"].format)

    T, identity = 128 if s is FULL else 16, weights.checkpoint_identity(folder / "clip")
    frame_store.open_settings(folder / "frames", frame_store.StoreSettings(short_side=s.frame[0]))
    jpegs = [frame_store.encode_jpeg(picture, 90) for picture in smooth_pictures(T, s.frame)]
    rng, width = np.random.default_rng(0), s.clip["projection_dim"]
    for i in range(16):
        places = np.arange(T)
        entry = frame_store.VideoEntry(
            f"{i}.mp4", 1.0, T, places.astype(float), places, s.frame[1], s.frame[0], "none", 1, "none"
        )
        entry = frame_store.write_frames(folder / "frames", entry, jpegs)
        blocks = np.split(rng.normal(size=(T, width)), range(frame_store.FEATURE_ROWS, T, frame_store.FEATURE_ROWS))
        frame_store.write_features(folder / "frames", entry, identity, blocks, width)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    values = llava_video_7b.get_config()
    values.agent.clip, values.answerer.folder = str(folder / "clip"), str(folder / "answerer")
    values.data.store, values.data.questions = str(folder / "frames"), str(folder / "questions.jsonl")
    values.mesh.axes, values.answerer.question_chunk = (("data", 1), ("model", 1)), 1
    values.update_from_flattened_dict(scale.trained)
    return cfg.read(values)


def clip(bench: Bench) -> Measuring:
    """CLIP's image tower in the two types that predecode offers, normalised pixels in, features out."""
    config = ENCODERS["clip"].config(bench.scale.setting.clip)
    graphdef, abstract = abstract_module(lambda rngs: Clip(config, rngs=rngs))
    side, images, pieces = config.vision.image_size, 4 * bench.scale.images, {}

    def encode(params, pixels):
        with jax.default_matmul_precision("highest" if jax.tree.leaves(params)[0].dtype == jnp.float32 else None):
            return merge_params(graphdef, params).image_features(pixels)

    pixels = drawn((images, side, side, 3), jnp.float32)
    for dtype in (jnp.bfloat16, jnp.float32):
        pieces[dtype] = Piece(encode, random_params(abstract, dtype), pixels)
    yield list(pieces.values())
    return {
        f"{images} images, {jnp.dtype(dtype)}": timed(piece) | {"flops": piece.flops()}
        for dtype, piece in pieces.items()
    }


def qwen(bench: Bench) -> Measuring:
    """Qwen2.5-VL's image tower."""
    config = read_vision_config(dict(bench.scale.qwen))
    graphdef, abstract = abstract_module(lambda rngs: QwenVision(config, rngs=rngs))
    params = random_params(abstract, bench.scale.setting.dtype)
    pixels = drawn((bench.scale.images, *bench.scale.qwen_frame, 3), bench.scale.setting.dtype)
    piece = Piece(lambda params, pixels: merge_params(graphdef, params)(pixels), params, pixels)
    yield [piece]
    height, width = bench.scale.qwen_frame
    return {f"{bench.scale.images} frames of {height} x {width}": timed(piece) | {"flops": piece.flops()}}


def peer(bench: Bench) -> Measuring:
    """Both sides of step_time.py."""
    yield []
    s = bench.scale
    result = step_time.measure(s.setting, s.tokens, 2, s.images, s.prompts)
    rows = {"a step": result["step"]["sum"], "a step without CLIP": result["step without CLIP"]["sum"]}
    rows |= {part: row for part, row in result["pieces"].items() if part != "sum"}
    if "ratio" not in rows["a step"]:
        raise ValueError("PyTorch is not installed, has no such device, or its side does not fit beside ours")
    return {
        part: {"seconds": row["ours"][0], "pytorch_seconds": row["pytorch"][0], "ratio": row["ratio"][0]}
        for part, row in rows.items()
    }


@dataclasses.dataclass(frozen=True)
class Stage:
    """Seconds that it may take; `is_alone`: in a process of its own, since it needs the memory of the others."""

    run: Callable[[Bench], Measuring]
    seconds: float
    is_alone: bool = False


STAGES = {
    "ceilings": Stage(ceilings, 60),
    "prefill": Stage(prefill, 180),
    "decode": Stage(decode, 480),
    "answer": Stage(answer, 180),
    "siglip": Stage(siglip, 90),
    "numerics": Stage(numerics, 120),
    "clip": Stage(clip, 120),
    "qwen": Stage(qwen, 120),
    "trainer": Stage(trainer, 400, is_alone=True),
    "peer": Stage(peer, 600, is_alone=True),
}
