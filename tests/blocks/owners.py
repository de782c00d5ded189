"""Whether pools and tables agree on who owns which block."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from leankv_mlx.blocks import BlockPool, BlockTable
from leankv_mlx.codec.format import TILE


def check_owners(tables: Iterable[BlockTable], pools: Iterable[BlockPool] = ()) -> None:
    """Assert that every block has as many references as tables name it, and a place of its own.

    Args:
        tables: all that there are; one that is named twice counts once.
        pools: further ones that none of the tables may be in any more.
    """
    tables = list({id(table): table for table in tables}.values())
    found = {id(pool): pool for pool in (*pools, *(table.pool for table in tables))}
    for pool in found.values():
        named = [np.zeros(0, np.int32)]
        for table in tables:
            if table.pool is pool:
                used = np.arange(table.ids.shape[1]) < -(-table.lengths // TILE)[:, None]
                mine = table.ids[used]
                assert len(np.unique(mine)) == len(mine), "a block twice in one table"
                assert sorted(mine) == sorted(table.owned)
                named.append(mine)
        ids, counts = np.unique(np.concatenate(named), return_counts=True)
        assert pool.references(ids).tolist() == counts.tolist()
        assert pool.used == len(ids) <= pool.capacity == len(pool.array)
        places = pool.places(ids)
        assert len(np.unique(places)) == len(ids), "two blocks in one place"
        assert not len(ids) or 0 <= places.min() <= places.max() < pool.capacity
