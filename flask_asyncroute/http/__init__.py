"""The HTTP endpoints that serve tasks."""
