"""What the parity matrix does not vary: strategies from code to value, orders of threads for
repack, arrays so small that MLX puts them into constant memory."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from leankv_mlx.codec.rotation import hadamard
from leankv_mlx.kernels import Rows
from leankv_mlx.kernels.append import append_ops
from leankv_mlx.kernels.decode_attention import decode_attention_ops
from leankv_mlx.kernels.gpu.append import Append
from leankv_mlx.kernels.gpu.attention import DecodeAttention
from leankv_mlx.kernels.gpu.geometry import Geometry
from leankv_mlx.kernels.gpu.repack import Repack
from leankv_mlx.kernels.repack import repack_ops
from tests.kernels import cases
from tests.msl import compiler
from tests.msl.dispatch import FORWARD, RANDOM, REVERSE, Run
from tests.msl.launcher import STRATEGIES, MslLauncher

pytestmark = pytest.mark.skipif(compiler.compiler() is None, reason="needs clang or ziglang, Linux")
BITS = [2, 3, 4, 8, cases.MIXED]


@pytest.mark.parametrize("kept", [1, 32, 77])
@pytest.mark.parametrize("bits", BITS)
def test_repack_moves_slots_bit_for_bit(bits: int, kept: int) -> None:
    draw = np.random.default_rng(kept)
    groups = cases.bits_of(bits, 96, 0), cases.bits_of(bits, 160, 1)
    body = cases.body(draw, *groups, heads=2, blocks=3, lengths="full")
    index = draw.integers(-1, 96, (2, kept)).astype(np.int32)
    for order in (FORWARD, REVERSE, RANDOM):
        ours = Repack(MslLauncher(run=Run(order=order)))(body, mx.array(index))
        assert mx.array_equal(ours, repack_ops(body, mx.array(index)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("bits", BITS)
def test_every_strategy_gives_the_same_values(bits: int, strategy: int) -> None:
    case = cases.case(
        k_bits=bits, v_bits=bits, dims=(160, 160), group=2, new=1, lengths="partial", tiers=1,
        exact=5, sink_logits=False, mask=None, dtype=mx.float32, rotated=False, heads=2,
    )  # fmt: skip
    launch = MslLauncher(strategy, spread=Geometry(2, 2, 2))
    outs = [case.attend(op) for op in (DecodeAttention(launch), decode_attention_ops)]
    assert cases.error(outs[0].out, outs[1].out) < 2e-5
    assert cases.error(outs[0].lse, outs[1].lse) < 2e-5


def test_arrays_of_fewer_than_8_elements_lie_in_constant_memory() -> None:
    """MLX then declares another kind of pointer: a model with one head of 4 channels."""
    draw = np.random.default_rng(0)
    rotations = hadamard(4), hadamard(4)
    launch = MslLauncher()
    none = Rows(*(mx.zeros((1, 0, 32), mx.float32) for _ in range(2)))
    new = Rows(*(cases.normal(draw, (1, 1, 4)) for _ in range(2)))
    exact = Append(launch)(none, new, rotations)
    for ours, reference in zip(exact, append_ops(none, new, rotations), strict=True):
        assert cases.error(ours, reference) < 1e-6
    case = cases.Case(new.k, [], exact, None, 1.0, 0, None, mx.array([0.3]), rotations)
    outs = [case.attend(op) for op in (DecodeAttention(launch), decode_attention_ops)]
    assert cases.error(outs[0].out, outs[1].out) < 1e-6
    assert cases.error(outs[0].lse, outs[1].lse) < 1e-6
