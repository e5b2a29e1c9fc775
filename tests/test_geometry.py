import math
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import geometry
from geometry import (Surface, active_neurons, attention_maps, average_flatness, doubling_radius, hessian_max_eigenvalue, loss_surface,
                      ntk_condition_number, plot_layers, plot_surface, save_attention, weight_norm)
from vit import ViT


def mlp(width=6):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))


def tiny_vit(**options):
    """Nothing is zero, so that every parameter matters."""
    torch.manual_seed(0)
    model = ViT(**{**dict(img_size=4, patch_size=2, in_chans=1, num_classes=3, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2.0), **options})
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def batch(*size, n=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, *size, generator=generator), torch.arange(n) % 3


def cross_entropy(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


class Weights(nn.Module):
    """A model that is only its weights: the loss is written down beside it."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def quadratic(*curvatures, at=None):
    model = Weights(*(at or [0.5] * len(curvatures)))
    return model, lambda: (torch.tensor(curvatures) * model.w**2).sum() / 2


def exact_hessian(model, loss_of, params):
    """By torch.autograd.functional.hessian in float64, of the loss as a function of the flat vector of these parameters."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in params)]
    shapes = [model.get_parameter(name).shape for name in names]

    def loss(vector):
        parts = vector.split([shape.numel() for shape in shapes])
        moved = {name: part.view(shape) for name, part, shape in zip(names, parts, shapes)}
        return loss_of(lambda x: torch.func.functional_call(model, moved, (x,)))

    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))


def extreme(hessian):
    values = torch.linalg.eigvalsh(hessian)
    return values[values.abs().argmax()].item()


# ---------------------------------------------------------------------------- Hessian


