"""Geometry: is this minimum a wide valley or a deep crack?

Two nets can have the same training loss, and one of them loses everything when its weights move a little.
Transformers and MLP-Mixers trained without tricks end in such cracks; sharpness-aware minimization (sam.py) leads
them out. Each function takes a finished model and a loss and measures one thing. H is the Hessian of the loss, g
its gradient, w the weights.

    H v = d/dw (g . v)                                  (1)   a second backward pass; H itself is never formed
    lambda = v . H v,  v the best of span(v+, v-, r)    (2)   r = H v - lambda v; v+ and v- the ends of the spectrum
    L_N = E L(w + eps),  eps ~ N(0, sigma^2)            (3)   average flatness: L_N - L is about sigma^2 / 2 tr H
    L(w + a d + b d'),  d_i = |w_i| / |n_i| n_i         (4)   a random slice; n normal, i a filter (row of a weight)
    Theta = J J^T,  kappa = lambda_1 / lambda_m         (5)   neural tangent kernel on m images; J: outputs by weights
    active = share of activations above zero            (6)   where an MLP layer lets signals and gradients through

Everything is measured in eval mode and fp32; weights, gradients, mode and random state come back as they were.

    loss_fn   a function without arguments: the loss on one fixed batch, without backward(), such as
              lambda: F.cross_entropy(model(x), y). Or a list of them, one per micro-batch of equal size
    params    whose weights count: None for all trainable ones, a name or pattern ("blocks.0",
              "blocks.*.mlp": diagonal blocks of H), a module, or a list of parameters

Compare nets by the ratio of their lambdas; where a norm follows, larger weights alone lower lambda (weight_norm).

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548; slices: Li et al. 2018, arXiv 1712.09913. Written from the papers;
sigma, the number of draws, the doubling radius and the logits in (5) are our choice. We differ: power iteration,
v <- H v made of length 1, does not converge if lambda and -lambda are both eigenvalues. (2) keeps the best direction
for either end of the spectrum and adds the residual r at each step (restarted Lanczos): the same cost, fewer steps.
Needs: torch, tqdm; sam.py for the demo.
Demo: python geometry.py (20 s on a CPU) measures one small net trained with five radii of SAM.
"""

import inspect
import math
import warnings
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


def select(model, params=None):
    """The trainable parameters that `params` means, see the top of this file."""
    if isinstance(params, str):
        named = dict(model.named_parameters(remove_duplicate=False))  # a shared weight has a name in either place
        chosen = [p for name, p in named.items() if fnmatchcase(name, params) or fnmatchcase(name, params + ".*")]
        if not chosen:
            raise ValueError(f"params {params!r} matches no parameter; names look like {', '.join(list(named)[:3])}")
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
    losses = [float(f()) for f in as_list(loss_fn)]
    return sum(losses) / len(losses)


def normal_like(params, generator):
    """Drawn on the CPU, so that every device gets the same numbers."""
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for p in params]


