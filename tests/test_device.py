"""Ready for a GPU, without one: a forward pass makes no tensor on the CPU, a step waits for the device only once."""

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from small_runs import CLASSIFY, CONTRAST, DETECT, HIERARCHICAL, PRETRAIN, SEGMENT
from torch._subclasses.fake_tensor import FakeTensorMode

import train
from detect import vit_mask_rcnn
from mae import MAE
from mirl import MIRL
from mixer import create_mixer
from mixmim import MixMIM, create_mixmim
from resnet import create_resnet
from sam import SAM
from segment import UperNet
from supcon import SupCon
from training import optim
from training.world import World
from vit import create_vit

ROOT = str(Path(train.__file__).parent)
SIZES = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2)


def vit(**options):
    return create_vit("vit_demo", **{**SIZES, **options})


def hierarchical(**options):
    return create_mixmim("mixmim_demo", img_size=32, embed_dim=16, num_classes=5, **options)


MODELS = {
    "vit": vit,
    "vit with biases": lambda: vit(rel_pos_bias="block", layer_scale=0.1),
    "mixer": lambda: create_mixer("mixer_demo", img_size=32),
    "resnet": lambda: create_resnet("resnet8"),
    "hierarchical": hierarchical,
    "shifted": lambda: hierarchical(shift=True, window_size=(3, 3, 2)),
    "mae": lambda: MAE(vit(), 32, 1, 2),
    "mirl": lambda: MIRL(vit(), 2, 32, 1, 2),
    "mixmim": lambda: MixMIM(hierarchical(), 32, 1, 2),
    "upernet": lambda: UperNet(vit(), 5, channels=16, norm="group"),
}


@contextmanager
def fake_gpu(make):
    """Inside, all tensors are on a GPU that does not exist, and the model too."""
    with torch.device("meta"):
        model = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield model.to_empty(device="cuda")


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_pass_and_its_loss_stay_on_the_gpu(name):
    with fake_gpu(MODELS[name]) as model:
        out = model(torch.rand(2, 3, 32, 32, device="cuda"))
        loss = getattr(out, "loss", out)
        assert loss.device.type == "cuda"
        if name == "upernet":
            labels = torch.zeros(2, 32, 32, dtype=torch.long, device="cuda")
            assert model(torch.rand(2, 3, 32, 32, device="cuda"), labels).loss.device.type == "cuda"


def test_the_contrastive_loss_stays_on_the_gpu():
    with fake_gpu(lambda: SupCon(vit(num_classes=0))) as model:
        labels = torch.zeros(4, dtype=torch.long, device="cuda")
        assert model(torch.rand(4, 2, 3, 32, 32, device="cuda"), labels).loss.device.type == "cuda"


def test_the_parts_of_a_detector_stay_on_the_gpu():
    """Which boxes are kept depends on numbers, and fake tensors have none: part by part."""
    def make():
        return vit_mask_rcnn(vit(img_size=64), 5, 64, window_size=3, channels=16, box_dim=16, norm="group")

    with fake_gpu(make) as model:
        heads = model.roi_heads
        maps = model.backbone(torch.rand(2, 3, 64, 64, device="cuda"))
        scores, deltas = model.rpn.head(list(maps.values()))
        classes, boxes = heads.box_predictor(heads.box_head(torch.rand(6, 16, 7, 7, device="cuda")))
        masks = heads.mask_predictor(heads.mask_head(torch.rand(6, 16, 14, 14, device="cuda")))
        assert {value.device.type for value in (*scores, *deltas, classes, boxes, masks)} == {"cuda"}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, optim.LARS])
def test_the_weights_of_sam_move_on_the_gpu(kind, monkeypatch):
    with fake_gpu(vit) as model:
        optimizer = SAM(model.parameters(), kind, lr=0.1)
        monkeypatch.setattr(torch.Tensor, "item", lambda norm: 1.0)  # fake tensors have no numbers
        monkeypatch.setattr(torch.Tensor, "tolist", lambda numbers: [0.0] * len(numbers))
        for half in (optimizer.first_step, optimizer.second_step):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            half()
        assert {p.device.type for p in model.parameters()} == {"cuda"}


# ---------------------------------------------------------------------------- waiting


WAITS = ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def waits(monkeypatch):
    """The calls, made by this repository's own code, that would make the CPU wait for a GPU."""
    calls = []

    def counted(name, method):
        def call(*args, **kwargs):
            frame = sys._getframe(1)
            if frame.f_code.co_filename.startswith(ROOT) and "tests" not in frame.f_code.co_filename:
                calls.append(f"{name} in {frame.f_code.co_name}")
            return method(*args, **kwargs)
        return call

    for name in WAITS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return calls


RUNS = {
    "mae": f"{PRETRAIN} --method mae".replace("--segments 2 ", ""),
    "mirl": PRETRAIN,
    "mixmim": f"--task pretrain --method mixmim {HIERARCHICAL} --data-size 64 --batch-size 8 --epochs 1",
    "classify": f"{CLASSIFY} --mixup 0.8 --drop-path 0.1",
    "contrast": CONTRAST,
    "detect": DETECT,
    "segment": SEGMENT,
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_waits_for_the_device_once_to_see_whether_the_loss_is_finite(name, waits):
    if name == "detect":
        pytest.importorskip("pycocotools")
    args = train.parse(f"{RUNS[name]} --workers 0 --device cpu --clip-grad 1 --output-dir none".split())
    task, world = train.TASKS[args.task], World("cpu")
    data = task.open_data(args, world)
    model = task.build(args, data, world).train()
    optimizer = optim.build_optimizer(model, args)
    batches, loader = train.training_loader(args, data, world)
    batch = next(iter(loader))
    stop = type("Stop", (), dict(signal=None))()
    waits.clear()

    shares = train.backward([batch], 1, model, task, args, data, world, world.autocast("fp32"))
    norm = optim.clip_gradients(model, args.clip_grad)
    optimizer.step()
    assert waits == []
    train.agree(shares, norm, stop, world)
    assert [call for call in waits if call != "tolist in sum"] == ["tolist in agree"]  # sum: numbers of the CPU
