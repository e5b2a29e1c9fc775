import statistics
import time
from itertools import product

import pytest
import torch
from test_hierarchical import HIERARCHICAL, one_line, stir, swin
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from checkpoints import load_pretrained
from masking import enlarge_mask, mix_mask, normalize_patches, patchify
from mixmim import HierarchicalViT, MixMIM, choose_partners, convert_official, create_mixmim
from shapes import shapes
from vit import ViT, create_vit, sincos_pos_embed

ENCODERS = {
    **HIERARCHICAL,
    "vit": lambda: create_vit("vit_demo", img_size=(16, 24), embed_dim=24, depth=2),  # (4 x 6)
}
PARTNERS = {2: [1, 0], 3: [2, 0, 1], 4: [3, 2, 1, 0], 5: [4, 3, 1, 2, 0]}  # p(k), by hand
INVERSE = {2: [1, 0], 3: [1, 2, 0], 4: [3, 2, 1, 0], 5: [4, 2, 3, 1, 0]}  # q(k), by hand
ABLATIONS = [
    dict(mask_per_cycle=True),
    dict(dual=False),
    dict(masked_attention=False),
    dict(dual=False, masked_attention=False),
    dict(fill="mask"),
]
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_batch = pytest.mark.parametrize("batch", PARTNERS)
shared_or_not = pytest.mark.parametrize("mask_per_cycle", [False, True], ids=["one mask", "mask per cycle"])


def tiny(encoder="padded", **options):
    torch.manual_seed(0)
    encoder = ENCODERS[encoder]() if isinstance(encoder, str) else encoder
    decoder = dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return stir(MixMIM(encoder, **{**decoder, **options}))


def images(model, batch=4, channels=3):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(batch, channels, *model.encoder.img_size, generator=generator)


def noise(model, *batch):
    gh, gw = model.grid_size
    return torch.rand(*batch, gh * gw, generator=torch.Generator().manual_seed(3))


def rows_of(model, batch):
    """Noise as the model takes it: a row for the batch or one per image."""
    return noise(model, batch) if model.mask_per_cycle else noise(model)


def repaint(model, imgs, where):
    """Other pixels in the patches where (B, N) is True."""
    where = enlarge_mask(where.view(len(imgs), 1, *model.grid_size), model.patch_size)
    return torch.where(where, 3 * torch.rand_like(imgs) - 1, imgs)


def target_of(model, imgs):
    patches = patchify(imgs, model.patch_size)
    return normalize_patches(patches) if model.norm_pix_loss else patches


def without_gradient(model):
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return [name for name, p in trainable.items() if p.grad is None or not p.grad.any()]


# ---------------------------------------------------------------------------- no prediction sees its patch


@every_encoder
@every_batch
@shared_or_not
def test_a_prediction_reads_exactly_the_other_part_of_its_own_image(name, batch, mask_per_cycle):
    model = tiny(name, mask_per_cycle=mask_per_cycle)
    imgs = images(model, batch).requires_grad_()
    out = model(imgs)
    for k, replaced in product(range(batch), (True, False)):  # predicted as image A, then as image B
        predicted = (out.mask[k] > 0) == replaced
        pred = out.pred[k][predicted]
        grad, = torch.autograd.grad((pred * torch.randn_like(pred)).sum(), imgs, retain_graph=True)
        expected = torch.zeros(batch, len(predicted), dtype=torch.bool)
        expected[k] = ~predicted
        assert torch.equal(patchify(grad, model.patch_size).any(-1), expected)


@every_encoder
@pytest.mark.parametrize("batch", [2, 3])
@torch.no_grad()
def test_other_pixels_in_a_patch_leave_its_prediction_bit_identical(name, batch):
    model = tiny(name).eval()
    imgs, row = images(model, batch), noise(model)
    before = model(imgs, noise=row)
    for k, i in product(range(batch), range(0, len(row), 3)):
        where = torch.zeros_like(before.mask, dtype=torch.bool)
        where[k, i] = True
        after = model(repaint(model, imgs, where), noise=row).pred
        same = (after == before.pred).all(-1)
        assert same[k, i] and torch.equal(same[k], before.mask[k] == before.mask[k, i])


