import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from checkpoints import encoder_options, load_pretrained
from coco import check_target
from detect import ViTPyramid, init_as_beit, vit_mask_rcnn
from pyramid import RelativeBias, bias_tables
from pyramid import attend_in_windows as attend
from pyramid import split_side as pieces
from mae import MAE
from mirl import MIRL
from mixmim import MixMIM, create_mixmim
from resnet import create_resnet
from vit import Attention, ViT

SMALL = dict(img_size=64, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=0)
HEADS = dict(
    channels=16, box_convs=1, box_dim=32, mask_convs=1, rpn_batch_size_per_image=32, box_batch_size_per_image=16
)


def vit(**changes):
    torch.manual_seed(0)
    return ViT(**{**SMALL, **changes})


def detector(encoder=None, classes=3, **changes):
    return vit_mask_rcnn(
        encoder or vit(), classes, **{**dict(img_size=64, window_size=4, norm="group"), **HEADS, **changes}
    )


def scene(height=64, width=64, box=(8.0, 8.0, 40.0, 40.0), label=1):
    mask = torch.zeros(1, height, width, dtype=torch.uint8)
    mask[0, 8:40, 8:40] = 1
    return torch.rand(3, height, width), dict(boxes=torch.tensor([box]), labels=torch.tensor([label]), masks=mask)


def empty(height=64, width=64):
    return torch.rand(3, height, width), dict(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.long),
        masks=torch.zeros(0, height, width, dtype=torch.uint8),
    )


def same(a, b, tolerance=1e-5):
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------- windows


@pytest.mark.parametrize(
    "size, window, expected",
    [(8, 4, [(0, 8, 4)]), (10, 4, [(0, 8, 4), (8, 10, 2)]), (3, 4, [(0, 3, 3)]), (4, 4, [(0, 4, 4)])],
)
def test_a_side_is_cut_into_whole_windows_and_a_rest(size, window, expected):
    assert pieces(size, window) == expected


