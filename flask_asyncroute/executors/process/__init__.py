"""Run each task in its own child process. Linux only."""
