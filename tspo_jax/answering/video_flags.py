"""The flags of what a Video-MLLM is told and shown of a video (VideoOptions)."""

from absl import flags

from tspo_jax.models.video_prompt import DEFAULT_VIDEO, NEXT_POSITION_RULES, VideoOptions

flags.disclaim_key_flags()  # they are flags of the command that defines them, whose --help lists them


def define() -> None:
    flags.DEFINE_list("frame_size", [], "Qwen: height,width of every frame; near its own if empty.")
    flags.DEFINE_float(
        "second_per_grid",
        DEFAULT_VIDEO.second_per_grid,
        "Qwen: seconds of a pair of frames, as if evenly spaced; 0 = the frames' own times (1 where nobody knows).",
        lower_bound=0,
    )
    flags.DEFINE_enum(
        "next_position",
        DEFAULT_VIDEO.next_position,
        NEXT_POSITION_RULES,
        "Qwen2.5-VL: text goes on after_all positions of the video (transformers 4), or after_space (5).",
    )
    flags.DEFINE_bool(
        "outer_markers",
        DEFAULT_VIDEO.outer_markers,
        "Qwen3-VL: markers around the whole video too (transformers since 5.10), not only around pairs of frames.",
    )
    flags.DEFINE_bool(
        "time_instruction", False, "LLaVA-Video: a sentence with the video's length and the frames' times."
    )
    flags.DEFINE_list("merge", [], "LLaVA-Video, Qwen2.5-VL: frames,patches merged away before the language model.")


def options(args: flags.FlagValues) -> VideoOptions:
    """Raises ValueError for flags that are no numbers."""
    return VideoOptions(
        _numbers("frame_size", args.frame_size, "height,width in pixels"),
        args.second_per_grid,
        args.next_position,
        args.outer_markers,
        args.time_instruction,
        _numbers("merge", args.merge, "frames,patches to merge away"),
    )


def _numbers(name: str, given: list[str], meaning: str) -> tuple[int, ...]:
    if not all(number.strip().isdecimal() for number in given):
        raise ValueError(f"--{name}={','.join(given)} is not {meaning}")
    return tuple(map(int, given))
