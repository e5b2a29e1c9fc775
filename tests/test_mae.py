import pytest
import torch

from mae import MAE
from masking import block_mask, enlarge_mask, masked_loss, normalize_patches, patchify, random_mask, split_by_noise
from shapes import shapes
from vit import ViT

SIZES = dict(img_size=(16, 24), patch_size=4, embed_dim=32, depth=2, num_heads=4)  # 4 x 6 patches


def tiny(encoder=None, **options):
    """A small model whose parameters are all away from their starting values."""
    torch.manual_seed(0)
    settings = {**dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=2), **options}
    model = MAE(ViT(**{**SIZES, **(encoder or {})}), **settings)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def images(batch=3, channels=3, size=(16, 24)):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def noise(batch=3, n=24):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(2))


def repaint(imgs, mask, patch_size=4):
    """Other pixels where mask is 1."""
    grid = imgs.shape[-2] // patch_size, imgs.shape[-1] // patch_size
    where = enlarge_mask(mask.view(len(imgs), 1, *grid), patch_size).bool()
    return torch.where(where, 3 * torch.rand_like(imgs) - 1, imgs)


def latent(model, imgs, **how):
    seen = []
    handle = model.encoder.norm.register_forward_hook(lambda *args: seen.append(args[2]))
    model(imgs, **how)
    handle.remove()
    return seen[0]


# ---------------------------------------------------------------------------- what the encoder sees


def test_hidden_pixels_never_reach_the_encoder():
    model, imgs = tiny(), images()
    mask = model(imgs, noise=noise()).mask
    z = latent(model, imgs, noise=noise())
    assert z.shape == (3, 1 + 6, 32)  # a quarter of 24 patches, and the class token
    assert torch.equal(z, latent(model, repaint(imgs, mask), noise=noise()))
    assert not torch.equal(z, latent(model, repaint(imgs, 1 - mask), noise=noise()))


def test_predictions_have_no_gradient_towards_hidden_pixels():
    model, imgs = tiny(), images().requires_grad_()
    out = model(imgs, noise=noise())
    out.pred.square().sum().backward()
    reached = patchify(imgs.grad, 4).any(-1)
    assert torch.equal(reached, out.mask == 0)


def test_the_encoder_gets_the_visible_patches_with_their_own_positions():
    model, imgs = tiny(), images()
    split = split_by_noise(noise(), 6)
    everything = model.encoder.embed(imgs)
    visible = model.encoder.embed(imgs, split.ids_keep)
    for b in range(3):
        torch.testing.assert_close(visible[b, 1:], everything[b, 1:][split.ids_keep[b]], atol=0, rtol=0)
    assert torch.equal(visible[:, 0], everything[:, 0])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_the_loss_counts_hidden_patches_only(norm_pix_loss):
    model, imgs = tiny(norm_pix_loss=norm_pix_loss), images()
    out = model(imgs, noise=noise())
    target = patchify(imgs, 4)
    target = normalize_patches(target) if norm_pix_loss else target
    by_hand = (out.pred - target)[out.mask.bool()].square().mean()
    torch.testing.assert_close(out.loss, by_hand)
    spoilt = torch.where(out.mask[..., None].bool(), target, torch.full_like(target, 1e3))
    torch.testing.assert_close(out.loss, masked_loss(out.pred, spoilt, out.mask), atol=0, rtol=0)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_true_visible_pixels_are_no_target(norm_pix_loss):
    model, imgs = tiny(norm_pix_loss=norm_pix_loss), images()
    torch.nn.init.zeros_(model.decoder_pred.weight)  # the prediction no longer depends on the input
    out = model(imgs, noise=noise())
    assert model(repaint(imgs, 1 - out.mask), noise=noise()).loss == out.loss
    assert model(repaint(imgs, out.mask), noise=noise()).loss != out.loss


# ---------------------------------------------------------------------------- masks


def test_noise_fixes_the_mask_and_the_smallest_stay():
    model = tiny()
    out = model(images(), noise=noise())
    assert torch.equal(out.mask, model(images(), noise=noise()).mask)
    kept = noise().argsort(1)[:, :6]
    expected = torch.ones(3, 24).scatter(1, kept, 0.0)
    assert torch.equal(out.mask, expected)


def test_without_noise_each_call_draws_another_mask():
    model = tiny()
    assert not torch.equal(model(images()).mask, model(images()).mask)
    torch.manual_seed(7)
    first = model(images()).mask
    torch.manual_seed(7)
    assert torch.equal(first, model(images()).mask)


@pytest.mark.parametrize("make", [block_mask, random_mask])
def test_a_given_mask_is_used_as_it_is(make):
    model, mask = tiny(), make(3, (4, 6), 0.5, torch.Generator().manual_seed(0))
    out = model(images(), mask=mask)
    assert torch.equal(out.mask, mask.flatten(1).float())
    as_noise = model(images(), mask_ratio=0.5, noise=mask.flatten(1).float())
    assert torch.equal(out.pred, as_noise.pred) and out.loss == as_noise.loss
    assert torch.equal(model(images(), mask=mask.flatten(1)).pred, out.pred)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_hiding_nothing_costs_nothing(norm_pix_loss):
    out = tiny(norm_pix_loss=norm_pix_loss)(images(), mask_ratio=0)
    out.loss.backward()
    assert out.loss == 0 and not out.mask.any()


