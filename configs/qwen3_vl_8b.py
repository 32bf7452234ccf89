"""The paper's hyperparameters with Qwen3-VL-8B as the frozen answerer, which reads the time of each pair of frames.

Put the checkpoint folders and the data where the fields say, or name other places on the command line. A machine
without room for 8B: `--config.answerer.folder=<Qwen3-VL-2B or 4B>`, everything else stays; or
`--config=configs/qwen3_vl_8b.py:laptop`, see llava_video_7b.py.
"""

from configs import llava_video_7b


def get_config(variant=""):
    config = llava_video_7b.get_config(variant)
    if not variant:
        config.answerer.folder = "checkpoints/Qwen3-VL-8B-Instruct"
        config.answerer.video.frame_size = (448, 800)  # about 16:9: 350 tokens for two frames
    return config
