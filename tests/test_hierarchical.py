from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import hierarchical
from checkpoints import load_pretrained
from hierarchical import PRESETS, HierarchicalViT, WindowBlock, create_mixmim, cut_windows
from masking import enlarge_mask
from vit import attention, resize_pos_embed, sincos_pos_embed

SMALL = dict(
    patch_size=4,
    embed_dim=16,
    depths=(2, 2),
    num_heads=(2, 4),
    window_size=(4, 4),
    num_classes=0,
)


def swin(**options):
    torch.manual_seed(0)
    return HierarchicalViT(**{**SMALL, **options})


HIERARCHICAL = {  # all small; the map of the last stage in brackets
    "demo": lambda: create_mixmim("mixmim_demo", embed_dim=16),  # (4 x 4)
    "shifted": lambda: swin(img_size=32, window_size=(4, 2), shift=True),  # maps 8 x 8 and (4 x 4)
    "padded": lambda: swin(img_size=(24, 40), window_size=(4, 3)),  # maps 6 x 10 and (3 x 5)
    "padded and shifted": lambda: swin(img_size=(24, 40), window_size=(4, 2), shift=True),
    "window over the map": lambda: swin(img_size=(32, 16), window_size=(14, 7)),  # maps 8 x 4 and (4 x 2)
}


def stir(model):
    """Move all trainable parameters away from their initial values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def images(encoder, batch=4, channels=3):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, channels, *encoder.img_size, generator=generator)


def one_line(error):
    return error.type is ValueError and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- against other implementations


def ours_from_timm(state_dict):
    """timm's Swin under our names; its merging opens the next stage, ours closes the one before."""
    state = {}
    for name, value in state_dict.items():
        stage, _, part = name.removeprefix("layers.").partition(".")
        if part.startswith("downsample."):
            name = f"layers.{int(stage) - 1}.{part}"
        if not name.endswith(("relative_position_index", "attn_mask")):
            state[name.replace("head.fc.", "head.")] = value
    return state


@pytest.mark.parametrize("size", [64, (32, 64)])
def test_with_shift_and_without_positions_it_is_timms_swin(size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = dict(img_size=size, num_classes=10, embed_dim=24, depths=(2, 2, 3), num_heads=(2, 4, 8))
    expected = timm.models.swin_transformer.SwinTransformer(**options, window_size=4, drop_path_rate=0.0)
    expected = stir(expected).eval()
    ours = swin(**options, window_size=(4, 4, 4), shift=True).eval()
    state = ours_from_timm(expected.state_dict())
    state["absolute_pos_embed"] = torch.zeros_like(ours.absolute_pos_embed)
    ours.load_state_dict(state, strict=True)

    maps = []
    for stage in expected.layers:
        stage.register_forward_hook(lambda _, inputs, output: maps.append(output))
    imgs = images(ours, 2)
    logits = expected(imgs)
    for a, b in zip(ours.forward_maps(imgs), maps, strict=True):
        torch.testing.assert_close(a.permute(0, 2, 3, 1), b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(imgs), logits, atol=1e-5, rtol=1e-5)


def visible_from(place, size, window, shifted, source):
    """The tokens that the token at (row, column) may attend to, by the definition."""
    (r, c), (wh, ww) = place, window
    down = wh // 2 if shifted and size[0] > wh else 0
    right = ww // 2 if shifted and size[1] > ww else 0
    tokens = []
    for a, b in product(range(size[0]), range(size[1])):
        same_window = (a - down) // wh == (r - down) // wh and (b - right) // ww == (c - right) // ww
        if same_window and (source is None or source[a, b] == source[r, c]):
            tokens.append((a, b))
    return tokens


def naive_block(block, x, window, shifted, source):
    """One map (H, W, D), token by token."""
    size = x.shape[:2]
    window = (min(window[0], size[0]), min(window[1], size[1]))
    th, tw = block.attn.window
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
    y = torch.empty_like(x)
    for r, c in product(range(size[0]), range(size[1])):
        tokens = visible_from((r, c), size, window, shifted, source)
        rows = [(r - a + th - 1) * (2 * tw - 1) + c - b + tw - 1 for a, b in tokens]
        bias = block.attn.relative_position_bias_table[rows]
        keys = torch.stack([k[token] for token in tokens])  # (n, h, d)
        values = torch.stack([v[token] for token in tokens])
        logits = (q[r, c] * keys).sum(-1) * q.shape[-1] ** -0.5
        weights = (logits + bias).softmax(0)
        y[r, c] = (weights[..., None] * values).sum(0).flatten()
    x = x + block.attn.proj(y)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size, window, table", [
    ((6, 10), (4, 4), (4, 4)),  # padding on both sides
    ((8, 4), (4, 4), (4, 4)),  # no padding; nothing to shift in the width
    ((5, 7), (3, 2), (3, 2)),  # windows that are not square
    ((3, 9), (4, 4), (4, 4)),  # lower than the window
    ((2, 3), (4, 4), (4, 4)),  # inside one window
    ((7, 7), (4, 4), (6, 5)),  # a table for larger windows
], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sources", [0, 1, 2])  # none, one for the batch, one per image
def test_a_window_block_is_attention_among_the_tokens_of_each_window(size, window, table, shifted, sources):
    torch.manual_seed(0)
    block = stir(WindowBlock(8, 2, table, mlp_ratio=2, drop_path=0.0)).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    source = torch.rand(sources, *size) < 0.5 if sources else None
    ours = block(x, cut_windows(*size, window, shifted, source, x.device))
    for k in range(2):
        expected = naive_block(block, x[k], window, shifted, source[k % sources] if sources else None)
        torch.testing.assert_close(ours[k], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (1, 4, 600, 4)], ids=str)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_trainable_bias_gives_the_values_and_gradients_of_the_fused_attention(shape, dtype, close, masked):
    def fused(q, k, v, bias):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)

    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(shape) for _ in range(4))
    bias = torch.randn(1, shape[1], shape[2], shape[2])
    if masked:
        bias[..., 1:, 0] = -torch.inf  # only the first token attends to the first
    results = []
    for function in (attention, fused):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = function(*(x.to(dtype) for x in leaves[:3]), leaves[3])
        (out.float() * weight).sum().backward()
        results.append((out, [x.grad for x in leaves]))
    (ours, grads), (expected, expected_grads) = results
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), expected.float(), atol=close, rtol=close)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max().item()
        torch.testing.assert_close(grad, expected_grad, atol=close * scale, rtol=close)


