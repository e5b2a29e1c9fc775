import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from golden_inputs import load_case
from mixer import PRESETS, Mixer, MixerBlock, create_mixer

TINY = dict(img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=3)
OFFICIAL = {
    "mixer_s32": ("Mixer-S/32", 19_104_624),
    "mixer_s16": ("Mixer-S/16", 18_528_264),
    "mixer_b32": ("Mixer-B/32", 60_293_428),
    "mixer_b16": ("Mixer-B/16", 59_880_472),
}


def tiny(**options):
    """A small model in which nothing is zero or one, so that no parameter can hide; the same at every call."""
    torch.manual_seed(0)
    model = Mixer(**{**TINY, **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


def images(*size, batch=3, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *(size or (32, 32)), generator=generator)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------------- agreement with timm


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(img_size=(16, 40)),
        dict(img_size=(40, 16), patch_size=4),
        dict(img_size=8),
        dict(in_chans=1),
        dict(in_chans=5),
        dict(mlp_ratio=(0.25, 2.0)),
        dict(embed_dim=40, depth=1, patch_size=16),
        dict(num_classes=0),
    ],
    ids=str,
)
def test_timm_gives_the_same_outputs_and_gradients_from_the_same_weights(options):
    timm_mixer = pytest.importorskip("timm.models.mlp_mixer")
    ours = tiny(**options)
    config = {**TINY, **options}
    theirs = timm_mixer.MlpMixer(num_blocks=config.pop("depth"), **config)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    imgs = images(*ours.img_size, channels=ours.in_chans)
    close(ours.forward_features(imgs), theirs.forward_features(imgs))
    close(ours(imgs), theirs(imgs))
    for model in (ours, theirs):
        model(imgs).square().mean().backward()
    theirs = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        scale = theirs[name].grad.abs().max().item()
        torch.testing.assert_close(
            p.grad, theirs[name].grad, atol=1e-5 * scale, rtol=1e-5, msg=lambda text: f"{name}: {text}"
        )


@pytest.mark.parametrize("preset", OFFICIAL)
def test_presets_have_timms_names_and_shapes(preset):
    timm_mixer = pytest.importorskip("timm.models.mlp_mixer")
    with torch.device("meta"):
        ours, theirs = create_mixer(preset), getattr(timm_mixer, f"{preset}_224")()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


# ---------------------------------------------------------------------------- presets and sizes


