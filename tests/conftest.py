import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the concept files lie in the repository root

# The test models are tiny: one thread is fastest, gives the same sums everywhere, and lets `pytest -n` share the cores.
torch.set_num_threads(1)


# fixtures that take seconds and serve a whole module
SHARED = ("two_processes", "ranks", "outcomes", "runs", "folder", "litter", "detected", "segmented", "mixed", "default_run", "pretrained")


@pytest.hookimpl(tryfirst=True)  # before xdist looks at the groups
def pytest_collection_modifyitems(items):
    """`pytest -n 2 --dist loadgroup` gives tests that share one of them to one process; two would make it twice."""
    for item in items:
        for name in SHARED:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {name}"))
                break
