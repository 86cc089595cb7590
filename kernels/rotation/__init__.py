"""Rotation: rotary position embedding applied to slots, or taken off."""

from kvpress.kernels.rotation.api import rotate

__all__ = ["rotate"]
