import re

import pytest
import torch
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st

from masking import (
    block_mask,
    choose_patches,
    enlarge_mask,
    grid_mask,
    hide,
    mask_from_image,
    masked_loss,
    mix_mask,
    normalize_patches,
    num_masked,
    num_visible,
    paste,
    patch_mean_loss,
    patch_statistics,
    patchify,
    random_mask,
    split_by_mask,
    split_by_noise,
    unpatchify,
    unshuffle,
)

MAKERS = {"random": random_mask, "block": block_mask, "grid": grid_mask}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
sizes = st.integers(1, 5)
quick = settings(max_examples=50, deadline=None)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------------------- patches


@quick
@given(batch=sizes, channels=sizes, gh=sizes, gw=sizes, patch_size=st.integers(1, 6))
def test_patchify_and_unpatchify_undo_each_other(batch, channels, gh, gw, patch_size):
    imgs = torch.rand(batch, channels, gh * patch_size, gw * patch_size)
    patches = patchify(imgs, patch_size)
    assert patches.shape == (batch, gh * gw, patch_size**2 * channels)
    assert torch.equal(unpatchify(patches, patch_size, (gh, gw)), imgs)
    assert torch.equal(patchify(unpatchify(patches, patch_size, (gh, gw)), patch_size), patches)


def test_patches_run_row_by_row_and_inside_one_the_channel_is_fastest():
    imgs = torch.arange(2 * 4 * 6).view(1, 2, 4, 6)  # pixel (c, y, x) is 24 c + 6 y + x
    patches = patchify(imgs, 2)
    assert patches.shape == (1, 6, 8)
    assert patches[0, 0].tolist() == [0, 24, 1, 25, 6, 30, 7, 31]
    assert patches[0, 1].tolist() == [2, 26, 3, 27, 8, 32, 9, 33]
    assert patches[0, 3].tolist() == [12, 36, 13, 37, 18, 42, 19, 43]


def test_images_and_patches_that_do_not_fit_are_refused_with_their_sizes():
    with pytest.raises(EinopsError, match="30"):
        patchify(torch.zeros(1, 3, 30, 32), 4)
    with pytest.raises(EinopsError, match="30"):
        patchify(torch.zeros(1, 3, 32, 30), 4)
    with pytest.raises(EinopsError, match="6"):
        unpatchify(torch.zeros(1, 6, 48), 4, (2, 2))
    with pytest.raises(EinopsError, match="50"):
        unpatchify(torch.zeros(1, 6, 50), 4, (2, 3))


# ---------------------------------------------------------------------------- choosing patches


@quick
@given(n=st.integers(1, 300), mask_ratio=st.floats(0, 0.999))
def test_the_number_of_visible_patches_is_the_official_formula_or_an_error(n, mask_ratio):
    keep = int(n * (1 - mask_ratio))
    if keep:
        assert num_visible(n, mask_ratio) == keep
        assert num_masked((1, n), mask_ratio) == n - keep
    else:
        with pytest.raises(ValueError, match="none of"):
            num_visible(n, mask_ratio)


def test_num_visible_of_known_cases():
    assert num_visible(196, 0.75) == 49
    assert num_visible(196, 0) == 196
    assert num_visible(10, 0.25) == 7  # 7.5, rounded down


@pytest.mark.parametrize("mask_ratio", [1, 1.0, 1.5, -0.1, float("nan")])
def test_mask_ratios_outside_zero_to_one_are_refused(mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} must lie in"):
        num_visible(64, mask_ratio)


@pytest.mark.parametrize("n", [2, 3, 4, 9, 10, 16, 49, 64, 100, 196, 256])
def test_the_largest_mask_ratio_that_the_error_suggests_does_work(n):
    with pytest.raises(ValueError, match=f"none of {n} patches visible") as error:
        num_visible(n, 0.99999)
    suggested = float(re.search(r"at most ([\d.]+\d)", str(error.value))[1])
    assert num_visible(n, suggested) == 1


def test_the_patches_with_the_smallest_noise_stay_in_that_order():
    noise = torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.2, 0.8, 0.4, 0.6]])
    split = split_by_noise(noise, 2)
    assert split.ids_keep.tolist() == [[1, 3], [0, 2]]
    assert split.ids_restore.tolist() == [[2, 0, 3, 1], [0, 3, 1, 2]]
    assert split.mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]


