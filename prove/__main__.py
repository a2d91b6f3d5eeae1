"""Runs the proofs: ``python -m prove --share 0.05`` does a twentieth of each."""

from __future__ import annotations

import argparse
import sys
import time
import traceback

from . import interruption, races, workers

PROOFS = {"workers": workers.prove, "races": races.prove, "interruption": interruption.prove}


def main() -> int:
    """Run each proof, print its figures, and return how many failed."""
    parser = argparse.ArgumentParser(prog="python -m prove", description=__doc__)
    parser.add_argument("--share", type=float, default=1.0, help="of the full counts (default: %(default)s)")
    parser.add_argument("--only", choices=sorted(PROOFS), help="this proof alone")
    given = parser.parse_args()
    failed = 0
    chosen = {name: proof for name, proof in PROOFS.items() if given.only in (None, name)}
    for name, proof in chosen.items():
        began = time.monotonic()
        try:
            for line in proof(given.share):
                print(f"{name}: {line}", flush=True)
        except Exception:
            failed += 1
            traceback.print_exc()
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return failed


sys.exit(main())