@pytest.mark.parametrize("height, width, window", [(7, 9, (3, 4)), (8, 8, (4, 4)), (5, 3, (4, 4)), (6, 6, (14, 14))])
def test_windows_equal_padded_windows_whose_padding_is_masked(height, width, window):
    """The reference pads the map with rubbish to whole windows and keeps every query from looking at it."""
    torch.manual_seed(0)
    attn, bias = Attention(16, 2).double(), RelativeBias(window, 2).double()
    nn.init.normal_(bias.relative_position_bias_table)
    x = torch.randn(2, height, width, 16, dtype=torch.float64)
    tall, wide = window
    rows, columns = -(-height // tall), -(-width // wide)
    padded = 100 * torch.randn(2, rows * tall, columns * wide, 16, dtype=torch.float64)
    padded[:, :height, :width] = x
    real = torch.zeros(rows * tall, columns * wide, dtype=torch.bool)
    real[:height, :width] = True
    out = torch.zeros_like(padded)
    for r in range(rows):
        for c in range(columns):
            ys, xs = slice(r * tall, (r + 1) * tall), slice(c * wide, (c + 1) * wide)
            hidden = torch.where(real[ys, xs].flatten(), 0.0, -torch.inf).double()
            out[:, ys, xs] = attn(padded[:, ys, xs].flatten(1, 2), bias(tall, wide) + hidden).view(2, tall, wide, 16)
    tables = bias_tables(bias, height, width, window)
    torch.testing.assert_close(attend(attn, x, window, tables), out[:, :height, :width], rtol=0, atol=1e-12)


def test_a_window_that_covers_the_map_is_global_attention():
    a, b = (
        ViTPyramid(vit(), window_size=size, global_blocks=blocks).eval() for size, blocks in ((8, "none"), (3, "all"))
    )
    b.load_state_dict(
        {**b.state_dict(), **{k: v for k, v in a.state_dict().items() if not k.startswith("bias.window")}}
    )
    x = torch.randn(2, 3, 64, 64)
    same(a(x), b(x))


def test_nothing_leaks_between_windows():
    attn, x = Attention(16, 2), torch.randn(1, 7, 9, 16, requires_grad=True)
    attend(attn, x, (3, 4), {})[0, 2, 3].sum().backward()  # the last place of the first window
    seen = x.grad[0].abs().sum(-1) > 0
    assert seen[:3, :4].all() and not seen[3:].any() and not seen[:, 4:].any()


def test_global_blocks_are_the_last_of_each_quarter():
    assert ViTPyramid(vit(depth=12)).global_blocks == {2, 5, 8, 11} and ViTPyramid(vit(depth=24)).taps == [
        5,
        11,
        17,
        23,
    ]


def test_all_global_without_bias_equals_the_vits_own_blocks():
    encoder = vit(class_token=False, pool="mean")
    x = torch.randn(2, 3, 64, 64)
    expected = encoder.forward_features(x, layers=[3])[0]
    maps = ViTPyramid(encoder, global_blocks="all", rel_pos_bias=False, pyramid="single")(x)
    torch.testing.assert_close(maps["0"].flatten(2).mT, expected, rtol=0, atol=1e-5)


def test_zero_bias_changes_nothing_and_another_one_does():
    x = torch.randn(1, 3, 64, 64)
    plain, biased = (ViTPyramid(vit(), window_size=3, rel_pos_bias=on).eval() for on in (False, True))
    torch.manual_seed(1)
    biased.load_state_dict({**biased.state_dict(), **plain.state_dict()})
    same(plain(x), biased(x))
    for bias in biased.bias.values():
        nn.init.normal_(bias.relative_position_bias_table)
    assert (plain(x)["3"] - biased(x)["3"]).abs().max() > 1e-3


def test_a_step_reads_each_bias_once_for_all_blocks(monkeypatch):
    model, sizes = ViTPyramid(vit(depth=8), window_size=3), []
    read = RelativeBias.forward
    monkeypatch.setattr(RelativeBias, "forward", lambda bias, h, w: sizes.append((h, w)) or read(bias, h, w))
    model(torch.randn(1, 3, 64, 64))
    assert sorted(sizes) == [(2, 2), (2, 3), (3, 2), (3, 3), (8, 8)]  # 8 = 3 + 3 + 2 tokens to each side


def test_a_bias_is_read_by_offset_and_a_smaller_map_reads_the_middle():
    bias = RelativeBias((3, 4), 1)
    with torch.no_grad():
        bias.relative_position_bias_table.copy_(torch.arange(35.0)[:, None])
    full = bias(3, 4)[0].view(3, 4, 3, 4)
    for y, x, v, u in ((0, 0, 2, 3), (2, 3, 0, 0), (1, 2, 1, 2)):
        assert full[y, x, v, u] == (y - v + 2) * 7 + (x - u + 3)  # row down, column right, from key to query
    assert torch.equal(bias(2, 3)[0].view(2, 3, 2, 3), full[:2, :3, :2, :3])
    assert bias(5, 4).shape == (1, 20, 20)  # a larger one: enlarged


@pytest.mark.parametrize(
    "size, patch, expected",
    [
        ((64, 64), 8, [(32, 32), (16, 16), (8, 8), (4, 4)]),
        ((64, 96), 8, [(32, 48), (16, 24), (8, 12), (4, 6)]),
        ((64, 96), 16, [(16, 24), (8, 12), (4, 6), (2, 3)]),
        ((32, 64), 4, [(32, 64), (16, 32), (8, 16), (4, 8)]),
    ],
)
def test_the_maps_have_the_strides_they_claim(size, patch, expected):
    for kind in ("taps", "simple"):
        pyramid = ViTPyramid(vit(patch_size=patch), window_size=3, pyramid=kind)
        maps = pyramid(torch.randn(1, 3, *size))
        assert [tuple(m.shape[-2:]) for m in maps.values()] == expected and [
            m.shape[1] for m in maps.values()
        ] == pyramid.channels
        assert [size[0] / m.shape[-2] for m in maps.values()] == pyramid.strides


def test_checkpointing_changes_neither_maps_nor_gradients():
    x, grads = torch.randn(1, 3, 64, 64), []
    for on in (False, True):
        pyramid = ViTPyramid(vit(), window_size=3, checkpointing=on)
        torch.manual_seed(1)
        for p in pyramid.scales.parameters():
            nn.init.normal_(p, std=0.1)
        sum(m.square().sum() for m in pyramid(x).values()).backward()
        grads.append({name: p.grad for name, p in pyramid.named_parameters()})
    same(*grads, tolerance=1e-4)


@pytest.mark.parametrize(
    "options",
    [dict(), dict(global_blocks="all"), dict(global_blocks="none"), dict(pyramid="simple"), dict(pyramid="single")],
)
def test_every_trainable_tensor_gets_a_gradient(options):
    model = detector(vit(depth=8), **options)
    images, targets = zip(scene(), empty())
    sum(model(list(images), list(targets)).values()).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_beits_shared_bias_is_taken_over_by_both_tables():
    encoder = vit(rel_pos_bias="shared", depth=8)
    nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    table = encoder.rel_pos_bias.relative_position_bias_table.detach().clone()
    pyramid = ViTPyramid(encoder, window_size=4)
    torch.testing.assert_close(pyramid.bias["global"].relative_position_bias_table.data, table[: 15 * 15])
    expected = F.interpolate(table[:225].T.view(1, 2, 15, 15), size=(7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(pyramid.bias["window"].relative_position_bias_table.data, expected.view(2, 49).T)
    assert pyramid(torch.randn(1, 3, 64, 64))["0"].isfinite().all()
    with pytest.raises(ValueError, match="rel_pos_bias='shared'"):
        ViTPyramid(vit(rel_pos_bias="block"))
    with pytest.raises(ValueError, match="rel_pos_bias=False"):
        ViTPyramid(vit(rel_pos_bias="shared"), rel_pos_bias=False)


def filled(model):
    """A state dict of numbers that no initialization gives."""
    return {
        name: torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name)))
        for name, value in model.state_dict().items()
    }


