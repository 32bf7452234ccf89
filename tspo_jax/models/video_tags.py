"""What stands in a rendered prompt where the visual tokens of a video, or of a pair of its frames, go."""

IMAGE_TAG = "<image>"  # LLaVA-Video's, and in questions of data sets
VIDEO_TAG = "<|video_pad|>"  # Qwen's chat templates'
