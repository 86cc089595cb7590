"""Packing: rows of numbers as int8 or int4 with a scale each."""

from kvpress.kernels.packing.api import pack_int4, pack_int8
from kvpress.kernels.packing.reference import SCALE_BYTES

__all__ = ["SCALE_BYTES", "pack_int4", "pack_int8"]
