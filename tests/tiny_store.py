"""A frame store of two tiny videos, questions about them, and a config that evaluates golden checkpoints on them."""

import hashlib
import json
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from video_files import write_video

from tspo_jax import config as cfg
from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.data import frame_store
from tspo_jax.data.decode import Video
from tspo_jax.evaluation import run as evaluate

LONG, SHORT = "tspo_agent.mp4", "short.mp4"  # 40 and 5 seconds


def make_store(folder: Path, golden: Path) -> Path:
    short = write_video(folder / SHORT, num_frames=125)
    return store_videos(folder / "store", {LONG: golden / LONG, SHORT: short}, golden / "tspo_agent")


def store_videos(store: Path, videos: dict[str, Path], clip_folder: Path) -> Path:
    """A store of these files by name, with features of the CLIP of a folder."""
    clip = load_clip(clip_folder)
    frame_store.open_settings(store, frame_store.StoreSettings())
    for name, path in videos.items():
        video = Video(path)
        idx = video.candidates()
        frames = list(video.frames(idx))
        entry = frame_store.VideoEntry(
            name, video.fps, video.num_frames, video.timestamps[idx], np.asarray(idx), frames[0].shape[1],
            frames[0].shape[0], video.decoder, 0, "", np.zeros(0, np.uint32),
        )  # fmt: skip
        entry = frame_store.write_frames(store, entry, (frame_store.encode_jpeg(f, 95) for f in frames))
        frame_store.write_features(store, entry, clip.identity, [clip.image_features(frames)], clip.width)
    return store


def store_lengths(folder: Path, lengths: dict[str, int]) -> frame_store.FrameStore:
    """Videos of so many frames at 1 fps, without real pictures."""
    frame_store.open_settings(folder, frame_store.StoreSettings())
    for name, T in lengths.items():
        entry = frame_store.VideoEntry(name, 1.0, T, np.arange(T) * 1.0, np.arange(T), 16, 8, "", 1, "x")
        frame_store.write_frames(folder, entry, [b"jpeg"] * T)
    return frame_store.FrameStore(folder)


def write_questions(path: Path, num: int = 12, kind: str = "general") -> Path:
    """Questions of three families, alternately about the long and the short video; every answer is B."""
    rows = [
        {
            "video": (LONG, SHORT)[i % 2],
            "original_question": f"<image>\nWhich number is shown at moment {i}?\nA. one\nB. two\nC. three\nD. four",
            "solution": "<answer>b</answer>",
            "type": kind,
            "family": ("lookup", "position", "relation")[i % 3],
            "evidence": [[i, i + 2.0]],
        }
        for i in range(num)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def make_config(golden: Path, store: Path, questions: Path):
    config = cfg.default()
    config.agent.clip = str(golden / "tspo_agent")
    config.answerer.folder = str(golden / "llava_video_grid")
    config.answerer.dtype = "float32"
    config.answerer.max_new_tokens = 2
    config.data.store = str(store)
    config.data.questions = str(questions)
    config.mesh.axes = (("data", -1), ("model", 2))
    config.evaluation.questions = str(questions)
    config.evaluation.methods = ("uniform", "clip-topk", "topk")
    config.evaluation.budgets = (4, 6)
    return config


def fake_answerer(monkeypatch, answered=None):
    """No model answers, but a hash of question and frames; (id, picks) of each goes to the list `answered`."""

    def answer(sets, items, store, answerer, config, *_):
        sets, size = list(sets), config.evaluation.batch_size
        for batch in (sets[i : i + size] for i in range(0, len(sets), size)):
            if answered is not None:
                answered.extend((s.item.id, s.picks) for s in batch)
            hashes = [hashlib.sha256(f"{s.item.id} {s.picks}".encode()).digest()[0] for s in batch]
            yield [(s, f"{'ABCD'[h % 4]}. something") for s, h in zip(batch, hashes, strict=True)]

    monkeypatch.setattr(evaluate, "answer", answer)
    monkeypatch.setattr(evaluate, "_load_answerer", lambda *_: None)
    monkeypatch.setattr(evaluate.Rollout, "of", lambda *_, **__: None)


def write_config(path: Path, config: ConfigDict) -> Path:
    """A file for --config that gives this config."""
    text = "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({!r})\n"
    path.write_text(text.format(config.to_dict()))
    return path


def needle_config(golden, folder):
    """Two steps of 4 needle questions on a (2, 4) mesh; needles, because their rewards differ within a group."""
    store, questions = make_store(folder, golden), write_questions(folder / "questions.jsonl", num=8, kind="specific")
    config = make_config(golden, store, questions)
    config.batch_size, config.num_steps, config.checkpoint_every = 4, 2, 2
    config.data.min_frames, config.data.max_frames, config.data.buckets = 0, 40, (40,)
    config.data.specific.update(k=3, group_frames=5, max_true_groups=3, distractor_groups=4, max_distractor_groups=4)
    config.policy.update(group_size=4, tau_start=0.5, tau_end=0.2)
    config.mesh.axes = (("data", 2), ("model", 4))
    return config
