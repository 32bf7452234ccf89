"""Qwen2.5-VL against Hugging Face's class on small random weights: image tower, positions, logits, answers."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_store import make_config, make_store, write_questions

from tspo_jax import config as cfg
from tspo_jax.answering import prompts
from tspo_jax.answering.given_frames import answer
from tspo_jax.answering.rollout import Rollout, encode_units
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.evaluation.run import evaluate
from tspo_jax.models import attention, qwen2_5_vl
from tspo_jax.models.layers import abstract_module, merge_params
from tspo_jax.models.preprocessing import QwenProcessor, patchify, smart_resize
from tspo_jax.models.qwen2_5_vl import Qwen25VLConfig, prompt_positions, video_offsets
from tspo_jax.models.video_prompt import VIDEO_TOKEN, FrameTimes, VideoOptions
from tspo_jax.runs.metrics import read_rows
from tspo_jax.train import train
from tspo_jax.tspo.environment import check_frame_sizes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
END, PAD = 256, 257  # of the golden tokenizer
# Merged patches of 28 x 28 pixels in windows of 2 x 2: windows that the grid does not fill, a grid within one window,
# one that fills its windows exactly.
GRIDS = [(3, 5), (1, 2), (4, 4)]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A small random checkpoint with the golden byte-level tokenizer; blocks 1 and 3 of the image tower are full."""
    folder = tmp_path_factory.mktemp("qwen2_5_vl")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(golden / "llava_video_grid")
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    tokenizer.save_pretrained(folder)
    start, end, _, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=280,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            initializer_range=0.1,
            eos_token_id=END,
            bos_token_id=None,
        ),
        vision_config=dict(
            depth=4,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=64,
            window_size=56,
            fullatt_block_indexes=[1, 3],
            tokens_per_second=2,
            initializer_range=0.1,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    transformers.Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END], "pad_token_id": PAD}))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    cls = transformers.Qwen2_5_VLForConditionalGeneration
    return cls.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def answerer(folder):
    return load_answerer(folder)


