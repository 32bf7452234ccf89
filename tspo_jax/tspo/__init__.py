"""Training the temporal agent: policy, rewards, programs, environment."""
