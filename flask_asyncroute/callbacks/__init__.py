"""Define and check callbacks. No module here uses the Flask request or the store."""
