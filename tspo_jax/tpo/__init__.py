"""TPO (arXiv 2501.13919): the answering Video-MLLM learns from pairs of its own answers."""
