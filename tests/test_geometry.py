"""Geometry: exact Hessians, hand-computed surfaces and kernels, and nothing left changed."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import geometry
from geometry import (
    Surface, active_neurons, attention_maps, average_flatness, doubling_radius, hessian_max_eigenvalue,
    loss_surface, ntk_condition_number, weight_norm)
from vit import ViT


def mlp(width=6):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 3))


def tiny_vit(**options):
    """Nothing is zero, so that every parameter matters."""
    torch.manual_seed(0)
    sizes = dict(img_size=4, patch_size=2, in_chans=1, num_classes=3)
    sizes |= dict(embed_dim=8, depth=1, num_heads=2, mlp_ratio=2.0)
    model = ViT(**{**sizes, **options})
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
    """A model that is only its weights; the loss is given beside it."""

    def __init__(self, *values):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(values))


def quadratic(*curvatures, at=None):
    model = Weights(*(at or [0.5] * len(curvatures)))
    return model, lambda: (torch.tensor(curvatures) * model.w**2).sum() / 2


def exact_hessian(model, loss_of, params):
    """By torch.autograd.functional.hessian, of the loss as a function of the flat vector of params."""
    names = [name for name, p in model.named_parameters() if any(p is q for q in params)]
    shapes = [model.get_parameter(name).shape for name in names]
    sizes = [shape.numel() for shape in shapes]

    def loss(vector):
        parts = [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]
        moved = dict(zip(names, parts, strict=True))
        return loss_of(lambda x: torch.func.functional_call(model, moved, (x,)))

    model.eval()
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))


def extreme(hessian):
    values = torch.linalg.eigvalsh(hessian)
    return values[values.abs().argmax()].item()


# ---------------------------------------------------------------------------- Hessian


@pytest.mark.parametrize("params", [None, "0", "2", "4.weight", "2.*"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_eigenvalue_of_an_mlp_and_its_blocks_is_that_of_the_exact_hessian(params, seed):
    model, (x, y) = mlp().double(), batch(4)
    x, prefix = x.double(), (params or "").rstrip("*")
    chosen = [p for name, p in model.named_parameters() if name.startswith(prefix)]
    expected = extreme(exact_hessian(model, lambda f: F.cross_entropy(f(x), y), chosen))
    value = hessian_max_eigenvalue(model, cross_entropy(model, x, y), params=params, seed=seed)
    assert value == pytest.approx(expected, rel=1e-3)
    model.float()
    in_fp32 = hessian_max_eigenvalue(model, cross_entropy(model, x.float(), y), params=params, seed=seed)
    assert in_fp32 == pytest.approx(expected, rel=1e-3)


VITS = {
    "class token": {},
    "mean": dict(pool="mean", class_token=False),
    "relative": dict(rel_pos_bias="block", pos_embed=None, layer_scale=0.5),
    "checkpointing": dict(checkpointing=True),
}


@pytest.mark.parametrize("options", VITS.values(), ids=VITS)
def test_the_eigenvalue_of_a_vit_is_that_of_the_exact_hessian_although_its_attention_is_fused(options):
    model, (x, y) = tiny_vit(embed_dim=4, **options).double(), batch(1, 4, 4)
    x, named = x.double(), dict(model.named_parameters())
    loss_fn = cross_entropy(model, x, y)
    blocks = {None: "", "blocks.0.attn": ".attn.", "blocks.*.mlp": ".mlp."}
    values = {params: hessian_max_eigenvalue(model, loss_fn, params=params) for params in blocks}
    model.checkpointing = False
    hessian = exact_hessian(model, lambda f: F.cross_entropy(f(x), y), list(named.values()))
    for params, part in blocks.items():
        inside = [torch.full((p.numel(),), part in name) for name, p in named.items()]
        rows = torch.cat(inside)
        assert values[params] == pytest.approx(extreme(hessian[rows][:, rows]), rel=1e-3)


def test_the_eigenvalue_of_a_small_resnet_is_that_of_the_exact_hessian():
    torch.manual_seed(0)
    features = nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = batch(1, 6, 6)
    x = x.double()
    model(x)  # running statistics other than the initial ones
    expected = extreme(exact_hessian(model, lambda f: F.cross_entropy(f(x), y), list(model.parameters())))
    model.train()
    assert hessian_max_eigenvalue(model, cross_entropy(model, x, y)) == pytest.approx(expected, rel=1e-3)


DIAGONALS = [((3.0, 1.0, -2.0), 3.0), ((1.0, -4.0, 2.0), -4.0), ((-1.0, -2.0), -2.0), ((5.0,), 5.0)]


@pytest.mark.parametrize("curvatures, expected", DIAGONALS)
def test_the_eigenvalue_of_a_diagonal_quadratic_is_exact_and_keeps_its_sign(curvatures, expected):
    model, loss_fn = quadratic(*curvatures)
    assert hessian_max_eigenvalue(model, loss_fn, tol=1e-5) == pytest.approx(expected, rel=1e-6)


def test_a_long_vector_of_weights_costs_no_digits():
    model = Weights(*[0.0] * 300_000)
    value = hessian_max_eigenvalue(model, lambda: model.w.sum() ** 2 / 2)
    assert value == pytest.approx(300_000, rel=1e-5)


def test_a_saddle_with_lambda_and_minus_lambda_converges():
    model, loss_fn = quadratic(2.0, -2.0, 0.5)  # on which plain power iteration does not
    assert abs(hessian_max_eigenvalue(model, loss_fn)) == pytest.approx(2.0, rel=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=8), st.integers(0, 5))
def test_the_larger_end_of_the_spectrum_is_reached_whatever_its_sign(curvatures, seed):
    model, loss_fn = quadratic(*map(float, curvatures))
    top = max(abs(c) for c in curvatures)
    value = hessian_max_eigenvalue(model, loss_fn, seed=seed)
    assert abs(value) == pytest.approx(top, rel=1e-3)
    assert round(value) in curvatures


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.integers(0, 5))
def test_the_magnitude_is_never_beyond_the_true_one(curvatures, seed):
    model, loss_fn = quadratic(*curvatures)
    top = max(abs(c) for c in curvatures)
    assert abs(hessian_max_eigenvalue(model, loss_fn, iters=3, seed=seed)) <= top * (1 + 1e-5)


@pytest.mark.parametrize("loss_of", [
    lambda w: w.sum(),
    lambda w: 0 * w.square().sum(),
    lambda w: w[0] + w[1].detach() ** 2,
])
def test_a_loss_without_curvature_has_eigenvalue_zero(loss_of):
    model = Weights(1.0, 2.0)
    assert hessian_max_eigenvalue(model, lambda: loss_of(model.w)) == 0.0


def test_micro_batches_give_the_values_of_the_whole_batch():
    model, (x, y) = mlp(), batch(4)
    whole, parts = cross_entropy(model, x, y), [cross_entropy(model, x[i::3], y[i::3]) for i in range(3)]
    expected = hessian_max_eigenvalue(model, whole)
    assert hessian_max_eigenvalue(model, parts) == pytest.approx(expected, rel=1e-4)
    expected = average_flatness(model, whole)
    assert average_flatness(model, parts)[:2] == pytest.approx(expected[:2], rel=1e-5)


def test_params_can_be_a_name_a_module_a_list_or_one_parameter():
    model, (x, y) = mlp(), batch(4)

    def top(params):
        return hessian_max_eigenvalue(model, cross_entropy(model, x, y), params=params)

    by_name = top("0.weight")
    assert top([model[0].weight]) == top(model[0].weight) == by_name
    assert top(model[0]) == top("0") != by_name
    model[0].bias.requires_grad_(False)  # frozen parameters do not count
    assert top(model[0]) == by_name


def test_a_shared_weight_belongs_to_both_names_and_counts_once():
    torch.manual_seed(0)
    model, x = nn.ModuleDict(dict(enc=nn.Linear(4, 4), dec=nn.Linear(4, 4))), torch.randn(8, 4)
    enc, dec = model.values()
    dec.weight = enc.weight

    def top(params):
        def loss_fn():
            return dec(torch.tanh(enc(x))).square().mean()

        return hessian_max_eigenvalue(model, loss_fn, params, tol=1e-5)

    assert top("dec") == pytest.approx(top(dec), rel=1e-3)
    assert top("dec") > 1.2 * top("dec.bias")
    assert top([enc.weight, dec.weight]) == pytest.approx(top("enc.weight"), rel=1e-3)


def test_without_gradients_and_under_autocast_outside_the_result_is_the_same():
    model, (x, y) = mlp(), batch(4)

    def measure():
        loss_fn = cross_entropy(model, x, y)
        return hessian_max_eigenvalue(model, loss_fn), average_flatness(model, loss_fn)

    expected = measure()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert measure() == expected


def test_an_unfinished_eigenvalue_is_a_warning_and_a_finished_one_is_not():
    model, curvature = nn.Linear(200, 1, bias=False), torch.linspace(-1, 1, 200)

    def loss_fn():
        return (curvature * model.weight.square()).sum()

    with pytest.warns(UserWarning, match="after 3 iterations"):
        hessian_max_eigenvalue(model, loss_fn, iters=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessian_max_eigenvalue(model, loss_fn, iters=400)


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
every_measure = pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)


def state_of(model):
    """Everything that must stay: weights, gradients, modes and the random state."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    return tensors, grads, modes, torch.get_rng_state()


