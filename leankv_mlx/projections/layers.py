"""MLX's quantized layers while their weights lie in the layout of `weight`.

A layer stays the object that it is: its class becomes one of these and its arrays one `Weight`.
As a dict, which every module is, it still shows MLX's arrays: whoever reads one (a listing of the
parameters, a save, a merge of adapters) gets it made, bit for bit. Whoever sets one gives the layer
MLX's arrays back, and it is relaid when it is used next.
"""

from __future__ import annotations

from collections.abc import Iterator
from copyreg import __newobj__  # type: ignore[attr-defined]
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
from mlx import nn

from leankv_mlx.projections.inputs import Input, Inputs, products
from leankv_mlx.projections.weight import Weight, relay, restore, rows

ARRAYS = ("weight", "scales", "biases")
"""Of an affine layer, in the order of `relay`."""

_HALF = (mx.float16, mx.bfloat16)


class Home(Protocol):
    """What all layers of a model share."""

    @property
    def inputs(self) -> Inputs | None:
        """What is done with inputs now."""


@dataclass
class Held:
    """What a relaid layer has in place of MLX's arrays.

    Attributes:
        weight: None while the layer has MLX's arrays.
        scales: dtype of MLX's scales and biases; those of `weight` may be narrower.
        dtype: what MLX's product with an input of at most this dtype gives.
        at: which input of the model it multiplies, if that is known.
    """

    home: Home
    at: Input | None
    weight: Weight | None = None
    scales: mx.Dtype = mx.float32
    dtype: mx.Dtype = mx.float32


class Relaid(nn.Module):
    """What both kinds of layers have; `held` is a plain attribute, no parameter."""

    held: Held

    def relaid(self) -> Weight:
        """The weight."""
        return self.held.weight or self._take()

    def _take(self) -> Weight:
        arrays = [dict.__getitem__(self, name) for name in ARRAYS]
        self.hold(_weight(arrays, self.group_size, self.bits), arrays[1].dtype)
        assert self.held.weight is not None
        return self.held.weight

    def hold(self, weight: Weight, scales: mx.Dtype) -> None:
        """Have this weight in place of MLX's arrays.

        Args:
            scales: dtype of MLX's scales.
        """
        for name in ARRAYS:
            dict.pop(self, name)
        bias = dict.get(self, "bias")
        self.held.weight, self.held.scales = weight, scales
        self.held.dtype = scales if bias is None else mx.result_type(scales, bias.dtype)

    def put_back(self, arrays: dict[str, mx.array] | None = None) -> None:
        """Have MLX's arrays again.

        Args:
            arrays: these, which are what `shown` gave.
        """
        if self.held.weight is not None:
            for name, array in (arrays or self.shown()).items():
                dict.__setitem__(self, name, array)
            self.held.weight = None

    def shown(self) -> dict[str, mx.array]:
        """MLX's arrays, made of the weight (lazily); empty while the layer has them itself."""
        if self.held.weight is None:
            return {}
        codes, scales, biases = restore(self.held.weight)
        made = (codes, scales.astype(self.held.scales), biases.astype(self.held.scales))
        return dict(zip(ARRAYS, made, strict=True))

    def _input(self, x: mx.array) -> mx.array:
        dtype = self.held.dtype
        return x if x.dtype == dtype else x.astype(mx.result_type(x.dtype, dtype))

    # The dict that a module is.

    def __contains__(self, key: object) -> bool:
        return key in ARRAYS or super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        shown = self.shown() if key in ARRAYS else {}
        return shown[key] if shown else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        shown = self.shown() if key in ARRAYS else {}
        return shown[key] if shown else super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if key in ARRAYS:
            self.put_back()
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.put_back()
        super().__delitem__(key)

    def pop(self, key: str, *default: Any) -> Any:
        if key in ARRAYS:
            self.put_back()
        return super().pop(key, *default)

    def items(self) -> Any:
        return {**self.shown(), **dict(super().items())}.items()

    def keys(self) -> Any:
        return dict(self.items()).keys()

    def values(self) -> Any:
        return dict(self.items()).values()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self.keys())

    def children(self) -> dict[str, Any]:
        """None, told without making the arrays."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is a layer of MLX."""
        state = {name: value for name, value in vars(self).items() if name != "held"}
        return __newobj__, (PLAIN[type(self)],), state, None, iter(self.items())


class RelaidLinear(Relaid, nn.QuantizedLinear):
    """`QuantizedLinear`: [..., K] -> [..., N]."""

    def __call__(self, x: mx.array) -> mx.array:
        held, weight = self.held, self.relaid()
        biases = [dict.get(self, "bias")]
        return products(held.home.inputs, held.at, self._input(x), [weight], biases=biases)[0]


class RelaidEmbedding(Relaid, nn.QuantizedEmbedding):
    """`QuantizedEmbedding`, also as a head."""

    def __call__(self, x: mx.array) -> mx.array:
        return rows(self.relaid(), x, self.held.scales)

    def as_linear(self, x: mx.array) -> mx.array:
        held, weight = self.held, self.relaid()
        return products(held.home.inputs, held.at, self._input(x), [weight])[0]


RELAID: dict[type[nn.Module], type[Relaid]] = {
    nn.QuantizedLinear: RelaidLinear,
    nn.QuantizedEmbedding: RelaidEmbedding,
}
"""Classes that are relaid, and what they become; a subclass may compute differently."""
PLAIN = {relaid: plain for plain, relaid in RELAID.items()}
"""Back again."""


def _weight(arrays: list[mx.array], group: int, bits: int) -> Weight:
    """The weight of a layer's arrays, evaluated.

    Scales and biases that fit 16 bits exactly are held in 16 bits, because their bytes are read at
    every step: a layer that was made float32 for its inputs has such.
    """
    codes, scales, biases = arrays
    half = next((d for d in _HALF if _fits(scales, d) and _fits(biases, d)), scales.dtype)
    weight = relay(codes, scales.astype(half), biases.astype(half), group, bits)
    mx.eval(weight.codes, weight.scales, weight.biases)
    return weight


def _fits(array: mx.array, dtype: mx.Dtype) -> bool:
    return array.dtype == dtype or bool(
        mx.array_equal(array.astype(dtype).astype(array.dtype), array)
    )
