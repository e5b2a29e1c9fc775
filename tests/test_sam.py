"""SAM: the official numbers, hand-computed steps, and what must hold of every torch optimizer."""

import copy
import math
import os
import pickle
import socket
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from golden_inputs import TOLERANCE, assert_agree, first_values, golden_cases, load_case, parameter, relative
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

import sam
from sam import SAM, batchnorm_held

ROOT = Path(sam.__file__).resolve().parent
SGD, ADAMW = torch.optim.SGD, torch.optim.AdamW
BASES = {
    "sgd": (SGD, dict(lr=0.1, momentum=0.9, weight_decay=5e-4)),
    "adamw": (ADAMW, dict(lr=1e-2, weight_decay=0.1)),
    "adamw_fused": (ADAMW, dict(lr=1e-2, weight_decay=0.1, fused=True)),
}
every_base = pytest.mark.parametrize("base", BASES)
both_forms = pytest.mark.parametrize("form", ["step", "halves"])
plain_and_adaptive = pytest.mark.parametrize("adaptive", [False, True], ids=["plain", "adaptive"])
every_pass = pytest.mark.parametrize("mode, failing", [  # one closure runs twice, a list of two four times
    ("one", 1), ("one", 2),
    ("list", 1), ("list", 2), ("list", 3), ("list", 4),
    ("split", 1), ("split", 2), ("split", 3), ("split", 4),
])
with_and_without_model = pytest.mark.parametrize("given", [False, True], ids=["without model", "with model"])


def mlp(seed=0, dtype=None):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16, dtype=dtype), nn.Tanh(), nn.Linear(16, 3, dtype=dtype))


def batch(seed=1, size=8):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=generator), torch.randint(3, (size,), generator=generator)


def closure_of(optimizer, loss_of, before=None):
    """The closure of the docstring; `before` is called first."""

    def closure():
        optimizer.zero_grad()
        if before:
            before()
        loss = loss_of()
        loss.backward()
        return loss

    return closure


def cross_entropy(model, x, y):
    return lambda: F.cross_entropy(model(x), y)


def take(optimizer, loss_of, form="step"):
    """One step in either form. Returns the loss at w."""
    if form == "step":
        return optimizer.step(closure_of(optimizer, loss_of))
    loss = loss_of()
    loss.backward()
    optimizer.first_step(zero_grad=True)
    loss_of().backward()
    optimizer.second_step(zero_grad=True)
    return loss.detach()


def weights(model):
    params = model.parameters() if isinstance(model, nn.Module) else model
    return [p.detach().clone() for p in params]


def same_bits(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def difference(end, start):
    return [b - a for a, b in zip(start, end, strict=True)]


def total_norm(tensors):
    return torch.cat([t.flatten() for t in tensors]).norm()


def stepped(params, grads, lr):
    """w - lr g, by hand."""
    return [p - lr * g for p, g in zip(params, grads, strict=True)]


def climbed(params, grads, rho):
    """w + rho g / |g|, by hand."""
    return stepped(params, grads, -rho / total_norm(grads))


def fill(model, values):
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)


def gradient(model, at, loss_of):
    """The gradient of a loss at other weights; those of the model stay as they are."""
    here = weights(model)
    fill(model, at)
    grads = torch.autograd.grad(loss_of(), list(model.parameters()))
    fill(model, here)
    return grads


# ---------------------------------------------------------------------------- the numbers of the official code

GOLDEN = golden_cases("sam_")


def golden_model(case, dtype):
    """Two linear layers with the parameters of a case: {official name: parameter}, and x -> logits."""
    dims = case["config"]["dims"]
    layers = nn.ModuleDict()
    for k in range(1, len(dims)):
        layers[f"fc{k}"] = nn.Linear(dims[k - 1], dims[k], dtype=dtype)
    named = dict(layers.named_parameters())
    assert list(named) == [p["name"] for p in case["params"]]
    with torch.no_grad():
        for p in case["params"]:
            named[p["name"]].copy_(parameter(p["name"], p["shape"], p["fill"], case["fill_rule"]))

    def forward(x):
        for k, layer in enumerate(layers.values()):
            x = layer(torch.tanh(x) if k else x)
        return x

    return named, forward


def golden_input(case, dtype):
    b = torch.arange(case["input"]["batch"], dtype=torch.float64)[:, None]
    j = torch.arange(case["config"]["dims"][0], dtype=torch.float64)
    x = torch.sin(0.7 * j * (b + 1) + 0.3 * b).float()
    torch.testing.assert_close(x, torch.tensor(case["input"]["x"]), atol=1e-7, rtol=1e-6)
    return x.to(dtype), torch.tensor(case["input"]["labels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", GOLDEN)
def test_every_step_is_the_official_one(name, dtype):
    case = load_case(name)
    config = case["config"]
    expected, tolerance = case, TOLERANCE[case["fill_rule"]]
    if dtype == torch.float64:
        expected, tolerance = case["float64"], TOLERANCE["float64"]
    loss_tolerance = max(tolerance["loss"], 1e-13)  # losses of steps are stored with 13 digits
    named, forward = golden_model(case, dtype)
    x, y = golden_input(case, dtype)
    base = getattr(torch.optim, config["base_optimizer"])
    options = dict(rho=config["rho"], adaptive=config["adaptive"], **config["base_kwargs"])
    optimizer = SAM(named.values(), base, **options)
    seen, off = [], {}

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(x), y)
        loss.backward()
        norm = total_norm([p.grad for p in named.values()])
        seen.append((loss.item(), norm.item(), weights(named.values())))
        return loss

    assert len(expected["steps"]) == config["steps"]
    for k, step in enumerate(expected["steps"], start=1):
        seen.clear()
        optimizer.step(closure)
        (first, norm, here), (second, norm_there, there) = seen
        moved = total_norm(difference(there, here))
        off[f"{k} first loss"] = relative(first, step["loss_first"]) / loss_tolerance
        off[f"{k} second loss"] = relative(second, step["loss_second"]) / loss_tolerance
        off[f"{k} gradient"] = relative(norm, step["grad_l2_first"]) / tolerance["grads"]
        off[f"{k} second gradient"] = relative(norm_there, step["grad_l2_second"]) / tolerance["grads"]
        off[f"{k} perturbation"] = relative(moved, step["perturbation_l2"]) / tolerance["grads"]
        assert (optimizer.last["first_loss"], optimizer.last["second_loss"]) == (first, second)
        if not config["adaptive"]:
            assert optimizer.last["grad_norm"] == pytest.approx(norm, rel=1e-6)
        assert set(step["params_after"]) == set(named)
        for key, entry in step["params_after"].items():
            p = named[key].detach()
            off[f"{k} {key}"] = relative(p.norm(), entry["l2"]) / tolerance["statistics"]
            values = first_values(p.flatten(), entry["first"], entry["l2"] / p.numel() ** 0.5)
            off[f"{k} {key} first"] = values / tolerance.get("slices", tolerance["statistics"])
    off["loss at the end"] = relative(F.cross_entropy(forward(x), y), expected["loss"]) / tolerance["loss"]
    assert_agree(off)