@quick
@given(batch=sizes, n=st.integers(1, 40), dim=sizes, data=st.data())
def test_unshuffle_puts_visible_tokens_back_and_the_mask_token_elsewhere(batch, n, dim, data):
    keep = data.draw(st.integers(1, n))
    tokens = torch.randn(batch, n, dim)
    split = split_by_noise(torch.rand(batch, n), keep)
    visible = tokens.gather(1, split.ids_keep[..., None].expand(-1, -1, dim))
    token = torch.full((1, 1, dim), 100.0)
    restored = unshuffle(visible, token, split.ids_restore)
    assert torch.equal(restored, torch.where(split.mask[..., None].bool(), token, tokens))
    assert split.mask.sum(1).tolist() == [n - keep] * batch


def test_split_by_mask_agrees_with_a_hand_made_one():
    mask = torch.tensor([[[1, 0, 1], [0, 1, 1]], [[0, 1, 1], [1, 1, 0]]])
    for given_mask in (mask, mask.bool(), mask.flatten(1), mask.float()):
        split = split_by_mask(given_mask)
        assert split.ids_keep.tolist() == [[1, 3], [0, 5]]
        assert torch.equal(split.mask, mask.flatten(1).float())
        # hidden patches follow in their own order: positions 1, 3 | 0, 2, 4, 5
        assert split.ids_restore.tolist() == [[2, 0, 3, 1, 4, 5], [0, 2, 3, 4, 5, 1]]


def test_split_by_mask_refuses_rows_that_hide_differently_many_or_all():
    with pytest.raises(ValueError, match=r"mask .*\[1, 2\]"):
        split_by_mask(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    with pytest.raises(ValueError, match=r"mask .*\[0, 0\]"):
        split_by_mask(torch.ones(2, 3))


def test_choose_patches_refuses_what_does_not_fit_the_images():
    imgs = torch.zeros(2, 3, 8, 16)
    assert choose_patches(imgs, (8, 16), 4, 0.5).ids_keep.shape == (2, 4)
    with pytest.raises(ValueError, match="8x16.*img_size 16x16"):
        choose_patches(imgs, (16, 16), 4, 0.5)


@pytest.mark.parametrize(
    "name, shape",
    [("noise", (8,)), ("noise", (2, 7)), ("noise", (2, 2, 4)), ("mask", (1, 2, 4)), ("mask", (2, 8, 1, 2))],
)
def test_noise_and_masks_of_the_wrong_shape_are_refused(name, shape):
    with pytest.raises(ValueError, match=rf"{name} .*\(2, 8\)"):  # noise (N,) is MixMIM's
        choose_patches(torch.zeros(2, 3, 8, 16), (8, 16), 4, 0.5, **{name: torch.zeros(shape)})


# ---------------------------------------------------------------------------- masks


@every_maker
@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 12), (7, 5), (1, 6)])
@pytest.mark.parametrize("mask_ratio", [0, 0.1, 0.4, 0.5, 0.75, 0.9, 1])
def test_every_mask_removes_exactly_its_share(make, grid, mask_ratio):
    masks = make(6, grid, mask_ratio, seeded())
    n = grid[0] * grid[1]
    assert masks.shape == (6, *grid) and masks.dtype == torch.bool
    assert masks.flatten(1).sum(1).tolist() == [n - int(n * (1 - mask_ratio))] * 6


