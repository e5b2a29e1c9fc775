import pytest
import torch

from mae import MAE
from masking import block_mask, enlarge_mask, masked_loss, normalize_patches, patchify
from mirl import MIRL
from shapes import shapes
from vit import ViT, create_vit

SIZES = dict(img_size=(16, 24), patch_size=4, embed_dim=32, depth=12, num_heads=4)  # 4 x 6 patches


def tiny(segments=4, encoder=None, **options):
    """A small model whose parameters are all away from their starting values."""
    torch.manual_seed(0)
    settings = {**dict(decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2), **options}
    model = MIRL(ViT(**{**SIZES, **(encoder or {})}), segments, **settings)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def images(batch=3, channels=3, size=(16, 24)):
    return torch.rand(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def noise(batch=3, n=24):
    return torch.rand(batch, n, generator=torch.Generator().manual_seed(2))


def target_of(imgs):
    return normalize_patches(patchify(imgs, 4))


def repaint(imgs, mask):
    """Other pixels where mask is 1."""
    where = enlarge_mask(mask.view(len(imgs), 1, imgs.shape[-2] // 4, imgs.shape[-1] // 4), 4).bool()
    return torch.where(where, 3 * torch.rand_like(imgs) - 1, imgs)


def features(model, imgs):
    """All normalized z_k of a real forward pass."""
    seen = []
    handles = [
        m.register_forward_hook(lambda *args: seen.append(args[2])) for m in [*model.norms, model.encoder.norm]
    ]
    model(imgs, noise=noise())
    for handle in handles:
        handle.remove()
    return seen


# ---------------------------------------------------------------------------- what is seen


def test_hidden_pixels_never_reach_the_encoder():
    model, imgs = tiny(), images()
    mask = model(imgs, noise=noise()).mask
    before, after = features(model, imgs), features(model, repaint(imgs, mask))
    assert len(before) == 5
    for a, b in zip(before, after):
        assert a.shape == (3, 7, 32) and torch.equal(a, b)
    assert not torch.equal(before[0], features(model, repaint(imgs, 1 - mask))[0])


def test_predictions_have_no_gradient_towards_hidden_pixels():
    model, imgs = tiny(), images().requires_grad_()
    out = model(imgs, noise=noise())
    torch.stack(out.pred).square().sum().backward()
    assert torch.equal(patchify(imgs.grad, 4).any(-1), out.mask == 0)


def test_true_visible_pixels_are_no_target():
    model, imgs = tiny(weight_norm_pred=False), images()
    for decoder in model.decoders:
        torch.nn.init.zeros_(decoder.pred.weight)  # predictions no longer depend on the input
    out = model(imgs, noise=noise())
    assert model(repaint(imgs, 1 - out.mask), noise=noise()).loss == out.loss
    assert model(repaint(imgs, out.mask), noise=noise()).loss != out.loss


# ---------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("segments", [2, 4, 6, 12])
def test_the_loss_is_the_mean_over_pairs_from_the_outside_in(segments):
    model, imgs = tiny(segments), images()
    out = model(imgs, noise=noise())
    assert len(out.pred) == segments and len(out.pairs) == segments // 2
    hidden = out.mask.bool()
    for j, pair in enumerate(out.pairs):
        assert out.pred[j].shape == (3, 24, 48)
        error = out.pred[j] + out.pred[segments - 1 - j] - target_of(imgs)
        torch.testing.assert_close(pair, error[hidden].square().mean())
    torch.testing.assert_close(out.loss, torch.stack(out.pairs).mean(), atol=0, rtol=0)


def test_a_constant_may_move_between_the_two_of_a_pair():
    model, imgs = tiny(6), images()
    before = model(imgs, noise=noise())
    shift = torch.randn(48)
    with torch.no_grad():
        model.decoders[0].pred.bias += shift
        model.decoders[5].pred.bias -= shift
    after = model(imgs, noise=noise())
    torch.testing.assert_close(after.loss, before.loss)
    assert not torch.allclose(after.pred[0], before.pred[0], atol=0.1)
    with torch.no_grad():
        model.decoders[1].pred.bias += shift  # not its partner: this one counts
    assert model(imgs, noise=noise()).loss > before.loss + 0.05


def test_two_segments_with_a_silent_deep_decoder_are_a_plain_masked_loss():
    model, imgs = tiny(2, weight_norm_pred=False), images()
    deep = model.decoders[1].pred
    torch.nn.init.zeros_(deep.weight)
    torch.nn.init.zeros_(deep.bias)
    out = model(imgs, noise=noise())
    assert not out.pred[1].any()
    torch.testing.assert_close(out.loss, masked_loss(out.pred[0], target_of(imgs), out.mask), atol=0, rtol=0)


def test_both_of_a_pair_get_the_same_gradient():
    out = tiny(4)(images(), noise=noise())
    grads = torch.autograd.grad(out.loss, out.pred)
    for j in range(2):
        assert grads[j].any() and torch.equal(grads[j], grads[3 - j])
        assert torch.equal(grads[j].any(-1), out.mask.bool())


def test_without_pairing_every_decoder_predicts_the_image_alone():
    model, imgs = tiny(4, pairing=False), images()
    out = model(imgs, noise=noise())
    assert len(out.pairs) == 4
    for pred, term in zip(out.pred, out.pairs):
        torch.testing.assert_close(term, masked_loss(pred, target_of(imgs), out.mask), atol=0, rtol=0)
    torch.testing.assert_close(out.loss, torch.stack(out.pairs).mean())
    paired = tiny(4)(imgs, noise=noise())
    assert all(torch.equal(a, b) for a, b in zip(out.pred, paired.pred)) and paired.loss != out.loss
    pictures, (outer, inner) = model.reconstruct(imgs, noise=noise()), tiny(4).reconstruct(imgs, noise=noise())
    assert len(pictures) == 4
    torch.testing.assert_close(pictures[0], outer.main)  # a picture of each decoder's own prediction
    torch.testing.assert_close(pictures[1], inner.main)


# ---------------------------------------------------------------------------- segments and context


@pytest.mark.parametrize("segments", [2, 4, 6, 12])
def test_every_block_gets_a_gradient_at_any_number_of_segments(segments):
    model = tiny(segments)
    model(images()).loss.backward()
    for i, block in enumerate(model.encoder.blocks):
        assert all(p.grad is not None and p.grad.any() for p in block.parameters()), f"block {i}"


def test_a_segments_feature_is_the_block_output_at_its_end():
    model, imgs = tiny(4), images()
    in_order = torch.arange(24.0).expand(3, -1)
    seen = model.forward_encoder(imgs, in_order.long())
    raw = model.encoder.forward_features(imgs, layers=[2, 5, 8, 11])
    torch.testing.assert_close(seen[0], model.norms[0](model.encoder.embed(imgs)))
    for z, x, norm in zip(seen[1:], raw, [*model.norms[1:], model.encoder.norm], strict=True):
        torch.testing.assert_close(z, norm(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(seen[-1], model.encoder.forward_features(imgs), atol=1e-5, rtol=1e-5)


def test_a_shallow_prediction_does_not_need_the_blocks_below_it():
    model = tiny(4)
    out = model(images(), noise=noise())
    for k, pred in enumerate(out.pred):
        grads = torch.autograd.grad(
            pred.sum(), [b.mlp.fc1.weight for b in model.encoder.blocks], retain_graph=True, allow_unused=True
        )
        assert [g is not None and bool(g.any()) for g in grads] == [i < 3 * (k + 1) for i in range(12)]


@pytest.mark.parametrize("dense", [True, False])
def test_the_dense_context_holds_all_earlier_segments(dense):
    model = tiny(4, dense_context=dense)
    out = model(images(), noise=noise())
    for k, pred in enumerate(out.pred, start=1):
        grads = torch.autograd.grad(
            pred.sum(), [e.weight for e in model.embeds], retain_graph=True, allow_unused=True
        )
        read = [i for i, g in enumerate(grads) if g is not None and g.any()]
        assert read == (list(range(k + 1)) if dense else [0, k])


@pytest.mark.parametrize("dense", [True, False])
def test_decoder_k_asks_the_k_features_before_its_own(dense):
    model, asked = tiny(4, dense_context=dense), []
    for decoder in model.decoders:
        decoder.blocks[0].register_forward_pre_hook(lambda _, inputs: asked.append(inputs[1]))
    seen = features(model, images())
    t = [embed(z) for embed, z in zip(model.embeds, seen, strict=True)]
    for k, context in enumerate(asked, start=1):
        torch.testing.assert_close(context, torch.cat(t[:k], dim=1) if dense else t[0], atol=0, rtol=0)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(segments=3), r"segments 3 .*depth 12.*\[2, 4, 6, 12\]"),
        (dict(segments=5), "segments 5"),
        (dict(segments=8), "segments 8 .*depth 12"),
        (dict(segments=0), "segments 0"),
        (dict(segments=-2), "segments -2"),
        (dict(segments=24), "segments 24"),
        (dict(encoder=dict(depth=9)), "segments 4 .*depth 9"),
        (dict(decoder_num_heads=5), "decoder_embed_dim 24 .*decoder_num_heads 5"),
        (dict(decoder_embed_dim=26), "multiple of 4.*26"),
        (dict(encoder=dict(rel_pos_bias="shared")), "rel_pos_bias=None"),
        (dict(encoder=dict(rel_pos_bias="block")), "rel_pos_bias=None"),
        (dict(encoder=dict(class_token=False, pool="mean")), "class_token=True"),
    ],
)
def test_what_does_not_fit_is_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny(**wrong)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- weight norm


def test_prediction_columns_keep_unit_length_through_training():
    model = tiny(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3)
    before = model.decoders[0].pred.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).loss.backward()
        optimizer.step()
    for decoder in model.decoders:
        weight = decoder.pred.weight
        assert weight.shape == (48, 24)
        torch.testing.assert_close(weight.norm(dim=0), torch.ones(24), atol=1e-5, rtol=0)
    assert not torch.allclose(before, model.decoders[0].pred.weight)
    magnitudes = [p for name, p in model.named_parameters() if name.endswith("original0")]
    assert (
        len(magnitudes) == 4
        and not any(p.requires_grad for p in magnitudes)
        and all((p == 1).all() for p in magnitudes)
    )


def test_without_weight_norm_the_prediction_is_a_plain_linear():
    keys = tiny(2, weight_norm_pred=False).state_dict().keys()
    assert "decoders.1.pred.weight" in keys and not any("parametrizations" in key for key in keys)


def test_a_state_dict_survives_the_round_trip():
    model, other = tiny(4), tiny(4)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(model(images(), noise=noise()).loss, other(images(), noise=noise()).loss)


# ---------------------------------------------------------------------------- masks


def test_noise_fixes_the_mask_and_the_smallest_stay():
    out = tiny()(images(), noise=noise())
    expected = torch.ones(3, 24).scatter(1, noise().argsort(1)[:, :6], 0.0)
    assert torch.equal(out.mask, expected)
    assert not torch.equal(tiny()(images()).mask, tiny(2)(images(), noise=noise()).mask)


def test_a_given_mask_is_used_as_it_is():
    model, mask = tiny(), block_mask(3, (4, 6), 0.5, torch.Generator().manual_seed(0))
    out = model(images(), mask=mask)
    assert torch.equal(out.mask, mask.flatten(1).float())
    as_noise = model(images(), mask_ratio=0.5, noise=mask.flatten(1).float())
    assert out.loss == as_noise.loss


def test_hiding_nothing_costs_nothing():
    out = tiny()(images(), mask_ratio=0)
    out.loss.backward()
    assert out.loss == 0 and not out.mask.any()


@pytest.mark.parametrize("mask_ratio", [1.0, -0.1, 0.99])
def test_mask_ratios_that_leave_nothing_or_make_no_sense_are_refused(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio}"):
        tiny()(images(), mask_ratio=mask_ratio)


# ---------------------------------------------------------------------------- pictures


def test_reconstructions_hold_no_hidden_pixel_unless_asked_for():
    model, imgs = tiny().eval(), images()
    changed = repaint(imgs, model(imgs, noise=noise()).mask)
    before, after = model.reconstruct(imgs, noise=noise()), model.reconstruct(changed, noise=noise())
    assert len(before) == 2
    for a, b in zip(before, after):
        for x, y in zip(a, b):
            assert x.shape == imgs.shape and not x.requires_grad and torch.equal(x, y)
    leaky = [model.reconstruct(x, noise=noise(), use_true_patch_statistics=True) for x in (imgs, changed)]
    assert not torch.equal(leaky[0][0].sum, leaky[1][0].sum)


def test_main_and_residual_pictures_add_up():
    model = tiny(6).eval()
    for picture in model.reconstruct(images(), noise=noise()):
        torch.testing.assert_close(picture.main + picture.residual, picture.sum)


# ---------------------------------------------------------------------------- the encoder inside


def test_the_encoder_inside_is_the_plain_vit():
    model, plain = tiny(), ViT(**SIZES, num_classes=0)
    plain.load_state_dict(model.encoder.state_dict(), strict=True)
    model(images())
    seen = model.encoder.forward_features(images())
    assert torch.equal(seen, plain.forward_features(images()))
    assert torch.equal(seen, model.encoder.forward_features(images()))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(segments=2),
        dict(segments=12),
        dict(pairing=False),
        dict(weight_norm_pred=False),
        dict(decoder_depth=2),
        dict(encoder=dict(pool="mean", num_classes=10)),
        dict(encoder=dict(in_chans=1)),
        dict(encoder=dict(in_chans=5, img_size=(8, 40))),
        dict(encoder=dict(checkpointing=True, drop_path=0.1)),
    ],
    ids=str,
)
def test_every_trainable_parameter_gets_a_gradient(options):
    model = tiny(**options).train()
    encoder = options.get("encoder", {})
    torch.manual_seed(3)
    model(images(16, encoder.get("in_chans", 3), encoder.get("img_size", (16, 24)))).loss.backward()
    missing = [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    assert missing == []


def test_every_trainable_parameter_gets_a_gradient_without_the_dense_context():
    model = tiny(dense_context=False)
    model(images(16)).loss.backward()
    assert [
        name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ] == []


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("size", [(8, 40), (32, 8)])
def test_any_number_of_channels_and_any_rectangle_work(channels, size):
    model, imgs = tiny(2, dict(in_chans=channels, img_size=size)), images(2, channels, size)
    out, n = model(imgs, mask_ratio=0.5), size[0] * size[1] // 16
    assert out.pred[1].shape == (2, n, 16 * channels)
    assert out.mask.sum(1).tolist() == [n / 2] * 2
    assert model.reconstruct(imgs)[0].sum.shape == imgs.shape


def test_raw_pixels_give_the_loss_computed_by_hand():
    model = tiny(norm_pix_loss=False)
    with torch.no_grad():
        for decoder in model.decoders:  # every segment predicts 0.25 everywhere
            decoder.pred.parametrizations.weight.original0.zero_()
            decoder.pred.bias.fill_(0.25)
    imgs = torch.full((2, 3, 16, 24), 2.0)
    out = model(imgs, noise=noise(2))
    assert out.loss.item() == pytest.approx((0.25 + 0.25 - 2) ** 2)  # main + residual - pixel
    assert [pair.item() for pair in out.pairs] == pytest.approx([2.25, 2.25])
    # normalized, a flat patch is 0
    model.norm_pix_loss = True
    assert model(imgs, noise=noise(2)).loss.item() == pytest.approx(0.25)


# ---------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_overfits_a_few_images():
    torch.manual_seed(0)
    model = MIRL(
        ViT(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4),
        4,
        decoder_embed_dim=48,
        decoder_depth=1,
        decoder_num_heads=2,
    )
    imgs = shapes(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    pairs = []
    for _ in range(120):
        out = model(imgs)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        pairs.append([pair.item() for pair in out.pairs])
    first, last = torch.tensor(pairs[0]), torch.tensor(pairs[-10:]).mean(0)
    assert (first > 1).all()  # guessing each patch's mean scores 0.98
    assert (last < 0.7).all()  # every pair learns


def test_bf16_autocast_gives_a_float32_loss_close_to_the_exact_one():
    model = tiny()
    exact = model(images(), noise=noise()).loss
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images(), noise=noise()).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, atol=0, rtol=0.03)


