"""Executors run tasks. `base` is their interface; `registry` lists the implementations."""