def test_the_golden_cases_are_all_there():
    kinds = {name.removesuffix("_hash") for name in GOLDEN}
    assert len(GOLDEN) == 6 and kinds == {"sam_sgd", "sam_adamw", "sam_adaptive_sgd"}


# ---------------------------------------------------------------------------- by hand


def test_sam_step_matches_the_hand_computed_one():
    w = torch.tensor([3.0, 4.0], requires_grad=True)  # L = |w|^2 / 2: g = w, |g| = 5
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    loss = take(optimizer, lambda: w.square().sum() / 2)  # eps = 0.5 * w / 5 = (0.3, 0.4)
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))
    assert loss == 12.5 and not loss.requires_grad
    second = pytest.approx(15.125)
    assert optimizer.last == dict(grad_norm=5.0, first_loss=12.5, second_loss=second, skipped=False)


@both_forms
@plain_and_adaptive
def test_on_a_quadratic_the_gradient_is_the_algebraic_one(form, adaptive):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    w = torch.randn(6, dtype=torch.float64, requires_grad=True)
    A, start, rho = root @ root.T, w.detach().clone(), 0.3
    optimizer = SAM([w], SGD, rho=rho, adaptive=adaptive, lr=0.01)
    take(optimizer, lambda: w @ A @ w / 2, form)
    g = A @ start
    eps = rho * g / g.norm()
    if adaptive:
        eps = rho * start**2 * g / (start.abs() * g).norm()
    torch.testing.assert_close((start - w.detach()) / 0.01, A @ (start + eps), rtol=1e-12, atol=1e-12)


def test_a_maximized_objective_is_perturbed_to_where_it_is_lowest():
    w = torch.tensor([1.0], requires_grad=True)  # -w^2: the worst within 0.5 is at 1.5, with gradient -3
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1, maximize=True)
    take(optimizer, lambda: -w.square().sum())
    torch.testing.assert_close(w.detach(), torch.tensor([0.7]))


@every_base
@both_forms
def test_radius_zero_is_the_base_optimizer_bit_for_bit(base, form):
    cls, kwargs = BASES[base]
    ours, reference, (x, y) = mlp(), mlp(), batch()
    optimizer = SAM(ours.parameters(), cls, rho=0, **kwargs)
    plain = cls(reference.parameters(), **kwargs)
    for _ in range(5):
        take(optimizer, cross_entropy(ours, x, y), form)
        plain.step(closure_of(plain, cross_entropy(reference, x, y)))
    assert same_bits(weights(ours), weights(reference))


@plain_and_adaptive
def test_the_perturbation_has_length_rho_and_is_undone_bit_for_bit(adaptive):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, rho=0.7, adaptive=adaptive, lr=0.1)
    before = weights(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.first_step()
        assert same_bits(grads, [p.grad for p in model.parameters()])
        assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        if not adaptive:
            moved = total_norm(difference(weights(model), before))
            assert moved.item() == pytest.approx(0.7, rel=1e-5)
        optimizer.restore()
        assert same_bits(before, weights(model))


def test_weights_stay_in_their_memory_so_that_views_and_shared_memory_see_the_climb():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    places, view = [p.data_ptr() for p in model.parameters()], model[0].weight.detach()[0]
    seen = []

    def loss_of():
        seen.append(view.clone())
        assert places == [p.data_ptr() for p in model.parameters()]
        return F.cross_entropy(model(x), y)

    take(optimizer, loss_of)
    assert not torch.equal(*seen)
    assert torch.equal(view, model[0].weight[0])


def test_a_model_of_another_type_since_the_last_step_is_restored_bit_for_bit_too():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    take(optimizer, cross_entropy(model, x, y))
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 1e-12)  # to values that float32 does not have
    before = weights(model)
    optimizer.zero_grad()
    F.cross_entropy(model(x.double()), y).backward()
    optimizer.first_step()
    optimizer.restore()
    assert same_bits(before, weights(model))


def test_both_forms_are_the_same_bit_for_bit():
    a, b, (x, y) = mlp(), mlp(), batch()
    whole, halves = (SAM(model.parameters(), ADAMW, rho=0.1, lr=1e-2) for model in (a, b))
    for _ in range(3):
        assert take(whole, cross_entropy(a, x, y)) == take(halves, cross_entropy(b, x, y), "halves")
    assert same_bits(weights(a), weights(b))
    assert halves.last == dict(grad_norm=whole.last["grad_norm"], skipped=False)


