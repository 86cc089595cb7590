import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # cache_programs, cache_lanes
torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)
