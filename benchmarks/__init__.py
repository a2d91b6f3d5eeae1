"""What a start, a get, a stop and a list cost beside a plain view: ``python -m benchmarks``, or ``make bench``.

`prove` takes its figures from here too. Nothing of the package imports it.
"""
