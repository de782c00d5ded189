"""What the machine has."""

import os

import mlx.core as mx


def memory_size() -> int:
    """Bytes of memory that this machine has for models."""
    size = mx.device_info().get("memory_size")
    if isinstance(size, int) and size > 0:
        return size
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def on_cpu() -> bool:
    """Whether MLX computes on the CPU."""
    return bool(mx.default_device().type == mx.DeviceType.cpu)