def official(layout):
    """(the checkpoint as published, its encoder under our names): images of 32 px, patches of 8, eight blocks."""
    small = {**SMALL, "img_size": 32, "depth": 8}
    state = filled(ViT(**small))
    if layout == "deit":  # and timm: a classifier
        state = filled(ViT(**{**small, "num_classes": 10}))
        return {"model": state}, state
    if layout == "moco":  # two encoders and a projection head, under DistributedDataParallel's prefix
        extra = {f"module.momentum_encoder.{name}": value + 1 for name, value in state.items()} | {
            "module.predictor.0.weight": torch.ones(4, 4)
        }
        return {
            "arch": "vit",
            "state_dict": {f"module.base_encoder.{name}": value for name, value in state.items()} | extra,
        }, state
    if layout == "mae":
        extra = dict(mask_token=torch.ones(1, 1, 16), decoder_pos_embed=torch.ones(1, 17, 16)) | {
            "decoder_pred.weight": torch.ones(192, 16)
        }
        return {"model": state | extra}, state
    state = filled(ViT(**small, pos_embed=None, rel_pos_bias="shared", layer_scale=0.1))
    published = dict(state)
    for i in range(8):  # no bias on the keys
        q, _, v = published.pop(f"blocks.{i}.attn.qkv.bias").chunk(3)
        published |= {f"blocks.{i}.attn.q_bias": q, f"blocks.{i}.attn.v_bias": v}
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v])
    return {"model": published | {"mask_token": torch.ones(1, 1, 32), "lm_head.weight": torch.ones(50, 32)}}, state


@pytest.mark.parametrize("layout", ["deit", "moco", "mae", "beit"])
def test_an_official_checkpoint_arrives_in_the_detector_value_by_value(layout):
    file, state = official(layout)
    options = encoder_options(file)
    assert options["img_size"] == (32, 32) and (options.get("rel_pos_bias"), "layer_scale" in options) == (
        ("shared", True) if layout == "beit" else (None, False)
    )
    options["depth"] = 8
    encoder, fresh = vit(**options), vit(**options)
    load_pretrained(encoder, file, verbose=False)
    torch.manual_seed(1)
    now = detector(encoder, window_size=4).state_dict()  # of 64 px: 8 x 8 tokens, and the window is the old grid
    torch.manual_seed(1)
    without = detector(fresh, window_size=4).state_dict()
    inside = "backbone.pyramid.vit."
    assert list(now) == list(without) and not [name for name in now if "cls_token" in name]
    for name, value in now.items():
        if name.startswith(inside) and not name.endswith("pos_embed"):  # patch embedding, blocks, layer scale
            assert torch.equal(value, state[name.removeprefix(inside)]) and not torch.equal(value, without[name])
        elif not name.startswith("backbone.pyramid.bias") and not name.endswith(
            "pos_embed"
        ):  # neck and heads do not change
            assert torch.equal(value, without[name])

    def bicubic(rows, old, new):
        return (
            F.interpolate(rows.T.reshape(1, -1, old, old), size=(new, new), mode="bicubic", align_corners=False)
            .flatten(2)[0]
            .T
        )

    tables = {
        name: now[f"backbone.pyramid.bias.{name}.relative_position_bias_table"] for name in ("window", "global")
    }
    if layout == "beit":
        published = state["rel_pos_bias.relative_position_bias_table"][
            :49
        ]  # the last three rows are the class token's
        assert torch.equal(tables["window"], published)  # of BEiT's own size: bit for bit
        torch.testing.assert_close(tables["global"], bicubic(published, 7, 15), rtol=0, atol=1e-6)
        assert (
            now[f"{inside}pos_embed"].shape == (1, 64, 32) and 0.015 < now[f"{inside}pos_embed"].std() < 0.025
        )  # random, as in the benchmark
    else:
        torch.testing.assert_close(
            now[f"{inside}pos_embed"][0], bicubic(state["pos_embed"][0, 1:], 4, 8), rtol=0, atol=1e-6
        )
        assert not any(table.any() for table in tables.values())


