"""Which videos of a frame store, and which stretches of them, show what a text says."""
