"""Which videos of a frame store, and which stretches of them, show what a text says.

    python -m tspo_jax.retrieve --store=DIR --clip=DIR --query="a red ball rolls away"
    python -m tspo_jax.retrieve --store=DIR --model=DIR --query="..." --query="..." [--rerank=32]

--clip needs the features that predecode --clip makes, and nothing else; videos without them are named and left out.
--model is TESTA (a released .pth with BERT's vocab.txt in a folder) or BLIP of Hugging Face: each video is embedded
once and the result kept in the store under the model's identity; --rerank orders the likest videos anew by the head
that reads video and text together.

Result (stdout or --output): {"query", "videos": [{"video", "score", "matching", "stretches": [{"start", "end",
"score"}]}], "num_videos", "seconds"}; of several queries {"queries": [..]}. Scores are cosines, times seconds,
"seconds" that of the search, without what was computed before.
"""

import time

from absl import flags

from tspo_jax.checkpoints.folders import load_clip
from tspo_jax.checkpoints.testa_folders import load_testa
from tspo_jax.command_line import entry_point
from tspo_jax.command_line.progress_bar import described
from tspo_jax.retrieval.embeddings import ClipEmbedder, Found, Index, TestaEmbedder


def define_flags() -> None:
    flags.DEFINE_string("store", None, "Frame store that predecode made.", required=True)
    flags.DEFINE_string("clip", "", "Folder of CLIP (or of an agent with it), whose features are in the store.")
    flags.DEFINE_string("model", "", "Folder of TESTA or BLIP, instead of --clip.")
    flags.DEFINE_multi_string("query", [], "What to look for; may be given several times.")
    flags.DEFINE_integer("num_videos", 10, "How many videos are told.", lower_bound=1)
    flags.DEFINE_integer("num_stretches", 3, "How many stretches of each.", lower_bound=0)
    flags.DEFINE_float("stretch", 30.0, "Seconds of a stretch; they overlap by half.", lower_bound=0.1)
    flags.DEFINE_integer("rerank", 0, "With --model: so many videos are ordered anew by matching.", lower_bound=0)
    flags.DEFINE_integer("num_frames", None, "With --model: frames seen together; default: the model's.", lower_bound=1)
    flags.DEFINE_list("testa_r", None, "With --model: frames,patches that each block merges; default: the model's.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> None:
    args = flags.FLAGS
    if not args.query or not all(query.strip() for query in args.query):
        raise ValueError("--query is missing or empty")
    if bool(args.clip) == bool(args.model):
        raise ValueError("give either --clip or --model")
    if args.clip and (args.rerank or args.num_frames or args.testa_r):
        raise ValueError("--rerank, --num_frames and --testa_r are of --model; CLIP has no such thing")
    if args.clip:
        embedder = ClipEmbedder(args.store, load_clip(args.clip), args.stretch)
        if lost := embedder.without_features:
            told = ", ".join(lost[:3]) + (" .." if len(lost) > 3 else "")
            entry_point.note(f"not searched, without features of this CLIP (predecode --clip makes them): {told}")
    else:
        if args.testa_r is not None and not all(number.strip().isdecimal() for number in args.testa_r):
            raise ValueError(f"--testa_r={','.join(args.testa_r)}: not numbers of tokens")
        schedule = args.testa_r and [int(number) for number in args.testa_r]
        embedder = TestaEmbedder(
            args.store, load_testa(args.model, num_frames=args.num_frames, testa_r=schedule), args.stretch
        )
    names = embedder.names
    with described() as bar:
        task = bar.add_task("Embeddings", total=len(names))
        index = Index(names, embedder, lambda name: bar.advance(task))
    results = []
    for query in args.query:
        began = time.perf_counter()
        found = index.search(query, args.num_videos, args.num_stretches, args.rerank)
        seconds = time.perf_counter() - began
        results.append(
            {"query": query, "videos": [as_json(x) for x in found], "num_videos": len(names), "seconds": seconds}
        )
    entry_point.write_result(results[0] if len(results) == 1 else {"queries": results}, args.output)


def as_json(found: Found) -> dict:
    spans = [{"start": start, "end": end, "score": score} for start, end, score in found.stretches]
    return {"video": found.video, "score": found.score, "matching": found.matching, "stretches": spans}


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