def assert_same_state(a, b):
    for one, other in zip((a[0], a[1]), (b[0], b[1]), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert a[2] == b[2] and torch.equal(a[3], b[3])


def half_trained_vit():
    """A model with gradients, partly in eval mode."""
    model, (x, y) = tiny_vit(drop_path=0.5, depth=2), batch(1, 4, 4)
    model.train()
    model.blocks[0].eval()
    F.cross_entropy(model(x), y).backward()
    return model, x, y


@every_measure
def test_weights_gradients_modes_and_random_state_stay_and_do_not_matter(measure):
    model, x, y = half_trained_vit()

    def loss_fn():
        assert not any(module.training for module in model.modules())
        torch.rand(5)  # a loss that draws
        return F.cross_entropy(model(x), y)

    before, grads = state_of(model), [p.grad for p in model.parameters()]
    first = measure(model, loss_fn, x)
    assert_same_state(state_of(model), before)
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))
    torch.manual_seed(99)
    assert str(measure(model, loss_fn, x)) == str(first)


@pytest.mark.parametrize("name", ["eigenvalue", "flatness", "surface"])
def test_everything_is_restored_after_an_error_in_the_loss(name):
    model, x, y = half_trained_vit()
    calls = []

    def loss_fn():
        calls.append(1)
        if len(calls) > 1 or name == "eigenvalue":
            raise KeyError("mine")
        return F.cross_entropy(model(x), y)

    before = state_of(model)
    with pytest.raises(KeyError, match="mine"):
        MEASURES[name](model, loss_fn, x)
    assert_same_state(state_of(model), before)


