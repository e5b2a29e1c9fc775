import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from data import EvalBatches, as_lists, make_loader
from detect import ViTPyramid
from mixmim import create_mixmim
from segment import (
    Segmented,
    UperNet,
    confusion_matrix,
    mean_iou,
    pixel_loss,
    predict,
    segment_evaluate,
    slide,
    starts,
    whole,
)
from semantic import Segmentations, SemanticScenes, palette, save_segments
from vit import ViT, create_vit

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
HEAD = dict(channels=16, aux_channels=8, norm="layer")


def vit(**changes):
    torch.manual_seed(0)
    return ViT(**{**SMALL, **changes})


def upernet(encoder=None, classes=5, **changes):
    return UperNet(encoder or vit(), classes, **{**HEAD, **changes})


def hierarchical(**changes):
    torch.manual_seed(0)
    return create_mixmim("mixmim_demo", embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4), num_classes=0, **changes)


def scenes(count=4, size=64):
    """Normalised images and labels."""
    data = Segmentations(SemanticScenes(count, size), size, train=False)
    return tuple(map(torch.stack, zip(*(data[0, i] for i in range(count)))))


# ---------------------------------------------------------------------------- mean IoU


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31), st.floats(0, 1))
def test_mean_iou_equals_a_direct_count_of_each_class(classes, seed, ignored):
    draw = torch.Generator().manual_seed(seed)
    truth, found = (torch.randint(0, classes, (2, 5, 7), generator=draw) for _ in range(2))
    found[0] = truth[0]
    truth[torch.rand(truth.shape, generator=draw) < ignored] = 255
    result = mean_iou(confusion_matrix(found, truth, classes))
    there, ious = truth != 255, []
    for k in range(classes):
        both, either = (
            ((truth == k) & (found == k) & there).sum().item(),
            (((truth == k) | (found == k)) & there).sum().item(),
        )
        if either:
            assert result["iou"][k].item() == both / either
            ious.append(both / either)
        else:
            assert result["iou"][k].isnan()
    if ious:
        assert result["miou"] == pytest.approx(sum(ious) / len(ious), abs=1e-12)
        assert result["pixel_acc"] == ((truth == found) & there).sum().item() / there.sum().item()
    else:
        assert math.isnan(result["miou"]) and math.isnan(result["pixel_acc"])


def test_mean_iou_matches_a_hand_computed_one_and_knows_absent_from_wrongly_predicted():
    truth = torch.tensor([[0, 0, 1, 1, 255, 0]])
    found = torch.tensor([[0, 1, 1, 1, 2, 3]])
    confusion = confusion_matrix(found, truth, 5)
    assert confusion.dtype == torch.int64 and confusion.sum() == 5 and confusion[0].tolist() == [1, 1, 0, 1, 0]
    result = mean_iou(confusion)
    assert (
        result["iou"][:2].tolist() == [1 / 3, 2 / 3] and result["iou"][3] == 0
    )  # 3 never occurs, but was called once
    assert result["iou"][[2, 4]].isnan().all()  # 2 only under an ignored pixel
    assert result["miou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3) and result["pixel_acc"] == 3 / 5


@pytest.mark.parametrize(
    "prediction, labels, words",
    [
        (torch.zeros(2, 3), torch.full((2, 3), 7), "labels hold class 7"),
        (torch.full((2, 3), -1), torch.zeros(2, 3), "prediction hold class -1"),
        (torch.zeros(2, 3), torch.zeros(3, 2), r"\(2, 3\) and labels \(3, 2\)"),
    ],
)
def test_class_numbers_and_sizes_that_do_not_fit_are_named(prediction, labels, words):
    with pytest.raises(ValueError, match=words):
        confusion_matrix(prediction.long(), labels.long(), 5)


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize(
    "encoder, channels, sizes",
    [
        (vit, 3, [(64, 64), (64, 96)]),
        (lambda: vit(in_chans=1, img_size=(32, 64)), 1, [(32, 64)]),
        (lambda: vit(in_chans=5), 5, [(64, 64)]),
        (hierarchical, 3, [(64, 64), (64, 96)]),
        (lambda: torchvision.models.resnet18(weights=None), 3, [(65, 90)]),
        (lambda: ViTPyramid(vit(), global_blocks="all", rel_pos_bias=False, pyramid="simple"), 3, [(64, 64)]),
    ],
    ids=["vit", "one channel", "five channels", "hierarchical", "resnet", "pyramid"],
)
@pytest.mark.parametrize("norm", ["layer", "batch", "group"])
def test_any_encoder_gives_logits_of_the_images_size_and_every_parameter_a_gradient(encoder, channels, sizes, norm):
    model = upernet(encoder(), norm=norm)
    for height, width in sizes:
        model.zero_grad()
        out = model(torch.randn(2, channels, height, width), torch.randint(0, 5, (2, height, width)))
        assert out.logits.shape == (2, 5, height, width) and out.logits.dtype == torch.float32
        out.loss.backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        assert out.loss.isfinite()


def test_the_loss_is_the_cross_entropy_of_the_logits_and_0_4_of_the_helpers():
    model = upernet(dropout=0.0)
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(0, 5, (2, 64, 64))
    labels[0, :40] = 255
    out = model(images, labels)
    assert isinstance(out, Segmented)
    logits = model(images)
    torch.testing.assert_close(out.logits, logits, rtol=0, atol=0)
    kept = labels != 255
    by_hand = -logits.log_softmax(1).gather(1, labels.where(kept, 0)[:, None])[:, 0][kept].mean()
    torch.testing.assert_close(out.main, by_hand)
    third = model.pyramid(images)["2"]
    assert third.shape[-2:] == (8, 8)  # stride 8: the patch's own
    helper = F.interpolate(model.auxiliary_head(third), (64, 64), mode="bilinear")
    torch.testing.assert_close(out.auxiliary, F.cross_entropy(helper, labels, ignore_index=255))
    torch.testing.assert_close(out.loss, out.main + 0.4 * out.auxiliary)


def test_a_batch_without_a_labeled_pixel_costs_nothing_and_breaks_nothing():
    model = upernet()
    out = model(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 255))
    assert out.loss.item() == 0
    out.loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters() if p.requires_grad)


