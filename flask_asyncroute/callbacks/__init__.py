"""Callbacks: what a start makes of a `Callback`, the guard against inside addresses, and the sender of the outbox.

`dispatcher` has them resolved, `runner` has them sent. The lifecycle reaches none of this but by signal.
"""
