"""SwinBERT (arXiv 2111.13196) learns to say what stretches of stored videos show."""
