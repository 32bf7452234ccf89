"""Adapters in the folders of PEFT: its own file (golden), names, refusals, merging."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tpo_trajectory_pairs import Trajectory, model_of

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.adapters import CONFIG, TENSORS
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.models.layers import merge_params
from tspo_jax.models.lora import LoraConfig
from tspo_jax.tpo import programs

FORMAT = weights.LLAVA_VIDEO


@pytest.fixture(scope="module")
def trajectory(golden):
    return Trajectory(golden)


@pytest.fixture(scope="module")
def answerer(trajectory):
    return trajectory.answerer()


@pytest.fixture
def peft(golden, tmp_path):
    """A copy of the golden adapter folder."""
    return shutil.copytree(golden / "lora_peft", tmp_path / "peft")


@pytest.fixture(scope="module")
def log_probs(trajectory):
    """(graphdef, params) -> log-probabilities [pairs, 2] of all golden pairs."""

    def of(answerer):
        pairs = trajectory.pairs(list(range(trajectory.num_pairs)))
        return np.asarray(programs.make_reference(model_of(answerer))(answerer.params, pairs).total)

    return of


def test_golden_adapter_gives_its_log_probs(trajectory, golden, log_probs):
    adapted = load_answerer(trajectory.folder, adapter=golden / "lora_peft")
    expected = trajectory.arrays["lora/final_logps"]
    np.testing.assert_allclose(log_probs(adapted), expected, rtol=1e-6, atol=2e-4)


def test_golden_merged_weights(trajectory, golden, answerer):
    adapted = load_answerer(trajectory.folder, adapter=golden / "lora_peft")
    adapter = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    merged = adapters.merge(adapted.params, adapter.lora)
    assert jax.tree.structure(merged) == jax.tree.structure(answerer.params)
    tensors = weights.file_tensors(merged, FORMAT)
    expected = trajectory.of("lora/merged/")
    assert expected
    for name, wanted in expected.items():
        np.testing.assert_allclose(tensors[name], wanted, atol=1e-6, err_msg=name)


def test_identity_is_of_what_adapters_do_not_where_they_lie(trajectory, golden, peft):
    config = json.loads((peft / CONFIG).read_text())
    (peft / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": "elsewhere"}))
    plain, adapted = (adapters.answerer_identity(trajectory.folder, a) for a in ("", golden / "lora_peft"))
    assert adapted == adapters.answerer_identity(trajectory.folder, peft) != plain
    (peft / CONFIG).write_text(json.dumps(config | {"lora_alpha": config["lora_alpha"] + 1}))
    assert adapters.answerer_identity(trajectory.folder, peft) not in (plain, adapted)
    (peft / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS}: no such file"):
        adapters.folder_identity(peft)


def test_golden_names_and_shapes(golden, answerer, tmp_path):
    """What is written has the tensors of PEFT's own file, and reads as the same adapter."""
    adapter = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    base = weights.read_config(answerer.folder)
    adapters.write(tmp_path, adapter, FORMAT, answerer.folder, base, "identity")
    ours, theirs = (load_file(folder / TENSORS) for folder in (tmp_path, golden / "lora_peft"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    written, config = (json.loads((f / CONFIG).read_text()) for f in (tmp_path, golden / "lora_peft"))
    for field in ("r", "lora_alpha", "peft_type", "task_type", "bias", "use_rslora"):
        assert written[field] == config[field]
    again = adapters.read(tmp_path, answerer.params, FORMAT, "identity")
    assert again.lora == adapter.lora
    jax.tree.map(np.testing.assert_array_equal, again.params, adapter.params)


def test_only_the_language_model_is_a_target(answerer):
    lora = LoraConfig(targets=("q_proj", "down_proj"))
    expression = adapters.target_expression(lora, "model.language_model.")

    def matches(name):
        return re.fullmatch(expression, name) is not None

    assert matches("model.language_model.layers.11.self_attn.q_proj")
    assert matches("model.language_model.layers.0.mlp.down_proj")
    assert not matches("model.language_model.layers.0.self_attn.k_proj")
    assert not matches("model.vision_tower.vision_model.encoder.layers.0.self_attn.q_proj")


def test_peft_reads_it_and_gives_the_same(trajectory, golden, answerer, tmp_path, log_probs):
    """PEFT's own model in torch, where it is installed, with the folder that we write."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    adapter = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    base = weights.read_config(answerer.folder)
    adapters.write(tmp_path, adapter, FORMAT, answerer.folder, base, "identity")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**base))
    tensors = load_file(answerer.folder / "model.safetensors")
    own = {name: torch.tensor(x) for name, x in tensors.items() if name in model.state_dict()}
    model.load_state_dict(own, strict=True)
    model = peft.PeftModel.from_pretrained(model, str(tmp_path)).eval()
    ids = torch.arange(2, 40)[None]
    adapted = load_answerer(trajectory.folder, adapter=tmp_path)
    language = merge_params(adapted.graphdef, adapted.params).language_model
    embeddings = language.embed_tokens(jnp.asarray(ids.numpy()))
    hidden, _ = language(embeddings, jnp.arange(ids.shape[1])[None])
    with torch.no_grad():
        expected = model(ids).logits.numpy()
    np.testing.assert_allclose(language.logits(hidden), expected, atol=1e-4)


def change(folder, tensors=lambda tensors: tensors, **fields):
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))
    save_file(tensors(load_file(folder / TENSORS)), folder / TENSORS)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_names_of_hugging_faces_classes(answerer, peft, golden, prefix):
    change(peft, lambda ts: {n.replace("model.model.layers", f"model.{prefix}layers"): x for n, x in ts.items()})
    there = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    jax.tree.map(np.testing.assert_array_equal, adapters.read(peft, answerer.params, FORMAT).params, there.params)


def test_ranks_and_alphas_of_single_modules(answerer, peft, golden):
    """Their products are what counts: (x A) B scaling, whatever the ranks are."""
    plain = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    name = "base_model.model.model.layers.1.self_attn.q_proj.lora_{}.weight"

    def cut(tensors):
        a, b = name.format("A"), name.format("B")
        return tensors | {a: tensors[a][:2].copy(), b: tensors[b][:, :2].copy()}

    module = r"layers\.1\.self_attn\.q_proj"
    change(peft, cut, rank_pattern={module: 2}, alpha_pattern={module: 6})
    found = adapters.read(peft, answerer.params, FORMAT)
    assert found.lora == plain.lora

    def product(adapter, layer, rank):
        part = adapter.params["language_model"]["layers"]["self_attn"]["q_proj"]
        a, b = (part[factor]["kernel"][layer] for factor in ("lora_A", "lora_B"))
        return adapter.lora.scaling * a[:, :rank] @ b[:rank]

    np.testing.assert_allclose(product(found, 0, None), product(plain, 0, None))
    expected = product(plain, 1, 2) / plain.lora.scaling * 6 / 2
    np.testing.assert_allclose(product(found, 1, None), expected, atol=1e-7)


@pytest.mark.parametrize(
    "field, value",
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2]]),
        ("target_parameters", ["x"]),
        ("trainable_token_indices", [3]),
        ("fan_in_fan_out", True),
        ("init_lora_weights", "pissa"),
        ("peft_type", "IA3"),
    ],
)
def test_what_is_not_supported_is_named(answerer, peft, field, value):
    change(peft, **{field: value})
    with pytest.raises(CheckpointError, match=rf"adapter_config.json: {field} is .*support"):
        adapters.read(peft, answerer.params, FORMAT)


def test_adapters_of_other_models_are_refused(answerer, peft, golden):
    first = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    cases = [
        (lambda ts: ts | {first.replace("layers.0", "layers.9"): ts[first]}, "no such projection: .*layers.9"),
        (lambda ts: ts | {"base_model.model.lm_head.lora_A.weight": ts[first]}, "no such projection: .*lm_head"),
        (lambda ts: {n: x for n, x in ts.items() if n != first}, "missing: model.layers.0.self_attn.q_proj.lora_A"),
        (lambda ts: {n: x for n, x in ts.items() if "layers.0.mlp.up_proj" not in n}, "which target_modules names"),
        (lambda ts: ts | {first: ts[first][:, :-1].copy()}, "wrong shape"),
        (lambda ts: {}, "no tensors"),
    ]
    for tensors, said in cases:
        change(peft, tensors)
        with pytest.raises(CheckpointError, match=said):
            adapters.read(peft, answerer.params, FORMAT)
        shutil.copy(golden / "lora_peft" / TENSORS, peft / TENSORS)


def test_folders_that_cannot_be_read(answerer, peft, tmp_path):
    with pytest.raises(CheckpointError, match="adapter_config.json"):
        adapters.read(tmp_path, answerer.params, FORMAT)
    (peft / TENSORS).rename(peft / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.bin cannot be read"):
        adapters.read(peft, answerer.params, FORMAT)
    (peft / TENSORS).write_bytes(b"cut")
    with pytest.raises(CheckpointError, match="truncated"):
        adapters.read(peft, answerer.params, FORMAT)


def test_adapter_of_other_weights_is_refused(answerer, golden, tmp_path):
    adapter = adapters.read(golden / "lora_peft", answerer.params, FORMAT)
    adapters.write(tmp_path, adapter, FORMAT, "base", weights.read_config(answerer.folder), "one")
    with pytest.raises(CheckpointError, match="trained on checkpoint one, this is two"):
        adapters.read(tmp_path, answerer.params, FORMAT, "two")


def test_first_parameters(answerer):
    _, abstract = adapters.add(answerer.graphdef, answerer.params, LoraConfig(3, 6.0))
    params = weights.flatten(adapters.fresh(abstract, seed=1))
    for path, x in params.items():
        if ".lora_B." in path:
            assert not np.asarray(x).any()
        else:
            bound = 1 / np.sqrt(x.shape[-2])
            assert 0.8 * bound < np.abs(x).max() <= bound
    other = weights.flatten(adapters.fresh(abstract, seed=2))
    assert any((np.asarray(x) != np.asarray(other[path])).any() for path, x in params.items())
