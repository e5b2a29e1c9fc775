import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import vit
from vit import PRESETS, Attention, ViT, create_vit, relative_position_index, resize_pos_embed, sincos_pos_embed

TINY = dict(img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=3, num_heads=4)
OPTIONS = {
    "cls": dict(),
    "mean": dict(pool="mean"),
    "mean, no class token": dict(pool="mean", class_token=False),
    "fixed table": dict(pos_embed="sincos"),
    "no table": dict(pos_embed=None),
    "shared bias": dict(rel_pos_bias="shared", pos_embed=None, layer_scale=0.1),
    "block bias": dict(rel_pos_bias="block", pos_embed=None, layer_scale=0.1, pool="mean"),
    "features": dict(num_classes=0),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def tiny(**options):
    """A small model in which nothing is zero or one, so that no parameter can hide."""
    torch.manual_seed(0)
    model = ViT(**{**TINY, **options})
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def images(*size, batch=3, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or (32, 32)), generator=generator)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------- presets and sizes


@pytest.mark.parametrize("name", PRESETS)
@every_option
def test_every_preset_builds_on_the_meta_device_with_every_option(name, options):
    with torch.device("meta"):
        model = create_vit(name, **options)
    assert {p.device.type for p in model.parameters()} == {"meta"}


LARGE = {"vit_s54", "vit_b24", "vit_b48", "vit_l16", "vit_h14"}  # seconds each


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in PRESETS]
)
def test_every_preset_runs_on_the_meta_device(name):
    with torch.device("meta"):
        model = create_vit(name, rel_pos_bias="block")
        assert model(torch.empty(2, 3, *model.img_size)).shape == (2, 1000)
        model = create_vit(name, num_classes=0, pool="mean")
        assert model(torch.empty(2, 3, *model.img_size)).shape == (2, model.embed_dim)


