"""The flags of method tstar, which searches a video for objects (`select_frames`, `answer`)."""

from absl import flags

from tspo_jax.selection import methods
from tspo_jax.selection.search_options import SCHEDULES, SearchOptions, objects

flags.disclaim_key_flags()  # they are flags of the command that defines them, whose --help lists them


def define() -> None:
    flags.DEFINE_string("detector", "", f"Folder of the OWL-ViT detector that --method={methods.SEARCH} searches with.")
    flags.DEFINE_list("targets", [], "Names of the objects to search for; without any, an answerer names them.")
    flags.DEFINE_list("cues", [], "Names of objects that may be near the targets.")
    flags.DEFINE_enum("schedule", "mix", SCHEDULES, "Where a search looks next.")
    flags.DEFINE_float("search_budget", SearchOptions.share, "Share of the candidates that a search may look at.")
    flags.DEFINE_float("confidence", SearchOptions.threshold, "Of a target in a frame alone, that counts as found.")
    flags.DEFINE_list("grid", list(map(str, SearchOptions.grid)), "Rows and columns of frames looked at together.")


def check(args: flags.FlagValues) -> SearchOptions:
    """How to search, where args.method is tstar. Raises ValueError for flags that do not fit, before anything is
    loaded."""
    if args.method != methods.SEARCH:
        for name in ("detector", "targets", "cues"):
            if getattr(args, name):
                raise ValueError(f"--{name} is for --method={methods.SEARCH}")
        return SearchOptions()
    if not args.detector:
        raise ValueError(f"--method={methods.SEARCH} needs a --detector: a folder of OWL-ViT")
    targets, cues = objects(args.targets, args.cues)
    if (args.targets or args.cues) and not targets:
        raise ValueError(f"--targets={','.join(args.targets)} names no object to search for")
    if not targets and not args.answerer:
        raise ValueError(f"--method={methods.SEARCH} needs --targets, or an --answerer that names them")
    if args.page:
        raise ValueError(f"--page shows an agent's scores; --method={methods.SEARCH} has none (--contact_sheet works)")
    if not all(number.strip().isdecimal() for number in args.grid):
        raise ValueError(f"--grid={','.join(args.grid)} is not rows,columns")
    return SearchOptions(args.schedule, tuple(map(int, args.grid)), args.search_budget, args.confidence)