def test_a_window_larger_than_the_map_keeps_beits_bias():
    """At 4 x 4 tokens a window of 14 is the whole map: windowed and global blocks read the same, and all of it."""
    encoder = vit(**encoder_options(official("beit")[0]), depth=8)
    nn.init.normal_(encoder.rel_pos_bias.relative_position_bias_table)
    pyramid = ViTPyramid(encoder, window_size=14)
    assert torch.equal(pyramid.bias["window"](4, 4), pyramid.bias["global"](4, 4)) and pyramid.bias[
        "window"
    ].window == (4, 4)


def test_a_vit_serves_one_pyramid():
    encoder = vit()
    detector(encoder)
    with pytest.raises(ValueError, match="part of a pyramid"):
        detector(encoder)


def test_the_pyramid_says_what_became_of_the_positions():
    file, _ = official("beit")
    pyramid = ViTPyramid(vit(**encoder_options(file), depth=8), window_size=4, img_size=(64, 96))
    assert pyramid.bias["global"].window == (8, 12) and pyramid.vit.pos_embed.shape[1] == 96
    assert pyramid.positions == [
        ("absolute table", "none", "random 8x12"),
        ("bias of windowed blocks", "4x4", "4x4"),
        ("bias of global blocks", "4x4", "8x12"),
    ]
    pyramid = ViTPyramid(vit(img_size=32), window_size=3, global_blocks="none", img_size=32)
    assert pyramid.positions == [("absolute table", "4x4", "4x4"), ("bias of windowed blocks", "none", "zeros 3x3")]


@pytest.mark.parametrize(
    "make",
    [
        lambda encoder: MAE(encoder, 32, 1, 1),
        lambda encoder: MIRL(encoder, 2, 32, 1, 1),
        lambda encoder: MixMIM(encoder, 32, 1, 1),
    ],
)
def test_our_own_pretraining_arrives_in_the_detector(make):
    encoder = vit(img_size=32, class_token=True)
    wrapper = make(encoder)
    for p in wrapper.parameters():
        p.data.normal_()
    file = {"model": wrapper.state_dict(), "args": {"img_size": [32, 32]}}
    fresh = vit(img_size=32, class_token=encoder.cls_token is not None, pool="mean", pos_embed="sincos")
    load_pretrained(fresh, file, verbose=False)
    model = detector(fresh)
    for name, value in model.backbone.pyramid.vit.blocks.state_dict().items():
        assert torch.equal(value, file["model"][f"encoder.blocks.{name}"])
    rows = file["model"]["encoder.pos_embed"][0, -16:]
    expected = (
        F.interpolate(rows.T.reshape(1, 32, 4, 4), size=(8, 8), mode="bicubic", align_corners=False).flatten(2)[0].T
    )
    torch.testing.assert_close(model.backbone.pyramid.vit.pos_embed.data[0], expected)


@pytest.mark.parametrize("channels", [1, 5])
def test_images_of_other_channel_counts_are_detected_in(channels):
    model = detector(vit(in_chans=channels), image_mean=[0.5] * channels, image_std=[0.25] * channels)
    image, target = scene()
    image = image[:1].expand(channels, -1, -1).contiguous()
    assert sum(model([image], [target]).values()).isfinite()
    assert set(model.eval()([image])[0]) == {"boxes", "labels", "scores", "masks"}
    with pytest.raises(ValueError, match=f"the encoder takes {channels} channels"):
        detector(vit(in_chans=channels))


