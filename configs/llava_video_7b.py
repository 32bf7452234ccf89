"""The paper's run: TSPO-10K, CLIP ViT-L/14, LLaVA-Video-7B frozen; 10,000 questions once each in 625 steps.

Put the checkpoint folders and the data where the fields say, or name other places on the command line. A machine
without room for 7B: `--config.answerer.folder=<LLaVA-Video with 0.5B>`, everything else stays.
"""

from tspo_jax.config import default


def get_config():
    config = default()  # the paper's hyperparameters
    config.agent.clip = "checkpoints/clip-vit-large-patch14"
    config.answerer.folder = "checkpoints/LLaVA-Video-7B-Qwen2"
    config.answerer.max_new_tokens = 16  # the answer is a letter; the original waits for up to 256 tokens
    config.data.store = "data/tspo_10k/frames"
    config.data.questions = "data/tspo_10k/tspo_10k.jsonl"
    config.mesh.axes = (("data", -1), ("model", 4))  # 7B has 4 key and value heads
    return config
