import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files are in the repository root

# The test models are tiny: one thread is fastest, gives the same sums everywhere, and lets `pytest -n` share cores.
torch.set_num_threads(1)

# fixtures that take seconds and serve a whole module
SHARED = ("two_processes", "ranks", "outcomes", "runs", "folder", "litter", "detected", "segmented", "mixed",
          "default_run")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """`pytest -n 2 --dist loadgroup` gives tests that share one of them to one process; two would make it twice."""
    for item in items:
        for name in SHARED:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name}"))
                break


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