# ---------------------------------------------------------------------------- windows and sources


def test_the_stages_keep_two_sources_apart():
    encoder = stir(swin(img_size=(24, 40), window_size=(4, 2), shift=True))
    source = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.randn(2, 60, 16)
    y = torch.where(enlarge_mask(source, 2).flatten(1)[..., None], torch.randn_like(x), x)
    before = encoder.forward_stages(x, (6, 10), source)
    after = encoder.forward_stages(y, (6, 10), source)
    for scale, a, b in zip((2, 1), before, after, strict=True):
        same = (a == b).all(-1)
        assert torch.equal(same, ~enlarge_mask(source, scale).expand(2, -1, -1))
    without = encoder.forward_stages(x, (6, 10))[-1] == encoder.forward_stages(y, (6, 10))[-1]
    assert not without.any(-1).all()


def test_one_source_everywhere_is_no_source():
    encoder = stir(HIERARCHICAL["padded and shifted"]())
    x = encoder.patch_embed(images(encoder))
    everything = torch.ones(1, 3, 5, dtype=torch.bool)
    one_source = encoder.forward_stages(x, (6, 10), everything)[-1]
    torch.testing.assert_close(one_source, encoder.forward_stages(x, (6, 10))[-1])


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_larger_than_the_map_is_the_map(shift):
    torch.manual_seed(0)
    large = swin(img_size=32, window_size=(14, 14), shift=shift)
    fitting = swin(img_size=32, window_size=(8, 4), shift=shift)
    tables = [stage.blocks[0].attn.relative_position_bias_table.shape for stage in large.layers]
    assert tables == [(15 * 15, 2), (7 * 7, 4)]  # 2 x 8 - 1 and 2 x 4 - 1 offsets
    fitting.load_state_dict(large.state_dict(), strict=True)
    assert torch.equal(large(images(large)), fitting(images(large)))
    tall = swin(img_size=(32, 16), window_size=(6, 6))
    assert [stage.window for stage in tall.layers] == [(6, 4), (4, 2)]