@pytest.mark.parametrize("name", ["demo", "vit"])
@every_batch
def test_without_masked_attention_a_prediction_also_reads_the_partner_but_still_not_itself(name, batch):
    model = tiny(name, masked_attention=False)
    imgs = images(model, batch).requires_grad_()
    out = model(imgs)
    for k in range(batch):
        replaced = out.mask[k] > 0
        grad, = torch.autograd.grad(out.pred[k][replaced].square().sum(), imgs, retain_graph=True)
        reached = patchify(grad, model.patch_size).any(-1)
        expected = torch.zeros_like(reached)
        expected[k], expected[out.partner[k]] = ~replaced, replaced  # all tokens of mixture k
        assert torch.equal(reached, expected)


def block_outputs(model, imgs, row):
    """Outputs of all blocks and mergings as maps (B, h, w, d), the mask on each map, and the output."""
    encoder = model.encoder
    modules = list(encoder.blocks) if isinstance(encoder, ViT) else []
    for stage in getattr(encoder, "layers", []):
        modules += [*stage.blocks, *([stage.downsample] if stage.downsample else [])]
    maps = []
    handles = [m.register_forward_hook(lambda _, inputs, output: maps.append(output)) for m in modules]
    out = model(imgs, noise=row)
    for handle in handles:
        handle.remove()
    maps = [m.unflatten(1, model.grid_size) if m.ndim == 3 else m for m in maps]
    mask = out.mask.view(-1, *model.grid_size) > 0
    return maps, [enlarge_mask(mask, m.shape[1] // model.grid_size[0]) for m in maps], out


@every_encoder
@pytest.mark.parametrize("grad", [True, False], ids=["plain attention", "fused attention"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("which", ["A", "B"])
def test_pixels_reach_tokens_of_the_other_image_only_without_masked_attention(name, grad, masked, which):
    model = tiny(name, masked_attention=masked).eval()
    imgs, row = images(model, 3), noise(model)
    with torch.set_grad_enabled(grad):
        before, masks, out = block_outputs(model, imgs, row)
        other = imgs.clone()
        changed = 0 if which == "A" else out.partner[0]  # one of the images of mixture 0
        other[changed] = torch.rand_like(imgs[0])
        after = block_outputs(model, other, row)[0]
    for a, b, mask in zip(after, before, masks, strict=True):
        same = (a[0] == b[0]).all(-1)
        unchanged = mask[0] == (which == "A")  # the places of the other image
        assert not same[~unchanged].any()
        if masked:
            assert same[unchanged].all()
    if not masked:
        assert not same[unchanged].any()


# ---------------------------------------------------------------------------- partners, mixtures, stitching


@pytest.mark.parametrize("batch", range(2, 34))
def test_partners_are_a_permutation_without_fixed_points_in_short_cycles(batch):
    partner, index = choose_partners(batch), torch.arange(batch)
    assert sorted(partner.tolist()) == list(range(batch))
    assert (partner != index).all()
    in_three = partner[partner] != index
    assert in_three.sum() == (3 if batch % 2 else 0)
    assert torch.equal(partner[partner[partner]][in_three], index[in_three])


@every_batch
def test_partners_of_small_batches_are_the_ones_found_by_hand(batch):
    assert choose_partners(batch).tolist() == PARTNERS[batch]
    assert [PARTNERS[batch][q] for q in INVERSE[batch]] == list(range(batch))
    model = tiny()
    assert model(images(model, batch)).partner.tolist() == PARTNERS[batch]


@pytest.mark.parametrize("name", ["demo", "padded"])
@shared_or_not
def test_replaced_tokens_are_the_partners_with_the_position_of_the_place(name, mask_per_cycle):
    model = tiny(name, mask_per_cycle=mask_per_cycle)
    imgs, inputs = images(model, 5), []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    out = model(imgs)
    handle.remove()
    gh, gw = model.encoder.grid_size
    e = model.encoder.patch_embed(imgs).unflatten(1, (gh, gw))
    pos = model.encoder.absolute_pos_embed[0].unflatten(0, (gh, gw))
    scale = gh // model.grid_size[0]
    for k, y, x in product(range(5), range(gh), range(gw)):
        replaced = out.mask[k].view(model.grid_size)[y // scale, x // scale]
        source = out.partner[k] if replaced else k
        assert torch.equal(inputs[0][k, y, x], e[source, y, x] + pos[y, x])


@every_batch
@shared_or_not
def test_every_patch_of_every_image_is_predicted_once_where_a_mask_token_was(batch, mask_per_cycle):
    model, inputs = tiny(mask_per_cycle=mask_per_cycle), []
    imgs, n = images(model, batch), 15

    def decode(x):
        inputs.append(x)
        # sequences a_0 .. a_(B-1), b_0 .. b_(B-1)
        number = torch.arange(2.0 * batch * n).view(2 * batch, n, 1)
        return number.expand(-1, -1, 3 * model.patch_size**2)

    model.decode = decode
    out = model(imgs)
    for k, i in product(range(batch), range(n)):
        sequence = k if out.mask[k, i] else batch + INVERSE[batch][k]
        assert (out.pred[k, i] == sequence * n + i).all()
    used = out.pred[..., 0].flatten().long()
    mask_tokens = (inputs[0] == model.mask_token).all(-1).flatten().nonzero()[:, 0]
    assert torch.equal(used.sort()[0], mask_tokens)  # every mask token once, and nothing else
    torch.testing.assert_close(out.loss, (out.pred - target_of(model, imgs)).square().mean())


@every_batch
def test_the_decoder_gets_the_tokens_of_one_image_and_mask_tokens_elsewhere(batch):
    model, outputs, inputs = tiny("demo"), [], []
    decode = model.decode
    model.decode = lambda x: (inputs.append(x), decode(x))[1]
    handle = model.decoder_embed.register_forward_hook(lambda _, args, output: outputs.append(output))
    out = model(images(model, batch))
    handle.remove()
    z, x, replaced = outputs[0], inputs[0], out.mask[..., None] > 0
    assert torch.equal(x[:batch], torch.where(replaced, model.mask_token, z))
    assert torch.equal(x[batch:], torch.where(replaced, z, model.mask_token))


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@shared_or_not
def test_the_loss_is_the_mean_over_all_patches(norm_pix_loss, mask_per_cycle):
    model = tiny("demo", norm_pix_loss=norm_pix_loss, mask_per_cycle=mask_per_cycle)
    imgs = images(model, 3)
    out = model(imgs, mask_ratio=0.25)
    assert out.mask.sum(1).tolist() == [4] * 3
    torch.testing.assert_close(out.loss, (out.pred - target_of(model, imgs)).square().mean())


# ---------------------------------------------------------------------------- masks


def test_one_row_of_noise_gives_one_mask_and_the_smallest_come_from_the_partner():
    model = tiny()
    row = noise(model)
    out = model(images(model, 3), mask_ratio=0.4, noise=row)
    expected = torch.zeros(15).scatter(0, row.argsort()[:6], 1.0)
    assert torch.equal(out.mask, expected.expand(3, -1))


@pytest.mark.parametrize("as_mask", [False, True])
def test_masks_per_cycle_follow_the_first_image_of_the_cycle(as_mask):
    model = tiny(mask_per_cycle=True)
    rows = noise(model, 5)
    given = dict(mask=mix_mask(rows, 0.5)) if as_mask else dict(noise=rows)
    mask = model(images(model, 5), **given).mask
    first = [0, 1, 1, 1, 0]  # cycles {0, 4} and {1, 2, 3}
    assert torch.equal(mask, mix_mask(rows[first], 0.5).float())
    assert not torch.equal(mask[0], mask[1])


@every_batch
def test_drawn_masks_agree_along_cycles_and_differ_between_them(batch):
    model = tiny(mask_per_cycle=True)
    out = model(images(model, batch))
    assert torch.equal(out.mask, out.mask[out.partner])
    assert len(out.mask.unique(dim=0)) == batch // 2
    assert len(tiny()(images(model, batch)).mask.unique(dim=0)) == 1


@shared_or_not
def test_a_given_mask_is_used_as_it_is_flat_or_as_a_grid(mask_per_cycle):
    model = tiny(mask_per_cycle=mask_per_cycle)
    imgs = images(model, 5)
    out = model(imgs, noise=rows_of(model, 5))
    flat = out.mask if mask_per_cycle else out.mask[0]
    for mask in (flat, flat.bool(), flat.unflatten(-1, (3, 5))):
        again = model(imgs, mask=mask)
        assert torch.equal(again.mask, out.mask) and torch.equal(again.pred, out.pred)
        assert again.loss == out.loss


def test_a_given_mask_may_be_a_transposed_tensor():
    model = tiny()
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    assert model(images(model), mask=mask.T).mask[0].view(3, 5).tolist() == mask.T.tolist()


@pytest.mark.parametrize("name", ["noise", "mask"])
@pytest.mark.parametrize("mask_per_cycle, shape, expected", [
    (False, (4, 15), r"\(15,\)"),
    (False, (1, 15), r"\(15,\)"),
    (False, (14,), r"\(15,\)"),
    (True, (15,), r"\(4, 15\)"),
    (True, (3, 15), r"\(4, 15\)"),
    (True, (4, 5, 3), r"\(4, 15\)"),
])
def test_noise_and_masks_of_the_wrong_shape_are_refused(name, mask_per_cycle, shape, expected):
    model = tiny(mask_per_cycle=mask_per_cycle)
    given = ", ".join(map(str, shape))
    with pytest.raises(ValueError, match=rf"{name} \({given},?\) .*{expected}.*mask_per_cycle") as error:
        model(images(model, 4), **{name: torch.rand(shape)})
    assert one_line(error)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.01, 1.0, -0.1, 1.5])
@pytest.mark.parametrize("options", [dict(), dict(mask_per_cycle=True), dict(fill="mask")], ids=str)
def test_mask_ratios_that_leave_one_image_without_patches_are_refused(mask_ratio, options):
    model = tiny(**options)
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} ") as error:
        model(images(model), mask_ratio=mask_ratio)
    assert one_line(error)


@shared_or_not
def test_equal_seeds_and_equal_noise_give_equal_losses(mask_per_cycle):
    model = tiny("demo", mask_per_cycle=mask_per_cycle)
    imgs, outs = images(model), []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        outs.append(model(imgs))
    assert outs[0].loss == outs[1].loss and torch.equal(outs[0].mask, outs[1].mask)
    assert outs[0].loss != outs[2].loss and not torch.equal(outs[0].mask, outs[2].mask)
    rows = rows_of(model, 4)
    assert model(imgs, noise=rows).loss == model(imgs, noise=rows).loss


# ---------------------------------------------------------------------------- ablations


@pytest.mark.parametrize("name", ["demo", "padded and shifted", "vit"])
@shared_or_not
def test_with_fill_mask_a_mask_token_replaces_patches_and_only_they_count(name, mask_per_cycle):
    model = tiny(name, fill="mask", mask_per_cycle=mask_per_cycle)
    imgs, encoder = images(model, 3), model.encoder
    out = model(imgs, noise=rows_of(model, 3))
    assert out.partner.tolist() == [0, 1, 2]
    assert len(out.mask.unique(dim=0)) == (3 if mask_per_cycle else 1)

    scale = encoder.grid_size[0] // model.grid_size[0]
    replaced = enlarge_mask(out.mask.view(-1, *model.grid_size), scale).flatten(1)[..., None]
    x = (1 - replaced) * encoder.patch_embed(imgs) + replaced * model.mask_token
    if name == "vit":
        z = encoder.fc_norm(encoder.forward_blocks(x + encoder.pos_embed))
    else:
        z = encoder.norm(encoder.forward_stages(x, encoder.grid_size)[-1].flatten(1, 2))
    pred = model.decode(model.decoder_embed(z))
    torch.testing.assert_close(out.pred, pred)

    hidden = out.mask > 0
    torch.testing.assert_close(out.loss, (pred - target_of(model, imgs))[hidden].square().mean())
    repainted = model(repaint(model, imgs, hidden), mask=out.mask if mask_per_cycle else out.mask[0])
    assert torch.equal(out.pred[hidden], repainted.pred[hidden])


def test_with_fill_mask_one_image_is_enough_and_the_others_do_not_matter():
    model = tiny("demo", fill="mask")
    imgs, row = images(model, 3), noise(model)
    torch.testing.assert_close(model(imgs[:1], noise=row).pred, model(imgs, noise=row).pred[:1])


@pytest.mark.parametrize("masked", [True, False])
def test_without_dual_only_image_a_is_predicted_and_only_its_replaced_patches_count(masked):
    model = tiny("demo", masked_attention=masked)
    single = tiny("demo", masked_attention=masked, dual=False)
    imgs, row = images(model, 3), noise(model)
    both, a = model(imgs, noise=row), single(imgs, noise=row)
    hidden = both.mask > 0
    assert torch.equal(a.mask, both.mask)
    torch.testing.assert_close(a.pred[hidden], both.pred[hidden])
    assert not torch.isclose(a.pred[~hidden], both.pred[~hidden]).all(-1).any()
    torch.testing.assert_close(a.loss, (a.pred - target_of(model, imgs))[hidden].square().mean())


@every_encoder
@pytest.mark.parametrize("options", [dict(), dict(norm_pix_loss=False), *ABLATIONS], ids=str)
def test_every_trainable_parameter_gets_a_gradient(name, options):
    model = tiny(name, **options).train()
    # a small ratio: in every block two tokens of image A meet in a window, so the bias matters
    model(images(model, 3), mask_ratio=0.25).loss.backward()
    assert without_gradient(model) == []


@pytest.mark.parametrize("encoder", [
    dict(in_chans=1),
    dict(in_chans=5, img_size=(16, 40)),
    dict(patch_size=2, img_size=16),
    dict(drop_path=0.1, checkpointing=True),
    dict(num_classes=10),
], ids=str)
def test_every_trainable_parameter_gets_a_gradient_whatever_the_encoder(encoder):
    model = tiny(swin(**{**dict(img_size=32), **encoder})).train()
    model(images(model, 16, encoder.get("in_chans", 3))).loss.backward()
    assert without_gradient(model) == [] and isinstance(model.encoder.head, torch.nn.Identity)


# ---------------------------------------------------------------------------- the encoder inside


@pytest.mark.parametrize("channels", [1, 5])
def test_predictions_have_the_patches_of_the_last_stage(channels):
    model = tiny(swin(img_size=(32, 48), in_chans=channels))
    imgs = images(model, 2, channels)
    assert model(imgs).pred.shape == (2, 24, channels * 8**2)
    assert model.reconstruct(imgs).shape == imgs.shape


@pytest.mark.parametrize("preset", ["mixmim_b", "mixmim_l", "mixmim_h", "mixmim_demo"])
def test_presets_build_on_the_meta_device(preset):
    with torch.device("meta"):
        model = MixMIM(create_mixmim(preset))
    assert all(p.is_meta for p in model.parameters())


@every_encoder
@pytest.mark.parametrize("options", [dict(), *ABLATIONS], ids=str)
def test_its_forward_creates_no_tensor_on_the_cpu(name, options):
    with torch.device("meta"):
        model = MixMIM(ENCODERS[name](), 16, 1, 2, **options)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cuda")
        out = model(torch.rand(3, 3, *model.encoder.img_size, device="cuda"))
        assert {value.device.type for value in out} == {"cuda"}


def test_the_encoder_inside_is_the_plain_one():
    model, plain = tiny("padded and shifted"), ENCODERS["padded and shifted"]()
    plain.load_state_dict(model.encoder.state_dict(), strict=True)
    imgs = images(model)
    model(imgs)
    assert isinstance(plain, HierarchicalViT) and torch.equal(model.encoder(imgs), plain(imgs))


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = tiny(swin(img_size=(24, 40), shift=True, checkpointing=checkpointing))
        model(images(model), noise=noise(model)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


@every_encoder
def test_a_state_dict_holds_parameters_only_and_survives_the_round_trip(name):
    model, other = tiny(name), MixMIM(ENCODERS[name](), 16, 1, 2)
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict(), strict=True)
    imgs, row = images(model), noise(model)
    assert model(imgs, noise=row).loss == other(imgs, noise=row).loss


def test_positions_are_the_fixed_sincos_tables_and_stay():
    model = tiny("padded")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == {"encoder.absolute_pos_embed", "decoder_pos_embed"}
    assert torch.equal(frozen["encoder.absolute_pos_embed"][0], sincos_pos_embed(16, 6, 10, cls_token=False))
    assert torch.equal(frozen["decoder_pos_embed"][0], sincos_pos_embed(16, 3, 5, cls_token=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(images(model)).loss.backward()
    optimizer.step()
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], table) for name, table in frozen.items())


@pytest.mark.parametrize("options", [
    dict(),
    dict(pool="mean"),
    dict(class_token=False, pool="mean"),
    dict(pos_embed=None),
    dict(num_classes=10),
], ids=str)
def test_a_plain_vit_loses_class_token_and_head_and_gets_fixed_positions(options):
    sizes = dict(img_size=(16, 24), patch_size=4, embed_dim=24, depth=1, num_heads=2, num_classes=0)
    model = tiny(ViT(**{**sizes, **options}))
    encoder = model.encoder
    assert encoder.cls_token is None and isinstance(encoder.head, torch.nn.Identity)
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed[0], sincos_pos_embed(24, 4, 6, cls_token=False))
    model(images(model)).loss.backward()
    assert without_gradient(model) == []
    assert encoder(images(model)).shape == (4, 24)


