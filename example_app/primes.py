"""``POST /primes/<limit>``: counts prime numbers, as an example of processor-bound work.

The view runs in a child process, so that it does not slow down requests and can always be stopped.
"""

from __future__ import annotations

import math

from flask import Blueprint, abort

from flask_asyncroute import current_task

from .extension import async_routes

blueprint = Blueprint("primes", __name__)

MAX_LIMIT = 1_000_000_000
SEGMENT = 1_000_000


@blueprint.post("/primes/<int:limit>")
@async_routes.task(timeout=600, executor="process")
def count_primes(limit: int) -> dict[str, int | None]:
    """Count the primes up to ``limit`` in segments of a million numbers, and find the largest."""
    if limit > MAX_LIMIT:
        abort(400, f"The limit is too large; use at most {MAX_LIMIT}.")
    count, largest = 0, None
    divisors = primes_up_to(math.isqrt(limit))
    for low in current_task.track(range(0, limit + 1, SEGMENT)):
        sieve = _sieve(low, min(low + SEGMENT, limit + 1), divisors)
        count += sieve.count(1)
        if (last := sieve.rfind(1)) >= 0:
            largest = low + last
    return {"limit": limit, "count": count, "largest": largest}


def primes_up_to(limit: int) -> list[int]:
    """Return a list of the primes up to ``limit``."""
    if limit < 2:
        return []
    sieve = _sieve(0, limit + 1, primes_up_to(math.isqrt(limit)))
    return [number for number, is_prime in enumerate(sieve) if is_prime]


def _sieve(low: int, high: int, divisors: list[int]) -> bytearray:
    """Return a byte for each number in ``range(low, high)``: 1 for primes (sieve of Eratosthenes).

    :param divisors: the primes up to the square root of ``high``, in ascending order.
    """
    sieve = bytearray(b"\x01") * (high - low)
    for number in range(low, min(2, high)):
        sieve[number - low] = 0
    for divisor in divisors:
        first = max(divisor * divisor, -(-low // divisor) * divisor) - low
        if first >= len(sieve):
            if divisor * divisor >= high:
                break
            continue
        sieve[first::divisor] = bytes(len(range(first, len(sieve), divisor)))
    return sieve