def test_pixel_loss_weighs_every_labeled_pixel_alike_whichever_image_it_is_in():
    logits = torch.zeros(2, 2, 1, 2)
    logits[1, 1] = math.log(3)  # probability 3/4 of class 1 in the second image
    labels = torch.tensor([[[0, 255]], [[1, 0]]])
    assert pixel_loss(logits, labels).item() == pytest.approx((math.log(2) + math.log(4 / 3) + math.log(4)) / 3)


def test_the_pyramid_pools_one_number_per_channel_over_the_whole_map():
    """With all weights of a branch known: the 1 x 1 branch tells every place the mean of the map."""
    model = upernet().eval()
    seen, x = [], torch.randn(2, 32, 4, 4)
    model.ppm.branches[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    model.ppm(x)
    torch.testing.assert_close(seen[0][..., 0, 0], x.mean((2, 3)))
    grads = torch.autograd.functional.jacobian(lambda m: model.ppm(m)[0, :, 0, 0].sum(), x)
    assert (grads[0].abs().sum(0) > 0).all() and grads[
        1
    ].abs().max() == 0  # a corner sees the whole map, and no other image


def test_fine_and_coarse_maps_both_reach_every_pixel():
    model = upernet().eval()
    maps = [torch.randn(1, 32, side, side, requires_grad=True) for side in (32, 16, 8, 4)]
    model.decode(maps)[0, :, 9, 9].sum().backward()
    reach = [(m.grad[0].abs().sum(0) > 0).float().mean().item() for m in maps]
    assert (
        reach[0] < 0.1 and reach == sorted(reach) and reach[3] == 1
    )  # the finest near by, the coarsest from everywhere


def test_the_head_is_as_large_as_the_published_ones():
    """UperNet with 512 channels and 150 classes: ResNet-101 has 86 M (with a stem of three convolutions, 0.02
    M more than torchvision's),
    Swin-T 60 M (table of the Swin paper, arXiv 2103.14030): 27.5 M are the encoder's."""
    with torch.device("meta"):
        count = sum(p.numel() for p in UperNet(torchvision.models.resnet101(weights=None), 150).parameters())
        assert round((count + 0.02e6) / 1e6) == 86
        swin = nn.Identity()
        swin.channels, swin.strides = [96, 192, 384, 768], [4, 8, 16, 32]
        head = sum(p.numel() for p in UperNet(swin, 150).parameters())
        assert round((head + 27.52e6) / 1e6) == 60
        plain = UperNet(create_vit("vit_b16", img_size=512, num_classes=0), 150)
    taken = sum(p.numel() for p in plain.pyramid.parameters())
    ppm = 4 * (768 * 512 + 2 * 512) + (768 + 4 * 512) * 512 * 9 + 2 * 512
    rest = 3 * (768 * 512 + 1024) + 3 * (512 * 512 * 9 + 1024) + 4 * 512 * 512 * 9 + 1024 + 513 * 150
    assert sum(p.numel() for p in plain.parameters()) - taken == ppm + rest + 768 * 256 * 9 + 512 + 257 * 150


def test_head_and_helper_compute_what_hugging_faces_do_with_the_same_weights():
    """They in turn load mmsegmentation's."""
    theirs = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    widths = [12, 16, 20, 24]
    config = SimpleNamespace(
        pool_scales=[1, 2, 3, 6],
        hidden_size=32,
        num_labels=7,
        auxiliary_in_channels=None,
        auxiliary_channels=10,
        auxiliary_num_convs=1,
        auxiliary_concat_input=False,
    )
    head, helper, encoder = theirs.UperNetHead(config, widths), theirs.UperNetFCNHead(config, widths), nn.Identity()
    encoder.channels, encoder.strides = widths, [4, 8, 16, 32]
    ours = UperNet(encoder, 7, channels=32, aux_channels=10)

    def layers(parts):
        return [m for part in parts for m in part.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))]

    for a, b in zip(
        layers(
            [
                head.psp_modules,
                head.bottleneck,
                head.lateral_convs,
                head.fpn_convs,
                head.fpn_bottleneck,
                head.classifier,
                helper,
            ]
        ),
        layers(
            [
                ours.ppm.branches,
                ours.ppm.bottleneck,
                ours.lateral_convs,
                ours.fpn_convs,
                ours.fpn_bottleneck,
                ours.conv_seg,
                ours.auxiliary_head,
            ]
        ),
        strict=True,
    ):
        for p in a.parameters():
            nn.init.normal_(p, std=0.2)
        b.load_state_dict(a.state_dict())
    maps = [torch.randn(2, *shape) for shape in zip(widths, (33, 17, 9, 5), (40, 20, 10, 5))]
    for module in (head, helper, ours):
        module.eval()
    torch.testing.assert_close(ours.decode(maps), head(maps))
    torch.testing.assert_close(ours.auxiliary_head(maps[2]), helper(maps))


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_a_single_image_trains_without_batch_statistics(norm):
    out = upernet(norm=norm)(torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.long))
    out.loss.backward()
    assert out.loss.isfinite()


