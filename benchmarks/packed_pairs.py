"""What one sequence for both answers of a pair saves against two: time of a training step, and memory of its gradient.

    python -m benchmarks.packed_pairs [--config=configs/tpo_toy.py] [--num_frames=32 --batch_size=16 --steps=5]
    python -m benchmarks.packed_pairs --memory=4096,8192,16384

Time: the gradient of the LoRA loss on random frames and texts, packed ([video, prompt | chosen | rejected]) and as two
sequences ([video, prompt | answer], frames encoded for each, as other trainers do), compiled once, the fastest of the
steps. Memory: the temporary bytes that the compiler plans for the packed gradient at so many tokens of a prompt; linear
means that their ratio is that of the tokens. The result is one JSON object on stdout.
"""

import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from tspo_jax import config as config_module
from tspo_jax.checkpoints import adapters
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.command_line import entry_point
from tspo_jax.models.layers import split_params
from tspo_jax.models.llava_video import LlavaVideo, LlavaVideoConfig
from tspo_jax.models.qwen2 import Qwen2Config
from tspo_jax.models.siglip import SiglipConfig
from tspo_jax.models.video_prompt import VIDEO_TOKEN
from tspo_jax.tpo import losses, programs
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.losses import AnswerLogProbs, Objective
from tspo_jax.tpo.programs import Model, Pairs
from tspo_jax.tpo.trained import lora_of


def random_pairs(count: int, num_frames: int, size: int, prompt: int, answer: int, vocabulary: int) -> Pairs:
    rng = np.random.default_rng(0)
    ids = rng.integers(vocabulary // 2, size=(count, prompt))
    ids[:, prompt // 4] = VIDEO_TOKEN
    frames = rng.integers(256, size=(count, num_frames, size, size, 3))
    lengths = np.full(count, prompt)
    answers, of_answers = rng.integers(vocabulary // 2, size=(count, 2, answer)), np.full((count, 2), answer)
    arrays = frames.astype(np.uint8), *(x.astype(np.int32) for x in (ids, lengths, answers, of_answers))
    return Pairs(*arrays, np.ones(count, np.float32), np.zeros((count, 2), np.float32))


def loss(model: Model, frozen: dict, trained: dict, pairs: Pairs, packed: bool) -> jax.Array:
    params = model.params(trained, frozen)
    if packed:
        policy = model.log_probs(params, pairs)
    else:
        parts = [
            model.log_probs(
                params,
                pairs._replace(answers=pairs.answers[:, i : i + 1], answer_lengths=pairs.answer_lengths[:, i : i + 1]),
            )
            for i in range(2)
        ]
        policy = AnswerLogProbs(*(jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True)))
    reference = AnswerLogProbs(pairs.reference, pairs.answer_lengths)
    return losses.total_loss(Objective(), policy, reference)[0]


def seconds(config: TpoConfig, batch_size: int, num_frames: int, num_steps: int) -> dict:
    """The fastest step of each form, and their share."""
    answerer = load_answerer(config.answerer.folder, jnp.float32)
    graphdef, abstract = adapters.add(answerer.graphdef, answerer.params, lora_of(config))
    trained = adapters.fresh(abstract, 0)
    model = Model(graphdef, answerer.processor.normalize, jnp.float32, config.answerer.encode_chunk)
    size, vocabulary = answerer.config.vision.image_size, answerer.config.language.vocab_size
    pairs = random_pairs(batch_size, num_frames, size, 64, 8, vocabulary)
    found, gradients = {}, []
    for name, packed in (("packed", True), ("separate", False)):
        step = jax.jit(jax.value_and_grad(partial(loss, model, answerer.params, packed=packed)))
        gradients.append(jax.block_until_ready(step(trained, pairs)))
        times = []
        for _ in range(num_steps):
            start = time.perf_counter()
            jax.block_until_ready(step(trained, pairs))
            times.append(time.perf_counter() - start)
        found[name] = min(times)
    apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), *gradients)
    tokens = answerer.config.num_visual_tokens(num_frames, size, size) + 63
    return found | {
        "share": found["packed"] / found["separate"],
        "largest_difference": max(jax.tree.leaves(apart)),
        "tokens_of_a_prompt": tokens,
    }


def temporary_bytes(num_tokens: int) -> int:
    """Of the gradient of one pair on a language model of 2 layers, 4 heads of 64, at so many tokens."""
    language = Qwen2Config(512, 256, 512, 2, 4, 2)
    config = LlavaVideoConfig(language, SiglipConfig(32, 64, 1, 2, 28, 14))

    def make() -> nnx.Module:
        return LlavaVideo(config, rngs=nnx.Rngs(0))

    graphdef, abstract = split_params(nnx.eval_shape(make))
    trained, frozen = programs.partition(abstract, lora=False)
    model = Model(graphdef, lambda x: x / 255.0, jnp.float32)
    pairs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_pairs(1, 2, 28, num_tokens, 32, language.vocab_size)
    )
    step = jax.jit(jax.grad(lambda trained, frozen, pairs: loss(model, frozen, trained, pairs, True)))
    return step.lower(trained, frozen, pairs).compile().memory_analysis().temp_size_in_bytes


def define_flags() -> None:
    config_module.define_flag()
    flags.DEFINE_integer("batch_size", 16, "Pairs of a step.", lower_bound=1)
    flags.DEFINE_integer("num_frames", 32, "Frames of a prompt.", lower_bound=1)
    flags.DEFINE_integer("steps", 5, "Steps that are timed.", lower_bound=1)
    flags.DEFINE_list("memory", [], "Tokens of a prompt at which memory is measured instead.")


def main() -> int:
    args = flags.FLAGS
    if args.memory:
        result = {"temporary_bytes": {int(n): temporary_bytes(int(n)) for n in args.memory}}
    else:
        result = seconds(config_module.from_flags(TpoConfig), args.batch_size, args.num_frames, args.steps)
    entry_point.write_result(result, "")
    return 0


if __name__ == "__main__":
    define_flags()
    entry_point.run(main, check=partial(config_module.check_overrides, kind=TpoConfig))
