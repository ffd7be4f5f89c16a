"""``crem demo``: every job once, on the embedded corpus."""
