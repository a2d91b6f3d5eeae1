"""Send callbacks to their URLs."""