@pytest.mark.parametrize("preset", OFFICIAL)
def test_presets_have_the_official_number_of_parameters_and_multiply_adds(preset):
    with torch.device("meta"), torch.no_grad():
        model = create_mixer(preset)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224))
    name, params = OFFICIAL[preset]
    fact = load_case("facts")["models"][name]
    assert sum(p.numel() for p in model.parameters()) == params == fact["params_total"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == fact["params_trainable"]
    assert counter.get_total_flops() / 2 == fact["forward_macs_matmul_and_conv"]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_and_runs_on_the_meta_device(preset):
    with torch.device("meta"):
        model = create_mixer(preset, num_classes=7, drop_path=0.1)
        assert model(torch.empty(2, 3, *model.img_size)).shape == (2, 7)
        model.reset_classifier(0)
        assert model(torch.empty(2, 3, *model.img_size)).shape == (2, model.num_features)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_demo_preset_is_the_small_protocol_for_32_pixels():
    model = create_mixer("mixer_demo", num_classes=10)
    assert (model.img_size, model.patch_size, model.embed_dim, len(model.blocks)) == ((32, 32), 4, 128, 6)
    assert model.blocks[5].mlp_tokens.fc1.weight.shape == (64, 64)  # D_S, N
    assert model.blocks[5].mlp_channels.fc1.weight.shape == (512, 128)  # D_C, D


@pytest.mark.parametrize("size", [(16, 48), (48, 16), (8, 8), (64, 24)])
@pytest.mark.parametrize("in_chans", [1, 3, 5])
def test_rectangles_and_other_channels_run_and_the_attributes_say_so(size, in_chans):
    model = tiny(img_size=size, in_chans=in_chans)
    gh, gw = size[0] // 8, size[1] // 8
    assert (model.img_size, model.grid_size, model.patch_size, model.stride) == (size, (gh, gw), 8, 8)
    assert (model.in_chans, model.embed_dim, model.num_features, model.num_classes) == (in_chans, 48, 48, 10)
    imgs = images(*size, channels=in_chans)
    assert model.forward_features(imgs).shape == (3, gh * gw, 48)
    assert model(imgs).shape == (3, 10)


def test_tokens_are_the_hand_made_linear_map_of_each_patch_row_by_row():
    model, imgs = tiny(img_size=(16, 40), in_chans=5), images(16, 40, channels=5)
    patch = imgs[:, :, 8:16, 24:32].flatten(1)  # row 1, column 3 of 2 x 5
    expected = patch @ model.stem.proj.weight.flatten(1).T + model.stem.proj.bias
    close(model.stem(imgs)[:, 1 * 5 + 3], expected, 2e-5)


# ---------------------------------------------------------------------------- the two mixings


def test_a_block_is_the_hand_computed_one():
    block = MixerBlock(num_tokens=2, dim=2, tokens_dim=1, channels_dim=1, drop_path=0.0)

    def fill(mlp, fc1, b1, fc2, b2):
        for p, value in zip(mlp.parameters(), (fc1, b1, fc2, b2)):
            p.data = torch.tensor(value)

    fill(block.mlp_tokens, [[2.0, 1.0]], [0.0], [[1.0], [3.0]], [0.5, 0.0])
    fill(block.mlp_channels, [[1.0, -1.0]], [0.0], [[1.0], [0.0]], [0.0, 7.0])
    x = torch.tensor([[[1.0, 3.0], [9.0, 5.0]]])  # rows: places; LN of two numbers: -1 and 1, by their order
    # LN x = [[-1, 1], [1, -1]]; column 0: 2 (-1) + 1 = -1, column 1: 2 - 1 = 1
    gelu = [-0.15865525, 0.84134475]  # of -1 and 1: x Phi(x)
    x1 = [[1 + gelu[0] + 0.5, 3 + gelu[1] + 0.5], [9 + 3 * gelu[0], 5 + 3 * gelu[1]]]  # rows still in the order <, >
    # LN x1 = [[-1, 1], [1, -1]] again; row 0: -1 - 1 = -2, row 1: 2; gelu: -2 Phi(-2), 2 Phi(2)
    expected = [[x1[0][0] - 0.04550026, x1[0][1] + 7], [x1[1][0] + 1.95449974, x1[1][1] + 7]]
    close(block(x), torch.tensor([expected]), 1e-5)


def reads(function, x, place, channel):
    """Which entries of the table x (1, N, D) one entry of function(x) depends on."""
    return torch.autograd.grad(function(x)[0, place, channel], x)[0][0] != 0


def test_token_mixing_reads_all_places_of_one_channel_and_channel_mixing_all_channels_of_one_place():
    block, x = tiny().blocks[0], torch.randn(1, 16, 48, requires_grad=True)
    column, row = torch.zeros(16, 48, dtype=torch.bool), torch.zeros(16, 48, dtype=torch.bool)
    column[:, 5] = True
    row[3] = True
    assert torch.equal(reads(block.mix_tokens, x, 3, 5), column)
    assert torch.equal(reads(block.mlp_channels, x, 3, 5), row)
    assert reads(block, x, 3, 5).all()


def test_all_channels_share_one_token_mixing_and_all_places_one_channel_mixing():
    block, x = tiny().blocks[0], torch.randn(2, 16, 48)
    channels, places = torch.randperm(48), torch.randperm(16)
    close(block.mix_tokens(x)[..., channels], block.mix_tokens(x[..., channels]))
    close(block.mlp_channels(x)[:, places], block.mlp_channels(x[:, places]))
    assert (block.mix_tokens(x)[:, places] - block.mix_tokens(x[:, places])).abs().max() > 0.1


def test_without_token_mixing_each_place_is_alone():
    model = tiny()
    for block in model.blocks:
        for p in block.mlp_tokens.fc2.parameters():
            p.data.zero_()
    imgs = images().requires_grad_()
    model.forward_features(imgs)[0, 6, 2].backward()  # row 1, column 2
    touched = imgs.grad[0].abs().sum(0) > 0
    assert touched[8:16, 16:24].all() and touched.sum() == 64


def test_patches_shuffled_together_with_the_token_weights_give_the_same_logits():
    model, shuffled, imgs = tiny(), tiny(), images()
    order = torch.randperm(16)
    for block in shuffled.blocks:
        mlp = block.mlp_tokens
        mlp.fc1.weight.data = mlp.fc1.weight[:, order]
        mlp.fc2.weight.data, mlp.fc2.bias.data = mlp.fc2.weight[order], mlp.fc2.bias[order]
    patches = imgs.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)[:, :, order]  # (B, C, N, 8, 8)
    other = patches.unflatten(2, (4, 4)).transpose(3, 4).flatten(4, 5).flatten(2, 3)
    close(shuffled(other), model(imgs), 1e-4)
    assert (model(other) - model(imgs)).abs().max() > 0.1


# ---------------------------------------------------------------------------- features, head, start


def test_features_are_the_mean_of_the_normed_tokens_and_the_head_reads_them():
    model, imgs = tiny(), images()
    tokens = model.forward_features(imgs)
    close(tokens.mean(1) @ model.head.weight.T + model.head.bias, model(imgs))
    close(model.forward_head(tokens), model(imgs))
    model.reset_classifier(0)
    close(model(imgs), tokens.mean(1))
    assert not any(key.startswith("head") for key in model.state_dict())


def test_reset_classifier_gives_a_fresh_zero_head_of_the_models_dtype():
    model = tiny().double()
    model.reset_classifier(7)
    assert model.num_classes == 7 and model.head.weight.requires_grad
    assert torch.equal(model(images().double()), torch.zeros(3, 7, dtype=torch.float64))
    assert model.state_dict().keys() == tiny().state_dict().keys()


