"""The flags of strategies that answer in rounds (`answer --strategy=...`)."""

from absl import flags

from tspo_jax.answering.backtracking import STRATEGIES, Settings
from tspo_jax.answering.strategies import WriterOptions

DIRECT = "direct"

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
    for budget in ("captions", "writer_calls", "writer_tokens"):
        flags.DEFINE_integer(f"max_{budget}", None, f"Of a strategy: {budget.replace('_', ' ')} of a question at most.")
    flags.DEFINE_list("windows", list(map(str, Settings.windows)), "Seconds of a clip: coarse, fine, ultra-fine.")


def check(args: flags.FlagValues) -> None:
    """Raises ValueError for flags that make no sense, before anything is loaded."""
    options(args)
    for name in ("captioner", "writer", "calls"):
        if args.strategy == DIRECT and getattr(args, name):
            raise ValueError(f"--{name} is for --strategy={'|'.join(STRATEGIES)}")
    if args.strategy != DIRECT and (args.frames or args.agent or args.contact_sheet or args.method):
        raise ValueError(
            f"--strategy={args.strategy} looks at a whole --video: without --frames, --agent, --method, --contact_sheet"
        )


def options(args: flags.FlagValues) -> dict:
    """What strategies.answer_questions takes of them."""
    try:
        coarse, fine, ultra_fine = map(float, args.windows)
    except ValueError:
        raise ValueError(f"--windows={','.join(args.windows)} is not coarse,fine,ultra-fine in seconds") from None
    budgets = {name: getattr(args, f"max_{name}") for name in ("captions", "writer_calls", "writer_tokens")}
    tokens = args.max_new_tokens
    return {
        "settings": Settings(windows=(coarse, fine, ultra_fine), rounds=args.rounds, **budgets),
        "writer": WriterOptions(args.writer, args.writer_model, args.writer_context, tokens, args.writer_timeout),
        "captioner": args.captioner,
        "calls_file": args.calls or None,
        "caption_tokens": tokens,
        "template": args.template or "",
    }
