"""Sends callbacks to their URLs."""
