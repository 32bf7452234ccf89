import pytest
from absl import flags

from tspo_jax.answering import strategy_flags


@pytest.fixture
def args(monkeypatch):
    """The flags of a command of its own."""
    values = flags.FlagValues()
    for name in ("DEFINE_enum", "DEFINE_string", "DEFINE_integer", "DEFINE_float", "DEFINE_list"):
        original = getattr(flags, name)
        monkeypatch.setattr(flags, name, lambda *a, original=original, **k: original(*a, flag_values=values, **k))
    strategy_flags.define()
    for name in ("frames", "agent", "contact_sheet", "method", "template", "suffix"):
        flags.DEFINE_string(name, "", "")
    for name, value in (("max_new_tokens", 256), ("num_frames", 16), ("window", 12)):
        flags.DEFINE_integer(name, value, "")
    return lambda *given: values(["answer", *given]) and values


def test_options(args):
    options = strategy_flags.options(args("--windows=30,6,2", "--rounds=2", "--max_captions=9", "--writer=a:b"))
    settings, writer = options["settings"], options["writer"]
    assert options["captioner"] == ""
    assert (settings.windows, settings.rounds, settings.captions, settings.writer_calls) == ((30, 6, 2), 2, 9, None)
    assert (writer.name, writer.max_new_tokens, options["calls_file"]) == ("a:b", 256, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--windows=a,b,c",), "--windows=a,b,c"),
        (("--windows=1,10,60",), "windows are"),
        (("--max_writer_calls=0",), "writer_calls is 0"),
        (("--rounds=2",), "--rounds is for --strategy=flat|backtrack"),
        (("--max_captions=9",), "--max_captions is for --strategy=flat|backtrack"),
        (("--strategy=flat", "--num_frames=16"), "looks at a whole --video: without .*--num_frames"),
        (("--strategy=flat", "--suffix=Why?"), "looks at a whole --video: without .*--suffix"),
        (("--strategy=flat", "--method=topk"), "without --frames"),
        (("--captioner=x",), "--captioner is for --strategy=flat|backtrack"),
    ],
)
def test_nonsense(args, given, message):
    with pytest.raises(ValueError, match=message):
        strategy_flags.check(args(*given))