def test_a_step_works_where_gradients_are_switched_off():
    a, b, (x, y) = mlp(), mlp(), batch()
    with torch.no_grad():
        take(SAM(a.parameters(), SGD, lr=0.1), cross_entropy(a, x, y))
    take(SAM(b.parameters(), SGD, lr=0.1), cross_entropy(b, x, y))
    assert same_bits(weights(a), weights(b))


def test_a_step_waits_for_the_device_twice_at_most():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    waits = []

    class Count(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            name = getattr(function, "__name__", "")
            if name in ("item", "tolist", "__bool__", "__float__", "__int__"):
                waits.append(name)
            return function(*args, **(kwargs or {}))

    with Count():
        take(optimizer, cross_entropy(model, x, y))
    assert 1 <= len(waits) <= 2


# ---------------------------------------------------------------------------- groups, schedulers, resuming


def shared(optimizer):
    base = optimizer.base_optimizer
    return optimizer.param_groups is base.param_groups and optimizer.state is base.state


def test_the_groups_are_the_base_optimizers_own_list():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model[0].parameters(), SGD, rho=0.5, lr=0.1, momentum=0.9)
    assert shared(optimizer)
    optimizer.add_param_group(dict(params=model[2].parameters(), lr=0.3))
    assert shared(optimizer)
    settings = [(group["lr"], group["rho"], group["momentum"]) for group in optimizer.param_groups]
    assert settings == [(0.1, 0.5, 0.9), (0.3, 0.5, 0.9)]
    optimizer.load_state_dict(optimizer.state_dict())
    assert shared(optimizer)


def test_a_group_added_later_is_perturbed_and_stepped():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model[0].parameters(), SGD, rho=0.5, lr=0.1)
    optimizer.add_param_group(dict(params=model[2].parameters(), lr=0.3))
    before, loss_of = weights(model), cross_entropy(model, x, y)
    grads = gradient(model, before, loss_of)
    second = gradient(model, climbed(before, grads, 0.5), loss_of)
    take(optimizer, loss_of)
    expected = stepped(before[:2], second[:2], 0.1) + stepped(before[2:], second[2:], 0.3)
    torch.testing.assert_close(weights(model), expected)


def test_named_parameters_are_taken_too():
    model = mlp()
    optimizer = SAM(model.named_parameters(), SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]


def test_a_group_of_radius_zero_is_not_perturbed_but_counts_in_the_norm():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    optimizer = SAM([dict(params=[a]), dict(params=[b], rho=0)], SGD, rho=0.5, lr=0.1)
    seen = []

    def loss_of():
        seen.append((a.item(), b.item()))
        return (a.square() + b.square()).sum() / 2

    take(optimizer, loss_of)
    assert seen == [(3, 4), (pytest.approx(3.3), 4)]  # 0.5 * 3 / 5, not 0.5 * 3 / 3
    assert [a.item(), b.item()] == pytest.approx([3 - 0.33, 4 - 0.4])


def test_groups_may_mix_sam_and_asam():
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([2.0], requires_grad=True)
    optimizer = SAM([dict(params=[a]), dict(params=[b], rho=1.0, adaptive=True)], SGD, rho=0.5, lr=0.1)
    (a.square().sum() / 2 + b.square().sum() / 2).backward()
    optimizer.first_step()  # the norm is over (3, 2 * 2) = 5
    assert [a.item(), b.item()] == pytest.approx([3 + 0.5 * 3 / 5, 2 + 1.0 * 2 * 4 / 5])


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    "onecycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=10),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (1 + k)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@both_forms
def test_schedulers_set_the_rates_of_the_base_optimizer_without_a_warning(scheduler, form):
    cls, kwargs = BASES["sgd"]
    ours, reference, (x, y) = mlp(), mlp(), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = SAM(ours.parameters(), cls, rho=0, **kwargs)
        plain = cls(reference.parameters(), **kwargs)
        schedules = [SCHEDULERS[scheduler](o) for o in (optimizer, plain)]
        rates = set()
        for _ in range(4):
            take(optimizer, cross_entropy(ours, x, y), form)
            plain.step(closure_of(plain, cross_entropy(reference, x, y)))
            for schedule in schedules:
                schedule.step()
            rates.add(optimizer.base_optimizer.param_groups[0]["lr"])
    assert len(rates) == 4
    assert schedules[0].get_last_lr() == schedules[1].get_last_lr()
    assert same_bits(weights(ours), weights(reference))


@every_base
@plain_and_adaptive
def test_ten_steps_are_five_and_a_file_and_five(base, adaptive, tmp_path):
    cls, kwargs = BASES[base]
    x, y = batch()

    def start():
        model = mlp()
        optimizer = SAM(model.parameters(), cls, rho=0.2, adaptive=adaptive, **kwargs)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)

    def go(model, optimizer, schedule, steps):
        for _ in range(steps):
            take(optimizer, cross_entropy(model, x, y))
            schedule.step()

    straight = start()
    go(*straight, 10)
    first = start()
    go(*first, 5)
    torch.save([part.state_dict() for part in first], tmp_path / "five.pt")

    second = start()
    take(second[1], cross_entropy(second[0], *batch(seed=9)))  # its state is replaced
    for part, state in zip(second, torch.load(tmp_path / "five.pt", weights_only=True), strict=True):
        part.load_state_dict(state)
    assert shared(second[1])
    go(*second, 5)
    assert same_bits(weights(straight[0]), weights(second[0]))
    assert not same_bits(weights(first[0]), weights(second[0]))


