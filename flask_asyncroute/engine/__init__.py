"""Starts and stops tasks, writes their State, and notifies subscribers."""
