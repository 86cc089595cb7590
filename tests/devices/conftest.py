import logging
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # policy_table
torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)
