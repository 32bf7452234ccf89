"""A run on disk, its log and estimates, and the training loop of every trainer."""
