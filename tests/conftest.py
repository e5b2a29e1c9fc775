import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files are in the repository root

# The test models are tiny: one thread is fastest, gives the same sums everywhere, and lets `pytest -n` share cores.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """flags -> the folder of an uninterrupted run of them, trained once; for reading only."""
    from small_runs import start

    folders = {}

    def run(flags):
        if flags not in folders:
            folder = tmp_path_factory.mktemp("finished")
            start(flags, folder)
            folders[flags] = folder
        return folders[flags]

    return run


@pytest.fixture(scope="session")
def pretrained(finished):
    """A tiny MIRL, pre-trained for two epochs."""
    from small_runs import PRETRAIN

    return finished(PRETRAIN)
