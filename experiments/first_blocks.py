"""First blocks: a checkpoint of a pre-trained ViT without its last blocks.

    python experiments/first_blocks.py runs/0001/checkpoint.pt 36        writes runs/0001/first36.pt

train.py --init takes the file like any other. What are the last blocks worth to fine-tuning? (mirl-tune in claims.py)

Needs: torch; checkpoints.py.
"""

import re
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import read_checkpoint


def output(path, count):
    return f"{path.removesuffix('checkpoint.pt')}first{count}.pt"


def main(argv=None):
    path, count = sys.argv[1:] if argv is None else argv
    saved, kept = read_checkpoint(path), {}
    for name, tensor in saved["model"].items():
        block = re.match(r"encoder\.blocks\.(\d+)\.", name)
        if block is None or int(block[1]) < int(count):
            kept[name] = tensor
    torch.save({"model": kept, "args": {**saved["args"], "depth": int(count)}}, output(path, count))


if __name__ == "__main__":
    main()