# ---------------------------------------------------------------------------- checkpoints


def official_names(state):
    """Our pre-training state under the official names: without the prefix, with index tables."""
    state = {name.removeprefix("encoder."): value for name, value in state.items()}
    return {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long)}


@pytest.mark.parametrize("official", [False, True])
def test_a_pretraining_checkpoint_loads_into_a_classifier_of_another_size(official):
    model, classifier = tiny(swin(img_size=32)), swin(img_size=64, num_classes=10)
    state = official_names(model.state_dict()) if official else model.state_dict()
    report = load_pretrained(classifier, {"model": state}, verbose=False)
    assert report.format == ("MixMIM" if official else "ours")
    assert report.resized == ["absolute_pos_embed"] and not report.skipped
    assert report.missing == ["head.weight", "head.bias"]
    loaded = classifier.state_dict()
    for name, value in model.encoder.state_dict().items():
        assert name == "absolute_pos_embed" or torch.equal(loaded[name], value)


def test_convert_official_renames_pretraining_and_leaves_finetuning():
    model, classifier = tiny(swin(img_size=32)), swin(img_size=32, num_classes=10)
    for state in (model.state_dict(), classifier.state_dict()):
        converted = convert_official(official_names(state))
        assert converted.keys() == state.keys()
        assert all(converted[name] is value for name, value in state.items())


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong, words", [
    (dict(fill="mean"), "fill 'mean'"),
    (dict(decoder_num_heads=5), "decoder_embed_dim 16 .*decoder_num_heads 5"),
    (dict(decoder_embed_dim=18), "multiple of 4.*18"),
    (dict(encoder=create_vit("vit_demo", depth=1, rel_pos_bias="shared", pos_embed=None)), "rel_pos_bias"),
], ids=["fill", "decoder_num_heads", "decoder_embed_dim", "encoder"])
def test_options_that_do_not_fit_are_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny(**wrong)
    assert one_line(error)


