from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import mixmim
from checkpoints import load_pretrained
from masking import enlarge_mask, mix_mask, normalize_patches, patchify
from mixmim import PRESETS, HierarchicalViT, MixMIM, WindowBlock, choose_partners, create_mixmim, cut_windows
from shapes import shapes
from vit import ViT, attention, create_vit, resize_pos_embed, sincos_pos_embed

ENCODERS = {  # all small; patches of the mask in brackets
    "demo": lambda: create_mixmim("mixmim_demo", embed_dim=16),  # (4 x 4)
    "shifted": lambda: swin(img_size=32, window_size=(4, 2), shift=True),  # maps 8 x 8 and (4 x 4)
    "padded": lambda: swin(img_size=(24, 40), window_size=(4, 3)),  # maps 6 x 10 and (3 x 5)
    "padded and shifted": lambda: swin(img_size=(24, 40), window_size=(4, 2), shift=True),
    "window over the map": lambda: swin(img_size=(32, 16), window_size=(14, 7)),  # maps 8 x 4 and (4 x 2)
    "vit": lambda: create_vit("vit_demo", img_size=(16, 24), embed_dim=24, depth=2),  # (4 x 6)
}
HIERARCHICAL = [name for name in ENCODERS if name != "vit"]
GUESTS = {2: [1, 0], 3: [1, 2, 0], 4: [3, 2, 1, 0], 5: [4, 2, 3, 1, 0]}  # q(k), worked out by hand
every_encoder = pytest.mark.parametrize("name", ENCODERS)
every_batch = pytest.mark.parametrize("batch", GUESTS)
shared_or_not = pytest.mark.parametrize("mask_per_cycle", [False, True], ids=["one mask", "mask per cycle"])


def swin(**options):
    torch.manual_seed(0)
    options = {**dict(patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=(4, 4), num_classes=0), **options}
    return HierarchicalViT(**options)