def test_batch_statistics_of_one_image_are_refused_in_training_only():
    model, image = upernet(norm="batch"), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="norm='group'"):
        model(image)
    assert model.eval()(image).shape == (1, 5, 64, 64)


def test_the_pooled_branches_keep_more_than_signs_under_group_norm():
    """32 groups of a 1 x 1 map of 64 channels would hold two numbers each, and normalize them to 1 and -1."""
    model = upernet(norm="group", channels=64)
    model.ppm.branches[0][2] = nn.Identity()
    seen = []
    model.ppm.branches[0].register_forward_hook(lambda module, args, out: seen.append(out))
    model(torch.randn(2, 3, 64, 64))
    assert len(seen[0][0].flatten().abs().mul(1e3).round().unique()) > 50


def test_a_bias_that_the_encoder_brings_is_kept_and_none_is_added():
    assert upernet().pyramid.bias is None
    encoder = vit(rel_pos_bias="shared")
    nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    table = encoder.rel_pos_bias.relative_position_bias_table.detach()[: 15 * 15].clone()
    torch.testing.assert_close(upernet(encoder).pyramid.bias["global"].relative_position_bias_table.detach(), table)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: upernet(classes=1), "num_classes 1 "),
        (lambda: upernet(classes=256), "255 marks"),
        (lambda: upernet(norm="spectral"), "spectral"),
        (lambda: upernet(nn.Linear(3, 3)), "encoder Linear"),
        (lambda: upernet()(torch.zeros(2, 3, 60, 64)), "img_size 60"),
        (lambda: upernet()(torch.zeros(2, 3, 64, 64), torch.zeros(2, 32, 32)), r"labels \(2, 32, 32\)"),
        (lambda: slide(upernet(), torch.zeros(1, 3, 64, 64), 32, 48), "stride .48, 48.*32"),
        (lambda: slide(upernet(), torch.zeros(1, 3, 64, 64), 0), "window .0, 0"),
    ],
)
def test_bad_input_gets_one_sentence(make, words):
    with pytest.raises(ValueError, match=words) as error:
        make()
    assert "\n" not in str(error.value)


