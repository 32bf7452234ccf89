"""SwinBERT and TESTA trained on toy videos of short events: captions from few and many frames, and finding a video.

    python -m benchmarks.video_text_toy run [--runs=8,32,32_sparse,testa,clip --seeds=0,1,2 --folder=runs/video_text]
    python -m benchmarks.video_text_toy table [--folder=runs/video_text]

A video lasts 33 s in 22 scenes of 1.5 s. Three of them, the first, the last and one between, show a ball beside some
thing ("a red ball in the desert"; the thing is not told), the others nothing. Frames are stored at 1 per second.

- Captions: what the event between first and last is, of the 30 s between them, from as many frames as the run's name
  says; with `32_sparse` attention between the video's tokens goes through a straight_through mask. `exact`: share of
  greedy captions of videos of no training that are right to the word; `cider`: COCO's CIDEr (pycocoevalcap).
- Retrieval: `testa` finds the videos of no training by what one of their events shows; `clip` by the mean of the toy
  CLIP's features, without any training. `recall_1`, `recall_5`: share of captions of which such a video is
  among so many first ones.

As SwinBERT's tower comes from Kinetics and TESTA's from BLIP, all runs of a model start from one that has learnt from
single scenes, the captioner then as long from 32 frames as a run is; a seed decides the order, the hidden words and the
mask's start. FOLDER holds data and runs, and
FOLDER/results.jsonl every result at once; what is there is not done again, and a stopped training goes on. `table`
prints means with Student's 95 % interval over the seeds. Needs pip install pycocoevalcap --no-deps.
"""

import argparse
import dataclasses
import json
import shutil
import time
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.streaming_toy import interval
from tspo_jax.captioning import training as captioner_training
from tspo_jax.captioning.config import CaptionData, CaptioningConfig, CaptionOptimizer, SparseMask, Words
from tspo_jax.checkpoints import weights
from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.checkpoints.swinbert_folders import SWINBERT, load_captioner, start_captioner
from tspo_jax.checkpoints.testa_folders import TESTA, load_testa
from tspo_jax.checkpoints.word_pieces import SPECIAL
from tspo_jax.command_line import entry_point
from tspo_jax.data import frame_store
from tspo_jax.data.caption_files import frames_of, read_examples
from tspo_jax.data.row_file import RowFile
from tspo_jax.models.bert import BertConfig
from tspo_jax.models.bert_captioner import BertCaptioner
from tspo_jax.models.layers import merge_params
from tspo_jax.models.testa import Testa, TestaConfig
from tspo_jax.models.timesformer import TimesformerConfig
from tspo_jax.models.video_swin import VideoSwinConfig
from tspo_jax.retrieval import training as retriever_training
from tspo_jax.retrieval.config import Contrast, RetrievalConfig, RetrievalData, RetrievalOptimizer
from tspo_jax.retrieval.embeddings import ClipEmbedder, Index, TestaEmbedder
from tspo_jax.runs.preemption import finish
from tspo_jax.toy.fitting import fresh_params
from tspo_jax.toy.scenes import World, caption, make_video_plan, render_frame, video_seed
from tspo_jax.toy.tiny_answerers import write_json

CLIP = "tspo_jax/toy/checkpoints/clip"
SIZE, PATCH = 48, 12  # pixels of a frame and of a patch
WORLD = World(
    duration=(33.0, 33.0),
    frame_rates=(Fraction(2),),
    max_scene_share=0.05,
    num_events=(3, 3),
    num_lookups=1,
    num_relations=0,
    decoys=(0, 0),
    filler_ball=0.0,
)
RUN = 600  # of toy.scenes.video_seed: no other study's videos
NUM_VIDEOS = {"train": 1600, "eval": 160}
CHECKPOINT_EVERY = 50
SCENES, EVENTS, WHOLE = "scenes", "events", "whole"  # files of captions: of single scenes, of the event between, of all


class Sizes(NamedTuple):
    """Of a training."""

    num_steps: int
    batch_size: int
    learning_rate: float

    def fields(self, seed: int) -> dict[str, int]:
        """Of the config of any training."""
        every = {"checkpoint_every": CHECKPOINT_EVERY, "keep_checkpoints": 1}
        return every | {"seed": seed, "num_steps": self.num_steps, "batch_size": self.batch_size}