@pytest.mark.parametrize("wrong", [dict(decoder_num_heads=5), dict(fill="mean")], ids=str)
@pytest.mark.parametrize("name", ["vit", "hierarchical"])
def test_a_refused_option_leaves_the_encoder_as_it_was(wrong, name):
    if name == "vit":
        encoder = ViT(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10)
    else:
        encoder = swin(num_classes=10)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    with pytest.raises(ValueError):
        MixMIM(encoder, **wrong)
    after = encoder.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("shape, words", [
    ((1, 3, 24, 40), "batch .*1.*at least 2"),
    ((4, 3, 24, 24), r"24x24.*img_size .*24, 40"),
    ((4, 3, 48, 80), r"48x80.*img_size .*24, 40"),
], ids=str)
def test_batches_that_do_not_fit_are_refused_with_one_sentence(shape, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny()(torch.rand(shape))
    assert one_line(error)


# ---------------------------------------------------------------------------- precision and speed


SMALL_WINDOWS = dict(img_size=16, depths=(1,), num_heads=(2,), window_size=(2,))


@pytest.mark.slow
@pytest.mark.parametrize("encoder", [
    pytest.param(lambda: swin(**SMALL_WINDOWS), id="windows"),
    pytest.param(
        lambda: swin(img_size=(24, 40), depths=(2, 1), shift=True),
        id="padded and shifted",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        lambda: create_vit("vit_demo", img_size=16, embed_dim=24, depth=1),
        id="vit",
        marks=pytest.mark.slow,
    ),
])
def test_compiling_it_breaks_no_graph_and_changes_no_number(encoder):
    torch._dynamo.reset()
    model = tiny(encoder())
    imgs, row, results = images(model), noise(model), []
    for function in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = function(imgs, noise=row)
        out.loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        results.append((out.loss.detach(), out.pred.detach(), *grads))
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_gives_a_float32_loss_close_to_the_exact_one():
    model = tiny("padded and shifted")
    imgs, row = images(model), noise(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(imgs, noise=row).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(imgs, noise=row).loss, atol=0, rtol=0.02)


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("batch", [3, 4])
def test_a_perfect_prediction_with_true_statistics_gives_the_images_back(batch):
    model = tiny("demo")
    imgs = images(model, batch)

    def decode(x):
        target = target_of(model, imgs)
        return torch.cat([target, target[choose_partners(batch)]])

    model.decode = decode
    assert model(imgs).loss == 0
    torch.testing.assert_close(model.reconstruct(imgs, use_true_patch_statistics=True), imgs)
    model.norm_pix_loss = False
    assert torch.equal(model.reconstruct(imgs), imgs)


@pytest.mark.parametrize("name", ["demo", "padded", "vit"])
@pytest.mark.parametrize("options", [dict(), dict(norm_pix_loss=False), dict(mask_per_cycle=True)], ids=str)
def test_reconstructed_patches_hold_nothing_hidden_unless_true_statistics_are_used(name, options):
    def unchanged(a, b):
        return (patchify(a, model.patch_size) == patchify(b, model.patch_size)).all(-1)

    model = tiny(name, **options).eval()
    imgs = images(model, 3)
    rows = rows_of(model, 3)
    mask, before = model(imgs, noise=rows).mask, model.reconstruct(imgs, noise=rows)
    leaky = model.reconstruct(imgs, noise=rows, use_true_patch_statistics=True)
    assert before.shape == imgs.shape and not before.requires_grad
    for k, replaced in product(range(3), (True, False)):
        where = torch.zeros_like(mask, dtype=torch.bool)
        where[k] = (mask[k] > 0) == replaced
        changed = repaint(model, imgs, where)
        same = unchanged(model.reconstruct(changed, noise=rows), before)
        assert same[where].all() and not same[k][~where[k]].any()
        assert same[torch.arange(3) != k].all()
        same = unchanged(model.reconstruct(changed, noise=rows, use_true_patch_statistics=True), leaky)
        # raw pixels need no statistics, so nothing leaks
        assert same[where].any() == (not model.norm_pix_loss)


@pytest.mark.parametrize("options", [dict(), dict(norm_pix_loss=False), *ABLATIONS], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["noise", "no noise"])
def test_pictures_show_what_their_captions_say(options, given):
    model = tiny("demo", **options).eval()
    imgs, gray = images(model, 3), torch.tensor([7.0, 8.0, 9.0]).view(3, 1, 1)
    torch.manual_seed(5)
    columns = model.pictures(imgs, 0.5, rows_of(model, 3) if given else None, gray)
    torch.manual_seed(5)
    out = model(imgs, 0.5, rows_of(model, 3) if given else None)
    b = imgs[out.partner]
    replaced = enlarge_mask(out.mask.view(3, 1, *model.grid_size), model.patch_size) > 0
    pred = model.reconstruct(imgs, mask=out.mask if model.mask_per_cycle else out.mask[0])

    expected = [imgs, b, torch.where(replaced, b, imgs)]
    if model.fill == "mask":
        expected = [imgs, torch.where(replaced, gray, imgs)]
    expected += [pred, pred[out.partner]] if model.dual else [torch.where(replaced, pred, gray)]
    expected += [torch.where(replaced, pred, imgs)]
    assert all(torch.equal(a, b) for a, b in zip(columns.values(), expected, strict=True))
    assert all(len(caption) <= 48 for caption in columns)
    true_only = [caption for caption in columns if "all true" in caption]
    assert len(true_only) == (1 if model.fill == "mask" else 3)


# ---------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_overfits_a_few_images():
    torch.manual_seed(0)
    encoder = create_mixmim("mixmim_demo", embed_dim=24, depths=(1, 1, 1))
    model = MixMIM(encoder, decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3)
    imgs, losses = shapes(8, img_size=64), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for _ in range(120):
        loss = model(imgs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1  # predicting the mean of each patch scores 1.00
    assert sum(losses[-10:]) / 10 < 0.6


@pytest.mark.slow
def test_a_training_step_of_mixmim_b_uses_most_of_the_machine(capsys):
    """224 px, batch 8, fp32, two threads: its share of the speed of large matrix products, taking turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.device("meta"), plain, torch.no_grad(), FlopCounterMode(display=False) as counter:
        MixMIM(create_mixmim("mixmim_b"))(torch.empty(8, 3, 224, 224))
    flops = 3 * counter.get_total_flops()  # the backward pass costs two forward passes
    model = MixMIM(create_mixmim("mixmim_b"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    imgs, a, b = torch.randn(8, 3, 224, 224), torch.randn(2048, 2048), torch.randn(2048, 2048)

    def matmul_rate():
        start = time.perf_counter()
        for _ in range(3):
            a @ b
        return 3 * 2 * 2048**3 / (time.perf_counter() - start)

    shares = []
    for _ in range(13):
        before, start = matmul_rate(), time.perf_counter()
        optimizer.zero_grad()
        model(imgs).loss.backward()
        optimizer.step()
        rate = flops / (time.perf_counter() - start)
        shares.append(rate / ((before + matmul_rate()) / 2))
    torch.set_num_threads(threads)
    share = statistics.median(shares[4:])  # the first steps also allocate the memory
    with capsys.disabled():
        print(f"\nMixMIM-B step: {share:.2f} of the matmul rate {[round(s, 2) for s in shares]}")
    assert share >= 0.70  # on an otherwise idle machine