@pytest.mark.parametrize("params", [None, "0", "2", "4.weight", "2.*"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_eigenvalue_is_that_of_the_exact_hessian_of_an_mlp_whole_and_by_block(params, seed):
    model, (x, y) = mlp().double(), batch(4)
    x = x.double()
    chosen = [p for name, p in model.named_parameters() if params is None or name.startswith(params.rstrip("*"))]
    expected = extreme(exact_hessian(model, lambda f: F.cross_entropy(f(x), y), chosen))
    found = hessian_max_eigenvalue(model, cross_entropy(model, x, y), params=params, seed=seed)
    assert found == pytest.approx(expected, rel=1e-3)
    in_fp32 = hessian_max_eigenvalue(model.float(), cross_entropy(model, x.float(), y), params=params, seed=seed)
    assert in_fp32 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("options", [{}, dict(pool="mean", class_token=False), dict(rel_pos_bias="block", pos_embed=None, layer_scale=0.5),
                                     dict(checkpointing=True)], ids=str)
def test_the_eigenvalue_is_that_of_the_exact_hessian_of_a_vit_although_its_attention_is_fused(options):
    model, (x, y) = tiny_vit(embed_dim=4, **options).double(), batch(1, 4, 4)
    x, named = x.double(), dict(model.named_parameters())
    found = {params: hessian_max_eigenvalue(model, cross_entropy(model, x, y), params=params) for params in (None, "blocks.0.attn", "blocks.*.mlp")}
    model.checkpointing = False
    hessian = exact_hessian(model, lambda f: F.cross_entropy(f(x), y), list(named.values()))
    for params, part in {None: "", "blocks.0.attn": ".attn.", "blocks.*.mlp": ".mlp."}.items():
        rows = torch.cat([torch.full((p.numel(),), part in name) for name, p in named.items()])
        assert found[params] == pytest.approx(extreme(hessian[rows][:, rows]), rel=1e-3)


def test_the_eigenvalue_of_a_small_resnet_is_that_of_the_exact_hessian():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = batch(1, 6, 6)
    x = x.double()
    model(x)  # running statistics other than the initial ones
    expected = extreme(exact_hessian(model, lambda f: F.cross_entropy(f(x), y), list(model.parameters())))
    model.train()
    assert hessian_max_eigenvalue(model, cross_entropy(model, x, y)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("curvatures, expected", [((3.0, 1.0, -2.0), 3.0), ((1.0, -4.0, 2.0), -4.0), ((-1.0, -2.0), -2.0), ((5.0,), 5.0)])
def test_the_eigenvalue_of_a_diagonal_quadratic_is_exact_and_keeps_its_sign(curvatures, expected):
    model, loss_fn = quadratic(*curvatures)
    assert hessian_max_eigenvalue(model, loss_fn, tol=1e-5) == pytest.approx(expected, rel=1e-6)


def test_a_long_vector_of_weights_costs_no_digits():
    model = Weights(*[0.0] * 300_000)
    assert hessian_max_eigenvalue(model, lambda: model.w.sum() ** 2 / 2) == pytest.approx(300_000, rel=1e-5)


def test_a_saddle_with_lambda_and_minus_lambda_does_not_stall():
    model, loss_fn = quadratic(2.0, -2.0, 0.5)  # plain power iteration swings between the two and ends anywhere
    assert abs(hessian_max_eigenvalue(model, loss_fn)) == pytest.approx(2.0, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_neither_sign_is_a_trap_for_the_other(curvatures, seed):
    model, loss_fn = quadratic(*map(float, curvatures))
    top = max(abs(c) for c in curvatures)
    found = hessian_max_eigenvalue(model, loss_fn, seed=seed)
    assert abs(found) == pytest.approx(top, rel=1e-3) and round(found) in curvatures


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(0, 5))
def test_the_magnitude_is_never_beyond_the_true_one(curvatures, seed):
    model, loss_fn = quadratic(*curvatures)
    top = max(abs(c) for c in curvatures)
    assert abs(hessian_max_eigenvalue(model, loss_fn, iters=3, seed=seed)) <= top * (1 + 1e-5)


@pytest.mark.parametrize("loss_of", [lambda w: w.sum(), lambda w: 0 * w.square().sum(), lambda w: w[0] + w[1].detach() ** 2])
def test_a_loss_without_curvature_has_eigenvalue_zero(loss_of):
    model = Weights(1.0, 2.0)
    assert hessian_max_eigenvalue(model, lambda: loss_of(model.w)) == 0.0


def test_micro_batches_give_the_eigenvalue_of_the_whole_batch():
    model, (x, y) = mlp(), batch(4)
    whole = hessian_max_eigenvalue(model, cross_entropy(model, x, y))
    parts = [cross_entropy(model, x[i::3], y[i::3]) for i in range(3)]
    assert hessian_max_eigenvalue(model, parts) == pytest.approx(whole, rel=1e-4)
    assert average_flatness(model, parts)[:2] == pytest.approx(average_flatness(model, cross_entropy(model, x, y))[:2], rel=1e-5)


def test_a_block_can_be_a_module_a_list_or_one_parameter():
    model, (x, y) = mlp(), batch(4)
    loss_fn = cross_entropy(model, x, y)
    by_name = hessian_max_eigenvalue(model, loss_fn, params="0.weight")
    assert hessian_max_eigenvalue(model, loss_fn, params=[model[0].weight]) == by_name
    assert hessian_max_eigenvalue(model, loss_fn, params=model[0].weight) == by_name
    assert hessian_max_eigenvalue(model, loss_fn, params=model[0]) == hessian_max_eigenvalue(model, loss_fn, params="0")
    model[0].bias.requires_grad_(False)  # frozen parameters do not count
    assert hessian_max_eigenvalue(model, loss_fn, params=model[0]) == by_name


def test_without_gradients_around_and_under_autocast_the_result_is_the_same():
    model, (x, y) = mlp(), batch(4)
    expected = hessian_max_eigenvalue(model, cross_entropy(model, x, y)), average_flatness(model, cross_entropy(model, x, y))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert (hessian_max_eigenvalue(model, cross_entropy(model, x, y)), average_flatness(model, cross_entropy(model, x, y))) == expected


# ---------------------------------------------------------------------------- nothing is left changed


MEASURES = {
    "eigenvalue": lambda model, loss_fn, x: hessian_max_eigenvalue(model, loss_fn, iters=3),
    "flatness": lambda model, loss_fn, x: average_flatness(model, loss_fn, draws=2),
    "surface": lambda model, loss_fn, x: loss_surface(model, loss_fn, steps=3),
    "ntk": lambda model, loss_fn, x: ntk_condition_number(model, x[:3]),
    "active": lambda model, loss_fn, x: active_neurons(model, x),
    "attention": lambda model, loss_fn, x: attention_maps(model, x),
    "norm": lambda model, loss_fn, x: weight_norm(model),
}


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_weights_gradients_modes_hooks_and_random_state_are_as_before_even_after_an_error(measure, fails):
    model, (x, y) = tiny_vit(drop_path=0.5, depth=2), batch(1, 4, 4)
    model.train()
    model.blocks[0].eval()
    F.cross_entropy(model(x), y).backward()
    calls = []

    def loss_fn():
        assert not any(module.training for module in model.modules())
        torch.rand(5)  # a loss that draws
        calls.append(1)
        if fails and len(calls) > 1:
            raise KeyError("mine")
        return F.cross_entropy(model(x), y)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    first = None
    try:
        first = measure(model, loss_fn, x)
    except KeyError:
        pass
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is grad and torch.equal(grad, copy) for p, (grad, copy) in zip(model.parameters(), grads))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks for m in model.modules())
    if first is not None and not fails:
        torch.manual_seed(99)  # what is measured does not hang on it
        again = measure(model, loss_fn, x)
        assert str(again) == str(first)


def test_batchnorm_statistics_do_not_move():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    x, y = batch(4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for name in ("eigenvalue", "flatness", "surface", "ntk", "active"):
        MEASURES[name](model, cross_entropy(model, x, y), x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---------------------------------------------------------------------------- flatness and norm


def test_flatness_of_a_quadratic_is_half_sigma_squared_times_the_trace():
    curvatures = (4.0, 1.0, 3.0, -2.0) * 50
    model, loss_fn = quadratic(*curvatures, at=[0.1] * 200)
    sigma, draws = 0.3, 400
    found = average_flatness(model, loss_fn, sigma=sigma, draws=draws)
    assert found.clean == pytest.approx(0.01 / 2 * sum(curvatures), rel=1e-5)
    assert found.gap == pytest.approx(sigma**2 / 2 * sum(curvatures), abs=4 * found.std / draws**0.5)
    # each draw is sum of c (w + s n)^2 / 2: its variance is known too
    variance = sum((c * 0.1 * sigma) ** 2 + (c * sigma**2) ** 2 / 2 for c in curvatures)
    assert found.std == pytest.approx(variance**0.5, rel=0.15)
    assert found.perturbed - found.clean == pytest.approx(found.gap)


def test_flatness_without_noise_has_no_gap_and_one_draw_no_spread():
    model, (x, y) = mlp(), batch(4)
    found = average_flatness(model, cross_entropy(model, x, y), sigma=0.0)
    assert found.gap == pytest.approx(0, abs=1e-9) and found.std == pytest.approx(0, abs=1e-9)
    assert average_flatness(model, cross_entropy(model, x, y), draws=1).std == 0


def test_the_weight_norm_counts_trainable_parameters_only():
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 4.0]]))
        model.bias.fill_(12.0)
    assert weight_norm(model) == 13.0
    model.bias.requires_grad_(False)
    assert weight_norm(model) == 5.0