def test_a_file_of_the_bare_base_optimizer_can_be_continued_from():
    a, (x, y) = mlp(), batch()
    plain = SGD(a.parameters(), lr=0.1, momentum=0.9)
    plain.step(closure_of(plain, cross_entropy(a, x, y)))
    b = copy.deepcopy(a)
    optimizer = SAM(b.parameters(), SGD, rho=0, lr=0.5, momentum=0.9)
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0, 0.1)
    take(optimizer, cross_entropy(b, x, y))
    plain.step(closure_of(plain, cross_entropy(a, x, y)))
    assert same_bits(weights(a), weights(b))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_model_and_optimizer_goes_on_like_the_original(copier):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], ADAMW, rho=0.5, lr=0.1)
    take(optimizer, lambda: w.square().sum())
    other, v = copier((optimizer, w))
    take(optimizer, lambda: w.square().sum())
    take(other, lambda: v.square().sum())
    assert torch.equal(w, v) and w is not v
    assert shared(other) and other.param_groups[0]["params"][0] is v


# ---------------------------------------------------------------------------- parameters with and without gradients


@both_forms
def test_frozen_and_unused_parameters_stay_and_the_others_move(form):
    model, unused, (x, y) = mlp(), nn.Parameter(torch.ones(3)), batch()
    model[0].weight.requires_grad = False
    params = [*model.parameters(), unused]
    optimizer = SAM(params, ADAMW, rho=0.5, lr=0.1, weight_decay=0.1)
    before = weights(params)
    take(optimizer, cross_entropy(model, x, y), form)
    stayed = [torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert stayed == [True, False, False, False, True]


@both_forms
@pytest.mark.parametrize("only_in", [1, 2])
def test_a_parameter_with_a_gradient_in_one_pass_alone_ends_unperturbed(form, only_in):
    a, b = torch.tensor([3.0], requires_grad=True), torch.tensor([4.0], requires_grad=True)
    optimizer = SAM([a, b], SGD, rho=0.5, lr=0.1)
    passes = []

    def loss_of():
        passes.append((a.item(), b.item()))
        if len(passes) == only_in:
            return (a.square() + b.square()).sum() / 2
        return a.square().sum() / 2

    take(optimizer, loss_of, form)
    if only_in == 1:
        assert passes[1] == (pytest.approx(3.3), pytest.approx(4.4))
        assert a.item() == pytest.approx(3 - 0.33) and b.item() == 4  # bit for bit
    else:
        assert passes[1] == (3.5, 4)
        assert [a.item(), b.item()] == pytest.approx([3 - 0.35, 4 - 0.4])


@both_forms
@plain_and_adaptive
def test_a_zero_gradient_gives_no_nan(form, adaptive):
    w = torch.tensor([0.0, 0.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, adaptive=adaptive, lr=0.1, momentum=0.9)
    take(optimizer, lambda: w.square().sum(), form)
    assert torch.equal(w.detach(), torch.zeros(2))
    assert optimizer.last["grad_norm"] == 0 and not optimizer.last["skipped"]


def test_without_any_gradient_it_raises_and_is_usable_afterwards():
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), SGD, lr=0.1)
    with pytest.raises(ValueError, match="no parameter has a gradient.*backward"):
        optimizer.step(lambda: F.cross_entropy(model(x), y))
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.first_step()
    before = weights(model)
    take(optimizer, cross_entropy(model, x, y))
    assert not same_bits(before, weights(model))


def test_a_second_pass_without_gradients_is_an_error_and_undone():
    w, passes = torch.tensor([3.0, 4.0], requires_grad=True), []
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        passes.append(0)
        if len(passes) == 1:
            loss.backward()
        return loss

    with pytest.raises(ValueError, match="after the second pass"):
        optimizer.step(closure)
    assert w.tolist() == [3.0, 4.0]


# ---------------------------------------------------------------------------- BatchNorm, clipping, dropout


def bn_model(momentum=0.1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16, momentum=momentum), nn.Tanh(), nn.Linear(16, 3))


@pytest.mark.parametrize("momentum", [0.1, None])
@with_and_without_model
def test_batchnorm_statistics_move_once_per_step_and_both_passes_use_the_batch(momentum, given):
    model, (x, y) = bn_model(momentum), batch()
    optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
    twin = copy.deepcopy(model)
    for step in range(1, 4):
        # the first forward pass of the twin is the only one that may move the statistics
        twin.load_state_dict(model.state_dict())
        before = weights(twin)
        grads = gradient(twin, before, cross_entropy(twin, x, y))
        moved_once = [b.clone() for b in twin.buffers()]
        second = gradient(twin, climbed(before, grads, 0.5), cross_entropy(twin, x, y))
        closure = closure_of(optimizer, cross_entropy(model, x, y))
        optimizer.step(closure, model=model if given else None)
        assert same_bits(list(model.buffers()), moved_once)
        assert model[1].num_batches_tracked == step and model[1].track_running_stats
        torch.testing.assert_close(weights(model), stepped(before, second, 0.1))


@with_and_without_model
def test_batchnorm_moves_again_after_a_closure_raised(given):
    model, (x, y) = bn_model(), batch()
    optimizer, before = SAM(model.parameters(), SGD, rho=0.5, lr=0.1), weights(model)
    calls = []

    def closure():
        loss = closure_of(optimizer, cross_entropy(model, x, y))()
        calls.append(0)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure, model=model if given else None)
    assert same_bits(before, weights(model))
    assert model[1].num_batches_tracked == 1
    model(x)
    assert model[1].num_batches_tracked == 2


def test_batchnorm_in_eval_mode_or_without_statistics_is_left_alone():
    still, bare, x = nn.BatchNorm1d(5).eval(), nn.BatchNorm1d(5, track_running_stats=False), batch()[0]
    expected = still(x), bare(x)
    for model in (None, nn.ModuleList([still, bare])):
        with batchnorm_held(model):
            assert same_bits(expected, (still(x), bare(x)))
        assert still.track_running_stats and not bare.track_running_stats


