"""All operations of a GPU backend."""

from leankv_mlx.codec.format import TILE
from leankv_mlx.kernels.gpu.append import Append
from leankv_mlx.kernels.gpu.attention import DecodeAttention
from leankv_mlx.kernels.gpu.dequantize import Dequantize
from leankv_mlx.kernels.gpu.encode import Encode
from leankv_mlx.kernels.gpu.launch import MAX_GROUPS, Launcher
from leankv_mlx.kernels.gpu.repack import Repack
from leankv_mlx.kernels.prefill_attention import prefill_attention_ops
from leankv_mlx.kernels.types import Backend


def make_backend(name: str, launch: Launcher) -> Backend:
    """The operations, launched by `launch`."""
    dequantize, attention, append = Dequantize(launch), DecodeAttention(launch), Append(launch)
    return Backend(
        name=name,
        encode=Encode(launch),
        dequantize=dequantize,
        decode_attention=attention,
        prefill_attention=prefill_attention_ops,
        gather=dequantize.gather,
        append=append,
        repack=Repack(launch),
        decode_attention_batch=attention.batch,
        append_batch=append.batch,
        widest=TILE * MAX_GROUPS,
    )