@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
@pytest.mark.parametrize("shift", [False, True])
def test_another_input_size_equals_a_model_built_for_it(size, shift):
    small = stir(swin(img_size=size, num_classes=10, shift=shift))
    large = swin(img_size=(96, 64), num_classes=10, shift=shift)
    report = load_pretrained(large, small.state_dict(), verbose=False, grid=small.grid_size)
    assert report.resized == ["absolute_pos_embed"] and not report.missing and not report.skipped
    imgs = images(large, 2)
    torch.testing.assert_close(small(imgs), large(imgs), atol=1e-6, rtol=1e-6)


def test_a_map_smaller_than_the_window_reads_the_middle_of_the_table():
    large = stir(swin(img_size=64, window_size=(16, 8)))
    small = swin(img_size=(32, 48), window_size=(16, 8))
    state = dict(large.state_dict())
    state["absolute_pos_embed"] = resize_pos_embed(state["absolute_pos_embed"], (16, 16), (8, 12), prefix=0)
    for s, i in product(range(2), range(2)):
        w, (wh, ww) = large.layers[s].window[0], small.layers[s].window
        name = f"layers.{s}.blocks.{i}.attn.relative_position_bias_table"
        table = state[name].view(2 * w - 1, 2 * w - 1, -1)  # offsets -(w - 1) .. w - 1
        middle = table[w - wh:w + wh - 1, w - ww:w + ww - 1]
        state[name] = middle.flatten(0, 1)
    small.load_state_dict(state, strict=True)
    imgs = images(small, 2)
    torch.testing.assert_close(large(imgs), small(imgs), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rows", [1, 4])  # one source for the batch, one per image
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_masks_are_made_once_per_stage_and_kind_and_not_repeated_over_the_batch(name, rows, monkeypatch):
    cuts, biases = [], []

    def cut(height, width, window, shifted, source, device):
        cuts.append(shifted)
        return cut_windows(height, width, window, shifted, source, device)

    def attend(q, k, v, bias=None):
        biases.append(bias.shape)
        return attention(q, k, v, bias)

    monkeypatch.setattr(hierarchical, "cut_windows", cut)
    monkeypatch.setattr(hierarchical, "attention", attend)
    encoder = HIERARCHICAL[name]()
    imgs, (gh, gw) = images(encoder), encoder.grid_size
    scale = encoder.stride // encoder.patch_size
    source = torch.rand(rows, gh // scale, gw // scale) < 0.5
    encoder.forward_stages(encoder.patch_embed(imgs), (gh, gw), source)
    kinds = [False, True] if "shifted" in name else [False]
    assert cuts == kinds * len(encoder.layers)
    assert len(biases) == sum(encoder.depths)
    assert all(len(shape) == 4 and shape[0] == rows for shape in biases)

    biases.clear()
    encoder(imgs)
    assert all(len(shape) == 3 or shape[0] == 1 for shape in biases)  # a classifier's bias: no batch either


# ---------------------------------------------------------------------------- the encoder


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 5])
def test_maps_have_the_shapes_of_their_stages_and_end_in_the_features(patch_size, channels):
    sizes = dict(img_size=(8 * patch_size, 12 * patch_size), patch_size=patch_size, in_chans=channels)
    encoder = stir(swin(**sizes, depths=(1, 1, 2), num_heads=(1, 2, 4), window_size=(4, 4, 2), num_classes=7))
    imgs = images(encoder, 2, channels)
    maps = encoder.forward_maps(imgs)
    assert [m.shape for m in maps] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert (encoder.stride, encoder.num_features, encoder.grid_size) == (4 * patch_size, 64, (8, 12))
    features = encoder.forward_features(imgs)
    assert torch.equal(features, encoder.norm(maps[-1].flatten(2).mT)) and features.shape == (2, 6, 64)
    assert torch.equal(encoder(imgs), encoder.head(features.mean(1))) and encoder(imgs).shape == (2, 7)
    encoder.reset_classifier(0)
    assert torch.equal(encoder(imgs), features.mean(1))


