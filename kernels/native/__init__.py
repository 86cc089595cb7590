"""The compiled CPU kernels: C++17 and OpenMP, no torch headers; a machine without a compiler installs without them.

torch must be loaded before the extension: its OpenMP runtime then serves both, with one pool of threads.
"""

from __future__ import annotations

import logging
from types import ModuleType

import torch  # noqa: F401  # before the extension, see above

logger = logging.getLogger("kvpress.kernels")

extension: ModuleType | None
try:
    from kvpress.kernels.native import _native

    extension = _native
    missing = None
except ImportError as error:
    extension = None
    missing = f"the native kernels are not built ({error}); reinstall with a C++17 compiler at hand"
    logger.warning("%s: CPU operations run on torch alone", missing)

__all__ = ["extension", "missing"]
