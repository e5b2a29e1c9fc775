"""Geometry: is this minimum a wide valley or a deep crack?

Two nets can have the same training loss, and one of them loses everything when its weights move a
little. Transformers and MLP-Mixers trained without tricks end in such cracks, and sharpness-aware
minimisation (sam.py) leads them out. Each function here takes a finished model and a loss, and
measures one thing. H is the Hessian of the loss, g its gradient, w the weights.

    H v = d/dw (g . v)                                  (1)   a second backward pass; H itself is never formed
    lambda = v . H v,  v <- H v, made of length 1       (2)   the eigenvalue of largest magnitude, signed
    L_N = E L(w + eps),  eps ~ N(0, sigma^2)            (3)   average flatness: the gap L_N - L is about sigma^2 / 2 tr H
    L(w + a d + b d'),  d_i = |w_i| / |n_i| n_i         (4)   a random slice; n normal, i a filter: one row of a weight
    Theta = J J^T,  kappa = lambda_1 / lambda_m         (5)   neural tangent kernel on m images; J: outputs by weights
    active = share of activations above zero            (6)   where an MLP layer lets signals and gradients through

Everything is measured in eval mode and fp32, whatever surrounds the call, and weights, gradients,
train or eval mode and the random state come back as they were. In what follows

    loss_fn   a function without arguments: the loss on one fixed batch, such as
              lambda: F.cross_entropy(model(x), y); no backward() in it. Or a list of them, one
              per micro-batch of equal size: their mean is the loss, one of them in memory at a time
    params    whose weights count: None for all trainable ones, a name or pattern ("blocks.0",
              "blocks.*.mlp": diagonal blocks of H), a module, or a list of parameters

Compare nets by the ratio of their lambdas, and look at weight_norm too: lambda is not free of scale.
Where layers are followed by a norm, larger weights alone lower it. Autocast inside loss_fn is yours.

Source: Chen, Hsieh, Gong 2022, arXiv 2106.01548; slices: Li et al. 2018, arXiv 1712.09913. Written
from the papers; the numbering of the equations is ours, and so are sigma, the number of draws, the
doubling radius and the choice of logits in (5). We differ: plain power iteration (2) swings for ever
where lambda and -lambda are both there. We keep the two best directions so far, one for either end
of the spectrum, and add a third at each step (Lanczos, restarted): the same cost, sooner there.
Needs: torch, tqdm (matplotlib for the curves, torchvision for the attention pictures).
Demo: python geometry.py (15 s on a CPU) measures one small net trained with and without SAM, checks
lambda against the exact Hessian, and saves geometry_demo.png if matplotlib is there.
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


@contextmanager
def measuring(model, also=()):
    """Inside: eval mode, fp32, no .grad, and attention that can be derived twice. Afterwards all is as it was found.

    also  parameters besides the model's
    """
    params = list(dict.fromkeys([*model.parameters(), *also]))
    for p in params:
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(f"the weights are {p.dtype}, too coarse to measure curvature; call model.float() first")
    if torch.is_inference_mode_enabled():
        raise ValueError("inside torch.inference_mode() nothing can be derived; use torch.no_grad() around your evaluation instead")
    modes, grads = [(module, module.training) for module in model.modules()], [p.grad for p in params]
    cuda = sorted({p.device.index for p in params if p.device.type == "cuda"})
    exact = [(backend, backend.fp32_precision) for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv)]
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
    if not all(isinstance(p, torch.Tensor) for p in chosen):
        raise ValueError("params must be None, a name or pattern such as 'blocks.0', a module, or a list of parameters")
    chosen = list(dict.fromkeys(p for p in chosen if p.requires_grad))  # each once
    if not chosen:
        raise ValueError("no parameter requires a gradient, so there is nothing to measure; unfreeze some, or choose others by params")
    return chosen


def as_list(x):
    items = list(x) if isinstance(x, (list, tuple)) else [x]
    if not items:
        raise ValueError("an empty list was given where a function, a batch or a name is needed")
    return items


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

    It stops when |H v - lambda v| <= tol |lambda| and the other end of the spectrum can no longer overtake: an eigenvalue then
    lies within that, most often far closer. After `iters` iterations it warns and returns what it has, never beyond the true
    magnitude. Memory: some 180 bytes per weight, besides the graph of one micro-batch.
    ValueError if nothing is trainable, or the loss does not depend on it.
    """
    if iters < 1:
        raise ValueError(f"iters {iters} must be at least 1")
    chosen = select(model, params)
    with measuring(model, chosen), torch.enable_grad():
        product = hessian_vector_product(as_list(loss_fn), chosen)
        q = flat(normal_like(chosen, torch.Generator().manual_seed(seed))).double()  # fp32 dot products of a million numbers lose 1e-3
        # orthonormal columns, and H times them: the lowest v so far, the highest v so far, and the new direction q
        span, image = q.new_empty(len(q), 0), q.new_empty(len(q), 0)
        for _ in tqdm(range(iters), desc="Hessian", disable=not progress):
            q = q / q.norm()
            span, image = torch.cat([span, q[:, None]], 1), torch.cat([image, product(q)[:, None]], 1)  # the one product
            small = span.T @ image  # H inside the span, at most 3 x 3
            if not small.isfinite().all():
                raise ValueError("the loss or its second derivative is not finite at these weights")
            values, mix = torch.linalg.eigh(small)
            ends = [0, -1] if len(values) > 1 else [0]  # one end alone would be a trap when the other sign is the larger
            values, span, image = values[ends], span @ mix[:, ends], image @ mix[:, ends]  # lowest and highest v so far
            rest = image - values * span  # H v - lambda v, what the span lacks
            error, size, top = rest.norm(dim=0), values.abs(), values.abs().argmax()
            # the top must be exact to tol; the other end may be off by what it lacks to the top
            if (error <= torch.maximum(tol * size[top], size[top] - size)).all():
                break
            q = rest[:, error.argmax()]
            q = q - span @ (span.T @ q)  # rounding
        else:
            warnings.warn(f"after {iters} iterations the eigenvalue {values[top]:.4g} is only known to within {error[top]:.1g}; "
                          "raise iters or tol")
        return values[top].item()