@pytest.mark.parametrize("preset, stride, width, grid", [
    ("mixmim_b", 32, 1024, (56, 56)),
    ("mixmim_l", 32, 1536, (56, 56)),
    ("mixmim_h", 32, 2816, (56, 56)),
    ("mixmim_demo", 16, 192, (16, 16)),
])
def test_presets_build_on_the_meta_device(preset, stride, width, grid):
    with torch.device("meta"):
        encoder = create_mixmim(preset)
    assert all(p.is_meta for p in encoder.parameters()) and len(PRESETS) == 4
    assert (encoder.stride, encoder.num_features, encoder.grid_size) == (stride, width, grid)


@pytest.mark.parametrize("name", HIERARCHICAL)
def test_its_forward_creates_no_tensor_on_the_cpu(name):
    with torch.device("meta"):
        encoder = HIERARCHICAL[name]()
    height, width = encoder.img_size
    with FakeTensorMode(allow_non_fake_inputs=True):
        encoder.to_empty(device="cuda")
        for size in ((height, width), (2 * height, 2 * width)):
            imgs = torch.rand(2, 3, *size, device="cuda")
            assert encoder(imgs).device.type == "cuda"


def test_drop_path_grows_linearly_from_zero_over_all_stages():
    encoder = swin(depths=(2, 3), drop_path=0.4)
    rates = [getattr(block.drop_path, "p", 0.0) for stage in encoder.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert isinstance(swin().layers[1].blocks[1].drop_path, torch.nn.Identity)


def test_positions_are_the_fixed_sincos_table_and_stay():
    encoder = stir(swin(img_size=(24, 40), num_classes=10))
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen == ["absolute_pos_embed"]
    assert torch.equal(encoder.absolute_pos_embed[0], sincos_pos_embed(16, 6, 10, cls_token=False))


def test_an_official_fine_tuning_state_loads_into_another_size():
    trained, model = stir(swin(img_size=32, window_size=(8, 4))), swin(img_size=64, num_classes=10)
    state = trained.state_dict()
    for i in range(2):
        state[f"layers.0.blocks.{i}.attn.relative_position_index"] = torch.zeros(64, 64, dtype=torch.long)
    head = model.head.weight.clone()
    report = load_pretrained(model, {"model": state}, verbose=False)
    biases = [f"layers.0.blocks.{i}.attn.relative_position_bias_table" for i in range(2)]
    tables = ["absolute_pos_embed", *biases]
    assert sorted(report.resized) == tables and report.missing == ["head.weight", "head.bias"]
    loaded = model.state_dict()
    resized = resize_pos_embed(state["absolute_pos_embed"], (8, 8), (16, 16), prefix=0)
    assert torch.equal(loaded["absolute_pos_embed"], resized)
    for name in biases:
        image = state[name].T.view(1, 2, 15, 15)
        expected = F.interpolate(image, size=(7, 7), mode="bicubic", align_corners=False)
        torch.testing.assert_close(loaded[name].T.view(1, 2, 7, 7), expected)
    assert torch.equal(model.head.weight, head)


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong, words", [
    (dict(img_size=50), "img_size 50x50 .* 8.*48x48"),
    (dict(img_size=(32, 36)), "img_size 32x36 .* 8.*32x32"),
    (dict(img_size=4), "img_size 4x4 .*8x8"),
    (dict(embed_dim=20, num_heads=(3, 4)), "num_heads 3 of stage 0 .*20"),
    (dict(num_heads=(2, 5)), "num_heads 5 of stage 1 .*32"),
    (dict(num_heads=(2, 4, 8)), r"num_heads \(2, 4, 8\)"),
    (dict(window_size=(4,)), r"window_size \(4,\)"),
    (dict(depths=(2, 2, 2)), r"depths \(2, 2, 2\)"),
    (dict(embed_dim=18, num_heads=(1, 1)), "multiple of 4.*18"),
], ids=str)
def test_options_that_do_not_fit_are_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        swin(**{**dict(img_size=32), **wrong})
    assert one_line(error)


def test_images_that_do_not_divide_are_refused_with_one_sentence():
    encoder = HIERARCHICAL["padded"]()
    for call in (encoder, encoder.forward_maps, encoder.forward_features):
        with pytest.raises(ValueError, match="24x42 .*24x40") as error:
            call(torch.rand(2, 3, 24, 42))
        assert one_line(error)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'mixmim_xl'.* mixmim_b, .*mixmim_demo") as error:
        create_mixmim("mixmim_xl")
    assert one_line(error)
