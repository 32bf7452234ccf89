import numpy as np
import pytest
import tiny_store
import tiny_testa

from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.checkpoints.testa_folders import load_testa
from tspo_jax.data import frame_store
from tspo_jax.data.frame_store import FrameStore, StoreError
from tspo_jax.retrieval import embeddings
from tspo_jax.retrieval.embeddings import ClipEmbedder, Index, VideoRows, evenly, stretches


@pytest.fixture(scope="module")
def store(golden, tmp_path_factory):
    return tiny_store.make_store(tmp_path_factory.mktemp("videos"), golden)


@pytest.fixture(scope="module")
def model(golden, tmp_path_factory):
    return load_testa(tiny_testa.make(tmp_path_factory.mktemp("model") / "testa", golden))


def test_stretches():
    times = np.arange(10.0)
    assert [part.tolist() for part in stretches(times, 4.0)] == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7], [6, 7, 8, 9]]
    assert [part.tolist() for part in stretches(times[:1], 4.0)] == [[0]]
    assert set(np.concatenate(stretches(np.array([0.0, 1.0, 50.0]), 4.0))) == {0, 1, 2}
    with pytest.raises(ValueError, match="must be positive"):
        stretches(times, 0.0)
    assert evenly(np.arange(60), 32)[-1] == 58  # floor(31 * 60 / 32): the end is seen
    assert evenly(np.arange(2), 4).tolist() == [0, 0, 1, 1]


def test_clip_alone(store, golden):
    clip = load_clip(golden / "tspo_agent")
    embedder = ClipEmbedder(store, clip, 10.0)
    rows, times = embedder.video(tiny_store.LONG)
    features = FrameStore(store, clip.identity).features(tiny_store.LONG)
    features = features / np.linalg.norm(features, axis=1, keepdims=True)
    mean = features.mean(0)
    np.testing.assert_allclose(rows[0], mean / np.linalg.norm(mean), atol=1e-6)
    assert (times[0, 0], len(rows)) == (times[1, 0], len(times))
    found = Index(embedder.names, embedder).search("a red ball", 2, 2)
    assert {x.video for x in found} == {tiny_store.LONG, tiny_store.SHORT} and found[0].score >= found[1].score
    assert all(x.stretches[0][2] >= x.stretches[-1][2] for x in found)


def test_testa_keeps_what_it_computed(store, model, monkeypatch):
    embedder = embeddings.TestaEmbedder(store, model, 10.0)
    assert not embedder.has(tiny_store.LONG)
    first = Index(embedder.names, embedder).search("a red ball", 2, rerank=2)
    assert all(x.matching is not None for x in first)
    assert first[0].score + first[0].matching >= first[1].score + first[1].matching

    def refuse(self, clips):
        raise AssertionError("computed again")

    monkeypatch.setattr(type(model), "video_features", refuse)
    again = embeddings.TestaEmbedder(store, model, 10.0)
    assert again.has(tiny_store.LONG)
    assert Index(again.names, again).search("a red ball", 2, rerank=2) == first
    with pytest.raises(AssertionError, match="computed again"):
        embeddings.TestaEmbedder(store, model, 11.0).video(tiny_store.LONG)


def test_damaged_and_foreign(store, model):
    embedder = embeddings.TestaEmbedder(store, model, 7.0)
    embedder.video(tiny_store.SHORT)
    path = next((store / "embeddings").glob("*-7/*.npz"))
    whole = path.read_bytes()
    with np.load(path) as kept:
        other = dict(kept)
    with path.open("wb") as file:
        np.savez(file, **(other | {"frames_crc32": 1}))
    assert not embedder.has(tiny_store.SHORT)  # of other frames: made again
    path.write_bytes(whole[:100])
    with pytest.raises(StoreError, match="damaged"):
        embedder.video(tiny_store.SHORT)
    with pytest.raises(ValueError, match="no video to search"):
        Index([], embedder)


def test_a_store_of_smaller_frames_than_the_model_sees(model, tmp_path):
    frame_store.open_settings(tmp_path, frame_store.StoreSettings(short_side=15))
    with pytest.raises(StoreError, match="shorter side of 15 pixels, the model sees 16; make a store with"):
        embeddings.TestaEmbedder(tmp_path, model, 10.0)


def test_ranking_is_exact():
    """Against a full sort, on embeddings whose order is known."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(500, 16)).astype(np.float32)
    table /= np.linalg.norm(table, axis=1, keepdims=True)

    class Known:
        def texts(self, texts):
            return np.tile(table[7], (len(texts), 1))

        def video(self, name):
            return VideoRows(table[int(name)][None].repeat(2, 0), np.zeros((2, 2)))

    found = Index([str(i) for i in range(500)], Known()).search("x", 20)
    expected = np.argsort(-(table @ table[7]), kind="stable")[:20]
    assert [int(x.video) for x in found] == expected.tolist() and found[0].video == "7"
