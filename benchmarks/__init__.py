"""Benchmarks of start, get, stop and list requests, and of killed workers: ``python -m benchmarks``
or ``make bench``.

The stress tests use this package too. `flask_asyncroute` does not import it.
"""