@pytest.mark.slow
def test_a_multiply_add_of_mirl_costs_what_one_of_mae_costs():
    """ViT-B/16, 224 px, batch 8: processor time and saved activations per multiply-add within 15 %, steps
    interleaved."""
    import time

    from torch.utils.flop_counter import FlopCounterMode

    make = {"mae": lambda: MAE(create_vit("vit_b16")), "mirl": lambda: MIRL(create_vit("vit_b16"), segments=6)}
    imgs = torch.randn(8, 3, 224, 224)
    macs, saved, seconds = {}, {}, {name: [] for name in make}
    models = {name: build() for name, build in make.items()}
    for name, model in models.items():
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage
            return tensor

        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(imgs)
        macs[name], saved[name] = counter.get_total_flops() / 2, sum(storage.nbytes() for storage in kept.values())
    for _ in range(6):
        for name, model in models.items():
            start = time.process_time()
            model(imgs).loss.backward()
            seconds[name].append(time.process_time() - start)
    time_ratio = (sorted(seconds["mirl"][1:])[2] / macs["mirl"]) / (sorted(seconds["mae"][1:])[2] / macs["mae"])
    memory_ratio = (saved["mirl"] / macs["mirl"]) / (saved["mae"] / macs["mae"])
    print(f"MIRL / MAE per multiply-add: time {time_ratio:.3f}, memory {memory_ratio:.3f}")
    assert time_ratio < 1.15 and memory_ratio < 1.15