def flat(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


# ---------------------------------------------------------------------------- curvature


def hessian_max_eigenvalue(model, loss_fn, params=None, iters=100, tol=1e-3, seed=0, progress=False):
    """(2): the Hessian's eigenvalue of largest magnitude, with its sign; one double backward pass per iteration.

    It stops when |H v - lambda v| <= tol |lambda| and the other end of the spectrum can no longer overtake. After
    `iters` iterations it warns and returns what it has, never beyond the true magnitude. Memory: some 180 bytes per
    weight, besides the graph of one micro-batch. ValueError if nothing is trainable, or the loss does not depend on it.
    """
    chosen = select(model, params)
    with measuring(model, chosen), torch.enable_grad():
        product = hessian_vector_product(as_list(loss_fn), chosen)
        # float64: dot products of a million fp32 numbers lose 1e-3
        q = flat(normal_like(chosen, torch.Generator().manual_seed(seed))).double()
        span, image = q.new_empty(len(q), 0), q.new_empty(len(q), 0)  # orthonormal columns, and H times them
        for _ in tqdm(range(iters), desc="Hessian", disable=not progress):
            # 1. add the new direction to the span, with the one product
            q = q / q.norm()
            span = torch.cat([span, q[:, None]], dim=1)
            image = torch.cat([image, product(q)[:, None]], dim=1)

            # 2. eigenvalues of H inside the span, at most 3 x 3
            small = span.T @ image
            if not small.isfinite().all():
                raise ValueError("the loss or its second derivative is not finite at these weights")
            values, mix = torch.linalg.eigh(small)

            # 3. keep the lowest and the highest: with one end alone the other sign could be missed
            ends = [0, -1] if len(values) > 1 else [0]
            values, span, image = values[ends], span @ mix[:, ends], image @ mix[:, ends]

            # 4. the residual H v - lambda v is the error of each end, and the larger one the next direction
            residual = image - values * span
            error, size, top = residual.norm(dim=0), values.abs(), values.abs().argmax()
            if (error <= torch.maximum(tol * size[top], size[top] - size)).all():
                break  # the top is exact to tol, and the other end cannot reach it
            q = residual[:, error.argmax()]
            q = q - span @ (span.T @ q)  # rounding
        else:
            warnings.warn(f"after {iters} iterations the eigenvalue {values[top]:.4g} is only known to within "
                          f"{error[top]:.1g}; raise iters or tol")
        return values[top].item()


def hessian_vector_product(loss_fns, params):
    """(1) as a function of the flat float64 vector v. The graph of one loss is kept, not of several."""

    def gradient(loss_fn):
        loss = loss_fn()
        if any(p.grad is not None for p in params):
            raise ValueError("loss_fn must return the loss and not call backward(); the second derivative is taken "
                             "here")
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn must return one number as a tensor, got {getattr(loss, 'shape', loss)!r}")
        grads = [None]
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        if all(g is None for g in grads):
            raise ValueError("the loss does not depend on the chosen parameters; does loss_fn use this model, "
                             "without "
                             "no_grad or detach?")
        return [g if g is not None and g.requires_grad else None for g in grads]  # None: no curvature

    kept = gradient(loss_fns[0]) if len(loss_fns) == 1 else None
    sizes = [p.numel() for p in params]

    def product(v):
        parts = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), params, strict=True)]
        total = torch.zeros_like(v)
        for loss_fn in loss_fns:
            grads = kept or gradient(loss_fn)
            curved = [k for k, g in enumerate(grads) if g is not None]
            if curved:
                total += flat(torch.autograd.grad(
                    [grads[k] for k in curved], params, [parts[k] for k in curved],
                    retain_graph=kept is not None, materialize_grads=True))
        return total / len(loss_fns)

    return product


# ---------------------------------------------------------------------------- flatness


class Flatness(NamedTuple):
    clean: float  # L(w)
    perturbed: float  # L_N
    gap: float  # L_N - L
    std: float  # of the loss over the draws; the mean's error is std / sqrt(draws)


@torch.no_grad()
def average_flatness(model, loss_fn, sigma=0.01, draws=10, seed=0, progress=False):
    """(3): the mean loss when every trainable weight gets Gaussian noise of standard deviation sigma."""
    params, generator, losses = select(model), torch.Generator().manual_seed(seed), []
    with measuring(model), borrowed(params) as home:
        clean = mean_loss(loss_fn)
        for _ in tqdm(range(draws), desc="flatness", disable=not progress):
            for p, w, noise in zip(params, home, normal_like(params, generator), strict=True):
                p.copy_(w + sigma * noise)
            losses.append(mean_loss(loss_fn))
    losses = torch.tensor(losses, dtype=torch.float64)
    mean = losses.mean().item()
    return Flatness(clean, mean, mean - clean, losses.std(correction=min(1, draws - 1)).item())


def weight_norm(model):
    """L2 norm of all trainable parameters together."""
    return math.sqrt(sum(p.detach().double().square().sum().item() for p in select(model)))


# ---------------------------------------------------------------------------- loss surface


class Surface(NamedTuple):
    coordinates: torch.Tensor  # (steps,), from -radius to radius
    losses: torch.Tensor  # (steps,) or (steps, steps), row: along d, column: along d'


