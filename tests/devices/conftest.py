import logging
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # policy_table; cases of processes
torch.set_num_threads(1)
logging.getLogger("transformers").setLevel(logging.ERROR)