def flat_patches(pixels):
    """Normalised frames as Hugging Face's model takes them, and their grid."""
    patches = np.asarray(patchify(pixels, 14, 2, 2))
    T, _, values = patches.shape
    grid = torch.tensor([[T, pixels.shape[1] // 14, pixels.shape[2] // 14]])
    return torch.tensor(patches.reshape(-1, values)), grid


# ---- preprocessing ----


def test_sizes_of_hugging_face():
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.smart_resize
    rng = np.random.default_rng(0)
    for height, width in rng.integers(15, 3000, (300, 2)).tolist():
        for limits in ((3136, 12845056), (100352, 602112), (200704, 235200)):
            if max(height, width) <= 200 * min(height, width):
                assert smart_resize(height, width, 28, *limits) == theirs(height, width, 28, *limits)


def test_sizes_of_the_original():
    assert smart_resize(480, 640, 28, 100352, 307200) == (476, 644)
    assert smart_resize(480, 640, 28, 200704, 235200) == (420, 560)
    assert smart_resize(720, 1280, 28, 100352, 307200) == smart_resize(1080, 1920, 28, 100352, 307200) == (392, 728)
    assert smart_resize(1080, 1920, 28, 200704, 235200) == (336, 644)
    assert smart_resize(5, 28, 28, 1, 10**6) == (28, 28)
    with pytest.raises(ValueError, match="201 x 1 pixels"):
        smart_resize(201, 1, 28, 3136, 602112)


@pytest.mark.parametrize("shape", [(60, 100), (28, 56), (130, 41)])
def test_patches_of_hugging_face(shape):
    """The slow processor shows one image as two equal frames."""
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
    theirs = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil()(
        [image], return_tensors="np"
    )
    ours = QwenProcessor(28)
    frame = ours.crop(image)
    assert frame.shape[:2] == ours.size_of(*shape)
    patches = patchify(ours.normalize(np.stack([frame, frame])), 14, 2, 2)
    assert theirs["image_grid_thw"].tolist() == [[1, frame.shape[0] // 14, frame.shape[1] // 14]]
    np.testing.assert_allclose(patches[0], theirs["pixel_values"], atol=1e-6)


def test_limits_of_a_folder():
    def limits(config):
        processor = QwenProcessor.from_hf(config, 28)
        return processor.min_pixels, processor.max_pixels

    assert limits({}) == (3136, 602112)
    assert limits({"min_pixels": 3136, "max_pixels": 12845056}) == (3136, 602112), "a frame of a video, not an image"
    assert limits({"size": {"shortest_edge": 784, "longest_edge": 9000}}) == (784, 9000)
    assert QwenProcessor.from_hf({}, 28, (56, 84)).crop(np.zeros((300, 300, 3), np.uint8)).shape == (56, 84, 3)
    with pytest.raises(ValueError, match="frame_size is .56, 90., not height and width, both multiples of 28"):
        QwenProcessor.from_hf({}, 28, (56, 90))
    with pytest.raises(ValueError, match="preprocessor_config.json: do_resize is false"):
        QwenProcessor.from_hf({"do_resize": False}, 28)


# ---- image tower ----


@pytest.mark.parametrize("grid", GRIDS)
def test_image_tower(answerer, reference, grid):
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(6, 28 * grid[0], 28 * grid[1], 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference.model.visual(*flat_patches(pixels)).pooler_output.numpy()
    tokens = jax.jit(lambda p, x: merge_params(answerer.graphdef, p).encode_frames(x))(answerer.params, pixels)
    assert tokens.shape == (3, *grid, 64)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(np.asarray(tokens).reshape(expected.shape), expected, atol=1e-4)


def test_windows_are_those_of_the_original():
    """Grid (1, 12, 20) of models.md: windows of 64, 64, 32, 32, 32 and 16 patches, in this order."""
    order, lengths = qwen2_5_vl.window_order((6, 10), 4, 2)
    assert lengths.tolist() == [64, 64, 32, 32, 32, 16]
    patches = order.reshape(-1, 4)  # of a visual token each
    assert (patches % 4 == np.arange(4)).all()
    units = patches[:, 0] // 4
    assert units[:20].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23, 30, 31, 32, 33, 4, 5, 6, 7]
    assert sorted(units) == list(range(60))


def test_tower_with_the_kernel_of_tpus(answerer):
    """Interpreted; 120 patches of a pair of frames, which are padded to a block of it, in 9 windows of 2 x 2 tokens."""
    pixels = jnp.asarray(np.random.default_rng(5).normal(size=(4, 6 * 28, 5 * 28, 3)), jnp.float32)

    def tokens(implementation):
        def run(params):
            with attention.computed_by(implementation, interpret=implementation == "pallas"):
                return merge_params(answerer.graphdef, params).encode_frames(pixels)

        return jax.jit(run)(answerer.params)

    np.testing.assert_allclose(tokens("pallas"), tokens("xla"), atol=1e-5)


# ---- positions ----


@pytest.mark.parametrize(
    ("frames", "rule", "text", "following"),
    [(16, "after_all", 38, 48), (16, "after_space", 38, 48), (64, "after_all", 78, 88), (64, "after_space", 38, 48)],
)
def test_positions_of_the_tables(frames, rule, text, following):
    """15 tokens, a video of 34 x 46 patches, 10 tokens."""
    offsets = video_offsets((frames // 2, 17, 23), 1.0, 2)
    length = 15 + len(offsets) + 10
    positions, first = prompt_positions(jnp.array([15]), length + 3, jnp.array([length]), offsets, rule)
    positions = np.asarray(positions[0])
    np.testing.assert_array_equal(positions[:15], np.arange(15)[:, None].repeat(3, 1))
    np.testing.assert_array_equal(positions[15:-13], 15 + offsets)
    np.testing.assert_array_equal(positions[-13:-3], text + np.arange(10)[:, None].repeat(3, 1))
    assert first.tolist() == [following]
    if frames == 64:  # what transformers calls rope_deltas
        assert positions[:-3].max() + 1 - length == {"after_all": -12449, "after_space": -12459}[rule]


@pytest.mark.parametrize("seconds", [1.0, 0.3, 1.7, 2 / 24])
def test_positions_of_hugging_face(reference, seconds):
    """The rule of transformers 5; times are cut to integers."""
    config = reference.config
    grid, before, after = (5, 2, 3), 4, 6
    M = int(np.prod(grid))
    ids = torch.tensor(
        [[7] * (before - 1) + [config.vision_start_token_id] + [config.video_token_id] * M + [9] * after]
    )
    kinds = (ids == config.video_token_id).int() * 2
    theirs, delta = reference.model.get_rope_index(
        ids,
        mm_token_type_ids=kinds,
        video_grid_thw=torch.tensor([[5, 4, 6]]),
        second_per_grid_ts=torch.tensor([seconds]),
        attention_mask=torch.ones_like(ids),
    )
    offsets, length = video_offsets(grid, seconds, 2), ids.shape[1]
    ours, _ = prompt_positions(jnp.array([before]), length, jnp.array([length]), offsets, "after_space")
    np.testing.assert_array_equal(ours[0].T, theirs[:, 0].numpy())
    assert ours.max() + 1 - length == int(delta)


# ---- logits and answers ----


def their_logits(reference, ids, pixels, video):
    """Logits of all tokens of one prompt, `ids` with VIDEO_TOKEN, by the positions that `video` asks for."""
    patches, grid = flat_patches(pixels)
    merged = (int(grid[0, 0]), int(grid[0, 1]) // 2, int(grid[0, 2]) // 2)
    offsets = video_offsets(merged, video.second_per_grid, 2)
    at = ids.index(VIDEO_TOKEN)
    whole = ids[:at] + [reference.config.video_token_id] * len(offsets) + ids[at + 1 :]
    positions, _ = prompt_positions(jnp.array([at]), len(whole), jnp.array([len(whole)]), offsets, video.next_position)
    whole = torch.tensor([whole])
    with torch.no_grad():
        return reference(
            input_ids=whole,
            pixel_values_videos=patches,
            video_grid_thw=grid,
            position_ids=torch.tensor(np.asarray(positions).transpose(2, 0, 1)),
            mm_token_type_ids=(whole == reference.config.video_token_id).int() * 2,
        ).logits[0]


@pytest.mark.parametrize(
    "video",
    [VideoOptions(second_per_grid=1.0), VideoOptions(next_position="after_space", second_per_grid=1.6)],
    ids=["4.49", "5"],
)
def test_answers_of_hugging_face(folder, reference, video):
    """Two questions of different lengths, three sets of five frames each: the last frame is shown twice. Decoding step
    by step gives what the whole sequence gives."""
    answerer = load_answerer(folder, video=video)
    rng = np.random.default_rng(2)
    texts = [
        prompts.render("Who opens the door?\nA. Cat\nB. Dog", "qwen2_5_vl"),
        prompts.render("Why?", "qwen2_5_vl", ""),
    ]
    ids = [prompts.tokenize(text, answerer.tokenizer) for text in texts]
    padded, lengths = prompts.pad(ids, PAD, multiple=16)
    frames = rng.integers(0, 256, (2, 7, 56, 84, 3)).astype(np.uint8)
    index = np.sort(np.stack([[rng.permutation(7)[:5] for _ in range(3)] for _ in range(2)]), axis=-1)
    rollout = Rollout.of(answerer, max_new_tokens=4, encode_chunk=4, return_first_logits=True)
    answers = rollout(answerer.params, frames, index, padded, lengths)
    for b in range(2):
        for g in range(3):
            shown = frames[b, [*index[b, g], index[b, g, -1]]]
            tokens = np.asarray(answers.tokens)[b, g, : answers.lengths[b, g]].tolist()
            pixels = np.asarray(answerer.processor.normalize(shown))
            logits = their_logits(reference, ids[b] + tokens[:-1], pixels, video)[-len(tokens) :]
            np.testing.assert_allclose(answers.first_logits[b, g], logits[0], atol=1e-4)
            assert logits.argmax(-1).tolist() == tokens


def test_generated_tokens_follow_the_newer_rule(folder, reference):
    """transformers 5 goes on behind the text of the prompt, also where the video's times reach further."""
    video = VideoOptions(next_position="after_space", second_per_grid=30.0)
    answerer = load_answerer(folder, video=video)
    ids = prompts.tokenize(prompts.render("Why?", "qwen2_5_vl", ""), answerer.tokenizer)
    frames = np.random.default_rng(3).integers(0, 256, (4, 56, 56, 3)).astype(np.uint8)
    answers = Rollout.of(answerer, max_new_tokens=6)(
        answerer.params, frames[None], np.arange(4)[None, None], np.array([ids]), np.array([len(ids)])
    )
    patches, grid = flat_patches(np.asarray(answerer.processor.normalize(frames)))
    at = ids.index(VIDEO_TOKEN)
    whole = torch.tensor([ids[:at] + [reference.config.video_token_id] * 8 + ids[at + 1 :]])
    generated = reference.generate(
        input_ids=whole,
        pixel_values_videos=patches,
        video_grid_thw=grid,
        second_per_grid_ts=torch.tensor([30.0]),
        mm_token_type_ids=(whole == reference.config.video_token_id).int() * 2,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    assert np.asarray(answers.tokens)[0, 0, : answers.lengths[0, 0]].tolist() == generated[0, whole.shape[1] :].tolist()


def test_repetition_penalty_counts_the_prompt(folder, reference):
    """As in Hugging Face's class, which generates from token ids: prompts of two lengths, padded."""
    answerer = load_answerer(folder, video=VideoOptions(next_position="after_space"))
    generation = dataclasses.replace(answerer.generation, repetition_penalty=1.5)
    assert generation.video_token_id == reference.config.video_token_id
    texts = [prompts.render(text, "qwen2_5_vl", "") for text in ("Why?", "Who is it that opens the door?")]
    ids = [prompts.tokenize(text, answerer.tokenizer) for text in texts]
    frames = np.random.default_rng(5).integers(0, 256, (4, 28, 28, 3)).astype(np.uint8)
    options = dict(max_new_tokens=5)
    rollout = Rollout(answerer.graphdef, answerer.processor.normalize, generation, **options)
    index = np.broadcast_to(np.arange(4), (2, 1, 4))
    answers = rollout(answerer.params, np.stack([frames, frames]), index, *prompts.pad(ids, PAD, multiple=16))
    patches, grid = flat_patches(np.asarray(answerer.processor.normalize(frames)))
    for b in range(2):
        at = ids[b].index(VIDEO_TOKEN)
        whole = torch.tensor([ids[b][:at] + [reference.config.video_token_id] * 2 + ids[b][at + 1 :]])
        video = dict(
            pixel_values_videos=patches,
            video_grid_thw=grid,
            second_per_grid_ts=torch.tensor([1.0]),
            mm_token_type_ids=(whole == reference.config.video_token_id).int() * 2,
        )
        options = dict(do_sample=False, eos_token_id=END, pad_token_id=PAD) | options
        theirs = reference.generate(input_ids=whole, **video, **options, repetition_penalty=1.5)[0, whole.shape[1] :]
        plain = reference.generate(input_ids=whole, **video, **options)[0, whole.shape[1] :]
        assert np.asarray(answers.tokens)[b, 0, : answers.lengths[b, 0]].tolist() == theirs.tolist() != plain.tolist()


def test_pairs_that_sets_share_are_encoded_once():
    index = jnp.array([[[0, 1, 2], [0, 1, 3], [0, 1, 2]]])
    units, of_sets = encode_units(index, 4, 2)
    units, of_sets = np.asarray(units[0]), np.asarray(of_sets[0])
    assert units[of_sets].tolist() == [[[0, 1], [2, 2]], [[0, 1], [3, 3]], [[0, 1], [2, 2]]]
    assert of_sets.max() == 2
    units, of_sets = encode_units(index, 4, 1)
    assert units.tolist() == [[[0], [1], [2], [3]]] and of_sets is index


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 4)])
@pytest.mark.parametrize("split_over_data", [False, True])
def test_sharded_gives_the_same_logits(folder, answerer, shape, split_over_data):
    devices = jax.devices()[: shape[0] * shape[1]]
    mesh = sharding.make_mesh(list(zip(sharding.AXES, shape, strict=True)), devices)
    where = sharding.answerer_sharding(mesh, weights.read_config(folder), split_over_data=split_over_data)
    rng = np.random.default_rng(4)
    ids = np.array([prompts.tokenize(prompts.render("Why?", "qwen2_5_vl"), answerer.tokenizer)] * 8)
    arrays = (
        rng.integers(0, 256, (8, 4, 56, 84, 3)).astype(np.uint8),
        np.broadcast_to(np.arange(4), (8, 1, 4)),
        ids,
        np.full(8, ids.shape[1]),
    )
    options = dict(max_new_tokens=1, return_first_logits=True)
    expected = Rollout.of(answerer, **options)(answerer.params, *arrays).first_logits
    split = load_answerer(folder, sharding=where)
    kernel = split.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * shape[1] * (shape[0] if split_over_data else 1) == kernel.size
    actual = Rollout.of(split, mesh=mesh, **options)(split.params, *sharding.put_batch(mesh, arrays)).first_logits
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), atol=1e-5)


# ---- checkpoints ----


def copy(folder, target, tensors=lambda tensors: tensors, **config):
    shutil.copytree(folder, target)
    save_file(tensors(load_file(folder / "model.safetensors")), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(weights.read_config(folder) | config))
    return target


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_flat_config(folder, answerer, tmp_path):
    """As published: the language model's fields at the top, positions of type mrope."""
    config = weights.read_config(folder)
    text = config.pop("text_config")
    section = text.pop("rope_parameters")["mrope_section"]
    flat = text | config | {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": section}}
    assert Qwen25VLConfig.from_hf(flat) == answerer.config
    (target := shutil.copytree(folder, tmp_path / "flat") / "config.json").write_text(json.dumps(flat))
    assert_equal(load_answerer(target.parent).params, answerer.params)
    mesh = sharding.make_mesh([("data", 2), ("model", 4)], jax.devices())
    assert sharding.answerer_sharding(mesh, flat) == sharding.answerer_sharding(mesh, weights.read_config(folder))


def test_names_of_newer_transformers(folder, answerer, tmp_path):
    def renamed(tensors):
        new = {
            f"model.{n}" if n.startswith("visual.") else n.replace("model.", "model.language_model."): t
            for n, t in tensors.items()
        }
        assert new.keys() != tensors.keys()
        return new

    assert_equal(load_answerer(copy(folder, tmp_path / "new", renamed)).params, answerer.params)


def test_tied_embeddings(folder, answerer, tmp_path):
    """Like 3B: no head in the file, or a copy of the embeddings."""
    head = "lm_head.weight"
    without = copy(
        folder, tmp_path / "without", lambda t: {n: x for n, x in t.items() if n != head}, tie_word_embeddings=True
    )
    tied = load_answerer(without)
    assert tied.config.language.tie_word_embeddings and "lm_head" not in tied.params["language_model"]
    assert_equal(load_answerer(copy(folder, tmp_path / "with", tie_word_embeddings=True)).params, tied.params)
    with pytest.raises(CheckpointError, match="missing: lm_head.weight"):
        load_answerer(copy(without, tmp_path / "lost", tie_word_embeddings=False))


def test_saved_tensors_equal_the_loaded_ones(folder, answerer):
    tensors = load_file(folder / "model.safetensors")
    saved = weights.file_tensors(answerer.params, weights.QWEN2_5_VL)
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"hidden_act": "relu"}, "vision_config.hidden_act 'relu' is not supported"),
        ("vision_config", {"window_size": 100}, "window_size 100 is no multiple of the 28 pixels"),
        ("vision_config", {"num_heads": 16}, "hidden_size 32 does not make 16 heads"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size 32 is not hidden_size 64"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        ("text_config", {"rope_parameters": {"mrope_section": [8, 8, 8]}}, "mrope_section .8, 8, 8. does not sum"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling is of type 'yarn'"),
    ],
)
def test_configs_that_are_not_supported(folder, part, change, message):
    config = weights.read_config(folder)
    config[part] |= change
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        Qwen25VLConfig.from_hf(config)


def test_unknown_rule_of_positions(folder):
    with pytest.raises(ValueError, match="next_position is 'x', not one of after_all, after_space"):
        load_answerer(folder, video=VideoOptions(next_position="x"))


# ---- entry points ----


@pytest.mark.slow
def test_trains_and_evaluates(golden, folder, tmp_path):
    """A step of training, and an evaluation whose answers are those of `answer`."""
    store = make_store(tmp_path, golden)
    config = make_config(golden, store, write_questions(tmp_path / "questions.jsonl", num=4))
    config.answerer.folder = str(folder)
    config.batch_size, config.num_steps = 4, 1
    config.data.min_frames, config.data.max_frames, config.data.buckets = 0, 40, (40,)
    config.data.general.k, config.policy.group_size = 3, 2
    config.answerer.video.frame_size = (56, 84)
    config.mesh.axes = (("data", 2), ("model", 1))
    config.evaluation.update(methods=("topk",), budgets=(3,), batch_size=4)
    train(cfg.read(config), tmp_path / "run", jax.devices()[:2])
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["unique_frames"] <= 6 and np.isfinite(row["grad_norm"])

    config.answerer.video.frame_size = (28, 56)
    config.mesh.axes = (("data", -1), ("model", 1))
    config.evaluation.batch_size = 8
    summary = evaluate(cfg.read(config), tmp_path / "evaluated", golden / "tspo_agent")
    assert summary["missing_videos"] == []
    answerer = load_answerer(folder, video=VideoOptions((28, 56)))
    clip_store = FrameStore(store, load_clip(golden / "tspo_agent").identity)
    for row in read_rows(tmp_path / "evaluated" / "evaluation" / "rows.jsonl"):
        program = Rollout.of(answerer, max_new_tokens=2)
        frames = list(clip_store.frames(row["video"], row["candidate_idx"]))
        question = json.loads((tmp_path / "questions.jsonl").read_text().splitlines()[int(row["id"])])
        text = question["original_question"].removeprefix("<image>\n")
        result = answer(answerer, program, frames, prompts.render(text, "qwen2_5_vl"))
        assert result["answer"] == row["answer"]
        assert result["num_visual_tokens"] == 2 * 1 * 2
        assert "<|vision_start|><|video_pad|><|vision_end|>Which number" in result["prompt"]


@pytest.mark.parametrize("options", [{}, {"next_position": "after_space"}, {"second_per_grid": 2.0}])
def test_places_for_more_frames_change_no_answer(folder, options):
    """Odd and even numbers of frames, uneven times, one program for all."""
    answerer = load_answerer(folder, video=VideoOptions((28, 56), **options))
    rng, seconds = np.random.default_rng(0), np.array([0.3, 1.0, 9.5, 9.75, 30.0, 31.0])
    frames = list(rng.integers(0, 256, (6, 28, 56, 3)).astype(np.uint8))
    rendered = prompts.render("Who?\nA. Cat\nB. Dog", answerer.template)
    exact, padded = (Rollout.of(answerer, max_new_tokens=4, return_first_logits=True) for _ in range(2))
    for k in (1, 3, 4, 6):
        times = FrameTimes.of(seconds[:k])
        alone = answer(answerer, exact, frames[:k], rendered, times=times)
        assert answer(answerer, padded, frames[:k], rendered, times=times, num_frames=6) == alone
    assert (exact.num_compilations, padded.num_compilations) == (4, 1)


def test_frames_of_several_sizes_are_refused(golden, folder, answerer, tmp_path):
    frames = [np.zeros((56, 56, 3), np.uint8), np.zeros((56, 112, 3), np.uint8)]
    with pytest.raises(ValueError, match="several sizes .*give all one with --frame_size"):
        answer(answerer, None, frames, "")
    with pytest.raises(ValueError, match="LLaVA-Video shows every frame at its tower's size"):
        load_answerer(golden / "llava_video_grid", video=VideoOptions((28, 28)))
    sizes = {"a": (480, 640), "b": (720, 1280)}
    store = SimpleNamespace(
        folder="frames",
        names=lambda: list(sizes),
        video=lambda name: SimpleNamespace(height=sizes[name][0], width=sizes[name][1]),
    )
    with pytest.raises(ValueError, match="frames would be shown in several sizes .476x644, 560x1008.; give all"):
        check_frame_sizes(store, answerer)
    check_frame_sizes(store, load_answerer(folder, video=VideoOptions((392, 728))))


def test_merged_tokens_keep_their_positions(folder, answerer):
    """Nothing merged gives today's bits; merged tokens are fewer, in order, at positions that there were."""
    tokens = jax.random.normal(jax.random.key(0), (2, 4, 2, 3, 64))
    ids, lengths = jnp.array([[3, VIDEO_TOKEN, 4, 5], [3, 6, VIDEO_TOKEN, 5]]), jnp.array([4, 4])
    steps = jnp.array([[0, 2, 4, 9], [0, 1, 2, 3]])

    def prompt(merge):
        config = dataclasses.replace(answerer.config, video=VideoOptions(merge=merge))
        graphdef = abstract_module(lambda rngs: qwen2_5_vl.Qwen25VL(config, rngs=rngs))[0]
        return config, jax.jit(lambda p: merge_params(graphdef, p).prompt(tokens, ids, lengths, steps))(answerer.params)

    (plain, today), (_, none), (config, merged) = prompt(()), prompt((0, 0)), prompt((2, 1))
    jax.tree.map(np.testing.assert_array_equal, today, none)
    M = config.num_visual_tokens(8, 56, 84)
    assert (plain.num_visual_tokens(8, 56, 84), M) == (4 * 6, 2 * 5)
    assert merged.embeddings.shape[1] == 3 + M and (merged.lengths == 3 + M).all()
    for row, start in ((0, 1), (1, 2)):
        before = {tuple(p) for p in np.asarray(today.positions[row, start : start + 24])}
        after = [tuple(p) for p in np.asarray(merged.positions[row, start : start + M])]
        assert set(after) <= before and len(set(after)) == M and after == sorted(after)
