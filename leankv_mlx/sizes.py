"""Sizes as people write them; every place that takes bytes reads them here."""

from __future__ import annotations

import re
from fractions import Fraction
from math import ceil

from leankv_mlx.errors import UsageError

_FORM = re.compile(r"(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]*)")
_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {
        _letter: 1024**_power, f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power,
    }  # fmt: skip
_MOST = 2**63 - 1


def parse_bytes(text: str) -> int:
    """A number of bytes, or one with a unit: 16GB, 512MB, 1.5GiB, 64M.

    As in GNU's tools: KB, MB, GB, TB are powers of 1000; KiB, MiB, GiB, TiB, and K, M, G, T for
    short, are powers of 1024. Upper and lower case are the same. Parts of a byte count as one.

    Raises:
        UsageError: it is none of these.
    """
    found = _FORM.fullmatch(text.strip())
    unit = _UNITS.get(found[2].upper()) if found else None
    size = ceil(Fraction(found[1]) * unit) if found and unit else -1
    if not 0 <= size <= _MOST:
        raise UsageError(f"{text!r} is not a size; use bytes, or for example 64MB, 1.5GiB or 16GB.")
    return size
