"""What masked layers will take is what their buffers take."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from leankv_mlx import attach
from leankv_mlx.cache import CompressedKVCache, Sequence
from leankv_mlx.codec.channels import Channels
from leankv_mlx.config import CompressionConfig
from leankv_mlx.mlx_lm.attachment import Attachment
from leankv_mlx.mlx_lm.footprint import Footprint
from leankv_mlx.mlx_lm.usage import measure
from tests.models import TINY

HEADS, DIM = 2, 64
ORDER = tuple(range(DIM)), tuple(reversed(range(DIM)))
LAYERS: list[Channels | None] = [Channels(ORDER, (2, 1)), Channels(ORDER, (0, 1))]


@pytest.mark.parametrize("kv", ["leankv:k4v4", "leankv:policy=budget,ratio=20,low=k3v2"])
def test_the_footprint_of_a_masked_model(kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Attachment, "channels", property(lambda self: LAYERS))
    model, config = TINY["llama"](head_dim=DIM, layers=2), CompressionConfig.parse(kv)
    sequence = Sequence(config.policy, config.scorer)
    with attach(model, config) as attachment:
        footprint = Footprint.of(model, attachment)
        caches: Any = [CompressedKVCache(config, sequence=sequence, channels=c) for c in LAYERS]
        ids = mx.random.randint(0, 100, (700,), key=mx.random.key(0))
        done = 0
        for size in (300, 390, *(1,) * 10):
            mx.eval(model(ids[None, done : done + size], cache=caches))
            done += size
            usage = measure(caches)
            queries = sum(c.layer.observations.nbytes for c in caches if c.layer.observations)
            if size > 8:
                assert footprint.used(done) == usage.used - queries
            assert usage.used - queries <= footprint.most(done)
        for cache in caches:
            cache.trim(450)  # from now on positions are stored
        mx.eval(model(ids[None, :100], cache=caches))
        assert measure(caches).used - queries <= footprint.most(350)
        monkeypatch.undo()
        assert footprint.used(4000) < 0.7 * Footprint.of(model, attachment).used(4000)
