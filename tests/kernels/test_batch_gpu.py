"""The GPU kernels on several sequences at once: every composition of a batch against the reference,
which takes one after the other, and how many launches it is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.cache import CompressedKVCache, owner_of
from leankv_mlx.cache.batch import BatchedKVCache
from leankv_mlx.codec.format import Format
from leankv_mlx.codec.rotation import hadamard, rotation
from leankv_mlx.kernels import Attention, Backend, Rows, Tier, View, resolve_backend
from leankv_mlx.kernels.append import append, append_batch
from leankv_mlx.kernels.decode_attention import decode_attention_batch
from leankv_mlx.kernels.gpu import make_backend
from leankv_mlx.kernels.gpu.append import MAX_SEQUENCES
from leankv_mlx.kernels.gpu.attention import shape_of
from leankv_mlx.kernels.gpu.stored import MAX_POOLS, Stored, groups
from tests.kernels import cases, masked
from tests.kernels.cases import FACTORS, Case
from tests.kernels.matrix import chosen, every, few
from tests.msl import compiler
from tests.msl.launcher import MslLauncher

REFERENCE = resolve_backend("reference")
EXACT = (68, 1, 40, 97, 33)
BATCH: Mapping[str, Sequence[Any]] = {
    name: values for name, values in FACTORS.items() if name not in ("exact", "tiers")
} | {
    "tiers": ((1, 1), (2, 2, 2), (1, 0, 2), (0, 0, 0), (2, 1, 2, 0, 1)),
    "pools": ("one", "two", "each its own"),
}
"""`tiers` are those of each sequence."""
ROWS = cases.pairwise(BATCH)
QUICK = [cases.identify(row) for row in few(ROWS, ("tiers", "pools"))]


GPUS = [param for param in every() if param.values[0] is None or param.values[0][0] != "cpu"]


@pytest.fixture(params=GPUS)
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    yield from chosen(request.param)


def drawn(
    tiers: Sequence[int], pools: str, exact: Sequence[int] = EXACT, **row: Any
) -> tuple[mx.array, list[View], Case]:
    """Queries [B, Hq, L, D] and the views of so many sequences, and the case of the first, which
    has what they share."""
    each = [
        cases.case(**row, tiers=count, exact=rows, heads=2, blocks=2 + i % 3)
        for i, (count, rows) in enumerate(zip(tiers, exact, strict=False))
    ]
    views = [replace(case.view, sinks=min(4, case.view.sinks)) for case in each]
    if pools != "each its own":
        half = len(views) // 2 if pools == "two" else 0
        views = shared(views[:half]) + shared(views[half:])
    return mx.stack([case.queries for case in each]), views, each[0]


def shared(views: Sequence[View]) -> list[View]:
    """The same, their tiers of one format in one pool."""
    pools: dict[Format, list[mx.array]] = {}
    for tier in (tier for view in views for tier in view.tiers):
        pools.setdefault(tier.format, []).append(tier.pool)
    whole = {format: mx.concatenate(parts) for format, parts in pools.items()}
    first = dict.fromkeys(pools, 0)
    moved = []
    for view in views:
        tiers = []
        for tier in view.tiers:
            pool, table = whole[tier.format], tier.table + first[tier.format]
            first[tier.format] += tier.pool.shape[0]
            tiers.append(Tier(pool, table, tier.lengths, tier.format, tier.full))
        moved.append(replace(view, tiers=tiers))
    return moved


def attend(queries: mx.array, views: Sequence[View], case: Case, backend: Backend) -> Attention:
    assert not isinstance(case.mask, mx.array)
    found = decode_attention_batch(
        queries, views, scale=case.scale, mask=case.mask, sink_logits=case.sink_logits,
        backend=backend,
    )  # fmt: skip
    mx.eval(found)
    return found


def check(queries: mx.array, views: Sequence[View], case: Case, backend: Backend) -> None:
    ours, wanted = (attend(queries, views, case, b) for b in (backend, REFERENCE))
    allowed = cases.TOLERANCE[queries.dtype if case.rotations else mx.float32]
    for i in range(len(views)):
        assert cases.error(ours.out[i], wanted.out[i]) < allowed
        assert cases.error(ours.lse[i], wanted.lse[i]) < 2e-5
    assert (ours.reads is None) == (wanted.reads is None)
    rows = queries.shape[1] // views[0].exact.k.shape[0] * queries.shape[2]
    if ours.reads is not None and wanted.reads is not None and rows <= 8:  # in one turn
        assert mx.array_equal(ours.reads.sum(0), wanted.reads.sum(0))


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for row in ROWS
        for name in [cases.identify(row)]
    ],
)
def test_a_batch_is_its_sequences(row: dict[str, Any], backend: Backend) -> None:
    check(*drawn(**row), backend)


def plain(**more: Any) -> dict[str, Any]:
    """A small row of one format."""
    return {
        "k_bits": 4, "v_bits": 3, "dims": (64, 64), "group": 2, "new": 1, "lengths": "ragged",
        "sink_logits": False, "mask": None, "dtype": mx.float32, "rotated": True, "skip": 0.0,
    } | more  # fmt: skip


def test_a_tier_that_only_some_have_is_found_by_its_format(backend: Backend) -> None:
    """Once all tokens of a sequence were demoted its first tier is the second one of others."""
    queries, views, case = drawn((2, 2, 2), "two", **plain())
    views = [views[0], replace(views[1], tiers=views[1].tiers[1:]), views[2]]
    check(queries, views, case, backend)


def test_a_sequence_that_has_just_begun_leaves_no_values_out(backend: Backend) -> None:
    check(*drawn((0, 1, 1), "one", **plain(skip=0.3)), backend)


def test_a_rotation_that_no_kernel_knows(backend: Backend) -> None:
    queries, views, case = drawn((1, 1), "one", **plain(rotated=False))
    identities = rotation("none", 57), rotation("none", 64)
    views = [replace(view, rotations=identities) for view in views]
    check(queries[..., :57], views, replace(case, rotations=identities), backend)


def test_sequences_of_one_block_have_tables_in_constant_memory(backend: Backend) -> None:
    """As MLX declares arrays of fewer than 8 elements."""
    row = plain(tiers=1, lengths="partial")
    each = [cases.case(**row, exact=n, heads=1, blocks=1) for n in (1, 40)]
    queries = mx.stack([case.queries for case in each])
    check(queries, shared([case.view for case in each]), each[0], backend)


@pytest.mark.parametrize("old", [(68, 3), (0, 5, 96), (1, 2, 3, 4, 5, 6), (0, 0)], ids=str)
@pytest.mark.parametrize("tokens", [1, 8])
def test_rows_are_appended_to_each_sequence(
    tokens: int, old: tuple[int, ...], backend: Backend
) -> None:
    draw, heads, dims = np.random.default_rng(tokens), 2, (89, 160)
    rotations = hadamard(dims[0]), hadamard(dims[1])
    for dtype in (mx.float32, mx.bfloat16):
        exact = [
            Rows(*(cases.normal(draw, (heads, n, r.dim)).astype(dtype) for r in rotations))
            for n in old
        ]
        new = Rows(*(cases.normal(draw, (len(old), heads, tokens, d)).astype(dtype) for d in dims))
        ours, wanted = (append_batch(exact, new, rotations, b) for b in (backend, REFERENCE))
        for mine, theirs in zip(ours, wanted, strict=True):
            for x, y in zip(mine, theirs, strict=True):
                assert cases.error(x, y) < cases.TOLERANCE[dtype]
        for i, mine in enumerate(ours):  # each by itself is the same kernel
            alone = append(exact[i], Rows(*(x[i] for x in new)), rotations, backend)
            assert all(mx.array_equal(x, y) for x, y in zip(mine, alone, strict=True))


def test_rows_of_another_dtype_are_appended_too(backend: Backend) -> None:
    draw, rotations = np.random.default_rng(0), (hadamard(64), hadamard(64))
    exact = [Rows(*(mx.zeros((2, n, 64), mx.float16) for _ in "kv")) for n in (2, 0)]
    new = Rows(*(cases.normal(draw, (2, 2, 1, 64)) for _ in "kv"))
    ours, wanted = (append_batch(exact, new, rotations, b) for b in (backend, REFERENCE))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert all(cases.error(x, y) < 1e-3 for x, y in zip(mine, theirs, strict=True))


@dataclass
class Counting(MslLauncher):
    """What was launched, by name."""

    names: list[str] = field(default_factory=list)

    def __call__(self, kernel: Any, *call: Any) -> list[mx.array]:
        self.names.append(kernel.name.removeprefix("leankv_"))
        return super().__call__(kernel, *call)


@pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
@pytest.mark.parametrize(
    ("sequences", "pools", "launches"),
    [
        (1, "one", ["decode_attention", "merge_splits_1"]),
        (5, "one", ["decode_attention_1", "merge_splits_1"]),
        (3, "each its own", ["decode_attention_4", "merge_splits_1"]),
        (
            MAX_POOLS + 1,
            "each its own",
            ["decode_attention_8", "merge_splits_1", "decode_attention", "merge_splits_1"],
        ),
    ],
)
def test_launches_do_not_grow_with_the_sequences(
    sequences: int, pools: str, launches: list[str]
) -> None:
    launch = Counting()
    many = drawn((1,) * sequences, pools, EXACT[:3] * sequences, **plain(new=2, mask="causal"))
    check(*many, make_backend("counting", launch))
    assert launch.names == launches


@pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
@pytest.mark.parametrize("sequences", [1, 3])
def test_a_masked_layer_is_a_launch_for_each_number_of_kept_groups(sequences: int) -> None:
    launch = Counting()
    row = masked.ONE | {"kept": "other shares", "head_dims": (128, 128)}
    found = [masked.case(**row, blocks=1 + i) for i in range(sequences)]
    name = "decode_attention" if sequences == 1 else "decode_attention_4"
    decode_attention_batch(
        mx.stack([case.queries for case in found]), [case.view for case in found],
        scale=found[0].scale, mask="causal", sink_logits=None,
        backend=make_backend("counting", launch),
    )  # fmt: skip
    kept = {n for n in masked.groups("other shares", 128) if n}
    assert launch.names == [name] * len(kept) + [f"merge_splits_{len(kept)}"]


@pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
def test_a_launch_appends_to_few_sequences() -> None:
    launch, rotations = Counting(), (hadamard(64), hadamard(64))
    exact = [Rows(mx.zeros((1, n, 64)), mx.zeros((1, n, 64))) for n in range(MAX_SEQUENCES + 1)]
    new = Rows(mx.ones((len(exact), 1, 1, 64)), mx.ones((len(exact), 1, 1, 64)))
    found = append_batch(exact, new, rotations, make_backend("counting", launch))
    assert [rows.k.shape[1] for rows in found] == [1, 2, 3, 4, 5]
    assert launch.names == [f"append_{MAX_SEQUENCES}", "append_1"]


def test_neighbours_of_few_pools_are_a_group() -> None:
    _, views, _ = drawn((1, 1, 1), "each its own", **plain())
    a, b, c = views
    assert groups([a]) == [slice(0, 1)]
    many = list(itertools.islice(itertools.cycle([a, b, c]), 100))
    assert groups(many) == [slice(0, 100)]
    copies = [shared([view])[0] for view in [a] * MAX_POOLS]  # each in a pool of its own
    assert groups([*copies, copies[0], a, *copies]) == [
        slice(0, MAX_POOLS + 1),
        slice(MAX_POOLS + 1, 2 * MAX_POOLS + 1),
        slice(2 * MAX_POOLS + 1, 2 * MAX_POOLS + 2),
    ]


def test_sequences_of_one_length_are_spread_as_heads_and_short_ones_hardly_count() -> None:
    def shape(blocks: Sequence[int]) -> Any:
        row = plain(lengths="full", tiers=1, exact=32)
        views = [cases.case(**row, heads=2, blocks=n).view for n in blocks]
        (column,) = Stored.of(views).columns()
        return shape_of(mx.zeros((4 * len(blocks), 1, 64)), views, column, True)

    assert shape([7] * 4) == replace(shape([7]), heads=8)
    assert shape([63, 1, 1]) == replace(shape([63]), heads=3)


@pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
def test_a_batch_of_caches_decodes_in_few_launches() -> None:
    """Two sequences of one prompt and a stranger, through flushes, beside each of them alone."""
    launch, draw = Counting(), np.random.default_rng(0)
    backend = make_backend("counting", launch)

    def rows(heads: int, tokens: int, sequences: int = 1) -> mx.array:
        return cases.normal(draw, (sequences, heads, tokens, 64))

    prompts = []
    for tokens in (223, 90):
        cache = CompressedKVCache("leankv:backend=reference")
        cache._backend = backend
        cache.update_and_fetch(rows(2, tokens), rows(2, tokens))
        prompts.append(cache)
    alone = [prompts[0], prompts[0].fork(), prompts[1]]
    batch = BatchedKVCache.merge(alone)
    for step in range(12):
        queries, keys, values = rows(4, 1, 3), rows(2, 1, 3), rows(2, 1, 3)
        launch.names.clear()
        owner = owner_of(*batch.update_and_fetch(keys, values))
        assert owner is not None
        together = owner.attend(queries, scale=0.125, mask=None)
        pools = 1 if step < 10 else 2  # the stranger begins a body
        others = {"encode", "dequantize"}  # of flushes, and of arrays that nobody reads
        assert [name for name in launch.names if name not in others] == [
            "append_3",
            f"decode_attention_{pools}",
            "merge_splits_1",
        ]
        for i, cache in enumerate(alone):
            owner = owner_of(*cache.update_and_fetch(keys[i : i + 1], values[i : i + 1]))
            assert owner is not None
            out = owner.attend(queries[i : i + 1], scale=0.125, mask=None)
            assert cases.error(together[i : i + 1], out) < cases.TOLERANCE[mx.float32]
    assert [row.view().slots for row in batch.rows] == [160, 160, 32]
