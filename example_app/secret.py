"""The key that signs session cookies: made once, kept in the instance folder, the same for every worker."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path


def secret_key(folder: Path) -> str:
    """Return the key in ``folder``; make it where there is none, readable by this user alone.

    Several processes may come at once: the file appears whole and never changes, so all of them get the same key.

    :raises OSError: where the folder cannot be written.
    """
    path = folder / "secret_key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, made = tempfile.mkstemp(dir=folder, prefix="secret_key.")
        try:
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            os.link(made, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(made)
    return path.read_text("ascii")
