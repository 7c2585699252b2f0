"""Training flows on real data."""
