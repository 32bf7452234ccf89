"""Prompts, rollout, batched answers about stored videos."""
