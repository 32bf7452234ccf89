import numpy as np
import pytest

from tspo_jax.checkpoints.plain_folders import CheckpointError
from tspo_jax.checkpoints.word_pieces import WordPieces

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "ball", "##s", "roll", "##ing", ",", "a"]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    return tmp_path


def test_hugging_face(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, do_lower_case=True)
    ours = WordPieces(folder)
    for text in ("A red ball, rolling", "balls", "Réd  BALLS rollings ,,", "", "a" * 101):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False), text


def test_round_trip(folder):
    pieces = WordPieces(folder, ("[DEC]", "[ENC]"))
    assert (pieces["[DEC]"], pieces["[ENC]"], len(pieces)) == (12, 13, 14)
    ids, mask = pieces.batch(["A red ball rolling", "balls", ""], "[ENC]", 6)
    np.testing.assert_array_equal(ids[0], [13, 11, 5, 6, 8, 3])  # cut in front of [SEP]
    np.testing.assert_array_equal(ids[1], [13, 6, 7, 3, 0, 0])
    np.testing.assert_array_equal(mask.sum(1), [6, 4, 2])
    assert pieces.decode([2, 5, 6, 7, 3, 5]) == "red balls"
    assert pieces.decode([2, 3]) == ""


def test_wrong_files(tmp_path):
    with pytest.raises(CheckpointError, match="vocab.txt: no such file"):
        WordPieces(tmp_path)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\na\n")
    with pytest.raises(CheckpointError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        WordPieces(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*PIECES, "a"]))
    with pytest.raises(CheckpointError, match="twice"):
        WordPieces(tmp_path)
