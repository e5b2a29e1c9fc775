"""Geometry: is this minimum a wide valley or a narrow crack?

Two networks can have the same training loss, and one of them loses everything when its weights move a little.
Transformers and MLP-Mixers trained without tricks end in such cracks; sharpness-aware minimization (sam.py)
avoids them. Each function takes a finished model and a loss and measures one thing. H is the Hessian of the
loss, g its gradient, w the weights.

    H v = d/dw (g . v)                             (1)   a second backward pass; H itself is never formed
    mu, v = eigenpair of H in span(v-, v+, q)      (2)   v- of the lowest, v+ of the highest mu
    q <- H v - mu v                                (3)   of v- or v+; in the end lambda is the larger |mu|
    L_N = E L(w + eps),  eps ~ N(0, sigma^2)       (4)   average flatness: L_N - L is about sigma^2 / 2 tr H
    L(w + a d + b d'),  d_i = |w_i| / |n_i| n_i    (5)   a random slice; n normal, i a filter (weight row)
    Theta = J J^T,  kappa = lambda_1 / lambda_m    (6)   tangent kernel on m images; J: outputs by weights
    active = share of activations above zero       (7)   where an MLP layer lets signals through

Everything is measured in eval mode and fp32; weights, gradients, mode and random state are restored.

    loss_fn   a function without arguments: the loss on one fixed batch, without backward(), such as
              lambda: F.cross_entropy(model(x), y). Or a list of them, one per micro-batch of equal size
    params    whose weights count: None for all trainable ones, a name or pattern ("blocks.0",
              "blocks.*.mlp": diagonal blocks of H), a module, or a list of parameters

Compare networks by the ratio of lambdas; before a norm layer, larger weights (weight_norm) lower lambda.

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548; slices: Li et al. 2018, arXiv 1712.09913. Written from the
papers; sigma, the number of draws, the doubling radius and the logits in (6) are our choice. We differ: power
iteration, v <- H v / |H v|, does not converge if lambda and -lambda are both eigenvalues. (2) and (3) are a
restarted Lanczos iteration that keeps both ends of the spectrum: the same cost per iteration, fewer of them.
Needs: torch; sam.py for the demo.
Demo: python geometry.py (20 s on a CPU) measures one small network trained with five radii of SAM.
"""

import fnmatch
import inspect
import math
import warnings
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# ---------------------------------------------------------------------------- curvature


def hessian_max_eigenvalue(model, loss_fn, params=None, iters=100, tol=1e-3, seed=0):
    """The Hessian's eigenvalue of largest magnitude, with its sign; one double backward pass per iteration.

    It stops when |H v - lambda v| <= tol |lambda| and the other end of the spectrum cannot be larger. After
    `iters` iterations it warns and returns what it has, never beyond the true magnitude.
    """
    chosen = select(model, params)
    if any(type(module).__name__ == "_WeightNorm" for module in model.modules()):
        raise ValueError("torch's weight norm has a wrong second derivative; fold it into the weights first, by "
                         "torch.nn.utils.parametrize.remove_parametrizations")
    with measuring(model, chosen), torch.enable_grad():
        product = hessian_vector_product(as_list(loss_fn), chosen)
        # float64: dot products of a million fp32 numbers lose 1e-3
        q = flat(normal_like(chosen, torch.Generator().manual_seed(seed))).double()
        span = q.new_empty(len(q), 0)  # orthonormal columns v-, v+, q
        image = q.new_empty(len(q), 0)  # H times them
        for _ in range(iters):
            # 1. add q to the span: the one product with H
            q = q / q.norm()
            span = torch.cat([span, q[:, None]], dim=1)
            image = torch.cat([image, product(q)[:, None]], dim=1)

            # 2. the eigenpairs of H in the span, at most 3 x 3
            small = span.T @ image
            if not small.isfinite().all():
                raise ValueError("the loss or its second derivative is not finite at these weights")
            values, mix = torch.linalg.eigh(small)

            # 3. equation (2): keep the lowest and the highest, since either may turn out the larger
            ends = [0, -1] if len(values) > 1 else [0]
            values, mix = values[ends], mix[:, ends]
            span, image = span @ mix, image @ mix

            # 4. equation (3): the residual is the error of an end, and the next direction
            residual = image - values * span
            error, size, top = residual.norm(dim=0), values.abs(), values.abs().argmax()
            allowed = torch.maximum(tol * size[top], size[top] - size)  # the other end must not overtake
            if (error <= allowed).all():
                return values[top].item()
            q = residual[:, error.argmax()]
            q = q - span @ (span.T @ q)  # rounding
    warnings.warn(f"after {iters} iterations the eigenvalue {values[top]:.4g} is only known to within "
                  f"{error[top]:.1g}; raise iters or tol")
    return values[top].item()


