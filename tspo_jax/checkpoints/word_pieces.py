"""BERT's word pieces from a vocab.txt, as BLIP, TESTA and SwinBERT read and write text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from tspo_jax.checkpoints.plain_folders import CheckpointError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPieces:
    """Text <-> ids. `vocab.txt` has one piece a line, its number is the line's.

    Args:
      further: tokens behind those of the file, e.g. BLIP's [DEC] and [ENC].
      lowercase: as the published English models.
    Raises: CheckpointError where the file or one of SPECIAL is missing.
    """

    def __init__(self, folder: str | Path, further: Sequence[str] = (), lowercase: bool = True):
        path = Path(folder) / "vocab.txt"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file; BERT's vocabulary (bert-base-uncased's vocab.txt) belongs there"
            )
        pieces = path.read_text(encoding="utf-8").splitlines()
        pieces += [piece for piece in further if piece not in pieces]
        self._number = {piece: i for i, piece in enumerate(pieces)}
        if len(self._number) < len(pieces):
            raise CheckpointError(f"{path}: holds a piece twice")
        if lost := [name for name in (*SPECIAL, *further) if name not in self._number]:
            raise CheckpointError(f"{path}: lacks {', '.join(lost)}")
        self._tokenizer = Tokenizer(models.WordPiece(self._number, unk_token="[UNK]", max_input_chars_per_word=100))
        self._tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._tokenizer.decoder = decoders.WordPiece(cleanup=False)
        self._is_special = np.zeros(len(pieces), bool)
        self._is_special[[self._number[name] for name in (*SPECIAL, *further)]] = True

    def __len__(self) -> int:
        return len(self._number)

    def __getitem__(self, piece: str) -> int:
        """The id of a piece, KeyError where there is none."""
        return self._number[piece]

    def encode(self, text: str) -> list[int]:
        """Ids without any special token."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text up to the first [SEP], special tokens left out."""
        ids = [int(i) for i in ids]
        if (end := self["[SEP]"]) in ids:
            ids = ids[: ids.index(end)]
        return self._tokenizer.decode([i for i in ids if not self._is_special[i]], skip_special_tokens=False)

    def batch(self, texts: Sequence[str], first: str, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`first`, the text, [SEP], padding: ids int32 [B, length] and their mask. A text that is too long is cut."""
        ids = np.full((len(texts), length), self["[PAD]"], np.int32)
        mask = np.zeros(ids.shape, np.int32)
        for row, counts, text in zip(ids, mask, texts, strict=True):
            tokens = [self[first], *self.encode(text)[: length - 2], self["[SEP]"]]
            row[: len(tokens)], counts[: len(tokens)] = tokens, 1
        return ids, mask