@every_maker
def test_masks_follow_their_generator_and_leave_the_global_one_alone(make):
    state = torch.get_rng_state()
    first = make(8, (8, 8), 0.5, seeded(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, make(8, (8, 8), 0.5, seeded(3)))
    assert not torch.equal(first, make(8, (8, 8), 0.5, seeded(4)))


@every_maker
def test_images_of_a_batch_get_different_masks(make):
    masks = make(64, (8, 8), 0.75, seeded())
    # a lattice that keeps one patch of each 2 x 2 has four places
    assert len(masks.flatten(1).unique(dim=0)) >= {random_mask: 64, block_mask: 60, grid_mask: 4}[make]


@pytest.mark.parametrize("make", [random_mask, grid_mask])
def test_every_place_is_removed_equally_often_in_the_long_run(make):
    share = make(2000, (6, 6), 0.5, seeded()).float().mean(0)
    assert (share - 0.5).abs().max() < 0.05


def test_block_masks_reach_the_corners_and_favour_no_side():
    share = block_mask(2000, (6, 6), 0.5, seeded()).float().mean(0)  # rectangles cover the middle more often
    assert share.min() > 0.1 and share.max() < 0.9
    for flipped in (share.flip(0), share.flip(1), share.T):
        assert (share - flipped).abs().max() < 0.08


@pytest.mark.parametrize("mask_ratio", [-0.1, 1.1])
@every_maker
def test_masks_refuse_a_share_outside_zero_to_one(make, mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio}"):
        make(1, (4, 4), mask_ratio)


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (4, 6)])
def test_a_grid_mask_of_three_quarters_keeps_one_patch_of_each_2x2(grid):
    masks = grid_mask(16, grid, 0.75, seeded())
    tiles = (~masks).view(16, grid[0] // 2, 2, grid[1] // 2, 2).sum((2, 4))
    assert (tiles == 1).all()
    assert (masks[:, :2, :2].flatten(1).float().std(dim=0) > 0).all()  # not the same one in every image


def test_a_grid_mask_of_one_half_is_a_checkerboard():
    board = (torch.arange(8)[:, None] + torch.arange(8)) % 2 == 0
    masks = grid_mask(32, (8, 8), 0.5, seeded())
    white, black = (masks == board).all((1, 2)), (masks == ~board).all((1, 2))
    assert (white ^ black).all() and white.any() and black.any()


def test_block_masks_are_more_connected_than_random_ones():
    def edges(masks):
        return (masks[:, 1:] != masks[:, :-1]).float().mean() + (masks[:, :, 1:] != masks[:, :, :-1]).float().mean()

    blocks, dots = block_mask(64, (14, 14), 0.4, seeded(), min_block=16), random_mask(64, (14, 14), 0.4, seeded())
    assert edges(blocks) < 0.6 * edges(dots)


def test_a_drawn_mask_removes_the_patches_it_covers_enough():
    picture = torch.zeros(1, 4, 8)
    picture[0, :, :3] = 1  # covers patch column 0 fully, column 1 by half
    picture[0, 0, 4] = 1  # a quarter of one patch
    assert mask_from_image(picture, 2).tolist() == [[[True, True, False, False]] * 2]
    assert mask_from_image(picture, 2, threshold=0.6).tolist() == [[[True, False, False, False]] * 2]
    assert mask_from_image(picture, 2, threshold=0.25).tolist() == [
        [[True, True, True, False], [True, True, False, False]]
    ]


@quick
@given(n=st.integers(2, 60), mask_ratio=st.floats(0, 1), batch=st.integers(0, 3))
def test_a_mix_mask_takes_the_smallest_noise_from_the_partner(n, mask_ratio, batch):
    noise = torch.rand(*([batch] if batch else []), n)
    count = int(n * mask_ratio)
    if not 0 < count < n:
        with pytest.raises(ValueError, match=f"{n} positions"):
            mix_mask(noise, mask_ratio)
        return
    mask = mix_mask(noise, mask_ratio)
    assert mask.shape == noise.shape and mask.dtype == torch.bool
    assert (mask.sum(-1) == count).all()
    for row, chosen in zip(noise.view(-1, n), mask.view(-1, n)):
        assert row[chosen].max() <= row[~chosen].min()


def test_enlarging_a_mask_repeats_every_entry_in_a_square():
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    expected = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    assert torch.equal(enlarge_mask(mask, 2), expected)
    assert torch.equal(enlarge_mask(mask[None, None], 2), expected[None, None])
    assert torch.equal(enlarge_mask(mask, 1), mask)


# ---------------------------------------------------------------------------- target and loss


def test_normalized_patches_have_mean_zero_and_unbiased_variance_one():
    patches = 5 + 3 * torch.randn(4, 9, 48, generator=seeded(), dtype=torch.float64)
    target = normalize_patches(patches)
    torch.testing.assert_close(target.mean(-1), torch.zeros(4, 9, dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        target.var(-1, unbiased=True), torch.ones(4, 9, dtype=torch.float64), atol=1e-6, rtol=0
    )
    by_hand = normalize_patches(torch.tensor([1.0, 2.0, 3.0, 6.0]))  # mean 3, unbiased variance 14 / 3
    torch.testing.assert_close(by_hand, torch.tensor([-2.0, -1.0, 0.0, 3.0]) / (14 / 3 + 1e-6) ** 0.5)


def test_a_flat_patch_normalizes_to_zero():
    assert normalize_patches(torch.full((1, 2, 48), 0.7)).abs().max() < 1e-3


def test_the_masked_loss_is_the_hand_computed_one():
    pred, target = torch.zeros(1, 3, 2), torch.tensor([[[1.0, 3.0], [2.0, 2.0], [100.0, 100.0]]])
    assert masked_loss(pred, target, torch.tensor([[1.0, 1.0, 0.0]])).item() == pytest.approx((5 + 4) / 2)
    assert masked_loss(pred, target, torch.tensor([[0.0, 1.0, 0.0]])).item() == pytest.approx(4)


def test_the_masked_loss_weighs_every_hidden_patch_alike_over_the_batch():
    pred, target = torch.zeros(2, 2, 1), torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    assert masked_loss(pred, target, torch.tensor([[1.0, 1.0], [1.0, 0.0]])).item() == pytest.approx((1 + 4 + 9) / 3)


@pytest.mark.parametrize("mask_ratio", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_masked_loss_and_its_gradient_are_finite_at_every_ratio(mask_ratio, dtype):
    pred = torch.randn(2, 16, 12, generator=seeded()).to(dtype).requires_grad_()
    mask = random_mask(2, (4, 4), mask_ratio, seeded()).flatten(1)
    loss = masked_loss(pred, torch.randn(2, 16, 12, generator=seeded(1)), mask)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and pred.grad.isfinite().all()
    assert torch.equal(pred.grad.any(-1), mask)  # hidden patches get a gradient, visible ones none
    assert (loss == 0) == (mask_ratio == 0)


def test_the_masked_loss_keeps_double_precision():
    generator = seeded()
    pred, target = torch.randn(2, 2, 16, 12, generator=generator, dtype=torch.float64)
    loss = masked_loss(pred, target, torch.ones(2, 16))
    assert loss.item() == pytest.approx((pred - target).square().mean().item(), rel=1e-14)


def test_predicting_each_patchs_mean_scores_the_biased_variance():
    imgs = torch.rand(2, 3, 16, 16, generator=seeded())
    assert patch_mean_loss(imgs, 4).item() == pytest.approx(47 / 48, rel=1e-3)
    patches = patchify(imgs, 4)
    constant = patches.mean(-1, keepdim=True).expand_as(patches)
    assert patch_mean_loss(imgs, 4, normalize=False).item() == pytest.approx(
        masked_loss(constant, patches, torch.ones(2, 16)).item()
    )


# ---------------------------------------------------------------------------- pictures


def test_hiding_paints_removed_patches_only_and_pasting_fills_them():
    imgs, pred = torch.rand(2, 1, 4, 6, generator=seeded()), torch.full((2, 1, 4, 6), 7.0)
    mask = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0]]).float()
    seen = hide(imgs, mask, 2, value=0.25)
    assert (seen[0, 0, :2, :2] == 0.25).all() and (seen[0, 0, 2:, 4:] == 0.25).all()
    assert (seen[0] == imgs[0]).sum() == 16 and torch.equal(seen[1], imgs[1])
    filled = paste(imgs, pred, mask, 2)
    assert (filled[0, 0, :2, :2] == 7).all() and torch.equal(filled[1], imgs[1])
    assert torch.equal(hide(filled, mask, 2, value=0.25), seen)


