"""A tiny store with questions, and the config of an evaluation of them."""

import pytest
import tiny_store


@pytest.fixture(scope="module")
def folder(tmp_path_factory, golden):
    folder = tmp_path_factory.mktemp("evaluation")
    tiny_store.make_store(folder, golden)
    tiny_store.write_questions(folder / "questions.jsonl")
    return folder


@pytest.fixture
def config(golden, folder):
    return tiny_store.make_config(golden, folder / "store", folder / "questions.jsonl")