def kept_for_backward(size, blocks):
    """Bytes that a training step of the backbone keeps, without weights."""
    pyramid = ViTPyramid(vit(depth=4), window_size=4, global_blocks=blocks, pyramid="single", img_size=size)
    weights, kept = {p.untyped_storage().data_ptr() for p in pyramid.parameters()}, {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = pyramid(torch.randn(1, 3, size, size))
    return sum(size for place, size in kept.items() if place not in weights) + 0 * len(out)


def test_windows_need_memory_linear_in_the_area_and_global_blocks_more():
    small, large = kept_for_backward(64, "none"), kept_for_backward(128, "none")
    assert 3.6 < large / small < 4.2
    assert kept_for_backward(128, "all") / kept_for_backward(64, "all") > 5


def test_the_position_table_trains_also_if_it_was_frozen():
    assert ViTPyramid(vit(pos_embed="sincos")).vit.pos_embed.requires_grad


# ---------------------------------------------------------------------------- the detector


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(pyramid="simple", norm="layer"),
        dict(pyramid="single"),
        dict(norm="batch"),
        dict(global_blocks="all"),
        dict(global_blocks="none", checkpointing=True),
        dict(aspect_ratios=(1.0,)),
    ],
)
def test_one_training_and_one_evaluation_step_on_rectangles(options):
    model = detector(**options)
    images, targets = zip(scene(64, 96), scene(96, 64), empty(48, 48))
    losses = model(list(images), list(targets))
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    total = sum(losses.values())
    total.backward()
    assert total.isfinite()
    with torch.no_grad():
        found = model.eval()(list(images))
    for image, one in zip(images, found, strict=True):
        assert one["masks"].shape[-2:] == image.shape[-2:]
        if len(one["boxes"]):
            assert one["boxes"].min() >= 0 and (one["boxes"].amax(0)[2:] <= torch.tensor(image.shape[:0:-1])).all()
            assert one["labels"].min() >= 1 and one["labels"].max() <= 3


@pytest.mark.parametrize(
    "encoder",
    [
        lambda: create_mixmim("mixmim_demo", num_classes=0),
        lambda: create_resnet("resnet18", num_classes=0),
        lambda: torchvision.models.resnet50(),
    ],
)
def test_other_encoders_take_the_same_heads(encoder):
    model = detector(encoder())
    images, targets = zip(scene(), scene())
    assert sum(model(list(images), list(targets)).values()).isfinite()
    maps = model.backbone(torch.randn(1, 3, 64, 64))
    assert [64 / m.shape[-1] for m in maps.values()] == model.backbone.strides


def test_a_batch_without_any_object_has_finite_losses():
    model = detector()
    images, targets = zip(empty(), empty())
    total = sum(model(list(images), list(targets)).values())
    total.backward()
    assert total.isfinite()


def test_the_anchors_of_each_level_are_eight_strides_and_the_head_fits_them():
    model = detector(window_size=4)
    sizes, strides = model.rpn.anchor_generator.sizes, model.backbone.strides
    assert [size[0] for size in sizes] == [8 * stride for stride in strides] == [16, 32, 64, 128, 256]
    assert model.rpn.head.cls_logits.out_channels == 3 and len(model.rpn.head.conv) == 2
    assert detector(pyramid="single").rpn.anchor_generator.sizes == ((16, 32, 64, 128, 256),)


def test_the_upgraded_heads_are_torchvisions():
    ours = vit_mask_rcnn(torchvision.models.resnet50(), 90, img_size=1024)
    theirs = torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=91
    )
    for part in ("rpn", "roi_heads"):
        assert {k: v.shape for k, v in getattr(ours, part).state_dict().items()} == {
            k: v.shape for k, v in getattr(theirs, part).state_dict().items()
        }


def test_vit_b_in_the_benchmarks_detector_has_as_many_parameters_as_its_published_reimplementation():
    with torch.device("meta"):
        model = vit_mask_rcnn(ViT(img_size=1024, num_classes=0), 80)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 118.68  # MIMDet's README says 118.67 M


def test_images_are_padded_to_the_square_of_training_and_the_mean_is_what_pads():
    model = detector().eval()
    batch, _ = model.transform([torch.rand(3, 40, 64)])
    assert tuple(batch.tensors.shape) == (1, 3, 64, 64) and (batch.tensors[0, :, 40:] == 0).all()