def hessian_vector_product(loss_fns, params):
    """(1) as a function of a flat float64 v. One graph is kept; those of several losses are rebuilt."""
    kept = loss_gradient(loss_fns[0], params) if len(loss_fns) == 1 else None
    sizes = [p.numel() for p in params]

    def product(v):
        parts = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), params, strict=True)]
        total = torch.zeros_like(v)
        for loss_fn in loss_fns:
            grads = kept or loss_gradient(loss_fn, params)
            dot = sum((g * part).sum() for g, part in zip(grads, parts, strict=True) if g is not None)
            if dot.requires_grad:  # a linear loss has no curvature
                keep = kept is not None
                total += flat(torch.autograd.grad(dot, params, retain_graph=keep, materialize_grads=True))
        return total / len(loss_fns)

    return product


def loss_gradient(loss_fn, params):
    """The gradient with its graph; None for a parameter on which the loss does not depend."""
    loss, grads = loss_fn(), []
    if any(p.grad is not None for p in params):
        raise ValueError("loss_fn must return the loss and not call backward(), which is done here")
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise ValueError(f"loss_fn must return one number as a tensor, got {getattr(loss, 'shape', loss)!r}")
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
    if all(grad is None for grad in grads):
        raise ValueError("loss_fn does not depend on the chosen params; does it use this model, undetached?")
    return grads


# ---------------------------------------------------------------------------- flatness and loss surface


class Flatness(NamedTuple):
    clean: float  # L(w)
    perturbed: float  # L_N
    gap: float  # L_N - L
    std: float  # of the loss over the draws; the mean's error is std / sqrt(draws)


@torch.no_grad()
def average_flatness(model, loss_fn, sigma=0.01, draws=10, seed=0):
    """(4): the mean loss when every trainable weight gets Gaussian noise of standard deviation sigma."""
    params, generator = select(model), torch.Generator().manual_seed(seed)
    losses = torch.zeros(draws, dtype=torch.float64)
    with measuring(model), borrowed(params) as originals:
        clean = mean_loss(loss_fn)
        for k in range(draws):
            for p, w, noise in zip(params, originals, normal_like(params, generator), strict=True):
                p.copy_(w + sigma * noise)
            losses[k] = mean_loss(loss_fn)
    mean = losses.mean().item()
    return Flatness(clean, mean, mean - clean, losses.std(correction=min(1, draws - 1)).item())


def weight_norm(model):
    """L2 norm of all trainable parameters together."""
    return math.sqrt(sum(p.detach().double().square().sum().item() for p in select(model)))


class Surface(NamedTuple):
    coordinates: torch.Tensor  # (steps,), from -radius to radius
    losses: torch.Tensor  # (steps,) or (steps, steps), row: along d, column: along d'


@torch.no_grad()
def loss_surface(model, loss_fn, radius=1.0, steps=21, dims=2, seed=0):
    """(5): the loss on a random line (dims=1) or plane (dims=2) through the weights.

    At radius 1 every filter has moved by its own length.
    """
    if steps < 3 or steps % 2 == 0:
        raise ValueError(f"steps {steps} puts no point on the weights themselves; try an odd number like 21")
    params, generator = select(model), torch.Generator().manual_seed(seed)
    directions = [filter_normalized(normal_like(params, generator), params) for _ in range(dims)]
    half = steps // 2
    coordinates = torch.arange(-half, half + 1) * (radius / half)  # an exact 0 in the middle
    points = torch.cartesian_prod(*[coordinates] * dims).view(-1, dims).tolist()
    losses = torch.zeros(len(points), dtype=torch.float64)
    with measuring(model), borrowed(params) as originals:
        for k, point in enumerate(points):
            for p, w, *along in zip(params, originals, *directions, strict=True):
                p.copy_(w + sum(a * d for a, d in zip(point, along, strict=True)))
            losses[k] = mean_loss(loss_fn)
    return Surface(coordinates, losses.view([steps] * dims))


def filter_normalized(noise, params):
    """Each filter of the direction as long as that of the weights; zero for biases and norms.

    Without this a network with small weights would look sharp, and the same network, rescaled, flat.
    """
    directions = [torch.zeros_like(w) for w in params]
    for direction, n, w in zip(directions, noise, params, strict=True):
        if w.ndim >= 2:
            rows, length = n.flatten(1), w.detach().flatten(1).norm(dim=1, keepdim=True)
            rows = rows * length / rows.norm(dim=1, keepdim=True)
            direction.copy_(rows.view_as(w))
    return directions