@pytest.mark.parametrize("options", [dict(), dict(weight_init="jax")], ids=str)
def test_weights_start_as_in_the_official_code(options):
    torch.manual_seed(0)
    model = create_mixer("mixer_s16", depth=2, **options)
    block = model.blocks[1]
    for weight, fan_in in (
        (model.stem.proj.weight, 3 * 16 * 16),
        (block.mlp_tokens.fc1.weight, 196),
        (block.mlp_tokens.fc2.weight, 256),
        (block.mlp_channels.fc1.weight, 512),
        (block.mlp_channels.fc2.weight, 2048),
    ):
        assert weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.02)
        assert weight.abs().max() <= 2 / 0.8796 * fan_in**-0.5  # cut at two sigma of the uncut normal
    assert not any(
        p.any() for name, p in model.named_parameters() if name.endswith("bias") or name.startswith("head")
    )
    assert all((m.weight == 1).all() and m.eps == 1e-6 for m in model.modules() if isinstance(m, torch.nn.LayerNorm))


def test_activations_are_modules_that_a_hook_can_watch():
    model, seen = tiny(), []
    for block in model.blocks:
        for mlp in (block.mlp_tokens, block.mlp_channels):
            mlp.act.register_forward_hook(
                lambda module, args, out: seen.append((tuple(out.shape), (out > 0).float().mean().item()))
            )
    model(images())
    assert [shape for shape, _ in seen] == 3 * [(3, 48, 24), (3, 16, 192)]
    assert all(0 < active < 1 for _, active in seen)


def test_every_parameter_gets_a_gradient():
    model = tiny().train()
    model(images()).square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_each_image_is_treated_alone():
    model = tiny()
    close(model(images())[1:2], model(images()[1:2]))


def test_drop_path_rates_grow_linearly_and_whole_branches_are_dropped_in_training_only():
    model = Mixer(**{**TINY, "depth": 5}, drop_path=0.4)
    assert [getattr(block.drop_path, "p", 0) for block in model.blocks] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    dropping, plain = tiny(drop_path=0.5), tiny()
    assert torch.equal(dropping(images()), plain(images()))
    block, x = dropping.train().blocks[2], torch.randn(400, 16, 48)
    torch.manual_seed(0)
    y = block(x)
    assert (y == x).flatten(1).all(1).float().mean() == pytest.approx(0.25, abs=0.08)  # both branches gone
    tokens = x + 2 * block.mix_tokens(block.norm1(x))  # what is kept is doubled
    assert (y - tokens).abs().flatten(1).amax(1).lt(1e-5).float().mean() == pytest.approx(0.25, abs=0.08)


def test_sixteen_images_are_memorised():
    torch.manual_seed(0)
    model = Mixer(**TINY)
    imgs, labels = images(batch=16), torch.randint(10, (16,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    assert F.cross_entropy(model(imgs), labels).item() == pytest.approx(math.log(10))  # the zero head knows nothing
    for _ in range(40):
        loss = F.cross_entropy(model(imgs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(imgs).argmax(1) == labels).all() and loss < 0.05


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(img_size=30), r"img_size 30 .*patch_size 8; try 24 or 32"),
        (dict(img_size=(32, 30)), r"img_size 30 .*patch_size 8; try 24 or 32"),
        (dict(img_size=4), r"img_size 4 .*patch_size 8; try 8"),
        (dict(img_size=0), r"img_size 0 .*patch_size 8; try 8"),
        (dict(weight_init="mae"), r"weight_init 'mae' .*'jax'"),
    ],
)
def test_wrong_settings_are_refused_with_a_way_out_in_one_line(wrong, words):
    with pytest.raises(ValueError, match=words) as caught:
        Mixer(**{**TINY, **wrong})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "imgs, words",
    [
        (torch.zeros(2, 3, 40, 32), r"\(40, 32\).*img_size \(32, 32\)"),
        (torch.zeros(2, 3, 16, 64), r"\(16, 64\).*img_size \(32, 32\)"),  # as many tokens, but other places
    ],
)
def test_wrong_images_are_refused_in_one_line(imgs, words):
    with pytest.raises(ValueError, match=words) as caught:
        tiny()(imgs)
    assert "\n" not in str(caught.value)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match="mixer_b15.*mixer_b16"):
        create_mixer("mixer_b15")


# ---------------------------------------------------------------------------- export, compile, bf16


def test_an_exported_classifier_agrees_at_any_batch_size():
    model = tiny()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (3, 7):
        close(program.module()(images(batch=batch)), model(images(batch=batch)))


@pytest.mark.slow
def test_a_compiled_model_agrees_in_values_and_gradients():
    model = tiny(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(images()), model(images()))
    grads = []
    for call in (compiled, model):
        model.zero_grad()
        call(images()).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_on_the_cpu_is_close_to_fp32():
    model, imgs = tiny(), images()
    exact = model(imgs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(imgs)
    assert (rough.float() - exact).norm() < 0.03 * exact.norm()
