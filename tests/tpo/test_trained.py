"""A trained answerer out of a run folder: its adapters and its merged weights are those of the checkpoint."""

import dataclasses

import jax
import numpy as np
import pytest

from tspo_jax import config as cfg
from tspo_jax.checkpoints import adapters
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.weights import flatten
from tspo_jax.models.layers import merge_params
from tspo_jax.models.lora import is_adapter
from tspo_jax.runs.run_folder import Checkpoints, RunFolderError, read_part, write_run_config
from tspo_jax.tpo import config as tpo_config
from tspo_jax.tpo import trained
from tspo_jax.tpo.config import TpoConfig
from tspo_jax.tpo.programs import State


@pytest.fixture(scope="module")
def base(golden):
    return load_answerer(golden / "llava_video_grid")


def write_run(folder, golden, params, full=False):
    """A run folder with one checkpoint that holds these trained parameters."""
    config = tpo_config.default()
    config.answerer.folder, config.lora.r, config.full = str(golden / "llava_video_grid"), 2, full
    write_run_config(folder, dataclasses.asdict(cfg.read(config, TpoConfig)))
    with Checkpoints(folder, 1) as checkpoints:
        checkpoints.save(1, State(params, {"count": np.int32(1)}), {})
    return folder


@pytest.fixture(scope="module")
def run_dir(golden, base, tmp_path_factory):
    """Of adapters that change what the model says."""
    config = cfg.read(tpo_config.default(), TpoConfig)
    lora = dataclasses.replace(trained.lora_of(config), r=2)
    _, abstract = adapters.add(base.graphdef, base.params, lora)
    params = jax.tree.map(lambda x: 0.1 + np.asarray(x), adapters.fresh(abstract, 0))
    return write_run(tmp_path_factory.mktemp("run"), golden, params)


def text_logits(answerer, ids) -> np.ndarray:
    language = merge_params(answerer.graphdef, answerer.params).language_model
    hidden, _ = language(language.embed_tokens(ids), np.arange(ids.shape[1])[None])
    return np.asarray(language.logits(hidden))


def test_adapter_and_merged_folder_answer_alike(run_dir, base, tmp_path):
    said = []
    trained.write_adapter(run_dir, tmp_path / "adapter")
    trained.write_merged(run_dir, tmp_path / "merged", np.float32, said.append)
    assert "of the change of the weights, 0.0%" in said[0]
    adapted, merged = load_answerer(base.folder, adapter=tmp_path / "adapter"), load_answerer(tmp_path / "merged")
    found = {path: x for path, x in flatten(adapted.params).items() if is_adapter(path)}
    of_run = flatten(read_part(run_dir, trained.PART))
    assert found.keys() == of_run.keys()
    for path, x in of_run.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    ids = np.arange(3, 40)[None]
    np.testing.assert_allclose(text_logits(adapted, ids), text_logits(merged, ids), atol=1e-3, rtol=1e-4)
    assert np.abs(text_logits(adapted, ids) - text_logits(base, ids)).max() > 1e-2


def test_run_folders_are_told_apart(run_dir, golden, tmp_path):
    assert trained.is_run(run_dir) and trained.run_config(run_dir).lora.r == 2
    with pytest.raises(RunFolderError, match="holds no checkpoint"):
        trained.is_run(tmp_path)
    full = write_run(tmp_path / "full", golden, {"x": np.zeros(2, np.float32)}, full=True)
    with pytest.raises(ValueError, match="has no adapters; export it merged"):
        trained.write_adapter(full, tmp_path / "adapter")
    with pytest.raises(ValueError, match="is the answerer's own folder"):
        trained.write_merged(run_dir, golden / "llava_video_grid")