def hessian_vector_product(loss_fns, params):
    """(1) as a function of the flat float64 vector v. One loss: its graph is kept. Several: made anew each time, to save memory."""

    def gradient(loss_fn):
        loss = loss_fn()
        if any(p.grad is not None for p in params):
            raise ValueError("loss_fn must return the loss and not call backward(); the second derivative is taken here")
        if not (isinstance(loss, torch.Tensor) and loss.numel() == 1):
            raise ValueError(f"loss_fn must return one number as a tensor, got {tuple(loss.shape) if hasattr(loss, 'shape') else loss!r}")
        grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True) if loss.requires_grad else [None]
        if all(g is None for g in grads):
            raise ValueError("the loss does not depend on the chosen parameters; does loss_fn use this model, without no_grad or detach?")
        return [g if g is not None and g.requires_grad else None for g in grads]  # None: a constant gradient, no curvature

    kept = gradient(loss_fns[0]) if len(loss_fns) == 1 else None
    sizes = [p.numel() for p in params]

    def product(v):
        parts = [part.view_as(p).to(p.dtype) for part, p in zip(v.split(sizes), params, strict=True)]
        total = torch.zeros_like(v)
        for loss_fn in loss_fns:
            pairs = [(g, part) for g, part in zip(kept or gradient(loss_fn), parts, strict=True) if g is not None]
            if pairs:
                grads, along = zip(*pairs)
                total += flat(torch.autograd.grad(grads, params, along, retain_graph=kept is not None, materialize_grads=True))
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
    if sigma < 0 or draws < 1:
        raise ValueError(f"sigma {sigma} must not be negative and draws {draws} must be at least 1")
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
    """(4): the loss on a random line (dims=1) or plane (dims=2) through the weights; radius 1: as far as the weights are long."""
    if dims not in (1, 2) or not radius > 0:
        raise ValueError(f"dims {dims} must be 1 or 2 and radius {radius} above 0")
    if steps < 3 or steps % 2 == 0:
        raise ValueError(f"steps {steps} puts no point on the weights themselves; use an odd number such as 21")
    params, generator = select(model), torch.Generator().manual_seed(seed)
    directions = [filter_normalised(normal_like(params, generator), params) for _ in range(dims)]
    coordinates = torch.arange(-(steps // 2), steps // 2 + 1) * (radius / (steps // 2))  # an exact 0 in the middle
    points = torch.cartesian_prod(*[coordinates] * dims).view(-1, dims).tolist()
    losses = []
    with measuring(model), borrowed(params) as home:
        for point in tqdm(points, desc="surface", disable=not progress):
            for p, w, *along in zip(params, home, *directions, strict=True):
                p.copy_(w + sum(a * d for a, d in zip(point, along, strict=True)))
            losses.append(mean_loss(loss_fn))
    return Surface(coordinates, torch.tensor(losses, dtype=torch.float64).view([steps] * dims))


def filter_normalised(noise, params):
    """Each filter of the direction as long as the weights' own; zero for biases and norms, as in the paper.

    Without this a net with small weights would look sharp and the same net, rescaled, flat.
    """
    directions = []
    for n, w in zip(noise, params, strict=True):
        if w.ndim < 2:
            directions.append(torch.zeros_like(w))
            continue
        rows, own = n.flatten(1), w.detach().flatten(1)
        rows = rows * own.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True)
        directions.append(rows.view_as(w))
    return directions


def doubling_radius(surface):
    """The smallest distance at which the loss, averaged over the ring, is twice that of the centre; inf if there is none.

    Between two rings the loss counts as linear in the squared distance: exact for a parabola, else good to about a step.
    """
    x, losses = surface.coordinates.double(), surface.losses
    squared = x**2 if losses.ndim == 1 else x[:, None] ** 2 + x**2
    ring = (squared.sqrt() / (x[1] - x[0])).round()  # in 1-D two points; in 2-D the corners lie beyond the last full ring
    means = [(squared[ring == k].mean().item(), losses[ring == k].mean().item()) for k in range(len(x) // 2 + 1)]
    twice = 2 * means[0][1]
    if not twice > 0:
        raise ValueError(f"the loss at the centre is {means[0][1]:g}; only a positive loss can double")
    for (near, low), (far, high) in zip(means, means[1:]):
        if not high < twice:  # so that nan, a loss that blew up, counts as reached
            return math.sqrt(near + (far - near) * (twice - low) / (high - low) if math.isfinite(high) else far)
    return math.inf


# ---------------------------------------------------------------------------- tangent kernel


class NTK(NamedTuple):
    kappa: float
    eigenvalues: torch.Tensor  # descending, float64: (m,), or (classes, m)


def ntk_condition_number(model, inputs, params=None, per_class=False, progress=False):
    """(5): how unequally gradient descent learns the m inputs (B, ...); inf if some cannot be told apart.

    per_class=False takes the sum of each image's logits; True takes one kernel per logit and averages their kappas. m gradients
    are in memory at once: for a large model use few inputs, or restrict params.
    """
    chosen = select(model, params)
    with measuring(model), torch.enable_grad():
        outputs = model(inputs[:1]).flatten(1).shape[1]
        kernels = [tangent_kernel(model, inputs, chosen, k, progress) for k in (range(outputs) if per_class else [None])]
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
    names = [name for name, m in modules.items() if isinstance(m, (nn.GELU, nn.ReLU))] if layers is None else as_list(layers)
    for name in names:
        if name not in modules:
            raise ValueError(f"layers: {name!r} is no module of this model; print(model) shows the names")
    if not names:
        raise ValueError("no nn.GELU or nn.ReLU module found; name the activation modules by layers=[...]")
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
    silent = [name for name, (_, total) in counts.items() if not total]
    if silent and (layers is not None or len(silent) == len(names)):
        raise ValueError(f"layers: nothing came out of {', '.join(silent)}; are they used in forward, and is there an image in inputs?")
    return {name: positive / total for name, (positive, total) in counts.items() if total}


@torch.no_grad()
def attention_maps(model, inputs, layer=-1):
    """Where each head of a layer looks: (B, C, H, W) -> (B, h, gh, gw), the class token's attention to the patches.

    Without a class token the mean over all patches' attention. The model is a ViT as in vit.py: forward_features(x,
    return_attn=True, layers=[layer]) and patch_size. ValueError for any other.
    """
    forward = getattr(model, "forward_features", None)
    if forward is None or "return_attn" not in inspect.signature(forward).parameters:
        raise ValueError(f"{type(model).__name__} has no attention to show; it needs forward_features(x, return_attn=True, "
                         "layers=[...]), as in vit.py")
    with measuring(model):
        attn = forward(inputs, return_attn=True, layers=[layer])[1][0]  # (B, h, N, N), with the class token 1 + N
    attn = attn[:, :, 0, 1:] if getattr(model, "cls_token", None) is not None else attn.mean(2)
    return attn.unflatten(-1, (inputs.shape[-2] // model.patch_size, inputs.shape[-1] // model.patch_size))


# ---------------------------------------------------------------------------- pictures


def save_attention(path, imgs, maps):
    """A row per image: the image, the mean of its heads, each head. imgs (B, C, H, W) in [0, 1].

    White is the most attention within each map, so that heads show where they look, not how much.
    """
    from torchvision.utils import save_image

    maps = torch.cat([maps.mean(1, keepdim=True), maps], dim=1).float()
    maps = maps / maps.amax((2, 3), keepdim=True).clamp(min=1e-12)
    maps = nn.functional.interpolate(maps, size=imgs.shape[-2:], mode="nearest")
    rows = torch.cat([imgs[:, None].expand(-1, -1, 3, -1, -1), maps[:, :, None].expand(-1, -1, 3, -1, -1)], dim=1)
    save_image(rows.flatten(0, 1), path, nrow=rows.shape[1])


def figure(panels):
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("curves need matplotlib: pip install matplotlib") from None
    # not pyplot: it would choose a window system and keep every figure
    fig = Figure(figsize=(4.4 * panels, 4), layout="constrained")
    FigureCanvasAgg(fig)
    return fig, fig.subplots(1, panels, squeeze=False)[0]


def plot_surface(path, surfaces):
    """{caption: surface}: planes as contours on one common scale, with the doubling radius; lines in one panel."""
    planes = {caption: s for caption, s in surfaces.items() if s.losses.ndim == 2}
    lines = {caption: s for caption, s in surfaces.items() if s.losses.ndim == 1}
    fig, axes = figure(len(planes) + bool(lines))
    if planes:
        losses = [s.losses.nan_to_num(nan=math.inf).clamp(max=1e6) for s in planes.values()]
        log = flat(losses).min() > 0
        heights = [loss.log() if log else loss for loss in losses]
        lowest, highest = flat(heights).aminmax()
        levels = torch.linspace(lowest, max(highest, lowest + 1e-3), 21)
        for ax, (caption, s), height in zip(axes, planes.items(), heights):
            x = s.coordinates.tolist()
            picture = ax.contourf(x, x, height, levels=levels, cmap="viridis", extend="both")
            radius = doubling_radius(s) if log else math.inf
            if math.isfinite(radius):
                angle = torch.linspace(0, 2 * math.pi, 100)
                ax.plot(radius * angle.cos(), radius * angle.sin(), "w--", linewidth=1)
                caption += f"\ndashed: loss doubles, radius {radius:.2f}"
            ax.set(title=caption, aspect="equal")
        fig.colorbar(picture, ax=axes[:len(planes)].tolist(), label="loss", format=lambda v, _: f"{math.exp(v) if log else v:.2g}")
    for caption, s in lines.items():
        axes[-1].plot(s.coordinates, s.losses, label=caption)
        axes[-1].set(xlabel="distance along the direction", ylabel="loss")
        axes[-1].legend()
    fig.savefig(path, dpi=120)


def plot_layers(path, measures, label, log=False):
    """{caption: {layer name: number}} as one curve per caption: active neurons, eigenvalues of blocks, eigenvalues of a kernel."""
    fig, (ax,) = figure(1)
    for caption, numbers in measures.items():
        ax.plot([str(name) for name in numbers], list(numbers.values()), "o-", label=caption)
    ax.set(ylabel=label, yscale="log" if log else "linear")
    ax.tick_params(axis="x", rotation=90, labelsize=7)
    ax.legend()
    fig.savefig(path, dpi=120)


if __name__ == "__main__":
    # Two spirals, one point in ten with the wrong label: learning those by heart takes a crack
    def spirals(n):
        t = 0.3 + 2.5 * torch.rand(n)
        label = torch.arange(n) % 2
        angle = 3 * t + math.pi * label
        x = torch.stack([t * angle.cos(), t * angle.sin()], 1) + 0.05 * torch.randn(n, 2)
        return x, torch.where(torch.rand(n) < 0.1, 1 - label, label)

    def train(rho, steps=600):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(2, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2))
        params, optimizer = list(net.parameters()), torch.optim.AdamW(net.parameters(), lr=0.01)
        for _ in range(steps):
            grads = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), params)
            length = flat(grads).norm()
            with borrowed(params):  # SAM, see sam.py: the gradient is taken at w + rho g / |g|; rho 0 is plain AdamW
                with torch.no_grad():
                    for p, g in zip(params, grads):
                        p.add_(rho / length * g)
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
        return net

    torch.manual_seed(0)
    x, y = spirals(256)
    pictures = {}
    print("            loss  lambda  (exact)  L_N - L  doubling radius  active neurons  |w|")
    for name, rho in {"AdamW": 0.0, "with SAM": 0.2}.items():
        net = train(rho)

        def loss_fn():
            return nn.functional.cross_entropy(net(x), y)

        top = hessian_max_eigenvalue(net, loss_fn)
        params = list(net.parameters())
        grad = flat(torch.autograd.grad(loss_fn(), params, create_graph=True))
        hessian = torch.stack([flat(torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)) for g in grad])
        exact = torch.linalg.eigvalsh(hessian)
        gap = average_flatness(net, loss_fn, sigma=0.05).gap
        plane = pictures[name] = loss_surface(net, loss_fn, radius=0.4)
        pictures[f"{name}, one line"] = loss_surface(net, loss_fn, radius=0.4, steps=41, dims=1)
        active = ", ".join(f"{share:.2f}" for share in active_neurons(net, x).values())
        print(f"{name:10s}  {loss_fn():.2f}  {top:6.2f}  {exact[exact.abs().argmax()]:7.2f}  {gap:7.3f}  {doubling_radius(plane):15.3f}  "
              f"{active:>14s}  {weight_norm(net):.1f}")
    print("(expect with SAM: a lambda more than 10 times smaller and equal to the exact one, a smaller gap, a larger radius)")
    try:
        plot_surface("geometry_demo.png", pictures)
        print("saved geometry_demo.png")
    except ValueError as error:
        print(f"no picture: {error}")
