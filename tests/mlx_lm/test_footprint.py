"""What masked layers will take is what their buffers take."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx import attach
from leankv_mlx.cache import CompressedKVCache
from leankv_mlx.codec.channels import Channels
from leankv_mlx.mlx_lm.attachment import make_caches
from leankv_mlx.mlx_lm.footprint import Footprint
from leankv_mlx.mlx_lm.usage import measure
from tests.models import TINY

HEADS, DIM = 2, 64
ORDER = tuple(range(DIM)), tuple(reversed(range(DIM)))
LAYERS = [Channels(ORDER, (2, 1)), Channels(ORDER, (0, 1))]


def queries(caches: list[CompressedKVCache]) -> int:
    layers = [cache.layer for cache in caches]
    return sum(x.observations.nbytes for x in layers if x and x.observations)


@pytest.mark.parametrize("kv", ["k4v4", "policy=budget,ratio=20,low=k3v2"])
def test_the_footprint_of_a_masked_model(kv: str) -> None:
    """It is what reading a prompt takes, whatever goes then."""
    model = TINY["llama"](head_dim=DIM, layers=2)
    with attach(model, kv) as attachment:
        plain = Footprint.of(model, attachment)
    with attach(model, f"{kv},mask=some", learned=LAYERS) as attachment:
        footprint = Footprint.of(model, attachment)
        assert footprint.used(4000) == plain.used(4000) and footprint.shared(4000) == 0
        caches: Any = make_caches(model)
        ids, done = mx.random.randint(0, 100, (1, 700), key=mx.random.key(0)), 0
        for size in (300, 390, *(1,) * 10):
            mx.eval(model(ids[:, done : done + size], cache=caches))
            done += size
            used = measure(caches).used - queries(caches)
            narrowed = [cache.layer.narrowed for cache in caches]
            assert narrowed == [done > 691] * 2  # the last of the prompt came by itself
            if size > 8:
                assert footprint.used(done) == used
            assert used <= footprint.most(done)
        assert used < 0.9 * footprint.used(done)
        for cache in caches:
            cache.trim(450)  # from now on positions are stored
        mx.eval(model(ids[:, :100], cache=caches))
        assert measure(caches).used - queries(caches) <= footprint.most(350)