SCENE_CAPTIONS, EVENT_CAPTIONS = Sizes(400, 64, 2e-3), Sizes(80, 16, 1e-3)
START_SEED = 9  # of the start's second training; no run has it
SCENE_SEARCH, WHOLE_SEARCH = Sizes(600, 64, 1e-3), Sizes(150, 16, 5e-4)
TESTA_R = (4, 2) * 4  # frames and patches that each block merges: 32 frames of 16 patches become 16 of 8


class Captions(NamedTuple):
    """A captioner's run."""

    meaning: str
    num_frames: int
    mask: str


CAPTIONERS = {
    "8": Captions("8 frames", 8, "none"),
    "32": Captions("32 frames", 32, "none"),
    "32_sparse": Captions("32 frames, straight_through", 32, "straight_through"),
}
RETRIEVERS = {"testa": "TESTA, 32 frames", "clip": "mean of CLIP's features, untrained"}


# ---- data ------------------------------------------------------------------------------------------------


def make_data(folder: Path) -> None:
    """Stores FOLDER/train and FOLDER/eval, and FOLDER/SPLIT_KIND.jsonl of each kind of captions."""
    clip = load_clip(CLIP)
    for split, count in NUM_VIDEOS.items():
        if (folder / f"{split}_{WHOLE}.jsonl").exists():
            continue
        store, rows = folder / split, {SCENES: [], EVENTS: [], WHOLE: []}
        frame_store.open_settings(store, frame_store.StoreSettings(short_side=SIZE))
        for i in range(count):
            plan, name = make_video_plan(video_seed(split, RUN, i), WORLD), f"{i:04d}"
            times = np.arange(0, plan.duration)
            frames = [clip.processor.crop(render_frame(plan, time)) for time in times]
            numbers = (times * float(plan.fps)).astype(int)
            entry = frame_store.VideoEntry(
                name, float(plan.fps), plan.num_frames, times, numbers, SIZE, SIZE, "rendered", 0, ""
            )
            jpegs = (frame_store.encode_jpeg(frame, 95) for frame in frames)
            entry = frame_store.write_frames(store, entry, jpegs)
            if split == "eval":
                frame_store.write_features(store, entry, clip.identity, [clip.image_features(frames)], clip.width)

            def row(scenes, scene, name=name, plan=plan):
                start, end = scenes[0].start, scenes[-1].end - 0.25  # the next scene's first frame is not in it
                text = caption(plan.setting, None, scene.ball)
                return {"video": name, "start": start, "end": end, "caption": text}

            events = [scene for scene in plan.scenes if scene.kind == "event"]
            nothing = next(scene for scene in plan.scenes if scene.kind == "filler")
            rows[SCENES] += [row([scene], scene) for scene in (*events, nothing)]
            rows[EVENTS].append(row(plan.scenes[1:-1], events[1]))
            rows[WHOLE] += [row(plan.scenes, scene) for scene in events]
        for kind, of_kind in rows.items():
            text = "".join(json.dumps(row) + "\n" for row in of_kind)
            frame_store.publish(folder / f"{split}_{kind}.jsonl", lambda partial, text=text: partial.write_text(text))


def write_vocabulary(folder: Path, data: Path) -> int:
    """vocab.txt of all words; returns their number, [DEC] and [ENC] of BLIP counted."""
    captions = read_examples(data / f"train_{SCENES}.jsonl")
    pieces = [*SPECIAL, "[DEC]", "[ENC]", *sorted({word for row in captions for word in row.caption.split()})]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("".join(piece + "\n" for piece in pieces))
    return len(pieces)


def bert(vocab_size: int, **other: Any) -> BertConfig:
    return BertConfig(vocab_size, 96, 2, 4, 192, 32, **other)


# ---- captions --------------------------------------------------------------------------------------------


def new_captioner(folder: Path, data: Path) -> None:
    """Writes the folder of an untrained captioner, for scenes."""
    vocab_size = write_vocabulary(folder / "tokenizer", data)
    (folder / "log").mkdir()
    args = {"max_num_frames": 2, "img_res": SIZE, "max_seq_length": 16, "max_gen_length": 16, "img_feature_dim": 96}
    swin = VideoSwinConfig(64, (2, 2), (2, 4), (8, 4, 4), (2, PATCH, PATCH), 2)
    write_json(folder / "log" / "args.json", args | {"vidswin_size": "tiny"})
    write_json(folder / "bert_config.json", dataclasses.asdict(bert(vocab_size)))
    write_json(folder / "video_swin.json", dataclasses.asdict(swin))
    config = start_captioner(folder).config
    _, params = fresh_params(lambda rngs: BertCaptioner(config, rngs=rngs), 0)
    weights.save_params(folder / "best-checkpoint", params, SWINBERT)