def test_the_random_start_divides_the_last_layers_of_block_l_by_the_root_of_2l():
    encoder = vit(depth=8, embed_dim=64)
    init_as_beit(encoder)
    for number in (1, 8):
        block = encoder.blocks[number - 1]
        # a normal cut at one sigma has 0.54 of its deviation
        assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02 * 0.54, rel=0.05)
        assert block.mlp.fc2.weight.std().item() == pytest.approx(0.02 * 0.54 / (2 * number) ** 0.5, rel=0.05)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(boxes=torch.tensor([[8.0, 8, 4, 40]])), "positive area"),
        (dict(boxes=torch.tensor([[8.0, 8, 70, 40]])), "inside 64x64"),
        (dict(boxes=torch.tensor([[-1.0, 8, 40, 40]])), "inside 64x64"),
        (dict(boxes=torch.tensor([[float("nan"), 8, 40, 40]])), "positive area"),
        (dict(boxes=torch.tensor([8.0, 8, 40, 40])), "must be"),
        (dict(labels=torch.tensor([0])), "background"),
        (dict(labels=torch.tensor([4])), r"1\.\.3"),
        (dict(labels=torch.tensor([1, 2])), r"labels \(2,\)"),
        (dict(masks=torch.zeros(1, 32, 64, dtype=torch.uint8)), r"masks \(1, 32, 64\)"),
    ],
)
def test_a_wrong_target_is_refused_with_its_name(change, words):
    image, target = scene()
    check_target(image, target, 3)
    check_target(*empty(), 3)
    image = change.pop("image", image)
    with pytest.raises(ValueError, match=words) as error:
        check_target(image, {**target, **change}, 3, "sample 17")
    assert str(error.value).startswith("sample 17") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ViTPyramid(vit(depth=6)), "quarters"),
        (lambda: ViTPyramid(vit(), pyramid="fancy"), "fancy"),
        (lambda: ViTPyramid(vit(), global_blocks="some"), "some"),
        (lambda: ViTPyramid(vit(), global_blocks=[9]), "0..3"),
        (lambda: ViTPyramid(vit(patch_size=2)), "patch_size 2"),
        (lambda: detector(classes=0), "num_classes"),
        (lambda: detector(norm="spectral"), "spectral"),
        (lambda: detector(anchor_sizes=[(8,)] * 4 + [(8, 16)]), "anchor_sizes"),
        (lambda: detector(nn.Linear(3, 3)), "Linear"),
    ],
)
def test_bad_input_is_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("patch", [8, 12])
def test_regions_are_read_at_the_true_strides_whatever_image_comes_first(patch):
    model = detector(vit(img_size=96, patch_size=patch), img_size=96).eval()
    model([torch.rand(3, 40, 96)])
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        assert pool.scales == [4 / patch, 2 / patch, 1 / patch, 1 / (2 * patch)]
        levels = pool.map_levels([torch.tensor([[0.0, 0, side, side]]) for side in (10, 224, 4000)])
        assert levels.tolist() == ([0, 3, 3] if patch == 8 else [0, 2, 3])


def test_an_images_scores_do_not_hang_on_the_image_before_it():
    image, found = torch.rand(3, 40, 64), []
    for first in (torch.rand(3, 40, 64), torch.rand(3, 64, 64)):
        torch.manual_seed(0)
        model = detector(box_score_thresh=0.0).eval()
        model([first])
        found.append(model([image])[0]["scores"])
    assert len(found[0]) and torch.equal(*found)


def test_boxes_are_decoded_in_float32_under_autocast():
    model = detector(box_score_thresh=0.0)
    images, targets = zip(scene(), scene())
    with torch.autocast("cpu", torch.bfloat16):
        assert sum(model(list(images), list(targets)).values()).dtype == torch.float32
        found = model.eval()(list(images))
    assert found[0]["boxes"].dtype == found[0]["masks"].dtype == torch.float32
    assert (found[0]["boxes"] - found[0]["boxes"].bfloat16().float()).abs().max() > 0  # no lattice


def test_the_small_resnets_are_refused():
    with pytest.raises(ValueError, match="resnet18"):
        detector(create_resnet("resnet20", num_classes=0))


def test_a_target_without_masks_is_told():
    image, target = scene()
    del target["masks"]
    with pytest.raises(ValueError, match="no masks"):
        check_target(image, target, 3)
