"""Sizes as people write them."""

from __future__ import annotations

import re

from leankv_mlx.errors import UsageError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def parse_bytes(text: str) -> int:
    """16GB, 512MB, 1.5GiB or a number of bytes.

    Raises:
        UsageError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in _UNITS:
        raise UsageError(f"'{text}' is not a size; use for example 16GB.")
    return int(float(found[1]) * _UNITS[found[2].upper()])
