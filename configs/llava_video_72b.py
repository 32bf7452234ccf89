"""The paper's run with LLaVA-Video-72B as the frozen answerer: 145 GB of weights, so eight devices hold one copy.

`:laptop` after the file's name is the same run on the toy world (see llava_video_7b.py).
"""

from configs import llava_video_7b


def get_config(variant=""):
    config = llava_video_7b.get_config(variant)
    if not variant:
        config.answerer.folder = "checkpoints/LLaVA-Video-72B-Qwen2"
        config.mesh.axes = (("data", -1), ("model", 8))  # 72B has 8 key and value heads
    return config
