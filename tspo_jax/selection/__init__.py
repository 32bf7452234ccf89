"""Choosing frames: methods, scoring, sources of videos."""