def with_frames(captioner: Path, num_frames: int, folder: Path) -> None:
    """Writes a captioner's folder for another number of frames: no parameter depends on it."""
    shutil.copytree(captioner, folder, dirs_exist_ok=True)
    args = folder / "log" / "args.json"
    write_json(args, json.loads(args.read_text()) | {"max_num_frames": num_frames})


def train_captioner(
    folder: Path, model: Path, captions: str, mask: str, seed: int, sizes: Sizes, run_dir: Path
) -> Path:
    config = CaptioningConfig(
        **sizes.fields(seed),
        model=str(model),
        dropout=0.0,
        data=CaptionData(str(folder / "train"), str(folder / f"train_{captions}.jsonl"), 2),
        words=Words(share=0.8),
        mask=SparseMask(mask, weight=2.0, rate=50.0),  # the default rate moves its numbers by less than 1 in 80 steps
        optimizer=CaptionOptimizer(sizes.learning_rate, swin_rate=1.0, weight_decay=0.01),
    )
    finish(captioner_training.train(config, run_dir, jax.devices()[:1]))
    return run_dir / "captioner"


def measure_captioner(folder: Path, name: str, seed: int) -> dict:
    run = CAPTIONERS[name]
    begin, run_dir = folder / "captioner_start", folder / f"{name}_{seed}"
    if not (begin / "events" / "captioner").exists():
        new_captioner(begin / "new", folder)
        of_scenes = train_captioner(folder, begin / "new", SCENES, "none", 0, SCENE_CAPTIONS, begin / "scenes")
        with_frames(of_scenes, 32, begin / "longer")
        train_captioner(folder, begin / "longer", EVENTS, "none", START_SEED, EVENT_CAPTIONS, begin / "events")
    with_frames(begin / "events" / "captioner", run.num_frames, run_dir / "start")
    made = load_captioner(
        train_captioner(folder, run_dir / "start", EVENTS, run.mask, seed, EVENT_CAPTIONS, run_dir / "run")
    )
    store, examples = frame_store.FrameStore(folder / "eval"), read_examples(folder / f"eval_{EVENTS}.jsonl")
    said = [made.caption(store.frames(row.video, frames_of(row, store)))[0] for row in examples]
    exact = np.mean([text == row.caption for text, row in zip(said, examples, strict=True)])
    found = {"exact": float(exact), "cider": cider(said, [row.caption for row in examples])}
    if run.mask != "none":
        edges = merge_params(made.graphdef, made.params).edges()
        found["open_edges"] = float(np.mean(edges >= 0.5))
    return found | {"captions": len(said), "said": said[:4]}


def cider(said: Sequence[str], right: Sequence[str]) -> float:
    """COCO's CIDEr of texts with one right text each; words are what spaces part."""
    from pycocoevalcap.cider.cider import Cider  # here: retrieval and tables need no metric

    numbers = range(len(said))
    return float(Cider().compute_score({i: [right[i]] for i in numbers}, {i: [said[i]] for i in numbers})[0])


# ---- retrieval -------------------------------------------------------------------------------------------


def new_retriever(folder: Path, data: Path) -> None:
    """Writes the folder of an untrained TESTA, for single frames."""
    vocab_size = write_vocabulary(folder, data)
    vision = TimesformerConfig(SIZE, PATCH, 64, 4, 4, 2, 1)
    config = TestaConfig(vision, bert(vocab_size, type_vocab_size=0, cross_width=vision.width), 64)
    _, params = fresh_params(lambda rngs: Testa(config, rngs=rngs), 0)
    weights.save_params(folder, params, TESTA)
    tower = dataclasses.asdict(vision)
    for name in ("merging", "frame_flag"):
        tower.pop(name)
    fields = {"model_type": "testa", "vision": tower, "text": dataclasses.asdict(config.text), "embed_dim": 64}
    write_json(folder / "config.json", fields)


