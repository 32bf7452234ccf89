"""The flags of strategies that answer in rounds (`answer --strategy=...`)."""

from absl import flags

from tspo_jax.answering.backtracking import STRATEGIES, Settings
from tspo_jax.answering.strategies import WriterOptions

DIRECT = "direct"
_OF_ROUNDS = ("captioner", "writer", "writer_model", "writer_context", "writer_timeout", "calls", "rounds", "windows")
_BUDGETS = ("captions", "writer_calls", "writer_tokens")
_OF_ONE_LOOK = ("frames", "agent", "method", "contact_sheet", "num_frames", "window", "suffix")

flags.disclaim_key_flags()  # they are flags of the command that defines them, whose --help lists them


def define() -> None:
    flags.DEFINE_enum(
        "strategy",
        DIRECT,
        [DIRECT, *STRATEGIES],
        "direct = one look at the frames; flat = captions of the whole video, one answer; backtrack = captions, and "
        "closer looks while they do not answer the question.",
    )
    flags.DEFINE_string("captioner", "", "Folder of SwinBERT that captions the clips; default: the answerer does.")
    flags.DEFINE_string("writer", "", "Who reads the captions: module:function or an http address; default: answerer.")
    flags.DEFINE_string("writer_model", "", "Model that the writer's address is asked for.")
    flags.DEFINE_integer("writer_context", 32768, "Tokens of a prompt and its reply together.", lower_bound=2)
    flags.DEFINE_float("writer_timeout", 120.0, "Seconds after which the writer is given up.")
    flags.DEFINE_string("calls", "", "File that remembers every call of a strategy; a stopped command goes on from it.")
    flags.DEFINE_integer("rounds", Settings.rounds, "backtrack: closer looks.", lower_bound=0)
    for budget in _BUDGETS:
        flags.DEFINE_integer(f"max_{budget}", None, f"Of a strategy: {budget.replace('_', ' ')} of a question at most.")
    flags.DEFINE_list("windows", list(map(str, Settings.windows)), "Seconds of a clip: coarse, fine, ultra-fine.")


def check(args: flags.FlagValues) -> None:
    """Raises ValueError for flags that make no sense, before anything is loaded."""
    options(args)
    if args.strategy == DIRECT:
        for name in (*_OF_ROUNDS, *(f"max_{budget}" for budget in _BUDGETS)):
            if args[name].present:
                raise ValueError(f"--{name} is for --strategy={'|'.join(STRATEGIES)}")
    elif any(args[name].present for name in _OF_ONE_LOOK):
        without = ", ".join(f"--{name}" for name in _OF_ONE_LOOK)
        raise ValueError(f"--strategy={args.strategy} looks at a whole --video: without {without}")


def options(args: flags.FlagValues) -> dict:
    """What strategies.answer_questions takes of them."""
    try:
        coarse, fine, ultra_fine = map(float, args.windows)
    except ValueError:
        raise ValueError(f"--windows={','.join(args.windows)} is not coarse,fine,ultra-fine in seconds") from None
    budgets = {name: getattr(args, f"max_{name}") for name in _BUDGETS}
    tokens = args.max_new_tokens
    return {
        "settings": Settings(windows=(coarse, fine, ultra_fine), rounds=args.rounds, **budgets),
        "writer": WriterOptions(args.writer, args.writer_model, args.writer_context, tokens, args.writer_timeout),
        "captioner": args.captioner,
        "calls_file": args.calls or None,
        "caption_tokens": tokens,
        "template": args.template or "",
    }
