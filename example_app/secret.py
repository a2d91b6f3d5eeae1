"""The key that signs session cookies. It is created once and stored in the instance folder, so that
all workers use the same key.
"""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path


def secret_key(folder: Path) -> str:
    """Return the key in ``folder``. Create it if it is missing, readable only by this user.

    Several processes can call this at once. They get the same key, because the file is created
    atomically and never changed.

    :raises OSError: if the folder is not writable.
    """
    path = folder / "secret_key"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix="secret_key.")
        try:
            with open(descriptor, "w", encoding="ascii") as file:
                file.write(secrets.token_hex(32))
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            os.unlink(temporary)
    return path.read_text("ascii")