@pytest.mark.parametrize("patch_size", [2, 4, 8, 16])
@pytest.mark.parametrize("in_chans", [1, 5])
def test_patch_tokens_are_the_hand_made_linear_map_of_each_patch_on_rectangles(patch_size, in_chans):
    model = tiny(img_size=(32, 48), patch_size=patch_size, in_chans=in_chans, pos_embed=None)
    imgs = images(32, 48, channels=in_chans)
    tokens, p = model.embed(imgs), patch_size
    assert tokens.shape == (3, 1 + 32 * 48 // p**2, 48)
    row, column = 1, 2
    patch = imgs[:, :, row * p : (row + 1) * p, column * p : (column + 1) * p].flatten(1)
    proj = model.patch_embed.proj
    expected = patch.double() @ proj.weight.flatten(1).T.double() + proj.bias
    close(tokens[:, 1 + row * (48 // p) + column], expected.float(), 5e-5)  # sums of up to 1,280 products
    close(tokens[:, 0], model.cls_token[0].expand(3, -1), 0)


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (8, 8), (64, 24)])
def test_rectangles_know_rows_from_columns(size):
    model = tiny(img_size=size, pos_embed="sincos")
    assert model.grid_size == (size[0] // 8, size[1] // 8)
    close(model.pos_embed[0], sincos_pos_embed(48, size[0] // 8, size[1] // 8), 0)
    assert model(images(*size)).shape == (3, 10)


def test_all_drop_path_rates_grow_linearly_to_the_last_block():
    model = ViT(**{**TINY, "depth": 5}, drop_path=0.4)
    assert [getattr(block.drop_path, "p", 0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_is_off_in_eval_and_drops_whole_samples_in_training():
    dropping, plain = tiny(drop_path=0.5), tiny()
    dropping.load_state_dict(plain.state_dict())
    imgs = images(batch=64)
    assert torch.equal(dropping(imgs), plain(imgs))
    torch.manual_seed(0)
    assert not torch.equal(dropping.train()(imgs), plain(imgs))
    # the branch is either absent or doubled: block 2 of 3 has rate 0.5, block 1 has 0.25
    block, x = dropping.blocks[2], torch.randn(64, 5, 48)
    dropped = (block(x) == x).flatten(1).all(1).float().mean()
    assert dropped == pytest.approx(0.25, abs=0.2)  # both branches gone


# ---------------------------------------------------------------------------- agreement with timm


def timm_vit(**options):
    timm_module = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(2)
    settings = {**TINY, **options}
    model = timm_module.VisionTransformer(**settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("pool, theirs", [("cls", "token"), ("mean", "avg")])
@pytest.mark.parametrize("size", [(32, 32), (16, 40)])
def test_timm_weights_load_by_key_and_give_timm_logits(pool, theirs, size):
    reference, model = timm_vit(global_pool=theirs, img_size=size), tiny(pool=pool, img_size=size)
    model.load_state_dict(reference.state_dict(), strict=True)
    imgs = images(*size)
    close(model(imgs), reference(imgs))


@pytest.mark.parametrize("layers", [[0, 2], [2, 1], [-1], [-3, 1]])
def test_chosen_layers_are_the_ones_timm_returns(layers):
    reference, model = timm_vit(), tiny()
    model.load_state_dict(reference.state_dict(), strict=True)
    indices = [i % 3 for i in layers]
    theirs = reference.forward_intermediates(
        images(), indices=indices, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    theirs = dict(zip(sorted(indices), [torch.cat([prefix, tokens], 1) for tokens, prefix in theirs]))
    ours = model.forward_features(images(), layers=layers)
    assert len(ours) == len(layers)
    for i, feature in zip(indices, ours):
        close(feature, theirs[i])


def timm_beit(pool, **options):
    timm_module = pytest.importorskip("timm.models.beit")
    torch.manual_seed(3)
    model = timm_module.Beit(
        **TINY,
        use_abs_pos_emb=False,
        init_values=0.1,
        qkv_bias=True,
        global_pool="avg" if pool == "mean" else "token",
        **options,
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.mark.parametrize("pool", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["block", "shared"])
def test_beit_with_relative_position_bias_gives_timm_logits(pool, kind):
    reference = timm_beit(
        pool, **{"block": dict(use_rel_pos_bias=True), "shared": dict(use_shared_rel_pos_bias=True)}[kind]
    )
    model = tiny(pool=pool, pos_embed=None, rel_pos_bias=kind, layer_scale=0.1)
    state = {}
    for key, value in reference.state_dict().items():
        if key.endswith("q_bias"):  # BEiT learns no bias for k
            value = torch.cat(
                [value, torch.zeros_like(value), reference.state_dict()[key.replace("q_bias", "v_bias")]]
            )
            state[key.replace("q_bias", "qkv.bias")] = value
        elif not key.endswith(("v_bias", "k_bias", "relative_position_index")):
            state[key] = value
    model.load_state_dict(state, strict=True)
    close(model(images()), reference(images()))


@pytest.mark.parametrize("new", [(6, 5), (9, 12)])
def test_enlarging_the_position_table_agrees_with_timm(new):
    layers = pytest.importorskip("timm.layers")
    table = torch.randn(1, 1 + 4 * 5, 48)
    theirs = layers.resample_abs_pos_embed(table, new_size=new, old_size=(4, 5), num_prefix_tokens=1, antialias=False)
    close(resize_pos_embed(table, (4, 5), new), theirs)


# ---------------------------------------------------------------------------- attention


@pytest.mark.parametrize("kind", [None, "shared", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_and_explicit_attention_agree_and_rows_sum_to_one(kind, dtype):
    model = tiny(rel_pos_bias=kind, img_size=(24, 40)).to(dtype)
    imgs = images(24, 40).to(dtype)
    tokens, attns = model.forward_features(imgs, return_attn=True)
    close(tokens, model.forward_features(imgs))
    assert len(attns) == 3
    for attn in attns:
        assert attn.shape == (3, 4, 16, 16) and attn.min() >= 0
        close(attn.sum(-1), torch.ones_like(attn[..., 0]))


def test_attention_weights_match_a_loop_over_heads():
    torch.manual_seed(0)
    attn, x = Attention(12, 3), torch.randn(1, 5, 12)
    q, k, v = attn.qkv(x)[0].split(12, dim=1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        heads.append(torch.softmax(q[:, part] @ k[:, part].T / 2, dim=1) @ v[:, part])
    close(attn(x)[0], attn.proj(torch.cat(heads, dim=1)))


@pytest.mark.parametrize("kind", ["shared", "block"])
def test_a_relative_bias_changes_where_the_model_looks(kind):
    model = tiny(rel_pos_bias=kind)
    before = model.forward_features(images(), return_attn=True)[1][0]
    table = (model.rel_pos_bias if kind == "shared" else model.blocks[0].attn).relative_position_bias_table
    with torch.no_grad():
        table[:, 1] -= 1e4
        table[model_offset(model, 0, 1), 1] += 2e4  # head 1 must now look one patch to the right
    after = model.forward_features(images(), return_attn=True)[1][0]
    close(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    close(after[:, 1, 1, 2], torch.ones(3))  # patch (0, 0) sees (0, 1)
    close(after[:, 1, 6, 7], torch.ones(3))  # patch (1, 1) sees (1, 2)


def model_offset(model, down, right):
    """Row of the bias table for a key this far down and right of the query."""
    gh, gw = model.grid_size
    return (gh - 1 - down) * (2 * gw - 1) + gw - 1 - right


def test_the_relative_position_index_of_a_2x2_grid_is_the_hand_made_one():
    # offsets (dy, dx) = query - key, row-major over dy, dx in -1 .. 1: (0, 0) is row 4; then the class token's rows
    expected = [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1], [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert relative_position_index(2, 2).tolist() == expected


def test_the_relative_position_index_of_a_rectangle_is_one_row_per_offset():
    index = relative_position_index(2, 3)
    assert index.shape == (7, 7) and index.max() == 3 * 5 + 2
    place = [(y, x) for y in range(2) for x in range(3)]
    rows = {}
    for i, (y, x) in enumerate(place):
        for j, (v, u) in enumerate(place):
            rows.setdefault((y - v, x - u), set()).add(index[1 + i, 1 + j].item())
    assert all(len(found) == 1 for found in rows.values())
    assert sorted(found.pop() for found in rows.values()) == list(range(15))


# ---------------------------------------------------------------------------- position tables


def mae_table(dim, gh, gw):
    """The formula published with MAE, in numpy: meshgrid with w first, the first half from grid[0]."""

    def one_axis(width, position):
        omega = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float64) / (width / 2.0))
        out = np.einsum("m,d->md", position.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(gw, dtype=np.float64), np.arange(gh, dtype=np.float64)), axis=0)
    table = np.concatenate([one_axis(dim // 2, grid[0]), one_axis(dim // 2, grid[1])], axis=1)
    return torch.from_numpy(np.concatenate([np.zeros([1, dim]), table], axis=0)).float()


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (14, 14), (3, 7), (7, 3)])
@pytest.mark.parametrize("dim", [4, 96, 768])
def test_the_sincos_table_is_the_formula_of_mae(grid, dim):
    close(sincos_pos_embed(dim, *grid), mae_table(dim, *grid), 1e-7)
    close(sincos_pos_embed(dim, *grid, cls_token=False), mae_table(dim, *grid)[1:], 1e-7)


def test_the_sincos_table_of_a_2x3_grid_is_the_hand_computed_one():
    table = sincos_pos_embed(
        8, 2, 3
    )  # frequencies 1 and 1 / 100; column sines, column cosines, row sines, row cosines
    assert table.shape == (7, 8)
    assert table[0].tolist() == [0] * 8
    assert table[1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    row, column = 1, 2
    expected = [0.9092974, 0.0199987, -0.4161468, 0.9998000, 0.8414710, 0.0099998, 0.5403023, 0.9999500]
    close(table[1 + 3 * row + column], torch.tensor(expected), 1e-6)


def test_a_width_that_no_sincos_table_fits_is_refused():
    with pytest.raises(ValueError, match="multiple of 4.*6"):
        sincos_pos_embed(6, 2, 2)


@pytest.mark.parametrize("kind", ["learned", "sincos"])
@pytest.mark.parametrize("size", [(48, 48), (16, 64), (24, 32)])
@pytest.mark.parametrize("options", [dict(), dict(pool="mean", class_token=False)], ids=["cls", "no cls"])
def test_another_input_size_equals_a_model_built_for_it_with_the_resized_table(kind, size, options):
    small, prefix = tiny(pos_embed=kind, **options), 0 if options else 1
    large = tiny(pos_embed=kind, img_size=size, **options)
    state = dict(small.state_dict())
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], (4, 4), large.grid_size, prefix)
    assert state["pos_embed"].shape[1] == prefix + large.grid_size[0] * large.grid_size[1]
    large.load_state_dict(state, strict=True)
    close(small(images(*size)), large(images(*size)))


def test_resizing_a_table_to_its_own_grid_leaves_it_and_keeps_the_class_token():
    table = torch.randn(1, 1 + 12, 8)
    close(resize_pos_embed(table, (3, 4), (3, 4)), table, 1e-6)
    assert torch.equal(resize_pos_embed(table, (3, 4), (5, 9))[:, 0], table[:, 0])


def test_a_constant_table_stays_constant_when_resized():
    table = torch.arange(8.0).expand(1, 1 + 12, 8)
    close(resize_pos_embed(table, (3, 4), (6, 5)), torch.arange(8.0).expand(1, 31, 8))


def test_a_fixed_table_is_frozen_and_a_learned_one_is_not():
    assert not tiny(pos_embed="sincos").pos_embed.requires_grad
    assert tiny().pos_embed.requires_grad
    assert tiny(pos_embed=None).pos_embed is None


# ---------------------------------------------------------------------------- features and head


@every_option
def test_features_are_deterministic_and_the_head_reads_them(options):
    model = tiny(**options)
    tokens = model.forward_features(images())
    assert torch.equal(tokens, model.forward_features(images()))
    pooled = tokens[:, 0] if model.pool == "cls" else tokens[:, int(model.cls_token is not None) :].mean(1)
    close(model(images()), model.head(model.fc_norm(pooled)))
    assert model(images()).shape == (3, options.get("num_classes", 10) or 48)


@every_option
def test_each_image_is_treated_alone(options):
    model = tiny(**options)
    close(model(images())[1:2], model(images()[1:2]))


def test_layers_are_raw_block_outputs_and_negative_ones_count_from_the_end():
    model = tiny()
    first, last = model.forward_features(images(), layers=[0, -1])
    close(first, model.blocks[0](model.embed(images())), 1e-6)
    close(model.norm(last), model.forward_features(images()), 1e-6)
    assert [f.equal(g) for f, g in zip(model.forward_features(images(), layers=[-3, -1]), (first, last))] == [
        True,
        True,
    ]
    assert model.forward_features(images(), layers=[]) == []


def test_attention_comes_for_the_chosen_layers_only():
    model = tiny()
    features, attns = model.forward_features(images(), return_attn=True, layers=[2, 0])
    all_features, all_attns = model.forward_features(images(), return_attn=True, layers=[0, 1, 2])
    assert len(features) == len(attns) == 2
    for mine, index in zip((0, 1), (2, 0)):
        close(attns[mine], all_attns[index])
        close(features[mine], all_features[index])


@pytest.mark.parametrize("layers", [[3], [-4], [0, 7]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(IndexError):
        tiny().forward_features(images(), layers=layers)


def test_reset_classifier_gives_a_fresh_head_and_exactly_one_last_norm():
    model = tiny()
    model.reset_classifier(7)
    assert model(images()).shape == (3, 7) and model.pool == "cls" and model.num_classes == 7
    norm = model.norm
    model.reset_classifier(5, pool="cls")
    assert model.norm is norm  # the trained norm is not thrown away
    model.reset_classifier(4, pool="mean")
    assert model(images()).shape == (3, 4)
    assert isinstance(model.norm, torch.nn.Identity) and isinstance(model.fc_norm, torch.nn.LayerNorm)
    model.reset_classifier(0)
    assert model(images()).shape == (3, 48) and model.pool == "mean"
    assert not any(key.startswith(("head", "norm.")) for key in model.state_dict())
    assert model.double().reset_classifier(0, "cls") is None


@every_option
def test_every_trainable_parameter_gets_a_gradient(options):
    model = tiny(**options).train()
    model(images()).square().sum().backward()
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("kind", [None, "shared", "block"])
def test_checkpointing_changes_neither_values_nor_gradients(kind):
    plain, saving = tiny(rel_pos_bias=kind).train(), tiny(rel_pos_bias=kind, checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        model(images()).square().sum().backward()
    assert torch.equal(plain(images()), saving(images()))
    for (name, p), q in zip(plain.named_parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text: f"{name}: {text}")


def test_checkpointing_draws_the_same_drop_path_twice():
    plain, saving = tiny(drop_path=0.5).train(), tiny(drop_path=0.5, checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    for model in (plain, saving):
        torch.manual_seed(4)
        model(images(batch=8)).square().sum().backward()
    for p, q in zip(plain.parameters(), saving.parameters()):
        torch.testing.assert_close(p.grad, q.grad)


def test_weights_start_as_in_mae():
    torch.manual_seed(0)
    model = create_vit("vit_ti16")
    qkv, patch = model.blocks[3].attn.qkv, model.patch_embed.proj.weight
    assert qkv.weight.abs().max() <= math.sqrt(6 / (192 + 3 * 192))  # Xavier, fused qkv as one matrix
    assert qkv.weight.std().item() == pytest.approx(math.sqrt(2 / (4 * 192)), rel=0.02)
    assert not qkv.bias.any() and not model.patch_embed.proj.bias.any() and not model.head.bias.any()
    assert patch.std().item() == pytest.approx(math.sqrt(2 / (192 + 768)), rel=0.02)  # as if the patch were a vector
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)


def test_layer_scale_starts_where_told_and_zero_switches_the_blocks_off():
    model = ViT(**TINY, layer_scale=0.0)
    close(model.forward_blocks(model.embed(images())), model.embed(images()), 0)
    assert ViT(**TINY, layer_scale=0.3).blocks[1].gamma_2.tolist() == pytest.approx([0.3] * 48)
    assert ViT(**TINY).blocks[0].gamma_1 is None


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(img_size=30, patch_size=4), r"img_size 30 .*not a multiple of patch_size 4; try 28 or 32"),
        (dict(img_size=(32, 30), patch_size=4), r"img_size 30 .*patch_size 4; try 28 or 32"),
        (dict(img_size=(30, 32), patch_size=4), r"img_size 30 .*patch_size 4; try 28 or 32"),
        (dict(img_size=4, patch_size=8), r"4 .*patch_size 8; try 8"),
        (dict(embed_dim=50, num_heads=4), r"embed_dim 50 .*num_heads 4"),
        (dict(pos_embed="sine"), r"pos_embed 'sine' .*learned"),
        (dict(rel_pos_bias=True), r"rel_pos_bias True .*shared"),
        (dict(pool="max"), r"pool 'max' .*cls"),
        (dict(class_token=False), r"class token"),
        (dict(pos_embed="sincos", embed_dim=50, num_heads=5), r"multiple of 4.*50"),
    ],
)
def test_wrong_settings_are_refused_with_a_way_out(wrong, words):
    with pytest.raises(ValueError, match=words):
        ViT(**{**TINY, **wrong})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="vit_b15.*vit_b16"):
        create_vit("vit_b15")


@pytest.mark.parametrize(
    "imgs, words",
    [
        (torch.zeros(2, 3, 30, 32), r"30.*patch_size 8; try 24 or 32"),
        (torch.zeros(2, 3, 32, 4), r"img_size 4 .*patch_size 8; try 8"),
    ],
)
def test_wrong_images_are_refused(imgs, words):
    with pytest.raises(ValueError, match=words):
        tiny()(imgs)


@pytest.mark.parametrize("kind", ["shared", "block"])
def test_a_relative_bias_refuses_another_input_size(kind):
    with pytest.raises(RuntimeError):
        tiny(rel_pos_bias=kind)(images(48, 32))


# ---------------------------------------------------------------------------- export, compile, bf16


def test_an_exported_classifier_agrees():
    model = tiny()
    program = torch.export.export(model, (images(),))
    close(program.module()(images()), model(images()), 1e-6)


def test_an_exported_classifier_can_take_any_batch_size():
    model = tiny()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    close(program.module()(images(batch=7)), model(images(batch=7)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [dict(), dict(rel_pos_bias="block", pool="mean", drop_path=0.1)], ids=["plain", "beit"]
)
def test_a_compiled_model_agrees(options):
    model = tiny(**options)
    compiled = torch.compile(model, fullgraph=True)
    close(compiled(images()), model(images()))


@every_option
def test_bf16_autocast_on_the_cpu_is_close_to_fp32(options):
    torch.manual_seed(0)
    model = ViT(**{**TINY, **options})
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images())
        loss = rough.float().square().mean()
    loss.backward()
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_the_bf16_kernel_and_its_fp32_detour_agree():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 20, 16).bfloat16()
    bias = torch.randn(4, 20, 20)
    close(
        vit.attention(q, k, v, bias).float(),
        F.scaled_dot_product_attention(q, k, v, attn_mask=bias.bfloat16()).float(),
        0.05,
    )
    assert vit.attention(q, k, v).dtype == torch.bfloat16
    long = torch.randn(3, 1, 1, 600, 8).bfloat16()
    assert torch.equal(vit.attention(*long), F.scaled_dot_product_attention(*long.float()).bfloat16())


@pytest.mark.parametrize("rel_pos_bias", [None, "shared", "block"])
def test_a_bias_given_to_the_blocks_joins_the_models_own(rel_pos_bias):
    torch.manual_seed(0)
    model = ViT(
        img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=0, rel_pos_bias=rel_pos_bias
    ).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias_table"):
            torch.nn.init.normal_(p)
    x = model.embed(torch.randn(2, 3, 8, 8))
    alone = torch.full((5, 5), -torch.inf).fill_diagonal_(0)  # every token sees itself only
    others = x.clone()
    others[:, 1:] = torch.randn(2, 4, 16)
    assert torch.equal(model.forward_blocks(x, bias=alone)[:, 0], model.forward_blocks(others, bias=alone)[:, 0])
    assert not torch.allclose(model.forward_blocks(x)[:, 0], model.forward_blocks(others)[:, 0])
    torch.testing.assert_close(model.forward_blocks(x, bias=torch.zeros(5, 5)), model.forward_blocks(x))


def test_dropping_the_class_token_leaves_the_patches_positions_and_pools_their_mean():
    model = ViT(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=3)
    before = model.pos_embed.detach().clone()
    model.drop_class_token()
    assert torch.equal(model.pos_embed, before[:, 1:]) and model.pos_embed.requires_grad and model.pool == "mean"
    assert model.forward_features(torch.randn(2, 3, 8, 8)).shape == (2, 4, 16) and model(
        torch.randn(2, 3, 8, 8)
    ).shape == (2, 3)
    model.drop_class_token()  # nothing left to drop
    with pytest.raises(ValueError, match="rel_pos_bias=None"):
        ViT(img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, rel_pos_bias="block").drop_class_token()


def test_the_jax_start_has_its_standard_deviations():
    torch.manual_seed(0)
    dim = 192
    for weight_init, pos_embed, kernel in (("mae", "sincos", 2 / (4 * dim)), ("jax", "learned", 2 / (2 * dim))):
        model = ViT(img_size=64, patch_size=4, embed_dim=dim, depth=1, num_heads=3, num_classes=10,
                    weight_init=weight_init, pos_embed=pos_embed)
        q, k, v = model.blocks[0].attn.qkv.weight.chunk(3)  # Xavier: of the fused matrix, or of each
        for matrix in (q, k, v):
            assert matrix.std().item() == pytest.approx(kernel**0.5, rel=0.02)
        assert matrix.abs().max().item() <= (3 * kernel) ** 0.5 + 1e-6  # uniform
        if weight_init == "jax":
            assert model.pos_embed.std().item() == pytest.approx(0.02, rel=0.03)
            assert not model.cls_token.any() and not model.head.weight.any()
        else:
            assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2) and model.head.weight.any()
