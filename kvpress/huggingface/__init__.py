"""For transformers' own ways: `model.generate(..., custom_generate=CUSTOM_GENERATE, policy="snapkv", budget=1024, trust_remote_code=True)`.

`CUSTOM_GENERATE` is a folder in the layout of a hub repository: copied to one, its id serves as well.
"""

from pathlib import Path

CUSTOM_GENERATE = str(Path(__file__).resolve().parent)

__all__ = ["CUSTOM_GENERATE"]
