import argparse
import pickle
import sys
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints import FORMATS, convert_official, encoder_options, find_grid, find_window, load_pretrained
from checkpoints import read_checkpoint
from formats import flat_tensors
from mae import MAE
from mirl import MIRL
from mixmim import HierarchicalViT
from small_runs import refusal
from vit import ViT

SIZES = dict(patch_size=4, embed_dim=16, depth=2, num_heads=2)
BEIT = dict(pos_embed=None, layer_scale=0.1)


def vit(img_size=16, num_classes=5, **options):
    return ViT(**{**SIZES, "img_size": img_size, "num_classes": num_classes, **options})


def names(width=16, depth=2, grid=4, prefix=1):
    """A published encoder's tensors, written out from the formats' key lists, random values."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, prefix + grid * grid, width),
        "patch_embed.proj.weight": (width, 3, 4, 4),
        "patch_embed.proj.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for i in range(depth):
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{norm}.weight": (width,), f"blocks.{i}.{norm}.bias": (width,)}
        for name, out, into in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"blocks.{i}.{name}.weight": (out, into), f"blocks.{i}.{name}.bias": (out,)}
    return shapes


def fill(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def encoder(**options):
    return fill(names(**options))


def head(classes=5, width=16):
    return fill({"head.weight": (classes, width), "head.bias": (classes,)}, seed=9)


def decoder():
    return fill(
        {
            "mask_token": (1, 1, 8),
            "decoder_pos_embed": (1, 17, 8),
            "decoder_embed.weight": (8, 16),
            "decoder_blocks.0.attn.qkv.weight": (24, 8),
            "decoder_norm.weight": (8,),
            "decoder_pred.weight": (48, 8),
        }
    )


def beit(table="shared", grid=4, heads=2):
    state = encoder(grid=grid)
    del state["pos_embed"]
    rows = (2 * grid - 1) ** 2 + 3
    index = torch.zeros(1 + grid * grid, 1 + grid * grid, dtype=torch.long)
    for i in range(2):
        del state[f"blocks.{i}.attn.qkv.bias"]
        state |= fill(
            {f"blocks.{i}.{name}": (16,) for name in ("attn.q_bias", "attn.v_bias", "gamma_1", "gamma_2")}, seed=i + 1
        )
        if table == "block":
            state |= fill({f"blocks.{i}.attn.relative_position_bias_table": (rows, heads)}, seed=i + 3)
            state[f"blocks.{i}.attn.relative_position_index"] = index
    if table == "shared":
        state |= fill(
            {
                "rel_pos_bias.relative_position_bias_table": (rows, heads),
                "mask_token": (1, 1, 16),
                "lm_head.weight": (32, 16),
                "lm_head.bias": (32,),
            },
            seed=5,
        )
        state["rel_pos_bias.relative_position_index"] = index
    else:  # fine-tuned: mean pooling
        state |= fill({"fc_norm.weight": (16,), "fc_norm.bias": (16,)}) | head()
        del state["norm.weight"], state["norm.bias"]
    return state


@pytest.mark.parametrize(
    "state, expected",
    [
        (encoder() | decoder(), dict(patch_size=4, img_size=(16, 16))),
        (beit(), dict(patch_size=4, img_size=(16, 16), pos_embed=None, rel_pos_bias="shared", layer_scale=0.1)),
        (
            beit("block", grid=5),
            dict(patch_size=4, img_size=(20, 20), pos_embed=None, rel_pos_bias="block", layer_scale=0.1),
        ),
        ({"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}, {}),
    ],
)
def test_a_vit_built_with_a_files_options_takes_it_in_as_it_is(state, expected):
    options = encoder_options({"model": state})
    assert options == expected
    if options:
        report = load_pretrained(vit(**options), {"model": state}, verbose=False)
        assert not report.resized and "blocks.1.attn.qkv.weight" in report.loaded


def test_a_rectangles_own_checkpoint_tells_its_size():
    assert encoder_options({"model": vit(img_size=(8, 24)).state_dict(), "args": {"img_size": [8, 24]}}) == dict(
        patch_size=4, img_size=(8, 24)
    )


def assert_same(state, other):
    assert set(state) == set(other)
    for name in state:
        assert torch.equal(state[name], other[name]), name


def bicubic(rows, old, new):
    """(h w, D) -> another grid, with none of checkpoints.py's or einops' code."""
    image = rows.T.reshape(1, -1, *old)
    return F.interpolate(image, size=new, mode="bicubic", align_corners=False).flatten(2)[0].T


def save(folder, file, name="file.pth"):
    torch.save(file, folder / name)
    return folder / name


# ---- convert_official, layout by layout


def test_an_encoder_only_mae_file_comes_back_unchanged():
    state = encoder()
    assert_same(convert_official(state), state)


def test_a_full_mae_file_loses_its_decoder_and_mask_token():
    assert_same(convert_official(encoder() | decoder()), encoder())


def test_a_timm_classifier_comes_back_unchanged_and_its_layer_scale_is_renamed():
    state = encoder() | head()
    assert_same(convert_official(state), state)
    gammas = fill({"blocks.0.ls1.gamma": (16,), "blocks.1.ls2.gamma": (16,)})
    converted = convert_official(state | gammas)
    assert torch.equal(converted["blocks.0.gamma_1"], gammas["blocks.0.ls1.gamma"])
    assert torch.equal(converted["blocks.1.gamma_2"], gammas["blocks.1.ls2.gamma"])
    assert set(converted) == set(state) | {"blocks.0.gamma_1", "blocks.1.gamma_2"}


def test_a_distilled_deit_loses_the_second_position_row_with_its_token_and_head():
    state = (
        encoder(prefix=2)
        | head()
        | fill({"dist_token": (1, 1, 16), "head_dist.weight": (5, 16), "head_dist.bias": (5,)})
    )
    converted = convert_official(state)
    assert set(converted) == set(encoder()) | set(head())
    assert converted["pos_embed"].shape == (1, 17, 16)
    assert torch.equal(converted["pos_embed"][0, 0], state["pos_embed"][0, 0])
    assert torch.equal(converted["pos_embed"][0, 1:], state["pos_embed"][0, 2:])


def test_of_a_moco_v3_file_only_the_base_encoder_without_its_mlp_head_stays():
    base, momentum = encoder(), fill(names(), seed=7)
    state = {f"module.momentum_encoder.{name}": value for name, value in momentum.items()}
    state |= {f"module.base_encoder.{name}": value for name, value in base.items()}
    state |= fill(
        {
            "module.base_encoder.head.0.weight": (32, 16),
            "module.base_encoder.head.1.running_mean": (32,),
            "module.momentum_encoder.head.0.weight": (32, 16),
            "module.predictor.0.weight": (32, 8),
        }
    )
    assert_same(convert_official(state), base)


@pytest.mark.parametrize("table", ["shared", "block"])
def test_beit_biases_become_q_zero_v_and_buffers_and_pretraining_parts_go(table):
    state = beit(table)
    converted = convert_official(state)
    for i in range(2):
        bias = converted[f"blocks.{i}.attn.qkv.bias"]
        assert torch.equal(bias[:16], state[f"blocks.{i}.attn.q_bias"])
        assert torch.equal(bias[16:32], torch.zeros(16))
        assert torch.equal(bias[32:], state[f"blocks.{i}.attn.v_bias"])
    model = vit(
        rel_pos_bias=table,
        **BEIT,
        pool="mean" if table == "block" else "cls",
        num_classes=5 if table == "block" else 0,
    )
    assert set(converted) == set(model.state_dict())
    for name in set(converted) & set(state):
        assert torch.equal(converted[name], state[name])


def test_an_official_mirl_state_dict_loses_its_decoders_norms_and_embeddings():
    extra = fill(
        {
            "norm_low.weight": (16,),
            "norm0.weight": (16,),
            "norm4.bias": (16,),
            "decoder_embed0_1.weight": (8, 16),
            "decoder_embed0.weight": (8, 16),
            "mask_token0": (1, 1, 8),
            "decoder_pos_embed0": (1, 17, 8),
            "decoder_blocks0.0.attn.qkv.weight": (24, 8),
            "decoder_norm0.weight": (8,),
            "decoder_pred0.weight_g": (8,),
            "decoder_pred0.weight_v": (48, 8),
        }
    )
    assert_same(convert_official(extra | encoder()), encoder())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda e: MAE(e, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2),
        lambda e: MIRL(e, segments=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2),
    ],
)
def test_our_own_pretraining_models_give_back_exactly_their_encoder(wrap):
    model = wrap(vit())
    assert_same(convert_official(model.state_dict()), model.encoder.state_dict())


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_wrapper_prefixes_are_stripped_also_stacked_and_around_an_encoder(prefix):
    assert_same(convert_official({prefix + name: value for name, value in encoder().items()}), encoder())
    assert_same(
        convert_official({f"{prefix}encoder.{prefix}{name}": value for name, value in encoder().items()}), encoder()
    )


def mixmim(window=3):
    state = fill(
        {
            "patch_embed.proj.weight": (8, 3, 4, 4),
            "patch_embed.norm.weight": (8,),
            "absolute_pos_embed": (1, 64, 8),
            "layers.0.blocks.0.attn.qkv.weight": (24, 8),
            "layers.0.blocks.0.norm1.weight": (8,),
            "layers.0.blocks.0.attn.relative_position_bias_table": ((2 * window - 1) ** 2, 2),
            "layers.0.downsample.reduction.weight": (16, 32),
            "norm.weight": (16,),
        }
    )
    extra = {
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(9, 9, dtype=torch.long),
        "layers.0.blocks.0.attn_mask": torch.zeros(1, 9, 9),
    }
    return state, extra | decoder()


def test_mixmim_keeps_its_names_and_loses_buffers_and_decoder():
    state, extra = mixmim()
    assert_same(convert_official(state | extra), state)


def hierarchical(img_size, window):
    return HierarchicalViT(img_size, embed_dim=8, depths=(1,), num_heads=(2,), window_size=(window,), num_classes=0)


BIAS = "layers.0.blocks.0.attn.relative_position_bias_table"


def test_a_mixmim_file_resizes_its_square_windows_and_its_position_table_without_class_row():
    source, model = (
        hierarchical(32, 3).state_dict(),
        hierarchical((8, 16), 4),
    )  # 2 x 4 tokens: the window becomes 2 x 4
    report = load_pretrained(model, source | mixmim()[1], verbose=False)
    assert report.format == "MixMIM" and set(report.resized) == {BIAS, "absolute_pos_embed"} and not report.missing
    loaded = model.state_dict()
    torch.testing.assert_close(loaded[BIAS], bicubic(source[BIAS], (5, 5), (3, 7)))
    torch.testing.assert_close(
        loaded["absolute_pos_embed"][0], bicubic(source["absolute_pos_embed"][0], (8, 8), (2, 4))
    )


def test_our_own_rectangular_windows_come_back_bit_for_bit():
    source, model = hierarchical((8, 16), 4).state_dict(), hierarchical((8, 16), 4)
    report = load_pretrained(model, {"model": source, "args": {"img_size": [8, 16]}}, verbose=False)
    assert not report.resized and torch.equal(model.state_dict()[BIAS], source[BIAS])
    turned = hierarchical((16, 8), 4)  # the same number of rows, another order
    load_pretrained(turned, {"model": source, "args": {"img_size": [8, 16]}}, verbose=False)
    torch.testing.assert_close(turned.state_dict()[BIAS], bicubic(source[BIAS], (3, 7), (7, 3)))


@pytest.mark.parametrize(
    "height, width, window, found",
    [(8, 8, 3, (3, 3)), (2, 4, 4, (2, 4)), (2, 8, 4, (2, 4)), (8, 2, 14, (8, 2)), (7, 7, 14, (7, 7))],
)
def test_a_windows_shape_is_found_from_its_table_and_its_map(height, width, window, found):
    rows = (2 * min(window, height) - 1) * (2 * min(window, width) - 1)
    assert find_window(rows, height, width) == (0, found)
    assert find_window(rows + 1, height, width) is None


def test_a_window_cut_on_one_axis_only_is_resized_too():
    source = hierarchical((8, 32), 4).state_dict()  # 2 x 8 tokens: a 2 x 4 window
    model = hierarchical((32, 32), 4)
    load_pretrained(model, {"model": source, "args": {"img_size": [8, 32]}}, verbose=False)
    torch.testing.assert_close(model.state_dict()[BIAS], bicubic(source[BIAS], (3, 7), (7, 7)))


# ---- load_pretrained: sizes and contents


@pytest.mark.parametrize("container", ["model", "state_dict", "module", "model_ema", None])
def test_every_container_loads_bit_for_bit(tmp_path, container):
    state = encoder() | head()
    model = vit()
    report = load_pretrained(
        model, save(tmp_path, {container: state, "epoch": 3} if container else state), verbose=False
    )
    assert_same(model.state_dict(), state)
    assert sorted(report.loaded) == sorted(state)
    assert (report.resized, report.skipped, report.missing) == ([], [], [])


def test_square_positions_are_resampled_to_a_rectangle_and_the_class_row_stays():
    state, model = encoder(), vit(img_size=(8, 12), num_classes=0)
    report = load_pretrained(model, state, verbose=False)
    assert report.resized == ["pos_embed"]
    assert torch.equal(model.pos_embed[0, 0], state["pos_embed"][0, 0])
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(state["pos_embed"][0, 1:], (4, 4), (2, 3)))


def test_the_grid_argument_gives_the_shape_of_the_file():
    state = encoder()
    state["pos_embed"] = torch.randn(1, 1 + 6, 16)
    model = vit(img_size=16, num_classes=0)
    message = refusal(load_pretrained, model, state)
    assert "pos_embed has 7 rows" in message and "grid=(gh, gw)" in message
    load_pretrained(model, state, verbose=False, grid=(3, 2))
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(state["pos_embed"][0, 1:], (3, 2), (4, 4)))


def test_a_grid_that_does_not_fit_the_file_is_an_error():
    assert "pass grid" in refusal(load_pretrained, vit(num_classes=0), encoder(), grid=(3, 2))


def test_equal_row_counts_of_different_grids_are_resampled_when_known_and_refused_when_not():
    state, model = encoder(), vit(img_size=(8, 32), num_classes=0)  # 4 x 4 and 2 x 8: both 16
    message = refusal(load_pretrained, model, state)
    assert "4x4" in message and "2x8" in message and "grid=(4, 4)" in message
    load_pretrained(model, state, verbose=False, grid=(4, 4))
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(state["pos_embed"][0, 1:], (4, 4), (2, 8)))
    load_pretrained(model, state, verbose=False, grid=(2, 8))
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_a_rectangular_checkpoint_of_ours_reloads_at_another_rectangular_size(tmp_path):
    source = vit(img_size=(8, 12))
    args = {"img_size": [8, 12], "patch_size": 4}
    path = save(tmp_path, {"model": source.state_dict(), "args": args})
    model = vit(img_size=(12, 8))  # as many rows, another grid
    report = load_pretrained(model, path, verbose=False)
    assert report.format == "ours" and report.resized == ["pos_embed"]
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(source.pos_embed[0, 1:].detach(), (2, 3), (3, 2)))
    model = vit(img_size=(16, 4))
    load_pretrained(model, path, verbose=False)
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(source.pos_embed[0, 1:].detach(), (2, 3), (4, 1)))
    same = vit(img_size=(8, 12))
    assert load_pretrained(same, path, verbose=False).resized == []
    assert_same(same.state_dict(), source.state_dict())


def test_img_size_may_be_one_number_in_our_args(tmp_path):
    path = save(tmp_path, {"model": MAE(vit(), 8, 1, 2).state_dict(), "args": {"img_size": 16, "patch_size": 4}})
    model = vit(img_size=(8, 32), num_classes=0)
    report = load_pretrained(model, path, verbose=False)
    assert report.resized == ["pos_embed"] and not report.missing


def test_a_class_row_the_model_lacks_is_dropped_and_one_the_file_lacks_becomes_zero():
    state = encoder()
    model = vit(class_token=False, pool="mean", num_classes=0)
    report = load_pretrained(model, state, verbose=False)
    assert torch.equal(model.pos_embed[0], state["pos_embed"][0, 1:])
    assert "cls_token" in report.skipped and report.resized == ["pos_embed"]

    state["pos_embed"] = state["pos_embed"][:, 1:]
    model = vit(num_classes=0)
    load_pretrained(model, state, verbose=False)
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(16))
    assert torch.equal(model.pos_embed[0, 1:], state["pos_embed"][0])
    model = vit(img_size=8, num_classes=0)
    load_pretrained(model, state, verbose=False)
    assert torch.equal(model.pos_embed[0, 0], torch.zeros(16))


def test_half_precision_tables_are_resampled_in_single_precision():
    state = {name: value.bfloat16() for name, value in encoder().items()}
    model = vit(img_size=8, num_classes=0)
    load_pretrained(model, state, verbose=False)
    torch.testing.assert_close(model.pos_embed[0, 1:], bicubic(state["pos_embed"][0, 1:].float(), (4, 4), (2, 2)))


@pytest.mark.parametrize("target,grid", [(16, (4, 4)), ((8, 24), (2, 6)), (24, (6, 6))])
def test_a_shared_relative_bias_goes_to_every_block_and_is_resampled_in_2d(target, grid):
    state = beit("shared")
    table = state["rel_pos_bias.relative_position_bias_table"]
    offsets = (2 * grid[0] - 1, 2 * grid[1] - 1)
    expected = torch.cat([bicubic(table[:49], (7, 7), offsets), table[49:]])
    block = vit(img_size=target, num_classes=0, rel_pos_bias="block", **BEIT)
    shared = vit(img_size=target, num_classes=0, rel_pos_bias="shared", **BEIT)
    for model in (block, shared):
        report = load_pretrained(model, state, verbose=False)
        assert report.format == "BEiT" and not report.missing and not report.skipped
        assert len(report.resized) == (0 if target == 16 else 2 if model is block else 1)
    tables = [b.attn.relative_position_bias_table for b in block.blocks] + [
        shared.rel_pos_bias.relative_position_bias_table
    ]
    for loaded in tables:
        torch.testing.assert_close(loaded, expected)
        assert torch.equal(loaded[-3:], table[-3:])
    imgs = torch.rand(2, 3, *block.img_size)
    with torch.no_grad():
        torch.testing.assert_close(block(imgs), shared(imgs))


def test_a_beit_forward_pass_equals_its_equations_written_out():
    state = beit("block")
    model = vit(rel_pos_bias="block", pool="mean", **BEIT)
    load_pretrained(model, state, verbose=False)
    imgs = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    x = (
        F.conv2d(imgs, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4)
        .flatten(2)
        .transpose(1, 2)
    )
    x = torch.cat([state["cls_token"].expand(2, 1, 16), x], dim=1)
    bias = torch.empty(2, 17, 17)
    for i in range(2):
        s = {name.removeprefix(f"blocks.{i}."): value for name, value in state.items()}
        table = s["attn.relative_position_bias_table"]
        for m in range(17):
            for n in range(17):
                if m and n:
                    dy, dx = (m - 1) // 4 - (n - 1) // 4, (m - 1) % 4 - (n - 1) % 4
                    row = (dy + 3) * 7 + dx + 3
                else:
                    row = 51 if m == n else 49 if m == 0 else 50
                bias[:, m, n] = table[row]
        y = F.layer_norm(x, (16,), s["norm1.weight"], s["norm1.bias"], 1e-6)
        q, k, v = (y @ s["attn.qkv.weight"].T).chunk(3, dim=-1)
        q, v = q + s["attn.q_bias"], v + s["attn.v_bias"]
        q, k, v = (t.view(2, 17, 2, 8).transpose(1, 2) for t in (q, k, v))
        y = ((q @ k.mT) / 8**0.5 + bias).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).reshape(2, 17, 16), s["attn.proj.weight"], s["attn.proj.bias"])
        x = x + s["gamma_1"] * y
        y = F.layer_norm(x, (16,), s["norm2.weight"], s["norm2.bias"], 1e-6)
        y = F.gelu(F.linear(y, s["mlp.fc1.weight"], s["mlp.fc1.bias"]))
        x = x + s["gamma_2"] * F.linear(y, s["mlp.fc2.weight"], s["mlp.fc2.bias"])
    x = F.layer_norm(x[:, 1:].mean(1), (16,), state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    expected = F.linear(x, state["head.weight"], state["head.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(imgs), expected, rtol=1e-4, atol=1e-4)


def test_a_mae_file_into_a_mean_pool_classifier_misses_head_and_fc_norm_and_skips_norm():
    model = vit(pool="mean")
    report = load_pretrained(model, {"model": encoder() | decoder()}, verbose=False)
    assert set(report.missing) == {"head.weight", "head.bias", "fc_norm.weight", "fc_norm.bias"}
    assert set(report.skipped) == {"norm.weight", "norm.bias"}
    assert report.format == "MAE"


def test_a_head_with_another_number_of_classes_is_left_as_it_was():
    model = vit(num_classes=7)
    before = model.head.weight.clone()
    report = load_pretrained(model, encoder() | head(5), verbose=False)
    assert set(report.skipped) == set(report.missing) == {"head.weight", "head.bias"}
    assert torch.equal(model.head.weight, before)


def test_a_frozen_sincos_table_is_overwritten_by_the_files_own():
    state, model = encoder(), vit(pos_embed="sincos", num_classes=0)
    load_pretrained(model, state, verbose=False)
    assert torch.equal(model.pos_embed, state["pos_embed"]) and not model.pos_embed.requires_grad


# ---- the report


def test_the_printed_report_names_counts_sizes_and_the_first_few_names(tmp_path, capsys):
    path = save(tmp_path, {"model": encoder() | decoder() | head(9)})
    report = load_pretrained(vit(img_size=(8, 12), pool="mean"), path)
    printed = capsys.readouterr().out
    count = sum(value.numel() for value in encoder().values()) - 32 - 10 * 16  # without norm and ten positions
    assert f"loaded {len(encoder()) - 2} tensors ({count / 1e6:.3g} M parameters) from {path} [MAE]" in printed
    assert "resized: pos_embed 4x4 -> 2x3" in printed
    assert "skipped: norm.weight, norm.bias, head.weight, head.bias; missing: fc_norm.weight" in printed
    assert "mask_token, decoder_pos_embed and 4 more" in printed and FORMATS["MAE"] in printed
    assert report.resized == ["pos_embed"]
    load_pretrained(vit(pool="mean"), path, verbose=False)
    assert capsys.readouterr().out == ""


def test_the_format_is_named_only_as_far_as_the_keys_tell():
    def kind(state, **options):
        return load_pretrained(vit(num_classes=0, **options), state, verbose=False).format

    assert (
        kind(encoder()) == "MAE or timm" and "ImageNet" in FORMATS["MAE or timm"] and "0.5" in FORMATS["MAE or timm"]
    )
    assert kind(encoder() | decoder()) == "MAE"
    assert kind(encoder(prefix=2) | {"dist_token": torch.zeros(1, 1, 16)}) == "DeiT distilled"
    assert kind(encoder() | {"norm_low.weight": torch.zeros(16)}) == "MIRL"
    assert kind({f"module.base_encoder.{name}": value for name, value in encoder().items()}) == "MoCo v3"
    assert kind({f"encoder.{name}": value for name, value in encoder().items()}) == "ours"
    gammas = fill({f"blocks.{i}.ls{j}.gamma": (16,) for i in range(2) for j in (1, 2)})
    assert kind(encoder() | gammas, layer_scale=1e-5) == "timm"
    assert kind(beit(), rel_pos_bias="shared", **BEIT) == "BEiT"


# ---- refusals


def test_renamed_keys_are_refused_with_the_first_five_names_and_the_model_stays_as_it_was():
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = refusal(load_pretrained, model, {f"vit.{name}": value for name, value in encoder().items()})
    absent = [name for name in before if not name.startswith(("head.", "norm.", "fc_norm."))]
    assert all(name in message for name in absent[:5]) and absent[5] not in message
    assert "vit.cls_token" in message
    assert_same(model.state_dict(), before)


def test_nine_tenths_of_the_encoder_are_enough_and_less_is_not():
    state = encoder()  # 28 encoder tensors: 2 may be absent, 3 may not
    del state["blocks.0.norm1.bias"], state["blocks.1.norm1.bias"]
    assert load_pretrained(vit(), state, verbose=False).missing[:1] == ["blocks.0.norm1.bias"]
    del state["blocks.1.attn.proj.bias"]
    assert "lacks 3 of the model's 28" in refusal(load_pretrained, vit(), state)


def test_another_width_is_refused_with_both_shapes_and_the_way_out():
    message = refusal(load_pretrained, vit(num_classes=0), encoder(width=32))
    assert "(1, 1, 32)" in message and "(1, 1, 16)" in message and "embed_dim" in message


def test_another_depth_is_refused_both_ways():
    assert "blocks.2.norm1.weight" in refusal(load_pretrained, vit(depth=3), encoder())
    assert "file's depth" in refusal(load_pretrained, vit(), encoder(depth=3))


@pytest.mark.parametrize(
    "options", [{}, dict(rel_pos_bias="shared"), BEIT, dict(rel_pos_bias="block", layer_scale=0.1)]
)
def test_beit_into_a_model_built_otherwise_is_refused_with_the_recipe(options):
    message = refusal(load_pretrained, vit(**options), beit("shared"))
    assert 'build the model with rel_pos_bias="block" (or "shared"), layer_scale=0.1, pos_embed=None' in message


def test_tables_of_every_block_do_not_fit_a_shared_one():
    message = refusal(load_pretrained, vit(rel_pos_bias="shared", **BEIT), beit("block"))
    assert "one relative position bias per block" in message and 'rel_pos_bias="block", layer_scale' in message


def test_other_heads_are_seen_where_a_bias_table_shows_them():
    message = refusal(load_pretrained, vit(num_heads=4, rel_pos_bias="shared", **BEIT), beit())
    assert "(52, 2)" in message and "(52, 4)" in message and "num_heads" in message


def test_layer_scale_and_positions_the_model_lacks_are_refused():
    gammas = fill({f"blocks.{i}.ls{j}.gamma": (16,) for i in range(2) for j in (1, 2)})
    assert 'layer_scale=0.1, pos_embed="learned"' in refusal(load_pretrained, vit(), encoder() | gammas)
    assert 'pos_embed="learned"' in refusal(load_pretrained, vit(pos_embed=None), encoder())


def test_a_q_bias_alone_is_refused():
    state = beit()
    del state["blocks.1.attn.v_bias"]
    assert "blocks.1.attn.q" in refusal(convert_official, state)
    state = beit()
    del state["blocks.1.attn.q_bias"]
    model = vit(rel_pos_bias="shared", num_classes=0, **BEIT)
    assert "blocks.1.attn.v" in refusal(load_pretrained, model, state)


def test_a_dict_without_tensors_is_refused_with_its_keys(tmp_path):
    message = refusal(load_pretrained, vit(), save(tmp_path, {"epoch": 3, "model": {}}))
    assert "no tensors" in message and "epoch" in message


# ---- reading


class Planted:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


class PlantedCall(Planted):
    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", [Planted, PlantedCall])
@pytest.mark.parametrize("write", ["torch", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, kind, write):
    planted, path = tmp_path / "planted", tmp_path / "evil.pth"
    file = {"model": encoder(), "args": kind(planted)}
    if write == "pickle":
        path.write_bytes(pickle.dumps({"args": kind(planted)}))
    else:
        torch.save(file, path, _use_new_zipfile_serialization=write == "torch")
    message = refusal(load_pretrained, vit(), path)
    assert "was not loaded" in message and str(path) in message
    assert not planted.exists()
    if write == "torch":  # the trap works: without protection it springs
        torch.load(path, weights_only=False)
        assert planted.exists()


def test_a_namespace_beside_the_weights_is_let_through_and_only_here(tmp_path):
    path = save(tmp_path, {"model": encoder(), "args": argparse.Namespace(lr=0.1, img_size=99)})
    assert read_checkpoint(path)["args"].lr == 0.1
    assert load_pretrained(vit(num_classes=0), path, verbose=False).format == "MAE or timm"
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


def test_read_checkpoint_returns_the_file_as_it_was_saved(tmp_path):
    file = {"model": encoder(), "epoch": 3, "args": {"img_size": [8, 12]}, "lr": [0.1, None]}
    read = read_checkpoint(str(save(tmp_path, file)))
    assert_same(read.pop("model"), file.pop("model"))
    assert read == file


def test_files_that_are_no_checkpoints_are_refused_in_one_sentence(tmp_path):
    whole = save(tmp_path, encoder()).read_bytes()
    contents = {
        "junk.pth": b"junk" * 100,
        "page.pth": b"<!DOCTYPE html><html>not found</html>",
        "half.pth": whole[: len(whole) // 2],
        "no_end.pth": whole[:-10],
        "zeros.pth": bytes(5000),
        "half.safetensors": b"\x10" * 20,
        "byte.pth": b"\x80",
        "noise.pth": np.random.default_rng(0).bytes(3000),
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        message = refusal(read_checkpoint, tmp_path / name)
        assert name in message and "not a readable checkpoint" in message
    (tmp_path / "empty.pth").write_bytes(b"")
    assert "is empty" in refusal(read_checkpoint, tmp_path / "empty.pth")
    assert "is a directory" in refusal(read_checkpoint, tmp_path)
    missing = tmp_path / "missing.pth"
    assert str(missing) in (message := refusal(read_checkpoint, missing)) and "does not exist" in message
    assert "not a dict" in refusal(read_checkpoint, save(tmp_path, torch.zeros(3), "tensor.pth"))


def test_safetensors_load_when_installed_and_name_the_install_when_not(tmp_path, monkeypatch):
    path = tmp_path / "vit.safetensors"
    path.write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "safetensors.torch", None)
        assert "pip install safetensors" in refusal(read_checkpoint, path)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(encoder() | head(), path)
    model = vit()
    assert not load_pretrained(model, path, verbose=False).missing
    assert_same(model.state_dict(), encoder() | head())


# ---- damaged and crafted files


def test_every_flipped_bit_of_a_record_is_noticed(tmp_path):
    path = save(tmp_path, {"model": encoder(), "args": {"img_size": [16, 16]}})
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        records = [record for record in archive.infolist() if record.file_size > 8]
    for record in records:
        names = int.from_bytes(whole[record.header_offset + 26:record.header_offset + 28], "little")
        extra = int.from_bytes(whole[record.header_offset + 28:record.header_offset + 30], "little")
        damaged = bytearray(whole)
        damaged[record.header_offset + 30 + names + extra + record.file_size // 2] ^= 4
        path.write_bytes(damaged)
        message = refusal(read_checkpoint, path)
        assert "damaged" in message and record.filename in message and str(path) in message
    path.write_bytes(whole)
    assert_same(read_checkpoint(path)["model"], encoder())


def test_files_that_torch_was_told_to_write_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path, encoder())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(path), encoder())


def test_an_empty_dict_is_refused(tmp_path):
    assert "empty" in refusal(read_checkpoint, save(tmp_path, {}))
    assert "no tensors" in refusal(load_pretrained, vit(), {})


def quantized(weight):
    with warnings.catch_warnings():  # torch will drop quantized tensors one day
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(weight, 0.1, 0, torch.qint8)


def nested(weight):
    return torch.nested.nested_tensor([weight, weight])


def with_a_number(number):
    def changed(weight):
        weight = weight.clone()
        weight.view(-1)[3] = number
        return weight

    return changed


@pytest.mark.filterwarnings("ignore:.*(prototype|beta state|quantized).*")
@pytest.mark.parametrize(
    "change",
    [
        with_a_number(float("nan")),
        with_a_number(float("inf")),
        with_a_number(-float("inf")),
        lambda weight: with_a_number(float("inf"))(weight.half()),
        lambda weight: weight.to_sparse(),
        lambda weight: weight.to_sparse_csr(),
        quantized,
        nested,
        lambda weight: weight.to("meta"),
        lambda weight: weight.to(torch.complex64),
        lambda weight: weight > 0,
        lambda weight: weight.to(torch.int8),
        lambda weight: weight[:1, :1].clone().expand(weight.shape),
        lambda weight: weight[0, 0],
        lambda weight: weight[0],
        lambda weight: weight[:, :0],
    ],
)
@pytest.mark.parametrize("name", ["blocks.0.attn.proj.weight", "pos_embed"])
def test_a_tensor_that_is_no_dense_finite_matrix_of_numbers_is_refused_by_name(change, name):
    model = vit()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = encoder() | head()
    state[name] = change(state[name])
    assert name in refusal(load_pretrained, model, {"model": state})
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("shape", [(), (0,), (52,), (0, 2), (52, 2, 1)])
def test_a_bias_table_without_the_axes_of_one_is_refused(shape):
    state = beit() | {"rel_pos_bias.relative_position_bias_table": torch.zeros(shape)}
    for call in (convert_official, encoder_options):
        assert "relative_position_bias_table" in refusal(call, state)
    model = vit(rel_pos_bias="shared", num_classes=0, **BEIT)
    assert "relative_position_bias_table" in refusal(load_pretrained, model, state)


def test_other_shapes_of_q_bias_and_v_bias_and_of_distilled_positions_are_refused():
    for value in (torch.zeros(()), torch.zeros(8), torch.zeros(16, 1)):
        assert "blocks.0.attn.q" in refusal(convert_official, beit() | {"blocks.0.attn.v_bias": value})
    distilled = encoder(prefix=2) | {"dist_token": torch.zeros(1, 1, 16), "pos_embed": torch.zeros(16)}
    assert "pos_embed" in refusal(convert_official, distilled)


def test_a_table_of_a_billion_rows_in_four_bytes_is_refused_at_once(tmp_path):
    table = torch.zeros(1, 2).expand(10**9, 2)
    state = beit() | {"rel_pos_bias.relative_position_bias_table": table}
    path = save(tmp_path, {"model": state})
    start = time.monotonic()
    assert "relative_position_bias_table" in refusal(encoder_options, read_checkpoint(path))
    assert "relative_position_bias_table" in refusal(load_pretrained, vit(), path)
    positions = {"pos_embed": torch.zeros(1, 1, 1).expand(1, 10**14, 16)}
    assert "pos_embed" in refusal(load_pretrained, vit(), encoder() | positions)
    assert time.monotonic() - start < 1


def test_a_large_table_that_is_no_square_is_seen_in_no_time():
    start = time.monotonic()
    assert find_grid("relative_position_bias_table", torch.zeros(10**8, 1, dtype=torch.int8), (1, 1)) is None
    assert time.monotonic() - start < 1


def test_a_dict_that_holds_itself_is_refused():
    file = {"epoch": 3}
    file["model"] = file
    assert "no tensors" in refusal(load_pretrained, vit(), file)
    inner = encoder()
    inner["model"] = inner  # at its innermost it is a state dict
    assert_same(convert_official(flat_tensors(inner)), encoder())


@pytest.mark.parametrize(
    "size", ["32", 0, [0, 0], -1, 32.0, torch.tensor(32), [32, 32, 32], [], [32, "32"], [32, None], {}]
)
def test_an_image_size_that_is_none_is_refused(size):
    file = {"model": encoder(), "args": {"img_size": size}}
    assert "img_size" in refusal(load_pretrained, vit(), file)
    assert "img_size" in refusal(encoder_options, file)


@pytest.mark.parametrize("size", [16, [16], (16, 16), [16, 16], None])
def test_image_sizes_as_flags_and_models_write_them_are_accepted(size):
    report = load_pretrained(vit(), {"model": encoder(), "args": {"img_size": size}}, verbose=False)
    assert not report.resized


def test_a_file_without_a_class_token_does_not_leave_the_models_at_random():
    state = encoder(prefix=0)
    del state["cls_token"]
    message = refusal(load_pretrained, vit(), state)
    assert 'class_token=False, pool="mean"' in message
    report = load_pretrained(vit(class_token=False, pool="mean"), state, verbose=False)
    assert "pos_embed" in report.loaded
