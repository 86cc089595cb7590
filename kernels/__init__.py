"""One operation a folder: `api.py` validates and dispatches, `reference.py` is the specification, the rest are
implementations."""

if __name__ == "kernels":  # the project root is on sys.path: step aside for Hugging Face's package of the same name
    import importlib.util as _u
    import os as _os
    import sys as _sys
    from importlib.machinery import PathFinder as _PF

    _here = _os.path.realpath(_os.path.dirname(_os.path.dirname(_os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    _s = _PF.find_spec("kernels", [p for p in _sys.path if _os.path.realpath(p or ".") != _here])
    if _s is not None and _s.loader is not None:
        _m = _u.module_from_spec(_s)
        _sys.modules["kernels"] = _m
        _s.loader.exec_module(_m)
