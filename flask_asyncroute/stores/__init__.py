"""Task stores: the interfaces `base` and `outbox`, their implementations, and `registry`.

Only `lifecycle` changes the State of tasks; any module may read a store.
"""
