import dataclasses
import json

import numpy as np
import pytest
from tiny_streams import save_encoder

from tspo_jax.checkpoints import adapters, weights
from tspo_jax.checkpoints.folders import load_answerer
from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.models.lora import LoraConfig
from tspo_jax.streaming import folders


@pytest.fixture(scope="module")
def answerer(golden):
    return load_answerer(golden / "llava_video_grid")


def test_written_and_read(answerer, tmp_path):
    """A run folder means the encoder in it; other weights are another identity."""
    save_encoder(tmp_path / folders.IN_RUN, answerer)
    one, other = folders.load(tmp_path, answerer), folders.load(save_encoder(tmp_path / "b", answerer, 1), answerer)
    assert one.config == other.config and one.identity != other.identity
    save_encoder(tmp_path / "again", answerer)
    again = folders.load(tmp_path / "again", answerer)
    assert again.identity == one.identity
    for path, leaf in weights.flatten(one.params).items():
        np.testing.assert_array_equal(leaf, weights.flatten(again.params)[path])


def test_encoders_that_are_refused(golden, answerer, tmp_path):
    folder = save_encoder(tmp_path / "encoder", answerer)
    other = load_answerer(golden / "llava_video_one_token")
    with pytest.raises(CheckpointError, match="was trained with the answerer"):
        folders.load(folder, other)
    with pytest.raises(CheckpointError, match="no streaming encoder"):
        folders.load(golden / "llava_video_grid", answerer)
    record = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(record | {"width": 32}))
    with pytest.raises(CheckpointError, match="not as config.json says"):
        folders.load(folder, answerer)


def test_adapters_are_part_of_the_answerer(answerer, tmp_path):
    """An encoder that saw with adapters is refused without them, and the other way round."""
    graphdef, abstract = adapters.add(answerer.graphdef, answerer.params, LoraConfig(r=2))
    params = adapters.beside(answerer.params, adapters.fresh(abstract, seed=0))
    tuned = dataclasses.replace(answerer, graphdef=graphdef, params=params)
    for trained_with, used_with in ((tuned, answerer), (answerer, tuned)):
        folder = save_encoder(tmp_path / str(used_with is tuned), trained_with)
        folders.load(folder, trained_with)
        with pytest.raises(CheckpointError, match="was trained with the answerer"):
            folders.load(folder, used_with)


def test_answerers_of_another_family(answerer):
    with pytest.raises(ValueError, match="must be of that family"):
        folders.check_answerer(dataclasses.replace(answerer, config=object()))