@pytest.mark.slow
def test_a_compiled_model_is_stepped_like_the_plain_one_without_a_warning():
    a, b, (x, y) = bn_model(), bn_model(), batch()
    compiled = torch.compile(b, backend="eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model, called, given in ((a, a, None), (b, compiled, compiled)):
            optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
            for _ in range(3):
                optimizer.step(closure_of(optimizer, cross_entropy(called, x, y)), model=given)
        optimizer.step(closure_of(optimizer, cross_entropy(compiled, x, y)))
        take(SAM(a.parameters(), SGD, rho=0.5, lr=0.1), cross_entropy(a, x, y))
    assert not [w for w in caught if "hook" in str(w.message)]
    torch.testing.assert_close(weights(a), weights(b))


@every_pass
def test_a_closure_that_raises_leaves_the_weights_bit_for_bit(mode, failing):
    model, (x, y) = mlp(), batch()
    optimizer, before, calls = SAM(model.parameters(), SGD, rho=0.5, lr=0.1), weights(model), []

    def fail():
        calls.append(0)
        if len(calls) == failing:
            raise RuntimeError("out of memory")

    closure = closure_of(optimizer, cross_entropy(model, x, y), before=fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure if mode == "one" else [closure, closure], split=mode == "split")
    assert same_bits(before, weights(model))

    # zero_grad works again, and the next step is as ever
    model[0].weight.grad = torch.ones_like(model[0].weight)
    optimizer.zero_grad()
    assert model[0].weight.grad is None
    twin = mlp()
    take(optimizer, cross_entropy(model, x, y))
    take(SAM(twin.parameters(), SGD, rho=0.5, lr=0.1), cross_entropy(twin, x, y))
    assert same_bits(weights(model), weights(twin))


def test_clipping_in_the_closure_shortens_the_step_and_does_not_turn_the_perturbation():
    places, moves = {}, {}
    for clip in (0.01, math.inf):
        model, (x, y) = mlp(), batch()
        optimizer = SAM(model.parameters(), SGD, rho=0.5, lr=0.1)
        seen = places[clip] = []

        def closure():
            seen.append(weights(model))
            loss = closure_of(optimizer, cross_entropy(model, x, y))()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            return loss

        optimizer.step(closure)
        moves[clip] = difference(weights(model), seen[0])
    torch.testing.assert_close(places[0.01][1], places[math.inf][1])  # the same w + eps
    length, free = total_norm(moves[0.01]), total_norm(moves[math.inf])
    assert length.item() == pytest.approx(0.1 * 0.01, rel=1e-3)
    for a, b in zip(moves[0.01], moves[math.inf], strict=True):
        torch.testing.assert_close(a / length, b / free, atol=1e-4, rtol=1e-3)


def test_a_closure_that_seeds_itself_drops_the_same_units_in_both_passes():
    (x, y), masks = batch(), []
    model = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    model[1].register_forward_hook(lambda module, inputs, output: masks.append(output == 0))
    optimizer = SAM(model.parameters(), SGD, rho=1e-3, lr=0.1)
    closure = closure_of(optimizer, cross_entropy(model, x, y), before=lambda: torch.manual_seed(7))
    optimizer.step(closure)
    assert torch.equal(masks[0], masks[1])


# ---------------------------------------------------------------------------- half precision, infinities


def test_under_bfloat16_autocast_a_step_is_close_to_the_float32_one():
    a, b, (x, y) = mlp(), mlp(), batch()
    half, full = (SAM(model.parameters(), SGD, rho=0.1, lr=0.1) for model in (a, b))

    def loss_of():
        with torch.autocast("cpu", torch.bfloat16):
            out = a(x)
            assert out.dtype == torch.bfloat16
            return F.cross_entropy(out, y)

    start = weights(a)
    for _ in range(3):
        loss = take(half, loss_of).item()
        assert loss == pytest.approx(take(full, cross_entropy(b, x, y)).item(), rel=2e-2)
    assert all(p.dtype == torch.float32 for p in a.parameters())
    off = total_norm(difference(weights(a), weights(b)))
    assert off < 0.05 * total_norm(difference(weights(b), start))


def scaled_step(optimizer, scaler, loss_of):
    """The recipe of the docstring."""
    for half in (optimizer.first_step, optimizer.second_step):
        scaler.scale(loss_of()).backward()
        scaler.unscale_(optimizer)
        half(zero_grad=True)
        scaler.update()


@pytest.mark.parametrize("half", [False, True], ids=["scaled float32", "float16"])
def test_the_two_halves_with_a_scaler_are_the_float32_step(half):
    a, b, (x, y) = mlp(), mlp(), batch()
    optimizer, full = (SAM(model.parameters(), SGD, rho=0.1, lr=0.1, momentum=0.9) for model in (a, b))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def loss_of():
        with torch.autocast("cpu", torch.float16, enabled=half):
            out = a(x)
        return F.cross_entropy(out.float(), y)

    for _ in range(3):
        scaled_step(optimizer, scaler, loss_of)
        take(full, cross_entropy(b, x, y))
    tolerance = dict(atol=2e-3, rtol=0) if half else {}
    torch.testing.assert_close(weights(a), weights(b), **tolerance)
    assert scaler.get_scale() == 1024


def poisoned(model, passes, value):
    """A hook that spoils one gradient in the given backward passes (counted from 1)."""
    count = [0]

    def spoil(grad):
        count[0] += 1
        return torch.full_like(grad, value) if count[0] in passes else grad

    model[0].weight.register_hook(spoil)


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_in_either_half_skips_and_makes_the_scaler_back_off(bad_pass, value):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), ADAMW, rho=0.1, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    poisoned(model, {bad_pass}, value)
    before = weights(model)
    scaled_step(optimizer, scaler, cross_entropy(model, x, y))
    assert same_bits(before, weights(model)) and not optimizer.state
    assert optimizer.last["skipped"] and scaler.get_scale() == 512

    scaled_step(optimizer, scaler, cross_entropy(model, x, y))
    assert not same_bits(before, weights(model))
    assert not optimizer.last["skipped"] and scaler.get_scale() == 512