def stir(model):
    """All trainable parameters away from their starting values."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    return model


def tiny(encoder="padded", **options):
    torch.manual_seed(0)
    encoder = ENCODERS[encoder]() if isinstance(encoder, str) else encoder
    return stir(MixMIM(encoder, **{**dict(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2), **options}))


def images(model, batch=4, channels=3):
    return torch.rand(batch, channels, *getattr(model, "encoder", model).img_size, generator=torch.Generator().manual_seed(2))


def noise(model, *batch):
    return torch.rand(*batch, model.grid_size[0] * model.grid_size[1], generator=torch.Generator().manual_seed(3))


def repaint(model, imgs, where):
    """Other pixels in the patches where (B, N) is True."""
    where = enlarge_mask(where.view(len(imgs), 1, *model.grid_size), model.patch_size)
    return torch.where(where, 3 * torch.rand_like(imgs) - 1, imgs)


def target_of(model, imgs):
    patches = patchify(imgs, model.patch_size)
    return normalize_patches(patches) if model.norm_pix_loss else patches


def untouched(model):
    """Names of trainable parameters without a gradient."""
    return [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


def one_line(error):
    return error.type is ValueError and "\n" not in str(error.value)


# ---------------------------------------------------------------------------- no prediction sees what it predicts


@every_encoder
@every_batch
@shared_or_not
def test_a_prediction_reads_exactly_the_other_half_of_its_own_image(name, batch, mask_per_cycle):
    model = tiny(name, mask_per_cycle=mask_per_cycle)
    imgs = images(model, batch).requires_grad_()
    out = model(imgs)
    for k, hidden in product(range(batch), (True, False)):
        predicted = (out.mask[k] > 0) == hidden  # what was hidden in the mixture where k was host, then where guest
        pred = out.pred[k][predicted]
        grad, = torch.autograd.grad((pred * torch.randn_like(pred)).sum(), imgs, retain_graph=True)
        expected = torch.zeros(batch, len(predicted), dtype=torch.bool)
        expected[k] = ~predicted
        assert torch.equal(patchify(grad, model.patch_size).any(-1), expected)


@every_encoder
@pytest.mark.parametrize("batch", [2, 3])
def test_other_pixels_in_a_patch_leave_its_prediction_bit_identical(name, batch):
    model = tiny(name).eval()
    imgs, rows = images(model, batch), noise(model)
    with torch.no_grad():
        before = model(imgs, noise=rows)
        for k in range(batch):
            for i in range(0, len(rows), 3):
                where = torch.zeros_like(before.mask, dtype=torch.bool)
                where[k, i] = True
                after = model(repaint(model, imgs, where), noise=rows).pred
                same = (after == before.pred).all(-1)
                assert same[k, i] and torch.equal(same[k], before.mask[k] == before.mask[k, i])


@pytest.mark.parametrize("name", ["demo", "vit"])
@every_batch
def test_without_masked_attention_a_prediction_also_reads_the_partner_but_still_not_itself(name, batch):
    model = tiny(name, masked_attention=False)
    imgs = images(model, batch).requires_grad_()
    out = model(imgs)
    for k in range(batch):
        hidden = out.mask[k] > 0
        grad, = torch.autograd.grad(out.pred[k][hidden].square().sum(), imgs, retain_graph=True)
        reached = patchify(grad, model.patch_size).any(-1)
        expected = torch.zeros_like(reached)
        expected[k], expected[out.partner[k]] = ~hidden, hidden  # mixture k: all of its tokens
        assert torch.equal(reached, expected)


def block_outputs(model, imgs, rows):
    """The output of every block and merging of one forward pass, as maps (B, h, w, d), and the mask on each map."""
    maps, encoder = [], model.encoder
    modules = encoder.blocks if isinstance(encoder, ViT) else [m for s in encoder.layers for m in (*s.blocks, s.downsample) if m is not None]
    handles = [m.register_forward_hook(lambda _, inputs, output: maps.append(output)) for m in modules]
    out = model(imgs, noise=rows)
    for handle in handles:
        handle.remove()
    maps = [m.unflatten(1, model.grid_size) if m.ndim == 3 else m for m in maps]
    mask = out.mask.view(-1, *model.grid_size) > 0
    return maps, [enlarge_mask(mask, m.shape[1] // model.grid_size[0]) for m in maps], out


@every_encoder
@pytest.mark.parametrize("grad", [True, False], ids=["plain attention", "fused attention"])
@pytest.mark.parametrize("masked", [True, False])
def test_the_partners_pixels_reach_a_hosts_tokens_only_without_masked_attention(name, grad, masked):
    model = tiny(name, masked_attention=masked).eval()
    imgs, rows = images(model, 3), noise(model)
    with torch.set_grad_enabled(grad):
        before, masks, out = block_outputs(model, imgs, rows)
        for changed, who in ((out.partner[0], "host"), (0, "guest")):  # of mixture 0, the one that stays as it is
            other = imgs.clone()
            other[changed] = torch.rand_like(imgs[0])
            after = block_outputs(model, other, rows)[0]
            same = [(a[0] == b[0]).all(-1) for a, b in zip(after, before, strict=True)]
            stays = [mask[0] == (who == "guest") for mask in masks]
            assert not any(s[~stay].any() for s, stay in zip(same, stays, strict=True))  # the changed one's tokens: all moved
            if masked:
                assert all(s[stay].all() for s, stay in zip(same, stays, strict=True))
            else:
                assert not same[-1][stays[-1]].any()


def test_the_stages_of_the_encoder_keep_two_sources_apart_on_its_own():
    encoder = stir(swin(img_size=(24, 40), window_size=(4, 2), shift=True))
    source = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    x = torch.randn(2, 60, 16)
    y = torch.where(enlarge_mask(source, 2).flatten(1)[..., None], torch.randn_like(x), x)
    for s, (a, b) in enumerate(zip(encoder.forward_stages(x, (6, 10), source), encoder.forward_stages(y, (6, 10), source), strict=True)):
        assert torch.equal((a == b).all(-1), ~enlarge_mask(source, 2 - s).expand(2, -1, -1))
    blind = encoder.forward_stages(x, (6, 10))[-1] == encoder.forward_stages(y, (6, 10))[-1]
    assert not blind.any(-1).all()


# ---------------------------------------------------------------------------- partners, mixtures, stitching


@pytest.mark.parametrize("batch", range(2, 34))
def test_everyone_has_a_partner_and_is_one(batch):
    partner = choose_partners(batch)
    assert sorted(partner.tolist()) == list(range(batch))
    assert (partner != torch.arange(batch)).all()
    if batch % 2 == 0:
        assert torch.equal(partner, torch.arange(batch).flip(0))
    else:
        alone = partner[partner] != torch.arange(batch)
        assert alone.sum() == 3 and torch.equal(partner[partner[partner]][alone], torch.arange(batch)[alone])


@pytest.mark.parametrize("batch, partners", [(2, [1, 0]), (3, [2, 0, 1]), (4, [3, 2, 1, 0]), (5, [4, 3, 1, 2, 0])])
def test_partners_of_small_batches_are_the_hand_made_ones(batch, partners):
    assert choose_partners(batch).tolist() == partners
    assert [partners[q] for q in GUESTS[batch]] == list(range(batch))
    model = tiny()
    assert model(images(model, batch)).partner.tolist() == partners


@pytest.mark.parametrize("name", ["demo", "padded"])
@shared_or_not
def test_the_encoder_gets_the_hosts_tokens_and_the_partners_each_with_the_position_of_the_place(name, mask_per_cycle):
    model = tiny(name, mask_per_cycle=mask_per_cycle)
    imgs, seen = images(model, 5), []
    handle = model.encoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    out = model(imgs)
    handle.remove()
    e, pos, (gh, gw) = model.encoder.embed(imgs), model.encoder.absolute_pos_embed, model.encoder.grid_size
    scale = gh // model.grid_size[0]
    for k, y, x in product(range(5), range(gh), range(gw)):
        removed = out.mask[k].view(model.grid_size)[y // scale, x // scale]
        of = out.partner[k] if removed else k
        torch.testing.assert_close(seen[0][k, y, x], e[of, y * gw + x] + pos[0, y * gw + x], atol=0, rtol=0)


@every_batch
@shared_or_not
def test_every_patch_of_every_image_is_predicted_once_where_a_hole_was(batch, mask_per_cycle):
    model, seen = tiny(mask_per_cycle=mask_per_cycle), []
    imgs, n = images(model, batch), 15

    def decode(x):
        seen.append(x)
        number = torch.arange(2.0 * batch * n).view(2 * batch, n, 1)  # sequences 0 .. B - 1: host of k; B .. 2 B - 1: guest of k
        return number.expand(-1, -1, 3 * model.patch_size**2)

    model.decode = decode
    out = model(imgs)
    for k, i in product(range(batch), range(n)):
        sequence = k if out.mask[k, i] else batch + GUESTS[batch][k]
        assert (out.pred[k, i] == sequence * n + i).all()
    used = out.pred[..., 0].flatten().long()
    holes = (seen[0] == model.mask_token).all(-1).flatten().nonzero()[:, 0]
    assert torch.equal(used.sort()[0], holes)  # every hole once, and nothing else
    torch.testing.assert_close(out.loss, (out.pred - target_of(model, imgs)).square().mean())


@every_batch
def test_what_stands_in_a_decoders_sequence_is_the_mixtures_own_token(batch):
    model, seen = tiny("demo"), []
    handle = model.decoder_embed.register_forward_hook(lambda _, inputs, output: seen.append(output))
    decode, fed = model.decode, []
    model.decode = lambda x: (fed.append(x), decode(x))[1]
    out = model(images(model, batch))
    handle.remove()
    (z,), (x,), hole = seen, fed, out.mask[..., None] > 0
    assert torch.equal(x[:batch], torch.where(hole, model.mask_token, z))
    assert torch.equal(x[batch:], torch.where(hole, z, model.mask_token))


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
    rows = noise(model)
    out = model(images(model, 3), mask_ratio=0.4, noise=rows)
    expected = torch.zeros(15).scatter(0, rows.argsort()[:6], 1.0)
    assert torch.equal(out.mask, expected.expand(3, -1))


def test_masks_per_cycle_follow_the_first_image_of_the_cycle():
    model = tiny(mask_per_cycle=True)
    rows = noise(model, 5)
    mask = model(images(model, 5), noise=rows).mask
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
    imgs, rows = images(model, 5), noise(model, *[5] * mask_per_cycle)
    out = model(imgs, noise=rows)
    flat = out.mask if mask_per_cycle else out.mask[0]
    for mask in (flat, flat.bool(), flat.unflatten(-1, (3, 5))):
        again = model(imgs, mask=mask)
        assert torch.equal(again.mask, out.mask) and torch.equal(again.pred, out.pred) and again.loss == out.loss


def test_a_given_mask_may_be_a_transposed_tensor():
    model = tiny()
    mask = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 0, 1]])
    assert model(images(model), mask=mask.T).mask[0].view(3, 5).tolist() == mask.T.tolist()


def test_a_mask_that_differs_along_a_cycle_is_refused():
    model = tiny(mask_per_cycle=True)
    mask = torch.zeros(5, 15)
    mask[:, :5] = 1
    mask[2] = mask[2].flip(0)
    with pytest.raises(ValueError, match="mask must be the same for all images of a cycle") as error:
        model(images(model, 5), mask=mask)
    assert one_line(error)


@pytest.mark.parametrize("what", ["noise", "mask"])
@pytest.mark.parametrize("mask_per_cycle, shape, words", [
    (False, (4, 15), r"\(4, 15\) must be \(15,\).*whole batch \(mask_per_cycle=False\)"),
    (False, (1, 15), r"\(1, 15\) must be \(15,\)"),
    (False, (14,), r"\(14,\) must be \(15,\)"),
    (True, (15,), r"\(15,\) must be \(4, 15\).*per image \(mask_per_cycle=True\)"),
    (True, (3, 15), r"\(3, 15\) must be \(4, 15\)"),
    (True, (4, 5, 3), r"\(4, 5, 3\) must be \(4, 15\)"),
])
def test_noise_and_masks_of_the_wrong_shape_are_refused(what, mask_per_cycle, shape, words):
    model = tiny(mask_per_cycle=mask_per_cycle)
    with pytest.raises(ValueError, match=f"{what} {words}") as error:
        model(images(model, 4), **{what: torch.rand(shape)})
    assert one_line(error)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.01, 1.0, -0.1, 1.5])
@pytest.mark.parametrize("options", [dict(), dict(mask_per_cycle=True), dict(fill="mask")], ids=str)
def test_mask_ratios_that_leave_one_source_empty_are_refused(mask_ratio, options):
    model = tiny(**options)
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} .*15 positions") as error:
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
    rows = noise(model, *[4] * mask_per_cycle)
    assert model(imgs, noise=rows).loss == model(imgs, noise=rows).loss


# ---------------------------------------------------------------------------- contrasts


@pytest.mark.parametrize("name", ["demo", "padded and shifted", "vit"])
@shared_or_not
def test_with_fill_mask_a_symbol_stands_in_the_holes_and_only_they_count(name, mask_per_cycle):
    model = tiny(name, fill="mask", mask_per_cycle=mask_per_cycle)
    imgs = images(model, 3)
    out = model(imgs, noise=noise(model, *[3] * mask_per_cycle))
    assert out.partner.tolist() == [0, 1, 2] and len(out.mask.unique(dim=0)) == (3 if mask_per_cycle else 1)
    encoder, grid = model.encoder, model.encoder.grid_size
    holes = enlarge_mask(out.mask.view(-1, *model.grid_size), grid[0] // model.grid_size[0]).flatten(1)[..., None]
    x = (1 - holes) * encoder.patch_embed(imgs) + holes * model.mask_token
    if name == "vit":
        z = encoder.fc_norm(encoder.forward_blocks(x + encoder.pos_embed))
    else:
        z = encoder.norm(encoder.forward_stages(x, grid)[-1].flatten(1, 2))
    pred = model.decode(model.decoder_embed(z))
    torch.testing.assert_close(out.pred, pred)
    hidden = out.mask > 0
    torch.testing.assert_close(out.loss, (pred - target_of(model, imgs))[hidden].square().mean())
    assert torch.equal(out.pred[hidden], model(repaint(model, imgs, hidden), mask=out.mask if mask_per_cycle else out.mask[0]).pred[hidden])


def test_with_fill_mask_one_image_is_enough_and_the_others_do_not_matter():
    model = tiny("demo", fill="mask")
    imgs, rows = images(model, 3), noise(model)
    torch.testing.assert_close(model(imgs[:1], noise=rows).pred, model(imgs, noise=rows).pred[:1])


@pytest.mark.parametrize("masked", [True, False])
def test_without_dual_only_the_host_is_predicted_and_only_its_holes_count(masked):
    model, contrast = tiny("demo", masked_attention=masked), tiny("demo", masked_attention=masked, dual=False)
    imgs, rows = images(model, 3), noise(model)
    both, host = model(imgs, noise=rows), contrast(imgs, noise=rows)
    hidden = both.mask > 0
    assert torch.equal(host.mask, both.mask)
    torch.testing.assert_close(host.pred[hidden], both.pred[hidden])
    assert not torch.isclose(host.pred[~hidden], both.pred[~hidden]).all(-1).any()
    torch.testing.assert_close(host.loss, (host.pred - target_of(model, imgs))[hidden].square().mean())
    contrast.decode = lambda x: torch.arange(float(len(x)))[:, None, None].expand(-1, 16, 3 * 16**2)
    assert contrast(imgs).pred[:, 5, 7].tolist() == [0, 1, 2]


@every_encoder
@pytest.mark.parametrize("options", [dict(), dict(mask_per_cycle=True), dict(dual=False), dict(masked_attention=False),
                                     dict(dual=False, masked_attention=False), dict(fill="mask"), dict(norm_pix_loss=False)], ids=str)
def test_every_trainable_parameter_gets_a_gradient(name, options):
    model = tiny(name, **options).train()
    model(images(model, 3), mask_ratio=0.25).loss.backward()  # enough hosts that in every block two of them meet: a bias matters
    assert untouched(model) == []


@pytest.mark.parametrize("encoder", [dict(in_chans=1), dict(in_chans=5, img_size=(16, 40)), dict(patch_size=2, img_size=16),
                                     dict(drop_path=0.1, checkpointing=True), dict(num_classes=10)], ids=str)
def test_every_trainable_parameter_gets_a_gradient_whatever_the_encoder(encoder):
    model = tiny(swin(**{**dict(img_size=32), **encoder})).train()
    model(images(model, 16, encoder.get("in_chans", 3))).loss.backward()
    assert untouched(model) == [] and isinstance(model.encoder.head, torch.nn.Identity)


# ---------------------------------------------------------------------------- the encoder against others


@pytest.mark.parametrize("size", [64, (32, 64)])
def test_with_shift_and_without_positions_it_is_timms_swin(size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    theirs = timm.models.swin_transformer.SwinTransformer(img_size=size, patch_size=4, num_classes=10, embed_dim=24, depths=(2, 2, 3),
                                                          num_heads=(2, 4, 8), window_size=4, drop_path_rate=0.0)
    theirs = stir(theirs).eval()
    ours = swin(img_size=size, num_classes=10, embed_dim=24, depths=(2, 2, 3), num_heads=(2, 4, 8), window_size=(4, 4, 4), shift=True)
    state = {"absolute_pos_embed": torch.zeros_like(ours.absolute_pos_embed)}
    for name, value in theirs.state_dict().items():
        stage, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("downsample."):  # timm's merging opens the next stage
            name = f"layers.{int(stage) - 1}.{rest}"
        if not name.endswith(("relative_position_index", "attn_mask")):
            state[name.replace("head.fc.", "head.")] = value
    ours.load_state_dict(state, strict=True)
    imgs, maps = images(ours.eval(), 2), []
    for stage in theirs.layers:
        stage.register_forward_hook(lambda _, inputs, output: maps.append(output))
    logits = theirs(imgs)
    for a, b in zip(ours.forward_maps(imgs), maps, strict=True):
        torch.testing.assert_close(a.permute(0, 2, 3, 1), b, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours(imgs), logits, atol=1e-5, rtol=1e-5)


def naive_block(block, x, window, shifted, source):
    """One map (H, W, D), token by token: each attends to the real tokens of its window and source, and to nothing else."""
    places = list(product(range(x.shape[0]), range(x.shape[1])))
    (wh, ww), (th, tw) = (min(a, b) for a, b in zip(window, x.shape)), block.attn.window
    down, right = (w // 2 if shifted and side > w else 0 for w, side in zip((wh, ww), x.shape))
    q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, block.attn.num_heads, -1)).unbind(2)
    y = torch.empty_like(x)
    for r, c in places:
        seen = [(a, b) for a, b in places if (a - down) // wh == (r - down) // wh and (b - right) // ww == (c - right) // ww
                and (source is None or source[a, b] == source[r, c])]
        bias = block.attn.relative_position_bias_table[[(r - a + th - 1) * (2 * tw - 1) + c - b + tw - 1 for a, b in seen]]
        keys, values = (torch.stack([t[place] for place in seen]) for t in (k, v))  # (n, h, d)
        weights = ((q[r, c] * keys).sum(-1) * q.shape[-1] ** -0.5 + bias).softmax(0)
        y[r, c] = (weights[..., None] * values).sum(0).flatten()
    x = x + block.attn.proj(y)
    return x + block.mlp(block.norm2(x))


@pytest.mark.parametrize("size, window, table", [
    ((6, 10), (4, 4), (4, 4)),  # padding on both sides
    ((8, 4), (4, 4), (4, 4)),  # none; nothing to shift in the width
    ((5, 7), (3, 2), (3, 2)),  # windows that are no squares
    ((3, 9), (4, 4), (4, 4)),  # lower than the window
    ((2, 3), (4, 4), (4, 4)),  # all of it inside one window
    ((7, 7), (4, 4), (6, 5)),  # a table for larger windows
], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("sources", [0, 1, 2])
def test_a_window_block_is_attention_among_the_real_tokens_of_each_window(size, window, table, shifted, sources):
    torch.manual_seed(0)
    block = stir(WindowBlock(8, 2, table, mlp_ratio=2, drop_path=0.0)).double()
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    source = torch.rand(sources, *size) < 0.5 if sources else None  # none, one for the batch, one per image
    ours = block(x, cut_windows(*size, window, shifted, source, x.device))
    for k in range(2):
        expected = naive_block(block, x[k], window, shifted, source[k % sources] if sources else None)
        torch.testing.assert_close(ours[k], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("shift", [False, True])
def test_a_window_larger_than_the_map_is_the_map(shift):
    torch.manual_seed(0)
    large, fitting = swin(img_size=32, window_size=(14, 14), shift=shift), swin(img_size=32, window_size=(8, 4), shift=shift)
    tables = [stage.blocks[0].attn.relative_position_bias_table.shape for stage in large.layers]
    assert tables == [(15 * 15, 2), (7 * 7, 4)]  # 2 x 8 - 1 and 2 x 4 - 1 offsets
    fitting.load_state_dict(large.state_dict(), strict=True)
    assert torch.equal(large(images(large)), fitting(images(large)))
    tall = swin(img_size=(32, 16), window_size=(6, 6))
    assert [stage.window for stage in tall.layers] == [(6, 4), (4, 2)]


@pytest.mark.parametrize("size", [(64, 64), (64, 32)])
@pytest.mark.parametrize("shift", [False, True])
def test_another_input_size_equals_a_model_built_for_it(size, shift):
    small, large = stir(swin(img_size=size, num_classes=10, shift=shift)), swin(img_size=(96, 64), num_classes=10, shift=shift)
    report = load_pretrained(large, small.state_dict(), verbose=False, grid=small.grid_size)
    assert report.resized == ["absolute_pos_embed"] and not report.missing and not report.skipped
    imgs = images(large, 2)
    torch.testing.assert_close(small(imgs), large(imgs), atol=1e-6, rtol=1e-6)


def test_a_map_smaller_than_the_window_reads_the_middle_of_the_table():
    large, small = stir(swin(img_size=64, window_size=(16, 8))), swin(img_size=(32, 48), window_size=(16, 8))
    state = dict(large.state_dict())
    state["absolute_pos_embed"] = resize_pos_embed(state["absolute_pos_embed"], (16, 16), (8, 12), prefix=0)
    for s, stage in enumerate(small.layers):
        w, (wh, ww) = large.layers[s].window[0], stage.window  # offsets -(wh - 1) .. wh - 1 of -(w - 1) .. w - 1
        for i in range(2):
            name = f"layers.{s}.blocks.{i}.attn.relative_position_bias_table"
            middle = state[name].view(2 * w - 1, 2 * w - 1, -1)[w - wh:w + wh - 1, w - ww:w + ww - 1]
            state[name] = middle.flatten(0, 1)
    small.load_state_dict(state, strict=True)
    imgs = images(small, 2)
    torch.testing.assert_close(large(imgs), small(imgs), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------------------- the encoder by itself


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("channels", [1, 5])
def test_maps_have_the_shapes_of_their_stages_and_end_in_the_features(patch_size, channels):
    encoder = stir(swin(img_size=(8 * patch_size, 12 * patch_size), patch_size=patch_size, in_chans=channels, depths=(1, 1, 2),
                        num_heads=(1, 2, 4), window_size=(4, 4, 2), num_classes=7))
    imgs = images(encoder, 2, channels)
    maps = encoder.forward_maps(imgs)
    assert [m.shape for m in maps] == [(2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    assert (encoder.stride, encoder.num_features, encoder.grid_size) == (4 * patch_size, 64, (8, 12))
    features = encoder.forward_features(imgs)
    assert torch.equal(features, encoder.norm(maps[-1].flatten(2).mT)) and features.shape == (2, 6, 64)
    assert torch.equal(encoder(imgs), encoder.head(features.mean(1))) and encoder(imgs).shape == (2, 7)
    encoder.reset_classifier(0)
    assert torch.equal(encoder(imgs), features.mean(1))
    model = tiny(encoder)
    assert model(imgs).pred.shape == (2, 6, channels * (4 * patch_size) ** 2)
    assert model.reconstruct(imgs).shape == imgs.shape


@pytest.mark.parametrize("preset, stride, width, grid", [("mixmim_b", 32, 1024, (56, 56)), ("mixmim_l", 32, 1536, (56, 56)),
                                                         ("mixmim_h", 32, 2816, (56, 56)), ("mixmim_demo", 16, 192, (16, 16))])
def test_presets_build_on_the_meta_device(preset, stride, width, grid):
    with torch.device("meta"):
        model = MixMIM(create_mixmim(preset))
    assert all(p.is_meta for p in model.parameters()) and len(PRESETS) == 4
    assert (model.patch_size, model.encoder.num_features, model.encoder.grid_size) == (stride, width, grid)


def test_drop_path_grows_linearly_from_zero_over_all_stages():
    encoder = swin(depths=(2, 3), drop_path=0.4)
    rates = [getattr(block.drop_path, "p", 0.0) for stage in encoder.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert swin().layers[1].blocks[1].drop_path.__class__ is torch.nn.Identity


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = tiny(swin(img_size=(24, 40), shift=True, checkpointing=checkpointing))
        model(images(model), noise=noise(model)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


@pytest.mark.parametrize("name", ENCODERS)
def test_a_state_dict_holds_parameters_only_and_survives_the_round_trip(name):
    model, other = tiny(name), MixMIM(ENCODERS[name](), 16, 1, 2)
    assert set(model.state_dict()) == {key for key, _ in model.named_parameters()}
    other.load_state_dict(model.state_dict(), strict=True)
    imgs, rows = images(model), noise(model)
    assert model(imgs, noise=rows).loss == other(imgs, noise=rows).loss


def test_positions_are_the_fixed_sincos_tables_and_stay():
    model = tiny("padded")
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == {"encoder.absolute_pos_embed", "decoder_pos_embed"}
    assert torch.equal(frozen["encoder.absolute_pos_embed"][0], sincos_pos_embed(16, 6, 10, cls_token=False))
    assert torch.equal(frozen["decoder_pos_embed"][0], sincos_pos_embed(16, 3, 5, cls_token=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    model(images(model)).loss.backward()
    optimizer.step()
    assert all(torch.equal(dict(model.named_parameters())[name], table) for name, table in frozen.items())
    classifier = swin(num_classes=10)
    assert [name for name, p in classifier.named_parameters() if not p.requires_grad] == ["absolute_pos_embed"]


@pytest.mark.parametrize("options", [dict(), dict(pool="mean"), dict(class_token=False, pool="mean"), dict(pos_embed=None),
                                     dict(num_classes=10)], ids=str)
def test_a_plain_vit_loses_class_token_and_head_and_gets_fixed_positions(options):
    model = tiny(ViT(img_size=(16, 24), patch_size=4, **{**dict(embed_dim=24, depth=1, num_heads=2, num_classes=0), **options}))
    encoder = model.encoder
    assert encoder.cls_token is None and isinstance(encoder.head, torch.nn.Identity) and not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed[0], sincos_pos_embed(24, 4, 6, cls_token=False))
    model(images(model)).loss.backward()
    assert untouched(model) == []
    assert encoder(images(model)).shape == (4, 24)


# ---------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("official", [False, True])
def test_a_pretraining_checkpoint_loads_into_a_classifier_of_another_size(official):
    model = tiny(swin(img_size=32, window_size=(8, 4)))
    state = model.state_dict()
    if official:
        state = {name.removeprefix("encoder."): value for name, value in state.items()}
        state |= {f"layers.0.blocks.{i}.attn.relative_position_index": torch.zeros(64, 64, dtype=torch.long) for i in range(2)}
    classifier = swin(img_size=64, window_size=(4, 4), num_classes=10)
    head = classifier.head.weight.clone()
    report = load_pretrained(classifier, {"model": state}, verbose=False)
    tables = ["absolute_pos_embed", *(f"layers.0.blocks.{i}.attn.relative_position_bias_table" for i in range(2))]
    assert report.format == ("MixMIM" if official else "ours")
    assert sorted(report.resized) == tables and report.missing == ["head.weight", "head.bias"] and not report.skipped
    trained, loaded = model.encoder.state_dict(), classifier.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in trained.items() if name not in tables)
    assert torch.equal(loaded["absolute_pos_embed"], resize_pos_embed(trained["absolute_pos_embed"], (8, 8), (16, 16), prefix=0))
    for name in tables[1:]:
        image = trained[name].T.view(1, 2, 15, 15)
        expected = F.interpolate(image, size=(7, 7), mode="bicubic", align_corners=False)
        torch.testing.assert_close(loaded[name].T.view(1, 2, 7, 7), expected)
    assert torch.equal(classifier.head.weight, head)


def test_the_encoder_inside_is_the_plain_one():
    model, plain = tiny("padded and shifted"), ENCODERS["padded and shifted"]()
    plain.load_state_dict(model.encoder.state_dict(), strict=True)
    imgs = images(model)
    model(imgs)
    assert torch.equal(model.encoder(imgs), plain(imgs))
    x = model.encoder.patch_embed(imgs)
    everything = torch.ones(1, 3, 5, dtype=torch.bool)  # one source: as without a mask
    torch.testing.assert_close(model.encoder.forward_stages(x, (6, 10), everything)[-1], plain.forward_stages(x, (6, 10))[-1])


# ---------------------------------------------------------------------------- errors


@pytest.mark.parametrize("wrong, words", [
    (dict(img_size=50), r"img_size 50 \(height\) is not a multiple of 8.*try 48 or 56"),
    (dict(img_size=(32, 36)), r"img_size 36 \(width\) is not a multiple of 8.*try 32 or 40"),
    (dict(img_size=4), r"img_size 4 \(height\).*try 8"),
    (dict(embed_dim=20, num_heads=(3, 4)), "width 20 of stage 0 .*num_heads 3"),
    (dict(num_heads=(2, 5)), "width 32 of stage 1 .*num_heads 5"),
    (dict(num_heads=(2, 4, 8)), r"depths \(2, 2\), num_heads \(2, 4, 8\).*one number per stage"),
    (dict(window_size=(4,)), r"window_size \(4,\).*one number per stage"),
    (dict(depths=(2, 2, 2)), r"depths \(2, 2, 2\).*one number per stage"),
    (dict(window_size=(4, 0)), r"window_size \(4, 0\) must all be at least 1"),
    (dict(depths=(2, 0)), r"depths \(2, 0\).*at least 1"),
    (dict(in_chans=0), "in_chans 0.*at least 1"),
    (dict(embed_dim=18, num_heads=(1, 1)), "multiple of 4.*18"),
], ids=str)
def test_encoders_that_do_not_fit_are_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        swin(**{**dict(img_size=32), **wrong})
    assert one_line(error)


@pytest.mark.parametrize("wrong, words", [
    (dict(fill="mean"), "fill 'mean' is unknown; choose 'mix' or 'mask'"),
    (dict(decoder_num_heads=5), "decoder_embed_dim 16 .*decoder_num_heads 5"),
    (dict(decoder_embed_dim=18), "multiple of 4.*18"),
    (dict(encoder=create_vit("vit_demo", depth=1, rel_pos_bias="shared", pos_embed=None)), "rel_pos_bias=None"),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else None)
def test_wrappers_that_do_not_fit_are_refused_with_one_sentence(wrong, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny(**wrong)
    assert one_line(error)


def test_a_refused_option_leaves_the_encoder_as_it_was():
    for wrong in (dict(decoder_embed_dim=24, decoder_num_heads=5), dict(fill="mean")):
        for encoder in (ViT(img_size=16, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=10), swin(num_classes=10)):
            before = {key: value.clone() for key, value in encoder.state_dict().items()}
            with pytest.raises(ValueError):
                MixMIM(encoder, **wrong)
            after = encoder.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown model 'mixmim_xl'; choose from mixmim_b, .*mixmim_demo") as error:
        create_mixmim("mixmim_xl")
    assert one_line(error)




@pytest.mark.parametrize("shape, words", [
    ((1, 3, 24, 40), "the batch holds 1; use a batch of at least 2"),
    ((4, 3, 24, 24), "images are 24x24, .*img_size 24x40"),
    ((4, 3, 48, 80), "images are 48x80, .*img_size 24x40"),
    ((4, 1, 24, 40), "in_chans"),
    ((3, 24, 40), r"\(3, 24, 40\)"),
], ids=str)
def test_batches_that_do_not_fit_are_refused_with_one_sentence(shape, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny()(torch.rand(shape))
    assert one_line(error)


@pytest.mark.parametrize("shape, words", [
    ((2, 3, 24, 42), r"42 \(width\).*try 40 or 48"),
    ((2, 1, 24, 40), r"\(B, 3, H, W\).*\(2, 1, 24, 40\).*in_chans is 3"),
    ((3, 24, 40), r"\(3, 24, 40\)"),
], ids=str)
def test_images_the_encoder_cannot_read_are_refused_with_one_sentence(shape, words):
    encoder = ENCODERS["padded"]()
    for call in (encoder, encoder.forward_maps, encoder.forward_features):
        with pytest.raises(ValueError, match=words) as error:
            call(torch.rand(shape))
        assert one_line(error)


# ---------------------------------------------------------------------------- attention and speed


@pytest.mark.parametrize("shape", [(3, 4, 6, 8), (1, 4, 600, 4)], ids=str)
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("masked", [False, True])
def test_a_trainable_bias_gives_the_values_and_gradients_of_the_fused_attention(shape, dtype, close, masked):
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(shape) for _ in range(4))
    bias = torch.randn(1, shape[1], shape[2], shape[2])
    if masked:
        bias[..., 1:, 0] = -torch.inf  # only the first token sees the first
    results = []
    for how in (lambda *x: attention(*x), lambda q, k, v, bias: F.scaled_dot_product_attention(q.float(), k.float(), v.float(), bias)):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = how(*(x.to(dtype) for x in leaves[:3]), leaves[3])
        (out.float() * weight).sum().backward()
        results.append((out, [x.grad for x in leaves]))
    assert results[0][0].dtype == dtype
    torch.testing.assert_close(results[0][0].float(), results[1][0].float(), atol=close, rtol=close)
    for ours, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(ours, expected, atol=close * expected.abs().max().item(), rtol=close)


@pytest.mark.parametrize("mask_per_cycle, leading", [(False, 1), (True, 4)])
@pytest.mark.parametrize("name", HIERARCHICAL)
def test_masks_are_cut_once_per_stage_and_kind_and_not_repeated_over_the_batch(name, mask_per_cycle, leading, monkeypatch):
    model, cuts, shapes_seen = tiny(name, mask_per_cycle=mask_per_cycle), [], []

    def cut(*args):
        cuts.append(args[3])
        return cut_windows(*args)

    def attend(q, k, v, bias=None):
        shapes_seen.append(bias.shape)
        return attention(q, k, v, bias)

    monkeypatch.setattr(mixmim, "cut_windows", cut)
    monkeypatch.setattr(mixmim, "attention", attend)
    model(images(model))
    stages, kinds = len(model.encoder.layers), [False, True] if "shifted" in name else [False]
    assert cuts == kinds * stages
    assert len(shapes_seen) == sum(model.encoder.depths) and {(len(shape), shape[0]) for shape in shapes_seen} == {(4, leading)}
    shapes_seen.clear()
    model.encoder(images(model))
    assert all(len(shape) == 3 or shape[0] == 1 for shape in shapes_seen)  # a classifier's bias: no batch either


@pytest.mark.parametrize("encoder", [lambda: swin(img_size=16, depths=(1,), num_heads=(2,), window_size=(2,)),
                                     pytest.param(lambda: swin(img_size=(24, 40), depths=(2, 1), shift=True), marks=pytest.mark.slow),
                                     pytest.param(lambda: create_vit("vit_demo", img_size=16, embed_dim=24, depth=1), marks=pytest.mark.slow)],
                         ids=["windows", "padded and shifted", "vit"])
def test_compiling_it_breaks_no_graph_and_changes_no_number(encoder):
    torch._dynamo.reset()
    model = tiny(encoder())
    imgs, rows, results = images(model), noise(model), []
    for how in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        out = how(imgs, noise=rows)
        out.loss.backward()
        results.append((out.loss.detach(), out.pred.detach(), *(p.grad for p in model.parameters() if p.requires_grad)))
    for compiled, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(compiled, eager, atol=1e-5, rtol=1e-4)


def test_bf16_autocast_gives_a_float32_loss_close_to_the_exact_one():
    model = tiny("padded and shifted")
    imgs, rows = images(model), noise(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(imgs, noise=rows).loss
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, model(imgs, noise=rows).loss, atol=0, rtol=0.02)


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("batch", [3, 4])
def test_a_perfect_prediction_with_true_statistics_gives_the_images_back(batch):
    model = tiny("demo")
    imgs = images(model, batch)
    model.decode = lambda x: torch.cat([target_of(model, imgs), target_of(model, imgs)[choose_partners(batch)]])
    assert model(imgs).loss == 0
    torch.testing.assert_close(model.reconstruct(imgs, use_true_patch_statistics=True), imgs)
    model.norm_pix_loss = False
    assert torch.equal(model.reconstruct(imgs), imgs)


@pytest.mark.parametrize("name", ["demo", "padded", "vit"])
@pytest.mark.parametrize("options", [dict(), dict(norm_pix_loss=False), dict(mask_per_cycle=True)], ids=str)
def test_reconstructed_patches_hold_nothing_of_what_was_hidden_unless_asked_for(name, options):
    model = tiny(name, **options).eval()
    imgs = images(model, 3)
    how = dict(noise=noise(model, *[3] * model.mask_per_cycle))
    mask, before = model(imgs, **how).mask, model.reconstruct(imgs, **how)
    leaky = model.reconstruct(imgs, **how, use_true_patch_statistics=True)
    assert before.shape == imgs.shape and not before.requires_grad
    for k, hidden in product(range(3), (True, False)):
        where = torch.zeros_like(mask, dtype=torch.bool)
        where[k] = (mask[k] > 0) == hidden
        changed = repaint(model, imgs, where)
        after = model.reconstruct(changed, **how)
        same = (patchify(after, model.patch_size) == patchify(before, model.patch_size)).all(-1)
        assert same[where].all() and not same[k][~where[k]].any() and same[torch.arange(3) != k].all()
        after = model.reconstruct(changed, **how, use_true_patch_statistics=True)
        same = (patchify(after, model.patch_size) == patchify(leaky, model.patch_size)).all(-1)
        assert same[where].any() == (not model.norm_pix_loss)  # raw pixels need no statistics, so nothing can leak


# ---------------------------------------------------------------------------- learning


def test_it_memorises_a_few_images():
    torch.manual_seed(0)
    model = MixMIM(create_mixmim("mixmim_demo", embed_dim=24, depths=(1, 1, 1)), decoder_embed_dim=96, decoder_depth=1, decoder_num_heads=3)
    imgs, losses = shapes(8, img_size=64), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95))
    for _ in range(120):
        loss = model(imgs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1  # guessing each patch's mean scores 1.00
    assert sum(losses[-10:]) / 10 < 0.6


@pytest.mark.slow
def test_a_training_step_of_mixmim_b_uses_most_of_the_machine(capsys):
    """224 px, batch 8, fp32, two threads: the share of the speed of large matrix products, steps and products interleaved."""
    import statistics
    import time

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.device("meta"), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            MixMIM(create_mixmim("mixmim_b"))(torch.empty(8, 3, 224, 224))
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
        seconds = time.perf_counter() - start
        shares.append(3 * counter.get_total_flops() / seconds / ((before + matmul_rate()) / 2))  # backward: twice the forward
    torch.set_num_threads(threads)
    share = statistics.median(shares[4:])  # the first steps also fetch the memory
    with capsys.disabled():
        print(f"\nMixMIM-B step: {share:.2f} of the matmul rate {[round(s, 2) for s in shares]}")
    assert share >= 0.70  # on an otherwise idle machine
