"""The paper's hyperparameters with Qwen2.5-VL-7B as the frozen answerer.

Put the checkpoint folders and the data where the fields say, or name other places on the command line. A machine
without room for 7B: `--config.answerer.folder=<Qwen2.5-VL-3B>`, everything else stays; or
`--config=configs/qwen2_5_vl_7b.py:laptop`, see llava_video_7b.py.
"""

from configs import llava_video_7b


def get_config(variant=""):
    config = llava_video_7b.get_config(variant)
    if not variant:
        config.answerer.folder = "checkpoints/Qwen2.5-VL-7B-Instruct"
        config.answerer.video.frame_size = (392, 728)  # 16:9 as in the original's demo: 364 tokens for two frames
        config.evaluation.frame_pixels = (200_704, 235_200)  # each video's own aspect ratio, as in the published runs
    return config
