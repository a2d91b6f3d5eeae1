"""Benchmarks of this package and other task queues: ``python -m benchmarks.peers``.

Each system has a module with its app factory and its worker. All systems run the same small task
behind the same route.
"""
