"""Runs the proofs, prints a line for each, and fails if one does: ``python -m prove --share 0.05``."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable

from . import (
    Broken,
    callbacks,
    crashes,
    exits,
    generated,
    guard,
    hotpath,
    interruptions,
    kills,
    lists,
    losses,
    news,
    overload,
    races,
    resume,
    soak,
    stops,
    streams,
    uploads,
    workers,
)

PROOFS: dict[str, Callable[[float], str]] = {
    "workers": workers.prove,
    "races-at-store": races.prove_at_store,
    "races-over-http": races.prove_over_http,
    "interruptions": interruptions.prove,
    "crashes": crashes.prove,
    "kills": kills.prove,
    "uploads": uploads.prove,
    "lists": lists.prove,
    "overload": overload.prove,
    "hotpath": hotpath.prove,
    "losses": losses.prove,
    "exits": exits.prove,
    "soak": soak.prove,
    "stops": stops.prove,
    "generated": generated.prove,
    "news": news.prove,
    "streams": streams.prove,
    "resume": resume.prove,
    "guard": guard.prove,
    "callbacks": callbacks.prove,
}


def main() -> int:
    """Read the command line and run what it says; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m prove", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of each count (default: %(default)s, all)")
    parser.add_argument("--only", choices=PROOFS, action="append", metavar="NAME", help=f"one of {', '.join(PROOFS)}")
    given = parser.parse_args()
    if not 0 < given.share <= 1:
        parser.error("--share is over 0 and at most 1")
    failed: list[str] = []
    chosen = given.only or list(PROOFS)
    for name in chosen:
        began = time.monotonic()
        try:
            verdict, figures = "passed", PROOFS[name](given.share)
        except Broken as broken:
            verdict, figures = "FAILED", str(broken)
        except Exception:
            verdict, figures = "FAILED", traceback.format_exc()
        if verdict == "FAILED":
            failed.append(name)
        print(f"{name:16} {verdict} {time.monotonic() - began:6.1f} s  {figures}", flush=True)
    print(f"{len(chosen) - len(failed)} passed, {len(failed)} failed{': ' * bool(failed)}{', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