def test_no_hook_stays_after_an_error_in_the_model():
    model, calls = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(3, 3)), []
    with pytest.raises(RuntimeError):
        active_neurons(model, batch(4)[0])
    model[2] = nn.Linear(4, 3)
    model[1].register_forward_hook(lambda *_: calls.append(1))
    assert 0 < active_neurons(model, batch(4)[0])["1"] < 1 and calls == [1]


def test_batchnorm_statistics_do_not_move():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)).train()
    x, y = batch(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for name in ("eigenvalue", "flatness", "surface", "ntk", "active"):
        MEASURES[name](model, cross_entropy(model, x, y), x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_outside_the_model_may_still_hold_gradients():
    model, head, x = nn.Linear(3, 3), nn.Linear(3, 1), torch.randn(5, 3)
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    params = [*model.parameters(), *head.parameters()]
    assert hessian_max_eigenvalue(model, lambda: head(model(x)).square().mean(), params) > 0
    assert all((p.grad == 1).all() for p in head.parameters())


@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_the_precision_of_multiplications_is_full_inside_and_restored(value):
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3)
    matmul = torch.backends.cuda.matmul
    before, seen = matmul.fp32_precision, []
    model.register_forward_hook(lambda *_: seen.append(matmul.fp32_precision))
    try:
        matmul.fp32_precision = value
        active_neurons(model, x)
        assert seen == ["ieee"] and matmul.fp32_precision == value
    finally:
        matmul.fp32_precision = before


# ---------------------------------------------------------------------------- flatness and norm


def test_flatness_of_a_quadratic_is_half_sigma_squared_times_the_trace():
    curvatures = (4.0, 1.0, 3.0, -2.0) * 50
    model, loss_fn = quadratic(*curvatures, at=[0.1] * 200)
    sigma, draws, trace = 0.3, 400, sum(curvatures)
    flatness = average_flatness(model, loss_fn, sigma=sigma, draws=draws)
    assert flatness.clean == pytest.approx(0.01 / 2 * trace, rel=1e-5)
    assert flatness.gap == pytest.approx(sigma**2 / 2 * trace, abs=4 * flatness.std / draws**0.5)
    assert flatness.perturbed - flatness.clean == pytest.approx(flatness.gap)

    # each draw is the sum of c (w + s n)^2 / 2, whose variance is known too
    variance = sum((c * 0.1 * sigma) ** 2 + (c * sigma**2) ** 2 / 2 for c in curvatures)
    assert flatness.std == pytest.approx(variance**0.5, rel=0.15)


def test_flatness_without_noise_has_no_gap_and_one_draw_no_spread():
    model, (x, y) = mlp(), batch(4)
    flatness = average_flatness(model, cross_entropy(model, x, y), sigma=0.0)
    assert flatness.gap == pytest.approx(0, abs=1e-9) and flatness.std == pytest.approx(0, abs=1e-9)
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
    weight = torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[5.0, 12.0]]])  # filters of length 5, 0, 13
    noise = [torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]], [[8.0, 6.0]]]), torch.ones(3)]
    params = [nn.Parameter(weight), nn.Parameter(torch.ones(3))]
    direction, bias = geometry.filter_normalized(noise, params)
    torch.testing.assert_close(direction, torch.tensor([[[0.0, 5.0]], [[0.0, 0.0]], [[10.4, 7.8]]]))
    assert bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize("dims", [1, 2])