@every_pass
def test_step_skips_whichever_pass_has_the_bad_gradient(mode, failing):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), ADAMW, rho=0.1, lr=0.1)
    poisoned(model, {failing}, math.inf)
    before, closure = weights(model), closure_of(optimizer, cross_entropy(model, x, y))
    closure = closure if mode == "one" else [closure, closure]
    optimizer.step(closure, split=mode == "split")
    assert same_bits(before, weights(model)) and not optimizer.state and optimizer.last["skipped"]

    optimizer.step(closure, split=mode == "split")
    assert not same_bits(before, weights(model)) and not optimizer.last["skipped"]
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("bad_pass", [3, 4])
def test_a_skipped_step_leaves_no_trace_in_the_state(bad_pass):
    model, (x, y) = mlp(), batch()
    optimizer = SAM(model.parameters(), ADAMW, rho=0.1, lr=0.1)
    poisoned(model, {bad_pass}, math.nan)
    take(optimizer, cross_entropy(model, x, y))
    before, state = weights(model), copy.deepcopy(optimizer.state_dict()["state"])
    take(optimizer, cross_entropy(model, x, y))
    assert optimizer.last["skipped"] and same_bits(before, weights(model))
    for key, entry in optimizer.state_dict()["state"].items():
        assert same_bits(list(entry.values()), list(state[key].values()))


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_a_loss_that_is_not_finite_is_skipped_even_if_its_gradient_is_finite(bad_pass):
    model, (x, y) = mlp(), batch()
    optimizer, passes, before = SAM(model.parameters(), SGD, lr=0.1), [], weights(model)

    def loss_of():
        passes.append(0)
        return F.cross_entropy(model(x), y) + (math.inf if len(passes) == bad_pass else 0)

    take(optimizer, loss_of)
    assert same_bits(before, weights(model)) and optimizer.last["skipped"]
    assert optimizer.last["first_loss" if bad_pass == 1 else "second_loss"] == math.inf


# ---------------------------------------------------------------------------- micro-batches


def micro_closures(optimizer, model, x, y, parts, zero):
    def make(rows):
        def closure():
            if zero:
                optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows]) / parts
            loss.backward()
            return loss

        return closure

    size = len(x) // parts
    return [make(slice(k * size, (k + 1) * size)) for k in range(parts)]


zeroing_or_not = pytest.mark.parametrize("zero", [False, True], ids=["no zero_grad", "each zeroes"])


@every_base
@plain_and_adaptive
@zeroing_or_not
def test_a_list_of_micro_batches_is_the_one_big_batch(base, adaptive, zero):
    cls, kwargs = BASES[base]
    a, b, (x, y) = mlp(dtype=torch.float64), mlp(dtype=torch.float64), batch(size=12)
    x = x.double()
    optimizer, whole = (SAM(m.parameters(), cls, rho=0.3, adaptive=adaptive, **kwargs) for m in (a, b))
    for _ in range(3):
        loss = optimizer.step(micro_closures(optimizer, a, x, y, 3, zero))
        assert loss.item() == pytest.approx(take(whole, cross_entropy(b, x, y)).item(), rel=1e-12)
        assert optimizer.last == pytest.approx(whole.last, rel=1e-12)
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-9, atol=1e-12)


@zeroing_or_not
def test_split_is_the_hand_computed_m_sharpness(zero):
    model, (x, y) = mlp(), batch(size=12)
    optimizer, before = SAM(model.parameters(), SGD, rho=0.3, lr=0.1), weights(model)
    expected, losses, norms = before, [], []
    for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):
        loss_of = cross_entropy(model, x[rows], y[rows])
        losses.append(loss_of().item())
        grads = gradient(model, before, loss_of)
        norms.append(total_norm(grads).item())
        second = gradient(model, climbed(before, grads, 0.3), loss_of)
        expected = stepped(expected, second, 0.1 / 3)
    loss = optimizer.step(micro_closures(optimizer, model, x, y, 3, zero), split=True)
    torch.testing.assert_close(weights(model), expected)
    assert loss.item() == pytest.approx(sum(losses) / 3)
    assert optimizer.last["grad_norm"] == pytest.approx(sum(norms) / 9)  # of losses divided by 3

    whole = mlp()
    other = SAM(whole.parameters(), SGD, rho=0.3, lr=0.1)
    other.step(micro_closures(other, whole, x, y, 3, zero))
    assert not torch.allclose(whole[0].weight, model[0].weight, atol=1e-5, rtol=0)


@pytest.mark.parametrize("split", [False, True])
def test_the_same_closure_may_be_in_the_list_twice(split):
    a, b, (x, y) = mlp(), mlp(), batch()
    optimizer, other = (SAM(model.parameters(), SGD, rho=0.3, lr=0.1) for model in (a, b))
    closure = closure_of(optimizer, lambda: F.cross_entropy(a(x), y) / 2)
    optimizer.step([closure, closure], split=split)
    take(other, cross_entropy(b, x, y))
    torch.testing.assert_close(weights(a), weights(b))


def test_a_closure_that_forgets_to_zero_the_gradients_does_no_harm():
    a, b, (x, y) = mlp(), mlp(), batch()
    optimizer, other = (SAM(model.parameters(), SGD, rho=0.3, lr=0.1) for model in (a, b))

    def closure():
        loss = F.cross_entropy(a(x), y)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
        take(other, cross_entropy(b, x, y))
    assert same_bits(weights(a), weights(b))


# ---------------------------------------------------------------------------- wrong use