def doubling_radius(surface):
    """The smallest distance at which the loss, averaged over a ring, is twice that of the center; or inf.

    Between two rings the loss is taken as linear in the squared distance, which is exact for a parabola.
    """
    x, losses = surface.coordinates.double(), surface.losses
    squared = x**2 if losses.ndim == 1 else x[:, None] ** 2 + x**2
    ring = (squared.sqrt() / (x[1] - x[0])).round()
    near, low = 0.0, losses[ring == 0].mean().item()
    twice = 2 * low
    if not twice > 0:
        raise ValueError(f"the loss at the center is {low:g}; only a positive loss can double")

    # ring by ring, from the center outward; the corners of a plane lie beyond the last full ring
    for k in range(1, len(x) // 2 + 1):
        far, high = squared[ring == k].mean().item(), losses[ring == k].mean().item()
        if not math.isfinite(high):  # the loss is inf or nan here
            return math.sqrt(far)
        if high >= twice:
            return math.sqrt(near + (far - near) * (twice - low) / (high - low))
        near, low = far, high
    return math.inf


# ---------------------------------------------------------------------------- kernel, activations, attention


class NTK(NamedTuple):
    kappa: float
    eigenvalues: torch.Tensor  # descending, float64: (m,), or (classes, m)


def ntk_condition_number(model, inputs, params=None, per_class=False):
    """(6): how unequally gradient descent learns the m inputs (B, ...); inf if two have the same gradient.

    per_class=False takes the sum of each image's logits; True takes one kernel per logit and averages their
    kappas. m gradients are in memory at once: for a large model use few inputs, or restrict params.
    """
    chosen = select(model, params)
    with measuring(model), torch.enable_grad():
        classes = model(inputs[:1]).flatten(1).shape[1]
        logits = range(classes) if per_class else [slice(None)]
        kernels = [tangent_kernel(model, inputs, chosen, logit) for logit in logits]
    values = torch.stack([torch.linalg.eigvalsh(kernel).flip(0) for kernel in kernels])  # (kernels, m)
    first, last = values[:, 0], values[:, -1]
    rounding = torch.finfo(chosen[0].dtype).eps ** 2  # of J, squared
    zero = last <= len(inputs) * rounding * first
    kappa = torch.where(zero, torch.inf, first / last).mean().item()
    return NTK(kappa, (values if per_class else values[0]).cpu())


def tangent_kernel(model, inputs, params, logit):
    """Theta (m, m) in float64, of one logit or the sum of a slice of them."""
    rows = []
    for image in inputs.split(1):  # in eval mode an output depends on its own image alone
        out = model(image).flatten(1)[0, logit].sum()
        rows.append(torch.autograd.grad(out, params, materialize_grads=True))
    theta = 0
    for parts in zip(*rows, strict=True):  # one parameter at a time in float64
        part = torch.stack(parts).flatten(1).double()
        theta = theta + part @ part.T
    return theta


@torch.no_grad()
def active_neurons(model, inputs, layers=None):
    """(7): {layer name: share of its outputs > 0, over images, tokens and neurons}, in the model's order.

    inputs  a batch, or a list of batches
    layers  names of modules; None takes all GELU and ReLU modules. All calls of a module count
    """
    modules = dict(model.named_modules())
    activations = [name for name, module in modules.items() if isinstance(module, (nn.GELU, nn.ReLU))]
    names = activations if layers is None else as_list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(f"layers {unknown or layers} are no modules of this model; try {activations}")
    positive, total = dict.fromkeys(names, 0), dict.fromkeys(names, 0)

    def watch(name):
        def hook(module, args, out):
            positive[name] += (out > 0).sum().item()
            total[name] += out.numel()

        return modules[name].register_forward_hook(hook)

    handles = [watch(name) for name in names]
    try:
        with measuring(model):
            for batch in as_list(inputs):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: positive[name] / total[name] for name in names if total[name]}


