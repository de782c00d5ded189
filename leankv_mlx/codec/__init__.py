"""The codec: rotation, codebooks, scales and packing; pure functions of arrays."""