# ---------------------------------------------------------------------------- loss surface


def test_a_direction_is_normalized_filter_by_filter():
    weight = nn.Parameter(torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[5.0, 12.0]]]))  # (3, 1, 2): filters of length 5, 0, 13
    noise = [torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]], [[8.0, 6.0]]]), torch.ones(3)]
    found, bias = geometry.filter_normalized(noise, [weight, nn.Parameter(torch.ones(3))])
    torch.testing.assert_close(found, torch.tensor([[[0.0, 5.0]], [[0.0, 0.0]], [[10.4, 7.8]]]))
    assert bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dims", [1, 2])
def test_the_surface_of_a_quadratic_is_the_hand_computed_one(dims):
    model = nn.Linear(3, 2)  # the loss |W|^2 / 2; the bias must not move
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0, 4], [0, 2, 0]]))

    def loss_fn():
        return (model.weight**2).sum() / 2 + 100 * (model.bias.sum() - model.bias.detach().sum())  # in this order exactly zero

    found = loss_surface(model, loss_fn, radius=2.0, steps=5, dims=dims, seed=3)
    assert found.coordinates.tolist() == [-2, -1, 0, 1, 2]
    generator = torch.Generator().manual_seed(3)
    directions = []
    for _ in range(dims):
        n, _ = torch.randn(2, 3, generator=generator), torch.randn(2, generator=generator)
        directions.append(n / n.norm(dim=1, keepdim=True) * torch.tensor([[5.0], [2.0]]))
    x = [-2, -1, 0, 1, 2]
    points = [[a] for a in x] if dims == 1 else [[a, b] for a in x for b in x]
    expected = [((model.weight + sum(a * d for a, d in zip(p, directions))) ** 2).sum().item() / 2 for p in points]
    torch.testing.assert_close(found.losses.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert found.losses.flatten()[len(points) // 2] == 14.5


def test_the_centre_of_a_surface_is_the_loss_itself():
    model, (x, y) = tiny_vit().eval(), batch(1, 4, 4)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y).item()
    assert loss_surface(model, cross_entropy(model, x, y), steps=3).losses[1, 1].item() == loss
    assert loss_surface(model, cross_entropy(model, x, y), steps=7, dims=1, radius=0.3).losses[3].item() == loss


def test_a_surface_does_not_change_when_a_relu_net_is_rescaled_though_lambda_does():
    """The same function with other weights: what filter normalization is for (and why lambda needs the weight norm beside it)."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)), batch(4)
    loss_fn = cross_entropy(model, x, y)
    before, top = loss_surface(model, loss_fn, steps=5), hessian_max_eigenvalue(model, loss_fn)
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[2].weight.div_(10)
    torch.testing.assert_close(loss_surface(model, loss_fn, steps=5).losses, before.losses, rtol=1e-4, atol=1e-5)
    assert hessian_max_eigenvalue(model, loss_fn) > 10 * top


def parabola(curvature, steps, dims=1, radius=1.0):
    x = torch.linspace(-radius, radius, steps, dtype=torch.float64)
    return Surface(x, 1 + curvature * (x**2 if dims == 1 else x[:, None] ** 2 + x**2))


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("steps", [5, 21])
@pytest.mark.parametrize("radius", [0.1, 0.3, 0.75])
def test_the_doubling_radius_of_a_parabola_is_exact_on_any_grid(dims, steps, radius):
    assert doubling_radius(parabola(1 / radius**2, steps, dims)) == pytest.approx(radius, rel=1e-6)


def test_the_doubling_radius_is_the_first_one_and_inf_where_there_is_none():
    x = torch.tensor([-2.0, -1, 0, 1, 2])
    assert doubling_radius(Surface(x, torch.tensor([1.0, 9, 1, 9, 1]))) == pytest.approx((1 / 8) ** 0.5)  # a rim, lower beyond
    assert doubling_radius(Surface(x, torch.tensor([4.0, 1, 1, 1, 4]))) == pytest.approx(2**0.5)  # 1 + 3 / 3: r^2 = 1 + 1
    assert doubling_radius(Surface(x, torch.tensor([1.9, 1, 1, 1, 1.9]))) == math.inf
    assert doubling_radius(Surface(x, torch.tensor([9.0, 1, 1, math.nan, 9]))) == 1  # it blew up there
    assert doubling_radius(parabola(0.1, 5, dims=2)) == math.inf  # the corners, at 1.2, do not count


# ---------------------------------------------------------------------------- tangent kernel


def test_the_kernel_of_a_linear_model_is_x_x_transposed():
    model, x = nn.Linear(3, 2), torch.tensor([[1.0, 0, 2], [0, 3, 0], [1, 1, 1]])
    gram = x @ x.T + 1  # per logit; + 1 from the bias. The sum of two logits has two such gradients
    values = torch.linalg.eigvalsh(gram.double()).flip(0)
    both, single = ntk_condition_number(model, x), ntk_condition_number(model, x, per_class=True)
    torch.testing.assert_close(both.eigenvalues, 2 * values)
    torch.testing.assert_close(single.eigenvalues, values.expand(2, 3))
    assert both.kappa == pytest.approx(single.kappa) == pytest.approx((values[0] / values[-1]).item())
    weights = ntk_condition_number(model, x, params="weight")
    torch.testing.assert_close(weights.eigenvalues, 2 * torch.linalg.eigvalsh((x @ x.T).double()).flip(0))


@pytest.mark.parametrize("make, size", [(mlp, (4,)), (tiny_vit, (1, 4, 4))])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_kernel_is_that_of_the_explicit_jacobian(make, size, per_class):
    model, x = make().double().eval(), batch(*size, n=5)[0].double()
    params = {k: p.detach() for k, p in model.named_parameters()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    jacobian = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)  # (m, classes, P)
    blocks = jacobian.unbind(1) if per_class else [jacobian.sum(1)]
    values = [torch.linalg.eigvalsh(j @ j.T).flip(0) for j in blocks]
    found = ntk_condition_number(model.train(), x, per_class=per_class)
    torch.testing.assert_close(found.eigenvalues, torch.stack(values) if per_class else values[0], rtol=1e-6, atol=1e-9)
    assert found.kappa == pytest.approx(sum((v[0] / v[-1]).item() for v in values) / len(values), rel=1e-5)


def test_images_that_cannot_be_told_apart_make_kappa_infinite():
    model, x = mlp(), batch(4)[0]
    assert ntk_condition_number(model, torch.cat([x[:2], x[:2]])).kappa == math.inf


# ---------------------------------------------------------------------------- activations and attention


def test_active_neurons_are_the_hand_computed_shares():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 2), nn.GELU()).train()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0], [1.0], [-1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 2.0, -2.0, 0.0]))
        model[2].weight.zero_()
        model[2].bias.copy_(torch.tensor([-1.0, 1.0]))
    x = torch.tensor([[1.0], [-1.0], [3.0], [0.0]])  # active: 2, 2, 3 and 1 of 4
    assert active_neurons(model, x) == {"1": 8 / 16, "3": 0.5}
    assert active_neurons(model, [x[:1], x[1:]]) == {"1": 8 / 16, "3": 0.5}
    assert active_neurons(model, x, layers=["0"]) == active_neurons(model, x, layers="0") == {"0": 8 / 16}


def test_active_neurons_of_a_vit_and_a_resnet_are_found_layer_by_layer():
    assert list(active_neurons(tiny_vit(depth=3), batch(1, 4, 4)[0])) == [f"blocks.{i}.mlp.act" for i in range(3)]
    from torchvision.models import resnet18
    shares = active_neurons(resnet18(num_classes=2), torch.randn(1, 3, 32, 32))  # its ReLUs work in place and are called twice
    assert len(shares) == 9 and all(0 < share < 1 for share in shares.values())


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_attention_maps_are_the_class_tokens_rows_on_the_images_grid(layer):
    model, x = tiny_vit(img_size=(4, 10), depth=2), batch(1, 4, 10, n=2)[0]
    maps = attention_maps(model.train(), x, layer)
    assert maps.shape == (2, 2, 2, 5) and not maps.requires_grad
    attn = model.eval().forward_features(x, return_attn=True)[1][layer]
    torch.testing.assert_close(maps[1, 0, 1, 3], attn[1, 0, 0, 1 + 5 + 3])
    sums = maps.sum((2, 3))
    assert (sums < 1).all()
    torch.testing.assert_close(sums, 1 - attn[:, :, 0, 0])  # the rest it keeps for itself
    assert attention_maps(model, batch(1, 8, 4)[0]).shape == (12, 2, 4, 2)  # another size than the model was built for


def test_without_a_class_token_the_maps_are_the_mean_over_all_queries():
    model, x = tiny_vit(pool="mean", class_token=False), batch(1, 4, 4, n=2)[0]
    maps = attention_maps(model, x)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2))
    attn = model.eval().forward_features(x, return_attn=True)[1][-1]
    torch.testing.assert_close(maps[0, 1, 1, 0], attn[0, 1, :, 2].mean())


# ---------------------------------------------------------------------------- pictures


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    model, (x, y) = mlp(), batch(4)
    loss_fn = cross_entropy(model, x, y)
    plane, line = loss_surface(model, loss_fn, steps=5), loss_surface(model, loss_fn, steps=5, dims=1)
    cases = {"plane": {"a": plane}, "line": {"a": line, "b": line}, "both": {"a": plane, "b": line, "c": plane},
             "two grids": {"a": plane, "b": parabola(1.0, 9, dims=2)},
             "flat": {"a": Surface(plane.coordinates, torch.ones(5, 5))},
             "negative": {"a": Surface(plane.coordinates, plane.losses - 50)},
             "blown up": {"a": Surface(plane.coordinates, torch.where(plane.losses > plane.losses.median(), math.inf, plane.losses))}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, surfaces in cases.items():
            plot_surface(tmp_path / f"{name}.png", surfaces)
        plot_layers(tmp_path / "layers.png", {"net": active_neurons(model, x)}, "active neurons")
    assert {path.stem for path in tmp_path.glob("*.png")} == {*cases, "layers"}


@pytest.mark.parametrize("channels", [1, 3])
def test_the_attention_picture_has_the_image_the_mean_and_each_head(tmp_path, channels):
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor
    imgs, maps = torch.rand(2, channels, 8, 12), torch.zeros(2, 3, 2, 3)
    maps[:, 0, 1, 2] = 0.7  # head 0 looks at the last patch, the others nowhere
    save_attention(tmp_path / "a.png", imgs, maps)
    picture = pil_to_tensor(Image.open(tmp_path / "a.png")).float() / 255
    height, width = 8 + 2, 12 + 2  # torchvision's gap of two pixels
    assert picture.shape == (3, 2 + 2 * height, 2 + 5 * width)
    cells = [picture[:, 2:10, 2 + i * width:14 + i * width] for i in range(5)]
    torch.testing.assert_close(cells[0], imgs[0].expand(3, -1, -1), atol=1 / 255, rtol=0)
    bright = torch.zeros(8, 12)
    bright[4:, 8:] = 1
    for cell, expected in zip(cells[1:], [bright, bright, 0 * bright, 0 * bright]):
        assert torch.equal(cell, expected.expand(3, -1, -1))


def test_without_matplotlib_the_error_names_the_install(monkeypatch, tmp_path):
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot_surface(tmp_path / "a.png", {"a": parabola(1.0, 5)})


# ---------------------------------------------------------------------------- clear errors


def frozen():
    return mlp().requires_grad_(False)


def backward():
    model, (x, y) = mlp(), batch(4)

    def closure():
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss
    return hessian_max_eigenvalue(model, closure)


def infinite():
    model = Weights(0.0)
    return hessian_max_eigenvalue(model, lambda: model.w.sum().sqrt())


ERRORS = {
    "no parameter requires a gradient": lambda: hessian_max_eigenvalue(frozen(), lambda: torch.tensor(1.0)),
    "nothing to measure": lambda: average_flatness(frozen(), lambda: torch.tensor(1.0)),
    "params 'block' matches no parameter; names look like 0.weight": lambda: hessian_max_eigenvalue(mlp(), lambda: 0, params="block"),
    "does not depend on the chosen parameters": lambda: hessian_max_eigenvalue(mlp(), lambda: torch.tensor(1.0)),
    "does loss_fn use this model": lambda: hessian_max_eigenvalue(mlp(), lambda other=Weights(1.0): other.w.sum()),
    r"must return one number as a tensor, got \(2,\)": lambda: hessian_max_eigenvalue(mlp(), lambda: torch.ones(2)),
    "must return one number as a tensor, got 0.5": lambda: hessian_max_eigenvalue(mlp(), lambda: 0.5),
    r"not call backward\(\)": backward,
    "is not finite at these weights": infinite,
    r"torch.bfloat16, too coarse .* model.float\(\)": lambda: average_flatness(mlp().bfloat16(), lambda: 0),
    "iters 0 must be at least 1": lambda: hessian_max_eigenvalue(mlp(), lambda: 0, iters=0),
    "sigma -1 must not be negative": lambda: average_flatness(mlp(), lambda: 0, sigma=-1),
    "draws 0 must be at least 1": lambda: average_flatness(mlp(), lambda: 0, draws=0),
    "steps 20 puts no point": lambda: loss_surface(mlp(), lambda: 0, steps=20),
    "dims 3 must be 1 or 2": lambda: loss_surface(mlp(), lambda: 0, dims=3),
    "only a positive loss can double": lambda: doubling_radius(Surface(torch.tensor([-1.0, 0, 1]), torch.tensor([1.0, 0, 1]))),
    "'act' is no module": lambda: active_neurons(mlp(), batch(4)[0], layers=["act"]),
    r"no nn.GELU or nn.ReLU .* layers=\[": lambda: active_neurons(nn.Linear(4, 2), batch(4)[0]),
    "Sequential has no attention to show": lambda: attention_maps(mlp(), batch(4)[0]),
}


@pytest.mark.parametrize("message", ERRORS)
def test_what_goes_wrong_is_said_in_one_line(message):
    with pytest.raises(ValueError, match=message) as error:
        ERRORS[message]()
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------- what readers stumbled over


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.enc, self.dec = nn.Linear(4, 4), nn.Linear(4, 4)
        self.dec.weight = self.enc.weight

    def forward(self, x):
        return self.dec(torch.tanh(self.enc(x)))


def test_a_shared_weight_belongs_to_both_names_and_counts_once():
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(8, 4)

    def top(params):
        return geometry.hessian_max_eigenvalue(model, lambda: model(x).square().mean(), params, tol=1e-5)
    assert top("dec") == pytest.approx(top(model.dec), rel=1e-3) and top("dec") > 1.2 * top("dec.bias")
    assert top([model.enc.weight, model.dec.weight]) == pytest.approx(top("enc.weight"), rel=1e-3)


def test_an_unfinished_eigenvalue_is_warned_of_and_a_finished_one_is_not():
    model = nn.Linear(200, 1, bias=False)
    curvature = torch.linspace(-1, 1, 200)
    with pytest.warns(UserWarning, match="after 3 iterations"):
        geometry.hessian_max_eigenvalue(model, lambda: (curvature * model.weight.square()).sum(), iters=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        geometry.hessian_max_eigenvalue(model, lambda: (curvature * model.weight.square()).sum(), iters=400)


def test_a_head_outside_the_model_may_still_hold_gradients():
    model, head, x = nn.Linear(3, 3), nn.Linear(3, 1), torch.randn(5, 3)
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    value = geometry.hessian_max_eigenvalue(model, lambda: head(model(x)).square().mean(), [*model.parameters(), *head.parameters()])
    assert value > 0 and all((p.grad == 1).all() for p in head.parameters())


def test_precision_set_by_either_of_torchs_ways_is_kept():
    model, x, matmul = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3), torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for value in ("tf32", "ieee"):
            matmul.fp32_precision = value
            seen = []
            hook = model.register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
            geometry.active_neurons(model, x)
            hook.remove()
            assert seen == ["ieee"] and matmul.fp32_precision == value
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("call, words", [
    (lambda m, x: geometry.select(m, ["0.weight"]), "a name or pattern"),
    (lambda m, x: geometry.select(m, []), "unfreeze"),
    (lambda m, x: geometry.average_flatness(m, []), "empty list"),
    (lambda m, x: geometry.loss_surface(m, lambda: m(x).mean(), radius=math.nan), "radius nan"),
    (lambda m, x: geometry.active_neurons(m, []), "empty list"),
    (lambda m, x: geometry.active_neurons(m, x[:0]), "nothing came out"),
])
def test_what_a_newcomer_gets_wrong_is_told(call, words):
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=words):
        call(model, torch.randn(5, 3))


def test_inference_mode_is_refused_with_the_way_out():
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        geometry.hessian_max_eigenvalue(model, lambda: model(x).square().mean())
