"""Small files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from leankv_mlx.folders import file_name


def write_text(path: Path, text: str) -> None:
    """Replace a file; if anything fails, an older one stays as it is.

    Raises:
        OSError: it cannot be written.
    """
    target = path.resolve()  # the file behind a link, not the link
    scratch = target.parent / file_name(f".{target.name}", f".{secrets.token_hex(4)}.tmp")
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
