"""The quickstart's run with a tiny Qwen3-VL as the frozen answerer, which reads the time of each picked frame.

The model is not part of the repository; docs/other_models.md says how it is made, and what was measured.
"""

from configs import toy


def get_config():
    config = toy.get_config()
    config.answerer.folder = "toy_qwen3/qwen3_vl"
    return config