@torch.no_grad()
def attention_maps(model, inputs, layer=-1):
    """Where each head of a layer looks: (B, C, H, W) -> (B, h, gh, gw), the class token's attention.

    Without a class token it is the mean over all patches' attention. The model is a ViT as in vit.py.
    """
    forward = getattr(model, "forward_features", None)
    if forward is None or "return_attn" not in inspect.signature(forward).parameters:
        raise ValueError(f"{type(model).__name__} has no forward_features(x, return_attn=True, layers=[...])")
    with measuring(model):
        attn = forward(inputs, return_attn=True, layers=[layer])[1][0]  # (B, h, N, N), N with the class token
    attn = attn[:, :, 0, 1:] if getattr(model, "cls_token", None) is not None else attn.mean(2)
    height, width = inputs.shape[-2:]
    return attn.unflatten(-1, (height // model.patch_size, width // model.patch_size))


# ---------------------------------------------------------------------------- helpers; leaving no trace last


def select(model, params=None):
    """The trainable parameters that `params` means, see the top of this file."""
    if isinstance(params, str):
        named = dict(model.named_parameters(remove_duplicate=False))  # a shared weight has several names
        names = fnmatch.filter(named, params) + fnmatch.filter(named, params + ".*")
        chosen = [named[name] for name in names]
        if not chosen:
            raise ValueError(f"params {params!r} matches no parameter; names look like {list(named)[:3]}")
    elif isinstance(params, torch.Tensor):
        chosen = [params]
    else:
        module = model if params is None else params
        chosen = list(module.parameters() if isinstance(module, nn.Module) else params)
    chosen = list(dict.fromkeys(p for p in chosen if p.requires_grad))  # each once
    if not chosen:
        raise ValueError("no parameter requires a gradient, so there is nothing to measure; unfreeze some")
    return chosen


def as_list(x):
    return list(x) if isinstance(x, (list, tuple)) else [x]


def mean_loss(loss_fn):
    return sum(float(f()) for f in as_list(loss_fn)) / len(as_list(loss_fn))


def normal_like(params, generator):
    """Drawn on the CPU, so that every device gets the same numbers."""
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


@contextmanager
def measuring(model, also=()):
    """Inside: eval mode, fp32, no .grad, attention with a second derivative. also: more parameters."""
    params = list(dict.fromkeys([*model.parameters(), *also]))
    for p in params:
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"weights in {p.dtype} are too coarse to measure curvature; call model.float()")
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode() there are no gradients; use torch.no_grad() instead")
    modes, grads = {module: module.training for module in model.modules()}, [p.grad for p in params]
    cuda = sorted({p.device.index for p in params if p.device.type == "cuda"})
    device = params[0].device.type if params else "cpu"
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    precision = matmul.fp32_precision, conv.fp32_precision
    try:
        model.eval()
        for p in params:
            p.grad = None
        matmul.fp32_precision = conv.fp32_precision = "ieee"
        # the fused attention kernels have no second derivative
        with torch.random.fork_rng(cuda), torch.autocast(device, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        matmul.fp32_precision, conv.fp32_precision = precision
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def borrowed(params):
    """Inside, the weights may be overwritten; afterwards they are restored bit for bit. Yields copies."""
    copies = [p.detach().clone() for p in params]
    try:
        yield copies
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, copies)


if __name__ == "__main__":
    from sam import SAM

    # two spirals, one point in ten with the wrong label: fitting those takes a sharp minimum
    torch.manual_seed(0)
    t, y = 0.3 + 2.5 * torch.rand(256), torch.arange(256) % 2
    angle = 3 * t + math.pi * y
    x = torch.stack([t * angle.cos(), t * angle.sin()], 1) + 0.05 * torch.randn(256, 2)
    y = torch.where(torch.rand(256) < 0.1, 1 - y, y)

    print("rho    loss  lambda  L_N - L  doubling radius  active neurons  |w|")
    for rho in (0.0, 0.02, 0.05, 0.2, 0.5):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))
        optimizer = SAM(net.parameters(), torch.optim.AdamW, rho=rho, lr=0.01)

        def loss_fn():
            return nn.functional.cross_entropy(net(x), y)

        for _ in range(600):
            for half in (optimizer.first_step, optimizer.second_step):
                loss_fn().backward()
                half(zero_grad=True)

        top = hessian_max_eigenvalue(net, loss_fn)
        gap = average_flatness(net, loss_fn, sigma=0.05).gap
        radius = doubling_radius(loss_surface(net, loss_fn, radius=0.4))
        active = ", ".join(f"{share:.2f}" for share in active_neurons(net, x).values())
        print(f"{rho:<5g}  {loss_fn():.2f}  {top:6.2f}  {gap:7.3f}  {radius:15.3f}  {active:>14s}  "
              f"{weight_norm(net):.1f}")
    print("(expect lambda to fall from about 50 without SAM to below 3 with rho 0.5, and the gap with it)")