def test_the_surface_of_a_quadratic_is_the_hand_computed_one(dims):
    model = nn.Linear(3, 2)  # the loss |W|^2 / 2; the bias must not move
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 0, 4], [0, 2, 0]]))

    def loss_fn():
        moved = model.bias.sum() - model.bias.detach().sum()  # in this order exactly zero
        return (model.weight**2).sum() / 2 + 100 * moved

    surface = loss_surface(model, loss_fn, radius=2.0, steps=5, dims=dims, seed=3)
    assert surface.coordinates.tolist() == [-2, -1, 0, 1, 2]

    generator, directions = torch.Generator().manual_seed(3), []
    for _ in range(dims):
        n = torch.randn(2, 3, generator=generator)
        torch.randn(2, generator=generator)  # for the bias
        directions.append(n / n.norm(dim=1, keepdim=True) * torch.tensor([[5.0], [2.0]]))
    along = torch.cartesian_prod(*[torch.arange(-2.0, 3)] * dims).view(-1, dims)
    expected = []
    for point in along.tolist():
        weight = model.weight + sum(a * d for a, d in zip(point, directions, strict=True))
        expected.append((weight**2).sum().item() / 2)
    losses = surface.losses.flatten()
    torch.testing.assert_close(losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert losses[len(losses) // 2] == 14.5


def test_the_center_of_a_surface_is_the_loss_itself():
    model, (x, y) = tiny_vit().eval(), batch(1, 4, 4)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        loss = F.cross_entropy(model(x), y).item()
    plane = loss_surface(model, cross_entropy(model, x, y), steps=3)
    line = loss_surface(model, cross_entropy(model, x, y), steps=7, dims=1, radius=0.3)
    assert plane.losses[1, 1].item() == line.losses[3].item() == loss


def test_a_surface_does_not_change_when_a_relu_network_is_rescaled_though_lambda_does():
    """The same function with other weights: what filter normalization is for."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    loss_fn = cross_entropy(model, *batch(4))
    before, top = loss_surface(model, loss_fn, steps=5), hessian_max_eigenvalue(model, loss_fn)
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[2].weight.div_(10)
    after = loss_surface(model, loss_fn, steps=5)
    torch.testing.assert_close(after.losses, before.losses, rtol=1e-4, atol=1e-5)
    assert hessian_max_eigenvalue(model, loss_fn) > 10 * top


def parabola(curvature, steps, dims=1, radius=1.0):
    x = torch.linspace(-radius, radius, steps, dtype=torch.float64)
    squared = x**2 if dims == 1 else x[:, None] ** 2 + x**2
    return Surface(x, 1 + curvature * squared)


@pytest.mark.parametrize("dims", [1, 2])
@pytest.mark.parametrize("steps", [5, 21])
@pytest.mark.parametrize("radius", [0.1, 0.3, 0.75])
def test_the_doubling_radius_of_a_parabola_is_exact_on_any_grid(dims, steps, radius):
    assert doubling_radius(parabola(1 / radius**2, steps, dims)) == pytest.approx(radius, rel=1e-6)


@pytest.mark.parametrize("losses, radius", [
    ([1.0, 9, 1, 9, 1], (1 / 8) ** 0.5),  # the first rim; beyond it the loss is lower
    ([4.0, 1, 1, 1, 4], 2**0.5),  # 1 + 3 / 3: r^2 = 1 + 1
    ([1.9, 1, 1, 1, 1.9], math.inf),
    ([9.0, 1, 1, math.nan, 9], 1),
])
def test_the_doubling_radius_is_the_first_one_and_inf_where_there_is_none(losses, radius):
    x = torch.tensor([-2.0, -1, 0, 1, 2])
    assert doubling_radius(Surface(x, torch.tensor(losses))) == pytest.approx(radius)


def test_the_corners_of_a_plane_do_not_count_for_the_doubling_radius():
    assert doubling_radius(parabola(0.6, 5, dims=2)) == math.inf  # 1.6 at the rim, 2.2 in the corners


# ---------------------------------------------------------------------------- tangent kernel


def test_the_kernel_of_a_linear_model_is_x_x_transposed():
    model, x = nn.Linear(3, 2), torch.tensor([[1.0, 0, 2], [0, 3, 0], [1, 1, 1]])
    gram = x @ x.T + 1  # per logit; + 1 from the bias. The sum of two logits has two such gradients
    values = torch.linalg.eigvalsh(gram.double()).flip(0)
    both, single = ntk_condition_number(model, x), ntk_condition_number(model, x, per_class=True)
    torch.testing.assert_close(both.eigenvalues, 2 * values)
    torch.testing.assert_close(single.eigenvalues, values.expand(2, 3))
    kappa = pytest.approx((values[0] / values[-1]).item())
    assert both.kappa == kappa and single.kappa == kappa
    weights = ntk_condition_number(model, x, params="weight")
    torch.testing.assert_close(weights.eigenvalues, 2 * torch.linalg.eigvalsh((x @ x.T).double()).flip(0))


@pytest.mark.parametrize("make, size", [(mlp, (4,)), (tiny_vit, (1, 4, 4))])
@pytest.mark.parametrize("per_class", [False, True])
def test_the_kernel_is_that_of_the_explicit_jacobian(make, size, per_class):
    model, x = make().double().eval(), batch(*size, n=5)[0].double()
    params = {name: p.detach() for name, p in model.named_parameters()}
    with sdpa_kernel(SDPBackend.MATH):
        jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    jacobian = torch.cat([j.flatten(2) for j in jacobian.values()], dim=2)  # (m, classes, P)
    blocks = jacobian.unbind(1) if per_class else [jacobian.sum(1)]
    values = torch.stack([torch.linalg.eigvalsh(j @ j.T).flip(0) for j in blocks])
    ntk = ntk_condition_number(model.train(), x, per_class=per_class)
    expected = values if per_class else values[0]
    torch.testing.assert_close(ntk.eigenvalues, expected, rtol=1e-6, atol=1e-9)
    assert ntk.kappa == pytest.approx((values[:, 0] / values[:, -1]).mean().item(), rel=1e-5)


def test_equal_images_make_kappa_infinite():
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


def test_active_neurons_of_a_vit_and_a_resnet_are_counted_layer_by_layer():
    shares = active_neurons(tiny_vit(depth=3), batch(1, 4, 4)[0])
    assert list(shares) == [f"blocks.{i}.mlp.act" for i in range(3)]

    from torchvision.models import resnet18
    shares = active_neurons(resnet18(num_classes=2), torch.randn(1, 3, 32, 32))  # some called twice
    assert len(shares) == 9 and all(0 < share < 1 for share in shares.values())


@pytest.mark.parametrize("layer", [-1, 0, 1])
def test_attention_maps_are_the_class_tokens_rows_on_the_images_grid(layer):
    model, x = tiny_vit(img_size=(4, 10), depth=2), batch(1, 4, 10, n=2)[0]
    maps = attention_maps(model.train(), x, layer)
    assert maps.shape == (2, 2, 2, 5) and not maps.requires_grad
    attn = model.eval().forward_features(x, return_attn=True)[1][layer]
    torch.testing.assert_close(maps[1, 0, 1, 3], attn[1, 0, 0, 1 + 5 + 3])
    sums = maps.sum((2, 3))
    torch.testing.assert_close(sums, 1 - attn[:, :, 0, 0])  # the rest goes to the class token itself
    assert (sums < 1).all()


def test_attention_maps_take_another_size_than_the_model_was_built_for():
    model = tiny_vit(img_size=(4, 10))
    assert attention_maps(model, batch(1, 8, 4)[0]).shape == (12, 2, 4, 2)


def test_without_a_class_token_the_maps_are_the_mean_over_all_queries():
    model, x = tiny_vit(pool="mean", class_token=False), batch(1, 4, 4, n=2)[0]
    maps = attention_maps(model, x)
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2))
    attn = model.eval().forward_features(x, return_attn=True)[1][-1]
    torch.testing.assert_close(maps[0, 1, 1, 0], attn[0, 1, :, 2].mean())


# ---------------------------------------------------------------------------- errors


def frozen():
    return mlp().requires_grad_(False)


def another_model():
    other = Weights(1.0)
    return hessian_max_eigenvalue(mlp(), lambda: other.w.sum())


def with_backward():
    model, (x, y) = mlp(), batch(4)

    def closure():
        loss = F.cross_entropy(model(x), y)
        loss.backward(retain_graph=True)
        return loss

    return hessian_max_eigenvalue(model, closure)


def infinite():
    model = Weights(0.0)
    return hessian_max_eigenvalue(model, lambda: model.w.sum().sqrt())


def zero_at_the_center():
    return doubling_radius(Surface(torch.tensor([-1.0, 0, 1]), torch.tensor([1.0, 0, 1])))


ERRORS = {
    "all frozen": (lambda: hessian_max_eigenvalue(frozen(), lambda: torch.tensor(1.0)), "requires a gradient"),
    "flatness of all frozen": (lambda: average_flatness(frozen(), lambda: 0), "requires a gradient"),
    "an empty list": (lambda: hessian_max_eigenvalue(mlp(), lambda: 0, params=[]), "requires a gradient"),
    "no such name": (lambda: hessian_max_eigenvalue(mlp(), lambda: 0, params="block"), "'block'.*0.weight"),
    "a constant": (lambda: hessian_max_eigenvalue(mlp(), lambda: torch.tensor(1.0)), "loss_fn"),
    "another model": (another_model, "loss_fn.*params"),
    "two losses": (lambda: hessian_max_eigenvalue(mlp(), lambda: torch.ones(2)), r"loss_fn.*\[2\]"),
    "a float": (lambda: hessian_max_eigenvalue(mlp(), lambda: 0.5), "loss_fn.*0.5"),
    "backward": (with_backward, r"loss_fn.*backward\(\)"),
    "infinite": (infinite, "not finite"),
    "half precision": (lambda: average_flatness(mlp().bfloat16(), lambda: 0), r"bfloat16.*model.float\(\)"),
    "even steps": (lambda: loss_surface(mlp(), lambda: 0, steps=20), "steps 20"),
    "a loss of zero": (zero_at_the_center, "center is 0"),
    "no such layer": (lambda: active_neurons(mlp(), batch(4)[0], layers=["act"]), "layers.*act"),
    "no activation": (lambda: active_neurons(nn.Linear(4, 2), batch(4)[0]), "layers"),
    "no attention": (lambda: attention_maps(mlp(), batch(4)[0]), "Sequential.*return_attn"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_is_one_line_that_names_the_argument(what):
    wrong, words = ERRORS[what]
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_inference_mode_is_refused_with_the_way_out():
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    with torch.inference_mode(), pytest.raises(ValueError, match="no_grad"):
        hessian_max_eigenvalue(model, lambda: model(x).square().mean())


def test_weight_norm_whose_second_derivative_torch_gets_wrong_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 8)), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="remove_parametrizations"):
        hessian_max_eigenvalue(model, lambda: model(torch.ones(2, 4)).square().mean())
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert hessian_max_eigenvalue(model, lambda: model(torch.ones(2, 4)).square().mean()) > 0
