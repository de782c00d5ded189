from __future__ import annotations

import pytest

from leankv_mlx.errors import UsageError
from leankv_mlx.sizes import parse_bytes


def test_sizes() -> None:
    assert parse_bytes("16GB") == 16 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    assert parse_bytes("1024") == 1024
    for text in ("", "GB", "16 bananas", "-1GB"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_bytes(text)
