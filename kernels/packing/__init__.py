"""Packing: rows of numbers as int8 with a scale each."""

from kvpress.kernels.packing.api import SCALE_BYTES, pack_int8

__all__ = ["SCALE_BYTES", "pack_int8"]