def test_labels_out_of_range_are_named():
    with pytest.raises(IndexError, match="Target 5"):  # torch's own words
        upernet()(torch.randn(2, 3, 64, 64), torch.full((2, 64, 64), 5))


def test_bfloat16_gives_logits_in_float32_near_the_exact_ones():
    model, (images, labels) = upernet(norm="group").eval(), scenes(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images, labels.clamp(max=4))
    assert out.logits.dtype == out.loss.dtype == torch.float32
    assert (out.logits - model(images)).abs().mean() < 0.05


@pytest.mark.slow
def test_it_overfits_two_scenes():
    images, labels = scenes(2, 32)
    model = UperNet(vit(img_size=32, patch_size=4), 11, channels=24, aux_channels=16, norm="batch", dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = model(images, labels).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    result = segment_evaluate(model, [(images, labels)], 11)
    assert result["miou"] > 0.9 and result["pixel_acc"] > 0.99


# ---------------------------------------------------------------------------- inference


class Count(nn.Module):
    """Logits that depend on where a pixel lies in what it was given: class 0 its first channel, class 1 its
    column. Notes the sizes."""

    def __init__(self, stride=1):
        super().__init__()
        self.stride, self.sizes = stride, []

    def forward(self, images):
        assert all(side % self.stride == 0 for side in images.shape[-2:])
        self.sizes.append(tuple(images.shape[-2:]))
        return torch.stack([images[:, 0], torch.arange(images.shape[-1]).expand_as(images[:, 0]).float()], dim=1)


@pytest.mark.parametrize(
    "side, window, stride, expected",
    [(10, 4, 3, [0, 3, 6]), (10, 4, 4, [0, 4, 6]), (4, 4, 2, [0]), (5, 4, 4, [0, 1]), (9, 4, 1, [0, 1, 2, 3, 4, 5])],
)
def test_windows_cover_a_side_and_the_last_is_moved_back_inside(side, window, stride, expected):
    assert starts(side, window, stride) == expected


def test_overlapping_windows_are_averaged():
    """Width 6, windows of 4 at 0 and 2: a pixel's column counts from its window's edge, in the overlap the
    mean of two."""
    images = torch.rand(1, 3, 4, 6)
    out = slide(Count(), images, 4, 2)
    assert out[0, 1, 0].tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]
    torch.testing.assert_close(out[:, 0], images[:, 0])


@pytest.mark.parametrize("size", [(64, 64), (64, 40), (50, 61), (20, 30)])
def test_one_window_that_covers_the_image_is_the_whole_image_exactly(size):
    model, images = upernet().eval(), torch.randn(2, 3, *size)
    with torch.no_grad():
        a, b = slide(model, images, 64, 32), whole(model, images)
    assert a.shape == (2, 5, *size) and torch.equal(a, b)


def test_sides_that_the_patch_does_not_divide_are_padded_with_zeros_and_cut_back():
    model, images = upernet().eval(), torch.randn(1, 3, 50, 61)
    padded = torch.zeros(1, 3, 56, 64)
    padded[..., :50, :61] = images
    with torch.no_grad():
        assert torch.equal(whole(model, images), model(padded)[..., :50, :61])
    count = Count(stride=8)
    slide(count, torch.rand(1, 3, 20, 30), (12, 100), (6, 50))
    assert count.sizes == [(16, 32)] * 3  # windows of 12 x 30 at rows 0, 6 and 8


def test_the_mirrored_image_has_a_say():
    images = torch.rand(3, 3, 8, 10)
    model = upernet(vit(img_size=16)).eval()
    with torch.no_grad():
        both = whole(model, images).softmax(1) + whole(model, images.flip(-1)).flip(-1).softmax(1)
    assert torch.equal(predict(model, images, flip=True), both.argmax(1))
    assert torch.equal(predict(model, images, flip=True).flip(-1), predict(model, images.flip(-1), flip=True))
    assert not torch.equal(predict(model, images).flip(-1), predict(model, images.flip(-1)))


def test_predictions_are_made_at_the_size_of_the_labels():
    found = predict(Count(), torch.full((1, 3, 4, 4), 1.2), size=(8, 8))
    columns = F.interpolate(torch.arange(4.0).expand(1, 1, 4, 4), (8, 8), mode="bilinear", align_corners=False)[0, 0]
    assert torch.equal(found[0], (columns > 1.2).long())