def test_guessed_patch_statistics_do_not_depend_on_hidden_pixels():
    imgs = torch.rand(3, 3, 8, 20, generator=seeded())
    mask = random_mask(3, (2, 5), 0.6, seeded()).flatten(1).float()
    hidden = enlarge_mask(mask.view(3, 1, 2, 5), 4).bool()
    changed = torch.where(hidden, 9 * torch.rand_like(imgs), imgs)
    for before, after in zip(patch_statistics(imgs, 4, mask), patch_statistics(changed, 4, mask)):
        assert before.shape == (3, 10, 1) and torch.equal(before, after)
    before, after = (patch_statistics(x, 4, mask, use_true_patch_statistics=True)[0] for x in (imgs, changed))
    assert torch.equal(before != after, mask[..., None].bool())


def test_patch_statistics_of_a_2x1_grid_are_those_of_the_only_visible_patch():
    imgs = torch.rand(1, 3, 8, 4, generator=seeded())
    mean, std = patch_statistics(imgs, 4, torch.tensor([[1.0, 0.0]]))
    visible = imgs[0, :, 4:].flatten()
    torch.testing.assert_close(mean.flatten(), visible.mean().expand(2))
    torch.testing.assert_close(std.flatten(), visible.std().expand(2), atol=1e-5, rtol=1e-5)


def test_nearer_visible_patches_weigh_more_in_the_guessed_statistics():
    imgs = torch.arange(5.0).view(1, 1, 1, 5).repeat_interleave(4, dim=-1).expand(1, 3, 4, 20)  # patch i has mean i
    mean, _ = patch_statistics(imgs, 4, torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))
    w = torch.tensor([1.0, 9.0]).neg().exp()  # patch 1: squared distances 1 to patch 0 and 9 to patch 4
    assert mean[0, 1, 0].item() == pytest.approx((4 * w[1] / w.sum()).item(), rel=1e-4)
    assert mean[0, 2, 0].item() == pytest.approx(2, rel=1e-4)
