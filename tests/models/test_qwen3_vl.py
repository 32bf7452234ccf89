"""Qwen3-VL against Hugging Face's classes on small random weights: tower, deepstack, positions, prompts, answers."""

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
from tspo_jax.answering.rollout import Rollout
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_answerer, load_clip
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.data.frame_store import FrameStore
from tspo_jax.devices import sharding
from tspo_jax.evaluation.run import evaluate
from tspo_jax.models import packed_answers
from tspo_jax.models.layers import merge_params
from tspo_jax.models.preprocessing import Qwen3Processor, patchify, video_resize
from tspo_jax.models.qwen3_vl import Qwen3VLConfig, prompt_positions
from tspo_jax.models.video_prompt import VIDEO_TOKEN, FrameTimes, VideoOptions
from tspo_jax.models.video_tags import VIDEO_TAG
from tspo_jax.runs.metrics import read_rows
from tspo_jax.train import train

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
# Both load without torchvision, which Hugging Face's own loading of a processor asks for.
processing = pytest.importorskip("transformers.models.qwen3_vl.processing_qwen3_vl")
video_processing = pytest.importorskip("transformers.models.qwen3_vl.video_processing_qwen3_vl")

VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
END, PAD = 256, 257  # of the golden tokenizer
GRIDS = [(3, 5), (1, 2), (4, 4)]  # merged patches of 32 x 32 pixels; the learned positions are 7 x 7
UNEVEN = [0.3, 0.4, 17.25, 99.96, 1234.56]


