"""Capture, identify and check the request that starts a task, and rebuild it for the task."""