# ---------------------------------------------------------------------------- evaluation


def shares(rank=0, world=1, batch_size=4, collate=as_lists, count=21):
    """21 scenes, every fourth pixel row ignored."""
    data = Segmentations(SemanticScenes(count, 32, train=False), 32, train=False)
    for images, labels in make_loader(
        data, EvalBatches(count, batch_size, rank, world), 0, torch.device("cpu"), collate
    ):
        for label in labels:
            label[::4] = 255
        yield images, labels


def judged():
    torch.manual_seed(0)
    return UperNet(ViT(**{**SMALL, "img_size": 32}), 11, **HEAD)


def test_the_figures_do_not_depend_on_the_batch_size_and_the_model_comes_back_as_it_was():
    model, results = judged(), []
    for options in (dict(batch_size=1), dict(batch_size=5), dict(batch_size=21), dict(batch_size=4, collate=None)):
        results.append(segment_evaluate(model, shares(**options), 11))
        assert model.training
    for other in results[1:]:
        assert results[0]["miou"] == other["miou"] and results[0]["pixel_acc"] == other["pixel_acc"]
        assert torch.equal(results[0]["iou"].nan_to_num(-1), other["iou"].nan_to_num(-1))
    segment_evaluate(model.eval(), shares(), 11)
    assert not model.training


def test_images_of_different_sizes_are_measured_each_at_its_labels_size():
    model = upernet().eval()
    images, labels = (
        [torch.randn(3, 30, 44), torch.randn(3, 64, 40)],
        [torch.randint(0, 5, (60, 88)), torch.randint(0, 5, (64, 40))],
    )
    result = segment_evaluate(model, [(images, labels)], 5)
    total = sum(confusion_matrix(predict(model, i[None], m.shape)[0], m, 5) for i, m in zip(images, labels))
    assert result["miou"] == mean_iou(total)["miou"] and total.sum() == 60 * 88 + 64 * 40
    windows = segment_evaluate(model, [(images, labels)], 5, window=32, stride=16, flip=True)
    assert 0 < windows["miou"] < 1 and windows["miou"] != result["miou"]


def two_process_job():
    """What each of the two processes runs: its share of the evaluation, then two steps, which an unused
    parameter would stop."""
    torch.set_num_threads(1)
    child = os.fork()  # both have loaded torch, once
    rank = int(child == 0)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    model = judged()
    results = segment_evaluate(model, shares(rank, 2, batch_size=3), 11)
    ddp = nn.parallel.DistributedDataParallel(model)
    for _ in range(2):
        images, labels = next(iter(shares(rank, 2, batch_size=3, collate=None)))
        ddp(images, labels).loss.backward()
    torch.save((results, model.conv_seg[-1].weight.grad), f"rank{rank}.pt")
    torch.distributed.destroy_process_group()
    if child:
        assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
def test_two_processes_measure_what_one_measures_and_train_together(tmp_path):
    (tmp_path / "job.py").write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]\n"
        "import test_segment\ntest_segment.two_process_job()\n"
    )
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    done = subprocess.run(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = segment_evaluate(judged(), shares(), 11)
    (first, grad), (second, other) = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for result in (first, second):
        assert result["miou"] == alone["miou"] and result["pixel_acc"] == alone["pixel_acc"]
        assert torch.equal(result["iou"].nan_to_num(-1), alone["iou"].nan_to_num(-1))
    assert torch.equal(grad, other) and grad.abs().max() > 0


# ---------------------------------------------------------------------------- pictures


def test_pictures_show_image_truth_and_prediction_and_name_the_classes_that_occur(tmp_path):
    classes = ["background", "cat", "dog"]
    truth = [torch.zeros(32, 48, dtype=torch.long), torch.full((20, 20), 1)]
    truth[0][:, 24:] = 255
    save_segments(tmp_path / "a.png", [torch.rand(3, 16, 24), torch.rand(3, 20, 20)], truth, truth, classes)
    with Image.open(tmp_path / "a.png") as page:
        seen = {colour for _, colour in page.convert("RGB").getcolors(1 << 20)}
    shade = [tuple((c * 255).round().int().tolist()) for c in palette(classes)]
    assert shade[0] in seen and shade[1] in seen and shade[2] not in seen
    many = palette([str(k) for k in range(150)])
    assert many.shape == (151, 3) and len(many.mul(255).round().unique(dim=0)) == 151
