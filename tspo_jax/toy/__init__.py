"""The synthetic world of the quickstart: real videos of short scenes, questions about them, and tiny checkpoints."""
