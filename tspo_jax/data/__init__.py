"""From video files and question files to batches."""
