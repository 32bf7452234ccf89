"""VideoStreaming: training its encoder, and streams as they come."""
