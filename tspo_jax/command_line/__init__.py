"""What entry points share: errors in one line, progress, shares of a job array."""
