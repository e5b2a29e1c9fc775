import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root

# The test models are tiny: one thread is fastest, gives the same sums everywhere, and lets `pytest -n` share the cores.
torch.set_num_threads(1)