@pytest.fixture(scope="module")
def folder(golden, tmp_path_factory):
    """A small random checkpoint with the golden byte-level tokenizer; heads are wider than hidden_size / heads."""
    folder = tmp_path_factory.mktemp("qwen3_vl")
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(golden / "llava_video_grid")
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    tokenizer.save_pretrained(folder)
    start, end, _, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    config = transformers.Qwen3VLConfig(
        text_config=dict(
            vocab_size=280,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=24,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [6, 3, 3],
                "mrope_interleaved": True,
            },
            initializer_range=0.1,
            eos_token_id=END,
        ),
        vision_config=dict(
            depth=3,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=64,
            num_position_embeddings=49,
            deepstack_visual_indexes=[0, 2],
            initializer_range=0.1,
        ),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):  # else ones and zeros, which hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END], "pad_token_id": PAD}))
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    cls = transformers.Qwen3VLForConditionalGeneration
    return cls.from_pretrained(folder, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def answerer(folder):
    return load_answerer(folder)


@pytest.fixture(scope="module")
def video_processor():
    return video_processing.Qwen3VLVideoProcessor()


@pytest.fixture
def processor(answerer, video_processor, monkeypatch):
    """Hugging Face's, whose check of its parts needs torchvision."""
    cls = processing.Qwen3VLProcessor
    images = transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil(patch_size=16)
    monkeypatch.setattr(cls, "check_argument_for_proper_class", lambda self, *_: None)
    return cls(images, answerer.tokenizer, video_processor)


def flat_patches(pixels):
    """Normalised frames as Hugging Face's model takes them, and their grid."""
    patches = np.asarray(patchify(pixels, 16, 2, 2))
    T, _, values = patches.shape
    grid = torch.tensor([[T, pixels.shape[1] // 16, pixels.shape[2] // 16]])
    return torch.tensor(patches.reshape(-1, values)), grid


# ---- preprocessing ----


def test_sizes_of_hugging_face(video_processor):
    theirs = video_processing.smart_resize
    rng = np.random.default_rng(0)
    for height, width in rng.integers(15, 3000, (100, 2)).tolist():
        for frames in (2, 3, 5, 16, 64):
            for limits in ((131072, 786432), (4096, 25165824)):
                if max(height, width) <= 150 * min(height, width):
                    expected = theirs(frames, height, width, 2, 32, *limits)
                    assert video_resize(frames, height, width, 32, 2, *limits) == expected
    with pytest.raises(ValueError, match="9 x 9000 pixels|32 x 32000 pixels"):
        video_resize(2, 9, 9000, 32, 2, 4096, 25165824)
    for capped in (True, False):
        options = {"size": {"shortest_edge": 4096, "longest_edge": 25165824}, "cap_pixels_per_frame": capped}
        ours = Qwen3Processor.from_hf(options, 16, 2, 2)
        for frames in (1, 2, 7, 16, 64):
            for height, width in ((360, 640), (1080, 1920), (20, 50)):
                h, w = ours.for_frames(frames).size_of(height, width)
                shown = max(frames, 2)  # Hugging Face's takes two at least
                expected = video_processor.get_num_of_video_patches(shown, height, width, options)
                assert -(-shown // 2) * h * w // 256 == expected


def test_patches_of_hugging_face(video_processor):
    frames = np.random.default_rng(0).integers(0, 256, (5, 64, 96, 3)).astype(np.uint8)
    ours = Qwen3Processor.from_hf({}, 16, 2, 2, (64, 96))
    pixels = ours.normalize(np.stack([ours.crop(frame) for frame in [*frames, frames[-1]]]))
    video = torch.tensor((frames / 255 - 0.5) / 0.5, dtype=torch.float32).permute(0, 3, 1, 2)[None]
    theirs, *grid = video_processor.patchify(video, 16, 2, 2)
    patches, (own_grid,) = flat_patches(pixels)
    assert grid == own_grid.tolist() == [3, 4, 6]
    np.testing.assert_allclose(patches, theirs[0], atol=1e-6)


def test_processor_of_another_tower():
    with pytest.raises(ValueError, match="patch_size is 14, but config.json's tower has 16"):
        Qwen3Processor.from_hf({"patch_size": 14}, 16, 2, 2)
    with pytest.raises(ValueError, match="do_rescale is false"):
        Qwen3Processor.from_hf({"do_rescale": False}, 16, 2, 2)
    with pytest.raises(ValueError, match="frame_size is .64, 90., not height and width, both multiples of 32"):
        Qwen3Processor.from_hf({}, 16, 2, 2, (64, 90))


# ---- image tower ----


@pytest.mark.parametrize("grid", GRIDS[:2])
def test_image_tower(answerer, reference, grid):
    """Visual tokens and those of the two deepstack levels."""
    rng = np.random.default_rng(1)
    pixels = rng.normal(size=(6, 32 * grid[0], 32 * grid[1], 3)).astype(np.float32)
    with torch.no_grad():
        out = reference.model.visual(*flat_patches(pixels))
    expected = np.stack([out.pooler_output, *out.deepstack_features], axis=1)  # [tokens, levels, hidden]
    tokens = jax.jit(lambda p, x: merge_params(answerer.graphdef, p).encode_frames(x))(answerer.params, pixels)
    assert tokens.shape == (3, 3, *grid, 64)
    assert np.abs(expected).max((0, 2)).min() > 0.5
    np.testing.assert_allclose(np.moveaxis(tokens, 1, 3).reshape(expected.shape), expected, atol=1e-4)


# ---- positions and prompts ----


place_prompts = jax.jit(prompt_positions, static_argnums=(1, 3))


@pytest.mark.parametrize("grid", GRIDS)
def test_positions_of_hugging_face(reference, grid):
    """Two prompts of different lengths, with text between the pairs."""
    config, pairs, M = reference.config, 3, grid[0] * grid[1]
    rows = [[5] * before + [VIDEO_TOKEN, 7, 8, VIDEO_TOKEN, 6, VIDEO_TOKEN, 9] for before in (4, 2)]
    ids, lengths = prompts.pad(rows, PAD, 16)
    positions, following = place_prompts(ids, pairs, lengths, grid)
    for row, ours, next_one in zip(rows, np.asarray(positions), following.tolist(), strict=True):
        whole = [t for token in row for t in ([config.video_token_id] * M if token == VIDEO_TOKEN else [token])]
        whole_ids = torch.tensor([whole])
        theirs, delta = reference.model.get_rope_index(
            whole_ids,
            mm_token_type_ids=(whole_ids == config.video_token_id).int() * 2,
            video_grid_thw=torch.tensor([[pairs, 2 * grid[0], 2 * grid[1]]]),
            attention_mask=torch.ones_like(whole_ids),
        )
        np.testing.assert_array_equal(ours[: len(whole)].T, theirs[:, 0].numpy())
        assert next_one == len(whole) + int(delta)


def test_axes_of_the_published_model():
    axes = SimpleNamespace(language=SimpleNamespace(head_dim=128), mrope_section=(24, 20, 20))
    axes = Qwen3VLConfig.axis_of_frequency.fget(axes)
    assert axes[:7].tolist() == [0, 1, 2, 0, 1, 2, 0] and axes[57:].tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert np.bincount(axes).tolist() == [24, 20, 20]


@pytest.mark.parametrize(("indices", "fps"), [([0, 30, 60, 90], 30.0), ([3], 29.97), ([1, 4, 5, 77, 3000], 23.976)])
def test_prompts_of_hugging_face(answerer, processor, indices, fps):
    """Text and token ids, equal to the byte; markers as in transformers 5.10 and later, and as before."""
    rendered = prompts.render("Why?\nA. So\nB. No", answerer.template)
    grid = torch.tensor([[-(-len(indices) // 2), 4, 6]])
    metadata = SimpleNamespace(frames_indices=list(indices), fps=fps)
    video = processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
    (expected,), _ = processor.get_text_with_replacements([rendered], videos_replacements=[video])
    times = FrameTimes.of([index / fps for index in indices])
    written = answerer.config.write_times(rendered, times)
    assert written.replace(VIDEO_TAG, VIDEO_TAG * 6) == expected
    ids = [t for token in prompts.tokenize(written, answerer.tokenizer) for t in ([token] if token >= 0 else [263] * 6)]
    assert ids == answerer.tokenizer(expected)["input_ids"]
    older = dataclasses.replace(answerer.config, video=VideoOptions(outer_markers=False))
    whole_video = f"<|vision_start|>{VIDEO_TAG}<|vision_end|>"  # what it replaced
    assert older.write_times(rendered, times).replace(VIDEO_TAG, VIDEO_TAG * 6) == rendered.replace(whole_video, video)


def test_times_in_prompts(answerer):
    """Of the mean of a pair, from its frames' own times, or evenly spaced ones where that is asked for."""
    rendered = prompts.render("Why?", answerer.template, "")
    text = answerer.config.write_times(rendered, FrameTimes.of([0.0, 0.1, 0.5, 2.0, 7.26]))
    pair = "seconds><|vision_start|><|video_pad|><|vision_end|>"
    assert f"<|vision_start|><0.1 {pair}<1.2 {pair}<7.3 {pair}<|vision_end|>Why?<|im_end|>" in text
    even = dataclasses.replace(answerer.config, video=VideoOptions(second_per_grid=3.0))
    assert f"<0.8 {pair}<3.8 {pair}<6.0 {pair}" in even.write_times(rendered, FrameTimes.of([0.0, 9, 9, 9, 9]))
    with pytest.raises(ValueError, match="run backwards: frame 2 is at 1 s, behind 2 s"):
        FrameTimes.of([0, 2, 1, 5])
    with pytest.raises(ValueError, match="not numbers of seconds from 0 on"):
        FrameTimes.of([0, float("nan")])


# ---- logits and answers ----


def their_inputs(reference, answerer, ids, frames):
    """A prompt, `ids` with VIDEO_TOKENs, and frames as arguments of Hugging Face's class."""
    frames = frames if len(frames) % 2 == 0 else np.concatenate([frames, frames[-1:]])
    patches, grid = flat_patches(np.asarray(answerer.processor.normalize(frames)))
    video, M = reference.config.video_token_id, int(grid[0, 1] * grid[0, 2]) // 4
    whole = torch.tensor([[t for token in ids for t in ([video] * M if token == VIDEO_TOKEN else [token])]])
    kinds = (whole == video).int() * 2
    return dict(input_ids=whole, pixel_values_videos=patches, video_grid_thw=grid, mm_token_type_ids=kinds)


@pytest.mark.parametrize(("times", "size"), [(UNEVEN, (96, 32)), ([2.5], (32, 64))], ids=["odd", "one"])
def test_answers_of_hugging_face(reference, answerer, times, size):
    """Logits of the first token, and 32 greedy ones, once with the repetition penalty too."""
    K = len(times)
    frames = np.random.default_rng(2).integers(0, 256, (K, *size, 3)).astype(np.uint8)
    written = answerer.config.write_times(prompts.render("Who?\nA. Cat", answerer.template), FrameTimes.of(times))
    ids = prompts.tokenize(written, answerer.tokenizer)
    inputs = their_inputs(reference, answerer, ids, frames)
    with torch.no_grad():
        logits = reference(**inputs).logits[0, -1]
    penalty = 1.3 if K == 1 else 1.0
    generation = dataclasses.replace(answerer.generation, eos_token_ids=(-1,), repetition_penalty=penalty)
    options = dict(max_new_tokens=32, return_first_logits=True)
    program = Rollout(answerer.graphdef, answerer.processor.normalize, generation, **options)
    padded, lengths = prompts.pad([ids], PAD, 16)
    answers = program(answerer.params, frames[None], np.arange(K)[None, None], padded, lengths)
    np.testing.assert_allclose(answers.first_logits[0, 0], logits, atol=1e-4)
    options = dict(do_sample=False, max_new_tokens=32, min_new_tokens=32, pad_token_id=PAD)
    theirs = reference.generate(**inputs, **options, repetition_penalty=penalty, eos_token_id=[279999])
    assert np.asarray(answers.tokens)[0, 0].tolist() == theirs[0, inputs["input_ids"].shape[1] :].tolist()


SETS = dict(max_new_tokens=1, prefill_chunk=1, return_first_logits=True)


@pytest.fixture(scope="module")
def sets(answerer):
    """Eight questions, two sets of four frames each, in one batch: frames, what the rollout is given, and its answers
    on one device."""
    rng = np.random.default_rng(3)
    frames = rng.integers(0, 256, (8, 5, 64, 64, 3)).astype(np.uint8)
    index = np.sort(np.stack([[rng.permutation(5)[:4] for _ in range(2)] for _ in range(8)]), axis=-1)
    seconds = np.cumsum(rng.uniform(0.1, 60, (8, 5)), axis=1)
    texts = [prompts.render(text, answerer.template, "") for text in ("Why?", "Who is it?") * 4]
    times = [[FrameTimes.of(seconds[b, picks]) for picks in index[b]] for b in range(8)]
    batch = prompts.write(texts, times, answerer, multiple=16)
    assert batch.ids.shape[:2] == batch.lengths.shape == (8, 2) and batch.steps is None
    arrays = frames, index, batch.ids, batch.lengths
    return arrays, Rollout.of(answerer, **SETS)(answerer.params, *arrays)


def test_sets_with_times_of_their_own(reference, answerer, sets):
    """A set's text tells its own times."""
    (frames, index, all_ids, lengths), answers = sets
    for b, g in ((0, 0), (0, 1), (5, 1)):
        ids = all_ids[b, g, : lengths[b, g]].tolist()
        with torch.no_grad():
            logits = reference(**their_inputs(reference, answerer, ids, frames[b, index[b, g]])).logits[0, -1]
        np.testing.assert_allclose(answers.first_logits[b, g], logits, atol=1e-4)


def test_packed_answers_of_hugging_face(reference, answerer):
    """Two answers to one prompt, deepstack included: what preference training learns from."""
    frames = np.random.default_rng(6).integers(0, 256, (4, 64, 64, 3)).astype(np.uint8)
    rendered = prompts.render("Who?", answerer.template, "")
    written = answerer.config.write_times(rendered, FrameTimes.of([1, 2, 30, 40]))
    ids = prompts.tokenize(written, answerer.tokenizer)
    answers = np.array([[65, 66, 67], [90, 33, 12]])

    @jax.jit
    def log_probs(params):
        model = merge_params(answerer.graphdef, params)
        tokens = model.project(model.tower(answerer.processor.normalize(frames)))[None]
        prompt = model.prompt(tokens, jnp.asarray([ids]), jnp.asarray([len(ids)]))
        hidden = packed_answers.answer_states(model, prompt, answers[None])
        return packed_answers.token_log_probs(model.language_model, hidden, answers[None])

    for row, ours in zip(answers.tolist(), np.asarray(log_probs(answerer.params))[0], strict=True):
        with torch.no_grad():
            logits = reference(**their_inputs(reference, answerer, ids + row, frames)).logits[0, -4:-1]
        theirs = torch.log_softmax(logits, -1)[range(3), row]
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_sharded_gives_the_same_logits(folder, sets):
    """Questions over `data`, and the weights over `data` and `model`."""
    mesh = sharding.make_mesh([("data", 2), ("model", 4)], jax.devices()[:8])
    where = sharding.answerer_sharding(mesh, weights.read_config(folder), split_over_data=True)
    arrays, expected = sets
    split = load_answerer(folder, sharding=where)
    kernel = split.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    actual = Rollout.of(split, mesh=mesh, **SETS)(split.params, *sharding.put_batch(mesh, arrays))
    np.testing.assert_allclose(np.asarray(actual.first_logits), np.asarray(expected.first_logits), atol=1e-5)
    np.testing.assert_array_equal(np.asarray(actual.tokens), np.asarray(expected.tokens))


# ---- checkpoints ----


def copy(folder, target, tensors=lambda tensors: tensors, **config):
    shutil.copytree(folder, target)
    save_file(tensors(load_file(folder / "model.safetensors")), target / "model.safetensors")
    (target / "config.json").write_text(json.dumps(weights.read_config(folder) | config))
    return target


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_config_of_older_transformers(folder, answerer):
    """As published: `rope_scaling` and `rope_theta` of 4.57."""
    config = weights.read_config(folder)
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert Qwen3VLConfig.from_hf(config) == answerer.config


def test_saved_tensors_equal_the_loaded_ones(folder, answerer):
    tensors = load_file(folder / "model.safetensors")
    saved = weights.file_tensors(answerer.params, weights.QWEN3_VL)
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(saved[name], tensor)


def test_tied_embeddings(folder, tmp_path):
    """Like 2B and 4B: no head in the file."""
    without = copy(
        folder,
        tmp_path / "tied",
        lambda t: {n: x for n, x in t.items() if "lm_head" not in n},
        tie_word_embeddings=True,
    )
    tied = load_answerer(without)
    assert tied.config.language.tie_word_embeddings and "lm_head" not in tied.params["language_model"]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vision_config", {"hidden_act": "swish9"}, "hidden_act 'swish9' is not supported"),
        ("vision_config", {"num_heads": 16}, "hidden_size 32 does not make 16 heads"),
        ("vision_config", {"out_hidden_size": 32}, "out_hidden_size 32 is not hidden_size 64"),
        ("vision_config", {"num_position_embeddings": 50}, "num_position_embeddings 50 is no square"),
        ("vision_config", {"deepstack_visual_indexes": [0, 3]}, "deepstack_visual_indexes .0, 3. are not ascending"),
        ("vision_config", {"rope_parameters": {"rope_theta": 5}}, "vision_config.rope_parameters.rope_theta is 5"),
        ("text_config", {"num_experts": 8}, "only dense models are supported"),
        ("text_config", {"attention_bias": True}, "attention_bias is true"),
        ("text_config", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only silu"),
        ("text_config", {"rope_parameters": {"mrope_section": [8, 8, 8]}}, "mrope_section .8, 8, 8. does not sum"),
        ("text_config", {"rope_parameters": {"rope_type": "yarn"}}, "rope_scaling is of type 'yarn'"),
        ("text_config", {"rope_parameters": {"mrope_interleaved": False}}, "mrope_interleaved is false"),
    ],
)
def test_configs_that_are_not_supported(folder, part, change, message):
    config = weights.read_config(folder)
    config[part] |= change
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        Qwen3VLConfig.from_hf(config)


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_models_that_are_not_supported(folder, tmp_path, model_type):
    other = copy(folder, tmp_path / "other", model_type=model_type)
    with pytest.raises(CheckpointError, match=f"'{model_type}' is not supported; supported: .*qwen3_vl"):
        load_answerer(other)


def test_processor_of_another_patch_size(folder, tmp_path):
    other = copy(folder, tmp_path / "other")
    (other / "video_preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(ValueError, match="patch_size is 14, but config.json's tower has 16"):
        load_answerer(other)


# ---- entry points ----


@pytest.mark.slow
def test_trains_and_evaluates(golden, folder, tmp_path):
    """A step of training, and an evaluation whose answer is that of `answer` with the frames' own times."""
    store = make_store(tmp_path, golden)
    config = make_config(golden, store, write_questions(tmp_path / "questions.jsonl", num=4))
    config.answerer.folder = str(folder)
    config.batch_size, config.num_steps = 4, 1
    config.data.min_frames, config.data.max_frames, config.data.buckets = 0, 40, (40,)
    config.data.general.k, config.policy.group_size = 3, 2
    config.answerer.video.frame_size = (64, 96)
    config.mesh.axes = (("data", 1), ("model", 1))
    config.evaluation.update(methods=("topk",), budgets=(3,), batch_size=4)
    train(cfg.read(config), tmp_path / "run", jax.devices()[:1])
    (row,) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["unique_frames"] <= 6 and np.isfinite(row["grad_norm"])

    config.mesh.axes = (("data", -1), ("model", 1))
    config.evaluation.batch_size = 8
    evaluate(cfg.read(config), tmp_path / "evaluated", golden / "tspo_agent")
    answerer = load_answerer(folder, video=VideoOptions((64, 96)))
    clip_store = FrameStore(store, load_clip(golden / "tspo_agent").identity)
    program = Rollout.of(answerer, max_new_tokens=2)
    rows = read_rows(tmp_path / "evaluated" / "evaluation" / "rows.jsonl")
    assert len(rows) == 4
    row = rows[0]
    frames = list(clip_store.frames(row["video"], row["candidate_idx"]))
    question = json.loads((tmp_path / "questions.jsonl").read_text().splitlines()[int(row["id"])])
    text = question["original_question"].removeprefix("<image>\n")
    times = FrameTimes.of(clip_store.video(row["video"]).timestamps[row["candidate_idx"]])
    result = answer(answerer, program, frames, prompts.render(text, answerer.template), times=times)
    assert result["answer"] == row["answer"]
    assert result["num_visual_tokens"] == 2 * 2 * 3
    assert result["prompt"].count(" seconds><|vision_start|><|video_pad|><|vision_end|>") == 2


def test_places_for_more_frames_change_no_answer(folder):
    """Odd and even numbers of frames, each pair's time in words, deepstack; one program for all."""
    answerer = load_answerer(folder, video=VideoOptions((64, 96)))
    rng, seconds = np.random.default_rng(0), np.array([0.3, 1.0, 9.5, 9.7, 30.0, 31.0])
    frames = list(rng.integers(0, 256, (6, 64, 96, 3)).astype(np.uint8))
    rendered = prompts.render("Who?\nA. Cat\nB. Dog", answerer.template)
    exact, padded = (Rollout.of(answerer, max_new_tokens=4) for _ in range(2))
    for k in (3, 4, 6):
        times = FrameTimes.of(seconds[:k])
        alone = answer(answerer, exact, frames[:k], rendered, times=times)
        assert answer(answerer, padded, frames[:k], rendered, times=times, num_frames=6) == alone
    assert padded.num_compilations < exact.num_compilations == 3


def test_more_frames_than_the_context_holds(folder, tmp_path):
    config = weights.read_config(folder)
    config["text_config"]["max_position_embeddings"] = 100
    small = load_answerer(copy(folder, tmp_path / "small", **config), video=VideoOptions((64, 64)))
    frames = [np.zeros((64, 64, 3), np.uint8)] * 20
    message = (
        "a prompt with 20 frames takes .* tokens and its answer up to 2, more than the 100 that the model can read"
    )
    with pytest.raises(ValueError, match=message):
        answer(small, Rollout.of(small, max_new_tokens=2), frames, prompts.render("Why?", small.template))
