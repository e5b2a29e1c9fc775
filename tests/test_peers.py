"""benchmarks/peers.py: every job makes a step, and peers do the same work."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import peers
from benchmarks.machine import multiply_adds

SPEC = dict(precision="fp32", compiled=False, batch=2, device="cpu", tiny=True)
LARGE = ("detector", "detvit")  # heads of full size


@pytest.mark.parametrize("job", [job for job in peers.MODELS if job not in LARGE])
def test_a_step_leaves_gradients(job):
    model, _, step = peers.make_step({**SPEC, "job": job}, "ours")
    step()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("job", LARGE)
def test_a_step_of_a_detector_leaves_gradients(job):
    test_a_step_leaves_gradients(job)


@pytest.mark.slow
@pytest.mark.parametrize("job", ["vit", "mixer", "swin", "mae"])
def test_peers_do_the_same_work(job):
    pytest.importorskip(peers.PACKAGES[job])
    works = []
    for side in ("ours", "peer"):
        model, inputs, _ = peers.make_step({**SPEC, "job": job}, side)
        works.append(multiply_adds(model, *inputs))
    assert works[0] == pytest.approx(works[1], rel=0.01)
    if job == "vit":  # 17 tokens of 32, 16 of them embedded from 192 pixels; two blocks; 1000 classes
        assert works[0] == 16 * 192 * 32 + 2 * (17 * 12 * 32 * 32 + 2 * 17 * 17 * 32) + 32 * 1000


def test_a_bf16_step_runs_under_autocast():
    model, _, step = peers.make_step({**SPEC, "job": "vit", "precision": "bf16"}, "ours")
    step()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("job", peers.MODELS)
def test_every_full_size_model_has_a_size_that_it_takes(job):
    if job in ("detector", "swin", "mixer"):
        pytest.skip("built in their own tests")
    with torch.device("meta"):
        model = peers.MODELS[job]("ours", False)
    size = peers.img_size(job, False)
    assert size in (224, 512) and sum(p.numel() for p in model.parameters()) > 2e7
