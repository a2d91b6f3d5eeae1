"""Executors run tasks: `base` is their interface, and `registry` lists the implementations."""
