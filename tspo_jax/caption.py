"""Says in words what videos show, with SwinBERT: a caption of a whole video, or of each stretch of it.

    python -m tspo_jax.caption --model=DIR --video=FILE|FOLDER [--stretch=10 --beams=4]
    python -m tspo_jax.caption --model=DIR --store=DIR [--video=NAME]

--model is a folder in SwinBERT's published layout (best-checkpoint/, log/args.json, tokenizer/). The captioner looks at
its number of frames, evenly from the first to the last of a stretch.

Result (stdout or --output): {"video", "captions": [{"start", "end", "caption", "confidence"}]}, times in seconds; of a
folder or a store {"videos": [..]}. Of several videos, one that cannot be read is named and left out, and the exit
status is 2.
"""

from absl import flags

from tspo_jax.answering.clip_captions import caption_video
from tspo_jax.checkpoints.swinbert_folders import load_captioner
from tspo_jax.command_line import entry_point
from tspo_jax.data.frame_store import check_side, read_settings
from tspo_jax.selection.video_source import each_readable, is_one, open_videos


def define_flags() -> None:
    flags.DEFINE_string("model", None, "Folder of SwinBERT.", required=True)
    flags.DEFINE_string("video", "", "Video file, or folder of videos; with --store, the name of a video of it.")
    flags.DEFINE_string("store", "", "Frame store, instead of video files.")
    flags.DEFINE_float("stretch", 0.0, "Seconds of a stretch; 0 = one caption of the whole video.", lower_bound=0.0)
    flags.DEFINE_integer("beams", 1, "Captions that are kept in parallel; 1 = greedy.", lower_bound=1, upper_bound=16)
    flags.DEFINE_integer("max_tokens", None, "Longest caption in tokens; default: the model's.", lower_bound=2)
    flags.DEFINE_bool("hard_mask", None, "Edges of a released sparse mask count fully or not; default: the model's.")
    flags.DEFINE_string("output", "", "JSON file to write; stdout if empty.")


def main() -> int:
    args = flags.FLAGS
    names, open_video = open_videos(args.video, args.store)
    captioner = load_captioner(args.model, hard_mask=args.hard_mask, max_caption=args.max_tokens)
    if args.store:
        check_side(args.store, read_settings(args.store), captioner.config.image_size)
    results, one = [], is_one(args.video, args.store)
    for source in each_readable(names, open_video, None):
        found = caption_video(captioner, source.timestamps, source.pictures, args.stretch, args.beams)
        results.append({"video": source.name, "captions": [caption._asdict() for caption in found]})
    entry_point.write_result(results[0] if one else {"videos": results}, args.output)
    return 0 if len(results) == len(names) else 2


if __name__ == "__main__":
    define_flags()
    entry_point.run(main)
