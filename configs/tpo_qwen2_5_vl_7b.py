"""Preference training of Qwen2.5-VL-7B, with the hyperparameters of LLaVA-Video-TPO. See tpo_llava_video_7b.py."""

from configs import tpo_llava_video_7b


def get_config(variant=""):
    config = tpo_llava_video_7b.get_config(variant)
    if variant != "laptop":
        config.answerer.folder = "checkpoints/Qwen2.5-VL-7B-Instruct"
        config.answerer.video.frame_size = (392, 728)  # 16:9: 364 tokens for two frames
    return config
