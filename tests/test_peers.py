"""benchmarks/peers.py: every job makes a step, and peers do the same work, at full size: on the meta device."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers
from benchmarks.machine import multiply_adds

SPEC = dict(precision="fp32", mode="eager", batch=2, device="meta")
DETECTORS = ("detector", "detvit")  # which boxes are kept depends on numbers


def step_of(job, side="ours", **options):
    with torch.device("meta"):
        return peers.make_step({**SPEC, "job": job, **options}, side)


@pytest.mark.parametrize("job", [job for job in peers.JOBS if job not in (*DETECTORS, "sam", "mirl", "mirl_b48")])
def test_a_step_leaves_gradients(job):
    model, _, step = step_of(job)
    step()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) > 2e7 and all(p.grad.shape == p.shape for p in trained)


@pytest.mark.slow
@pytest.mark.parametrize("job", [*DETECTORS, "sam", "mirl"])
def test_a_step_on_a_cpu_leaves_gradients(job):
    model, _, step = peers.make_step({**SPEC, "device": "cpu", "job": job, "batch": 1}, "ours")
    step()
    assert any(p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_work_of_a_vit_b_is_that_by_hand():
    # 197 tokens of 768, 196 of them embedded from 768 pixels; twelve blocks; 1000 classes
    model, inputs, _ = step_of("vit")
    by_hand = 196 * 768**2 + 12 * (197 * 12 * 768**2 + 2 * 197**2 * 768) + 1000 * 768
    assert multiply_adds(model, *inputs) == by_hand


@pytest.mark.parametrize("job", ["vit", "mixer", "swin", "mae"])
def test_peers_do_the_same_work(job):
    pytest.importorskip(peers.JOBS[job].package)
    works = []
    for side in ("ours", "peer"):
        model, inputs, _ = step_of(job, side)
        works.append(multiply_adds(model, *inputs))
    assert works[0] == pytest.approx(works[1], rel=0.01)


def test_a_bf16_step_runs_under_autocast():
    model, _, step = peers.make_step({**SPEC, "job": "vit", "precision": "bf16", "device": "cpu", "batch": 1}, "ours")
    types = set()
    model.blocks[0].attn.proj.register_forward_hook(lambda module, args, out: types.add(out.dtype))
    model(torch.rand(1, 3, 32, 32))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.rand(1, 3, 32, 32))
    assert types == {torch.float32, torch.bfloat16}
