"""A TESTA folder of the golden model's weights, for tests that need one to call."""

import json
import shutil
from pathlib import Path

from safetensors import safe_open

WORDS = ["a", "red", "ball", "man", "dog", "runs", "rolls", "blue", "door", "opens", "who", "what", "is", "in", "the"]


def make(folder: Path, golden: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(golden / "testa_retrieval.safetensors", folder / "model.safetensors")
    with safe_open(golden / "testa_retrieval.safetensors", "numpy") as file:
        fields = json.loads(file.metadata()["config"])
    config = {name: fields[name] for name in ("vision", "text", "embed_dim")}
    config |= {"model_type": "testa", "testa_r": fields["r"], "answers": True}
    (folder / "config.json").write_text(json.dumps(config))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    pieces += [f"[unused{i}]" for i in range(fields["text"]["vocab_size"] - 2 - len(pieces))]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    return folder