@torch.no_grad()
def loss_surface(model, loss_fn, radius=1.0, steps=21, dims=2, seed=0, progress=False):
    """(4): the loss on a random line (dims=1) or plane (dims=2) through the weights.

    radius 1 is as far as the weights are long
    """
    if steps < 3 or steps % 2 == 0:
        raise ValueError(f"steps {steps} puts no point on the weights themselves; use an odd number such as 21")
    params, generator = select(model), torch.Generator().manual_seed(seed)
    directions = [filter_normalized(normal_like(params, generator), params) for _ in range(dims)]
    coordinates = torch.arange(-(steps // 2), steps // 2 + 1) * (radius / (steps // 2))  # an exact 0 in the middle
    points = torch.cartesian_prod(*[coordinates] * dims).view(-1, dims).tolist()
    losses = []
    with measuring(model), borrowed(params) as home:
        for point in tqdm(points, desc="surface", disable=not progress):
            for p, w, *along in zip(params, home, *directions, strict=True):
                p.copy_(w + sum(a * d for a, d in zip(point, along, strict=True)))
            losses.append(mean_loss(loss_fn))
    return Surface(coordinates, torch.tensor(losses, dtype=torch.float64).view([steps] * dims))


def filter_normalized(noise, params):
    """Each filter of the direction as long as the weights' own; zero for biases and norms, as in the paper.

    Without this a net with small weights would look sharp and the same net, rescaled, flat.
    """
    directions = [torch.zeros_like(w) for w in params]
    for direction, n, w in zip(directions, noise, params, strict=True):
        if w.ndim >= 2:
            rows, length = n.flatten(1), w.detach().flatten(1).norm(dim=1, keepdim=True)
            direction.copy_((rows * length / rows.norm(dim=1, keepdim=True)).view_as(w))
    return directions


def doubling_radius(surface):
    """The smallest distance at which the loss, averaged over a ring, is twice that of the center; inf if there is none.

    Between two rings the loss is taken as linear in the squared distance, which is exact for a parabola.
    """
    x, losses = surface.coordinates.double(), surface.losses
    squared = x**2 if losses.ndim == 1 else x[:, None] ** 2 + x**2
    ring = (squared.sqrt() / (x[1] - x[0])).round()  # the corners of a plane lie beyond the last full ring
    rings = [ring == k for k in range(len(x) // 2 + 1)]
    means = [(squared[here].mean().item(), losses[here].mean().item()) for here in rings]
    twice = 2 * means[0][1]
    if not twice > 0:
        raise ValueError(f"the loss at the center is {means[0][1]:g}; only a positive loss can double")
    for (near, low), (far, high) in zip(means, means[1:]):
        if not math.isfinite(high):  # the loss blew up
            return math.sqrt(far)
        if high >= twice:
            return math.sqrt(near + (far - near) * (twice - low) / (high - low))
    return math.inf


# ---------------------------------------------------------------------------- tangent kernel


class NTK(NamedTuple):
    kappa: float
    eigenvalues: torch.Tensor  # descending, float64: (m,), or (classes, m)


def ntk_condition_number(model, inputs, params=None, per_class=False, progress=False):
    """(5): how unequally gradient descent learns the m inputs (B, ...); inf if some cannot be told apart.

    per_class=False takes the sum of each image's logits; True takes one kernel per logit and averages their kappas.
    m gradients are in memory at once: for a large model use few inputs, or restrict params.
    """
    chosen = select(model, params)
    with measuring(model), torch.enable_grad():
        outputs = model(inputs[:1]).flatten(1).shape[1]
        logits = range(outputs) if per_class else [None]
        kernels = [tangent_kernel(model, inputs, chosen, k, progress) for k in logits]
    values = torch.stack([torch.linalg.eigvalsh(kernel).flip(0) for kernel in kernels])  # (kernels, m)
    first, last = values[:, 0], values[:, -1]
    zero = last <= len(inputs) * torch.finfo(chosen[0].dtype).eps ** 2 * first  # below the rounding of J, squared
    kappa = torch.where(zero, torch.inf, first / last).mean().item()
    return NTK(kappa, (values if per_class else values[0]).cpu())


def tangent_kernel(model, inputs, params, logit=None, progress=False):
    """Theta (m, m) in float64, of one logit or (None) of the sum of all."""
    rows = []
    for i in tqdm(range(len(inputs)), desc="NTK", disable=not progress):
        out = model(inputs[i:i + 1]).flatten(1)  # in eval mode no image knows of the others
        out = out.sum() if logit is None else out[0, logit]
        rows.append(torch.autograd.grad(out, params, materialize_grads=True))
    theta = 0
    for parts in zip(*rows, strict=True):  # parameter by parameter: float64 for one at a time
        part = torch.stack(parts).flatten(1).double()
        theta = theta + part @ part.T
    return theta


# ---------------------------------------------------------------------------- activations and attention


@torch.no_grad()
def active_neurons(model, inputs, layers=None):
    """(6): {layer name: share of its outputs > 0, over images, tokens and neurons}, in the model's order.

    inputs  a batch, or a list of batches
    layers  names of modules; None finds all GELU and ReLU modules. One that is called twice counts both times
    """
    modules = dict(model.named_modules())
    found = [name for name, module in modules.items() if isinstance(module, (nn.GELU, nn.ReLU))]
    names = found if layers is None else as_list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(f"layers {unknown or layers} are no modules of this model, whose activations are {found}")
    counts = {name: [0, 0] for name in names}  # positive, all

    def watch(name):
        def hook(module, args, out):
            counts[name][0] += (out > 0).sum().item()
            counts[name][1] += out.numel()
        return hook

    handles = [modules[name].register_forward_hook(watch(name)) for name in names]
    try:
        with measuring(model):
            for batch in as_list(inputs):
                model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: positive / total for name, (positive, total) in counts.items() if total}


@torch.no_grad()
def attention_maps(model, inputs, layer=-1):
    """Where each head of a layer looks: (B, C, H, W) -> (B, h, gh, gw), the class token's attention to the patches.

    Without a class token the mean over all patches' attention. The model is a ViT as in vit.py: forward_features(x,
    return_attn=True, layers=[layer]) and patch_size. ValueError for any other.
    """
    forward = getattr(model, "forward_features", None)
    if forward is None or "return_attn" not in inspect.signature(forward).parameters:
        raise ValueError(f"{type(model).__name__} has no forward_features(x, return_attn=True, layers=[...]), as in vit.py")
    with measuring(model):
        attn = forward(inputs, return_attn=True, layers=[layer])[1][0]  # (B, h, N, N), with the class token 1 + N
    attn = attn[:, :, 0, 1:] if getattr(model, "cls_token", None) is not None else attn.mean(2)
    return attn.unflatten(-1, (inputs.shape[-2] // model.patch_size, inputs.shape[-1] // model.patch_size))


# ---------------------------------------------------------------------------- leaving no trace


@contextmanager
def measuring(model, also=()):
    """Inside: eval mode, fp32, no .grad, and attention that can be derived twice. Afterwards all is as before.

    also  parameters besides the model's
    """
    params = list(dict.fromkeys([*model.parameters(), *also]))
    for p in params:
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"the weights are {p.dtype}, too coarse to measure curvature; call model.float() first")
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode() nothing can be derived; use torch.no_grad() instead")
    modes, grads = [(module, module.training) for module in model.modules()], [p.grad for p in params]
    cuda = sorted({p.device.index for p in params if p.device.type == "cuda"})
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    exact = [(backend, backend.fp32_precision) for backend in backends]
    try:
        model.eval()
        for p in params:
            p.grad = None
        for backend, _ in exact:
            backend.fp32_precision = "ieee"
        kind = params[0].device.type if params else "cpu"
        # MATH: the fused attention kernels have no second derivative
        with torch.random.fork_rng(cuda), torch.autocast(kind, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for backend, before in exact:
            backend.fp32_precision = before
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        for module, mode in modes:
            module.training = mode


@contextmanager
def borrowed(params):
    """The weights, to be moved about inside; afterwards they are back bit for bit. Yields their copies."""
    copies = [p.detach().clone() for p in params]
    try:
        yield copies
    finally:
        with torch.no_grad():
            for p, copy in zip(params, copies, strict=True):
                p.copy_(copy)


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
        for _ in range(600):
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.first_step(zero_grad=True)
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.second_step(zero_grad=True)

        def loss_fn():
            return nn.functional.cross_entropy(net(x), y)

        top = hessian_max_eigenvalue(net, loss_fn)
        gap = average_flatness(net, loss_fn, sigma=0.05).gap
        radius = doubling_radius(loss_surface(net, loss_fn, radius=0.4))
        active = ", ".join(f"{share:.2f}" for share in active_neurons(net, x).values())
        print(f"{rho:<5g}  {loss_fn():.2f}  {top:6.2f}  {gap:7.3f}  {radius:15.3f}  {active:>14s}  "
              f"{weight_norm(net):.1f}")
    print("(expect lambda to fall from about 50 without SAM to below 3 with rho 0.5, and the gap with it)")