W = torch.ones(2, requires_grad=True)
WRONG = {
    "a negative rho": (lambda: SAM([W], SGD, rho=-0.1, lr=0.1), "rho -0.1"),
    "a rho that is no number": (lambda: SAM([W], SGD, rho=math.nan, lr=0.1), "rho nan"),
    "an infinite rho": (lambda: SAM([W], SGD, rho=math.inf, lr=0.1), "rho inf"),
    "rho as text": (lambda: SAM([W], SGD, rho="0.05", lr=0.1), "rho '0.05'"),
    "a negative rho in a group": (lambda: SAM([dict(params=[W], rho=-1)], SGD, lr=0.1), "rho -1"),
    "an instance": (lambda: SAM([W], SGD([W], lr=0.1)), "base_optimizer"),
    "a name": (lambda: SAM([W], "sgd"), "base_optimizer.*sgd"),
    "SAM in SAM": (lambda: SAM([W], SAM, lr=0.1), "base_optimizer.*SAM"),
    "LBFGS inside": (lambda: SAM([W], torch.optim.LBFGS, lr=0.1), "base_optimizer.*LBFGS"),
    "second_step alone": (lambda: SAM([W], SGD, lr=0.1).second_step(), "first_step"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_use_is_one_line_that_names_the_argument(what):
    wrong, words = WRONG[what]
    with pytest.raises(ValueError, match=words) as error:
        wrong()
    assert "\n" not in str(error.value)


def test_a_group_with_a_wrong_rho_is_not_added():
    optimizer = SAM([W], SGD, lr=0.1)
    with pytest.raises(ValueError, match="rho -1"):
        optimizer.add_param_group(dict(params=[torch.ones(1, requires_grad=True)], rho=-1))
    assert len(optimizer.param_groups) == 1


def test_first_step_twice_is_refused_and_can_still_be_undone():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    w.square().sum().backward()
    optimizer.first_step()
    with pytest.raises(ValueError, match="first_step"):
        optimizer.first_step()
    optimizer.restore()
    assert w.tolist() == [3, 4]


def test_a_step_between_the_two_halves_is_refused_and_ends_at_w():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    closure = closure_of(optimizer, lambda: w.square().sum() / 2)
    closure()
    optimizer.first_step()
    with pytest.raises(ValueError, match="second_step"):
        optimizer.step(closure)
    assert w.tolist() == [3, 4]
    optimizer.step(closure)
    torch.testing.assert_close(w.detach(), torch.tensor([2.67, 3.56]))


def test_a_closure_that_returns_nothing_is_an_error():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    with pytest.raises(ValueError, match="closure.*None"):
        optimizer.step(lambda: w.square().sum().backward())
    assert w.tolist() == [3, 4]


# ---------------------------------------------------------------------------- two processes

PARALLEL = {  # arguments of step, micro-batches of a process, which of the backward passes of a step average
    "local": (dict(), 1, [False, True]),
    "synchronized": (dict(sync_perturbation=True), 1, [True, True]),
    "without model": (dict(model=None), 1, [True, True]),
    "list": (dict(), 2, [False, False, False, True]),
    "synchronized list": (dict(sync_perturbation=True), 2, [False, True, False, True]),
    "split list": (dict(split=True), 2, [False, False, False, True]),
    "synchronized split list": (dict(split=True, sync_perturbation=True), 2, [True, False, True, True]),
}
FAULTS = {  # on one process alone: its rank, the pass, and whether the loss is infinite or a gradient
    "first gradient": (1, 1, False),
    "second gradient": (0, 2, False),
    "first loss": (1, 1, True),
}
RHO, LR, STEPS = 0.5, 0.2, 3


def train_in_parallel(name, view, x, y):
    """STEPS steps of a case of PARALLEL on this process's rows."""
    arguments, parts, _ = PARALLEL[name]
    model = mlp()
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=view)
    optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR, momentum=0.9)
    seen, averaged = [], []

    def spied(closure):
        def spy():
            seen.append(weights(model))
            averaged.append(ddp.require_backward_grad_sync)
            return closure()

        return spy

    closures = [spied(closure) for closure in micro_closures(optimizer, ddp, x, y, parts, zero=True)]
    losses = [optimizer.step(closures, **{"model": ddp, **arguments}).item() for _ in range(STEPS)]
    return dict(seen=seen[:2 * parts], averaged=averaged, weights=weights(model), losses=losses)


def train_with_a_fault(name, rank, x, y):
    """Two steps; something in the first is infinite on one process alone."""
    bad_rank, bad_pass, in_loss = FAULTS[name]
    model = mlp()
    ddp = DistributedDataParallel(model)
    optimizer, passes, results = SAM(model.parameters(), SGD, rho=RHO, lr=LR), [], []
    if rank == bad_rank and not in_loss:
        poisoned(model, {bad_pass}, math.inf)

    def loss_of():
        passes.append(0)
        bad = in_loss and rank == bad_rank and len(passes) == bad_pass
        return F.cross_entropy(ddp(x), y) + (math.inf if bad else 0)

    for _ in range(2):
        optimizer.step(closure_of(optimizer, loss_of), model=ddp)
        results.append((optimizer.last["skipped"], weights(model)))
    return results


def train_with_batchnorm(x, y):
    """BatchNorm, its buffers broadcast from rank 0."""
    model = bn_model()
    ddp = DistributedDataParallel(model)
    optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR)
    for _ in range(STEPS):
        optimizer.step(closure_of(optimizer, cross_entropy(ddp, x, y)), model=ddp)
    return weights(model), model[1].num_batches_tracked.item()


