"""A local web page: choose a video, ask about it, see the scores over time, the frames and the answer.

    python -m tspo_jax.serve --agent=DIR [--videos=FOLDER] [--store=DIR] [--answerer=DIR] [--port=8080]

`--agent` is a TSPO folder, or a plain CLIP folder. A video of the folder is decoded and encoded when it is first asked
about, into the frame store (one for the time of the page if none is named); a second question about it, like any about
a video of the store, reads features and the shown frames from there. Questions are answered one after the other; those
that come in meanwhile wait. With --in_rounds they can be answered from captions too (docs/rounds.md): the page shows
what was looked at and why while it goes on. It is for this machine alone (127.0.0.1) unless --host says otherwise.
"""

import contextlib
import signal
import sys
import tempfile
from pathlib import Path

from absl import flags

from tspo_jax.command_line import entry_point


def define_flags() -> None:
    flags.DEFINE_string("videos", "", "Folder of videos.")
    flags.DEFINE_string("store", "", "Frame store: its videos, and where those of the folder are kept.")
    flags.DEFINE_string(
        "agent", None, "Folder of CLIP and the temporal agent, of CLIP alone, or run folder.", required=True
    )
    flags.DEFINE_string("answerer", "", "Folder of the Video-MLLM; without one, frames are chosen only.")
    flags.DEFINE_string("adapter", "", "PEFT folder of adapters for the Video-MLLM.")
    flags.DEFINE_integer("window", None, "Frames that a frame attends to; default: 12, or as --agent was trained.", 1)
    flags.DEFINE_string("detector", "", "Folder of OWL-ViT: the page can then search too (method tstar).")
    flags.DEFINE_list("targets", [], "What a search looks for; without any, the answerer names it for each question.")
    flags.DEFINE_integer("max_new_tokens", 256, "Length at which an answer is cut.", lower_bound=1)
    flags.DEFINE_bool("in_rounds", False, "Questions can also be answered from captions, with closer looks.")
    flags.DEFINE_string("host", "127.0.0.1", "Address to listen at; anyone who reaches another one may ask and upload.")
    flags.DEFINE_integer("port", 8080, "Port; 0 = any that is free.", lower_bound=0, upper_bound=65535)
    flags.DEFINE_integer("max_upload_mb", 2048, "Largest video that may be added.", lower_bound=0)


def main() -> None:
    args = flags.FLAGS
    if not args.videos and not args.store:
        raise ValueError("--videos (a folder) or --store (a frame store) is missing")
    if args.videos and not Path(args.videos).is_dir():
        raise ValueError(f"--videos: {args.videos} is no folder")
    if args.detector and not (args.targets or args.answerer):
        raise ValueError("--detector needs --targets, or an --answerer that names what to look for")
    if args.adapter and not args.answerer:
        raise ValueError("--adapter needs the --answerer that it is for")
    if args.in_rounds and not args.answerer:
        raise ValueError("--in_rounds needs an --answerer, which describes the clips")
    from tspo_jax.answering.backtracking import Settings
    from tspo_jax.answering.grounding import make_searcher
    from tspo_jax.answering.strategies import WriterOptions
    from tspo_jax.data.video_files import not_taken, videos_below
    from tspo_jax.pages.library import Library, answer_by, in_rounds_by, load
    from tspo_jax.pages.server import Server
    from tspo_jax.selection.scoring import load_scorer
    from tspo_jax.selection.search_options import SearchOptions

    folder = Path(args.videos) if args.videos else None
    if folder and (note := not_taken(folder, videos_below(folder)[1])):
        print(note, file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: a temporary store is removed
    with contextlib.ExitStack() as until_the_end:
        store = args.store or until_the_end.enter_context(tempfile.TemporaryDirectory(prefix="tspo_store_"))
        scorer = load_scorer(args.agent, args.window)
        answerer = load(args.answerer, args.adapter) if args.answerer else None
        answer = answer_by(answerer, args.max_new_tokens) if answerer else None
        searcher = None
        if args.detector:
            searcher = make_searcher(args.detector, SearchOptions(), args.targets, answerer=answerer or "")
        in_rounds = None
        if args.in_rounds:
            writer = WriterOptions(max_new_tokens=args.max_new_tokens)
            in_rounds = in_rounds_by(answerer, args.max_new_tokens, Settings(), writer)
        library = Library(folder, Path(store), scorer, answer, searcher, in_rounds)
        server = until_the_end.enter_context(Server((args.host, args.port), library, args.max_upload_mb * 2**20))
        print(f"http://{args.host}:{server.server_address[1]}/", file=sys.stderr, flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