@pytest.mark.parametrize("mask_ratio", [1.0, -0.1, 0.99])
def test_mask_ratios_that_leave_nothing_or_make_no_sense_are_refused(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio}"):
        tiny()(images(), mask_ratio=mask_ratio)


def test_images_of_another_size_and_wrong_noise_are_refused():
    with pytest.raises(ValueError, match="24x24.*img_size 16x24"):
        tiny()(images(size=(24, 24)))
    with pytest.raises(ValueError, match=r"noise \(3, 23\)"):
        tiny()(images(), noise=noise(n=23))


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_reconstructions_hold_no_hidden_pixel_unless_asked_for(norm_pix_loss):
    model, imgs = tiny(norm_pix_loss=norm_pix_loss).eval(), images()
    changed = repaint(imgs, model(imgs, noise=noise()).mask)
    before = model.reconstruct(imgs, noise=noise())
    assert before.shape == imgs.shape and not before.requires_grad
    assert torch.equal(before, model.reconstruct(changed, noise=noise()))
    leaky = [model.reconstruct(x, noise=noise(), use_true_patch_statistics=True) for x in (imgs, changed)]
    assert torch.equal(*leaky) == (not norm_pix_loss)  # raw pixels need no statistics, so nothing can leak


def test_a_perfect_prediction_with_true_statistics_gives_the_image_back():
    model, imgs = tiny(), images(batch=1)
    target = normalize_patches(patchify(imgs, 4))
    model.forward_decoder = lambda z, ids_restore: target
    torch.testing.assert_close(model.reconstruct(imgs, use_true_patch_statistics=True), imgs)
    model.norm_pix_loss, target = False, patchify(imgs, 4)
    assert torch.equal(model.reconstruct(imgs), imgs)


# ---------------------------------------------------------------------------- the encoder inside


def test_the_encoder_inside_is_the_plain_vit():
    model = tiny()
    plain = ViT(**SIZES, num_classes=0)
    plain.load_state_dict(model.encoder.state_dict(), strict=True)
    model(images())
    features = model.encoder.forward_features(images())
    assert features.shape == (3, 25, 32)
    assert torch.equal(features, plain.forward_features(images()))
    assert torch.equal(features, model.encoder.forward_features(images()))


def test_with_nothing_hidden_the_wrapper_sees_what_the_plain_encoder_sees():
    model = tiny()
    in_order = torch.arange(24.0).expand(3, -1)
    z = latent(model, images(), mask_ratio=0, noise=in_order)
    torch.testing.assert_close(z, model.encoder.forward_features(images()), atol=1e-6, rtol=1e-6)


def test_tables_are_fixed_sincos_and_frozen():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters() if "pos_embed" in name}
    assert set(before) == {"encoder.pos_embed", "decoder_pos_embed"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(images()).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    for name, table in before.items():
        assert not after[name].requires_grad and torch.equal(after[name], table)
        assert not table[0, 0].any() and table[0, 1:].norm(dim=1).min() > 1  # zero for the class token only


@pytest.mark.parametrize(
    "encoder",
    [
        dict(),
        dict(pool="mean", num_classes=10),
        dict(in_chans=1),
        dict(in_chans=5),
        dict(img_size=(8, 40)),
        dict(pos_embed=None),
        dict(layer_scale=0.1),
        dict(drop_path=0.1),
        dict(checkpointing=True),
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient(encoder):
    model = tiny(encoder).train()
    torch.manual_seed(3)
    model(images(16, encoder.get("in_chans", 3), encoder.get("img_size", (16, 24)))).loss.backward()
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("size", [(8, 40), (32, 8)])
def test_any_number_of_channels_and_any_rectangle_work(channels, size):
    model, imgs = tiny(dict(in_chans=channels, img_size=size)), images(2, channels, size)
    out = model(imgs, mask_ratio=0.5)
    n = size[0] * size[1] // 16
    assert out.pred.shape == (2, n, 16 * channels)
    assert out.mask.sum(1).tolist() == [n / 2] * 2
    assert model.reconstruct(imgs).shape == imgs.shape


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(rel_pos_bias="shared"), "rel_pos_bias=None"),
        (dict(rel_pos_bias="block"), "rel_pos_bias=None"),
        (dict(class_token=False, pool="mean"), "class_token=True"),
    ],
)
def test_encoders_it_cannot_train_are_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny(wrong)
    assert "\n" not in str(error.value)


def test_decoder_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="decoder_embed_dim 24 .*decoder_num_heads 5"):
        tiny(decoder_num_heads=5)
    with pytest.raises(ValueError, match="multiple of 4.*26"):
        tiny(decoder_embed_dim=26)


def test_a_refused_decoder_leaves_the_encoder_as_it_was():
    encoder = ViT(**SIZES, num_classes=10, pool="mean")
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(ValueError, match="decoder_num_heads"):
        MAE(encoder, decoder_embed_dim=24, decoder_num_heads=5)
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


# ---------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_overfits_a_few_images():
    torch.manual_seed(0)
    model = MAE(
        ViT(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=4),
        decoder_embed_dim=48,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    imgs = shapes(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(120):
        loss = model(imgs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1  # guessing each patch's mean scores 0.98
    assert sum(losses[-10:]) / 10 < 0.55


def test_bf16_autocast_gives_a_float32_loss_close_to_the_exact_one():
    model = tiny()
    exact = model(images(), noise=noise()).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images(), noise=noise()).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0, rtol=0.02)