def train_retriever(folder: Path, model: Path, captions: str, seed: int, sizes: Sizes, run_dir: Path, **video) -> Path:
    config = RetrievalConfig(
        **sizes.fields(seed),
        model=str(model),
        data=RetrievalData(str(folder / "train"), str(folder / f"train_{captions}.jsonl"), 2),
        contrast=Contrast(queue=0, alpha=0.0),
        optimizer=RetrievalOptimizer(sizes.learning_rate, max_grad_norm=1.0),
        **video,
    )
    finish(retriever_training.train(config, run_dir, jax.devices()[:1]))
    return run_dir / "retriever"


def measure_retriever(folder: Path, name: str, seed: int) -> dict:
    if name == "clip":
        embedder = ClipEmbedder(folder / "eval", load_clip(CLIP), WORLD.duration[1])
    else:
        begin, run_dir = folder / "retriever_start", folder / f"{name}_{seed}"
        if not (begin / "retriever").exists():
            new_retriever(begin / "new", folder)
            train_retriever(folder, begin / "new", SCENES, 0, SCENE_SEARCH, begin)
        made = train_retriever(
            folder, begin / "retriever", WHOLE, seed, WHOLE_SEARCH, run_dir, num_frames=32, testa_r=TESTA_R
        )
        embedder = TestaEmbedder(folder / "eval", load_testa(made), WORLD.duration[1])
    examples, index = read_examples(folder / f"eval_{WHOLE}.jsonl"), Index(embedder.names, embedder)
    right = {row.caption: set() for row in examples}
    for row in examples:
        right[row.caption].add(row.video)
    found = [[video.video in right[row.caption] for video in index.search(row.caption, 5)] for row in examples]
    first, any_of_five = np.mean([hits[0] for hits in found]), np.mean([any(hits) for hits in found])
    return {"recall_1": float(first), "recall_5": float(any_of_five), "queries": len(examples)}


# ---- command ---------------------------------------------------------------------------------------------


def run(folder: Path, names: Sequence[str], seeds: Sequence[int]) -> None:
    make_data(folder)
    with RowFile(folder / "results.jsonl") as file:
        for seed in seeds:
            for name in names:
                if (number := f"{name}/{seed}") not in file.rows:
                    measure, began = measure_captioner if name in CAPTIONERS else measure_retriever, time.process_time()
                    row = {"id": number, "run": name, "seed": seed} | measure(folder, name, seed)
                    file.append([row | {"processor_seconds": round(time.process_time() - began)}])
                    entry_point.note(json.dumps(file.rows[number]))


def table(rows: Sequence[dict]) -> str:
    """Means with intervals over seeds, and differences between captioners of the same seeds."""
    by_run: dict[str, dict[int, dict]] = {}
    for row in rows:
        by_run.setdefault(row["run"], {})[row["seed"]] = row
    lines = []
    for meanings, fields in ((CAPTIONERS, ("exact", "cider", "open_edges")), (RETRIEVERS, ("recall_1", "recall_5"))):
        lines += [f"| run | {' | '.join(fields)} | seeds |", "|---" * (len(fields) + 2) + "|"]
        for name in meanings:
            if of_run := by_run.get(name):
                shown = [
                    interval([r[f] for r in of_run.values()]) if f in next(iter(of_run.values())) else ""
                    for f in fields
                ]
                meaning = getattr(meanings[name], "meaning", meanings[name])
                lines.append(f"| {meaning} | {' | '.join(shown)} | {len(of_run)} |")
        lines.append("")
    for a, b in (("32", "8"), ("32_sparse", "32")):
        if seeds := by_run.get(a, {}).keys() & by_run.get(b, {}).keys():
            gains = [by_run[a][seed]["exact"] - by_run[b][seed]["exact"] for seed in sorted(seeds)]
            lines.append(f"exact, {CAPTIONERS[a].meaning} minus {CAPTIONERS[b].meaning}: {interval(gains)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "table"])
    parser.add_argument("--runs", default=",".join((*CAPTIONERS, *RETRIEVERS)))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, default=Path("runs/video_text"))
    args = parser.parse_args()
    names = args.runs.split(",")
    if unknown := set(names) - set(CAPTIONERS) - set(RETRIEVERS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join((*CAPTIONERS, *RETRIEVERS))}")
    if args.action == "run":
        run(args.folder, names, [int(seed) for seed in args.seeds.split(",")])
    else:
        with RowFile(args.folder / "results.jsonl") as file:
            print(table(list(file.rows.values())))


if __name__ == "__main__":
    main()