def two_process_job():
    """What each process runs: every case from the same weights, each process with its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, y = (t[8 * rank:8 * rank + 8] for t in batch(size=16))
    results = {"batchnorm": train_with_batchnorm(x, y)}
    for name in PARALLEL:
        results[name, False] = train_in_parallel(name, False, x, y)
        results[name, True] = train_in_parallel(name, True, x, y)
    for name in FAULTS:
        results[name] = train_with_a_fault(name, rank, x, y)
    torch.save(results, f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


JOB = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
import test_sam
test_sam.two_process_job()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "job.py").write_text(JOB)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = dict(OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    processes = []
    for rank in range(2):
        env = {**os.environ, **world, "RANK": str(rank)}
        command = [sys.executable, "job.py"]
        processes.append(subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True, env=env))
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(text[-2000:] for text in errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def by_hand(climbs):
    """STEPS steps of SGD with momentum on the mean of the gradients, each at the top of its own climb.

    climbs: lists of rows of the batch; each list climbs together
    """
    model, (x, y) = mlp(), batch(size=16)
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    for _ in range(STEPS):
        here = weights(model)
        momentum = [0.9 * m for m in momentum]
        for rows in climbs:
            loss_of = cross_entropy(model, x[rows], y[rows])
            second = gradient(model, climbed(here, gradient(model, here, loss_of), RHO), loss_of)
            momentum = stepped(momentum, second, -1 / len(climbs))
        fill(model, stepped(here, momentum, LR))
    return weights(model)


TOGETHER = [list(range(16))]
APART = [list(range(8)), list(range(8, 16))]
CLIMBS = {
    "local": APART,
    "synchronized": TOGETHER,
    "without model": TOGETHER,
    "list": APART,
    "synchronized list": TOGETHER,
    "split list": [list(range(k, k + 4)) for k in (0, 4, 8, 12)],
    "synchronized split list": [[*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]],
}


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket view"])
@pytest.mark.parametrize("name", PARALLEL)
def test_two_processes_end_with_the_same_weights_and_those_computed_by_hand(ranks, name, view):
    a, b = (rank[name, view] for rank in ranks)
    assert same_bits(a["weights"], b["weights"])
    assert a["averaged"] == b["averaged"] == PARALLEL[name][2] * STEPS
    torch.testing.assert_close(a["weights"], by_hand(CLIMBS[name]), atol=1e-5, rtol=1e-4)
    assert same_bits(a["seen"][0], b["seen"][0])

    # unless the first gradients are averaged, each process climbs on its own
    own_climbs = name in ("local", "list", "split list")
    assert same_bits(a["seen"][-1], b["seen"][-1]) != own_climbs
    for result in (a, b):
        moved = total_norm(difference(result["seen"][-1], result["seen"][0]))
        assert moved.item() == pytest.approx(RHO, rel=1e-4)


@pytest.mark.parametrize("name", ["synchronized", "synchronized list"])
def test_synchronized_processes_are_one_process_with_the_big_batch(ranks, name):
    model, (x, y) = mlp(), batch(size=16)
    optimizer = SAM(model.parameters(), SGD, rho=RHO, lr=LR, momentum=0.9)
    losses = [take(optimizer, cross_entropy(model, x, y)).item() for _ in range(STEPS)]
    for view in (False, True):
        a, b = (rank[name, view] for rank in ranks)
        torch.testing.assert_close(a["weights"], weights(model), atol=1e-5, rtol=1e-4)
        means = [(p + q) / 2 for p, q in zip(a["losses"], b["losses"], strict=True)]
        assert means == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("fault", FAULTS)
def test_an_infinity_on_one_process_alone_makes_both_skip(ranks, fault):
    start = weights(mlp())
    for rank in ranks:
        skipped, after = rank[fault][0]
        assert skipped and same_bits(after, start)
    (first, a), (second, b) = (rank[fault][1] for rank in ranks)
    assert not first and not second
    assert same_bits(a, b) and not same_bits(a, start)


def test_batchnorm_under_two_processes_counts_each_step_once(ranks):
    (a, count), (b, other) = (rank["batchnorm"] for rank in ranks)
    assert same_bits(a, b) and count == other == STEPS


def test_processes_agree_on_a_bad_step_where_the_parameters_are(monkeypatch):
    """A closure may return its loss on the CPU; NCCL takes tensors of the GPU only."""

    class Reached(Exception):
        pass

    def all_reduce(votes, group):
        raise Reached(votes.device.type)

    w = torch.zeros(2, device="meta", requires_grad=True)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    monkeypatch.setattr(torch.Tensor, "item", lambda self: 1.0)
    optimizer = SAM([w], SGD, rho=0.5, lr=0.1)
    parallel = nn.Identity()
    parallel.no_sync, parallel.process_group = torch.no_grad, None

    def closure():
        w.grad = torch.zeros_like(w)
        return torch.tensor(0.5)

    with pytest.raises(Reached, match="meta"):
        optimizer.step(closure, model=parallel)


# ---------------------------------------------------------------------------- cost


@pytest.mark.slow
def test_what_sam_adds_to_the_two_passes_costs_about_two_adamw_updates():
    """Two norms, copy, climb and way back read 6 and write 3 numbers per parameter; fused AdamW 4 and 3."""
    from vit import create_vit

    class Nothing(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self):
            pass

    params = list(create_vit("vit_s16", num_classes=1000).parameters())
    grads = [torch.randn_like(p) for p in params]
    update, optimizer = ADAMW(params, lr=1e-9, weight_decay=0.1, fused=True), SAM(params, Nothing, rho=0.1)

    def closure():
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        return torch.tensor(1.0)

    def seconds(work):
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    ratios = []
    for _ in range(2 + 15):
        closure()
        base = seconds(update.step)
        ratios.append(seconds(lambda: optimizer.step(closure)) / base)
    ratio = statistics.median(ratios[2:])
    print(f"SAM's own part: {ratio:.2f} AdamW updates")
    assert ratio <= 3
