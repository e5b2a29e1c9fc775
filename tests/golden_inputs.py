"""Inputs and comparison for the reference numbers in tests/golden (computed with the official codes).

Parameters, images and noise follow fixed formulas, so that a JSON file need not store them. Two fill rules,
"sine" and "hash"; the second is well conditioned and reacts to every detail of a model.

Comparisons return how far we are off in units of TOLERANCE, the spread seen between the official float32
and float64 runs and a separate implementation. Up to LIMIT of these units passes.
"""

import json
from pathlib import Path
from zlib import crc32

import numpy as np
import torch

GOLDEN = Path(__file__).parent / "golden"
LIMIT = 10
TOLERANCE = {  # slices and means relative to the tensor's std, everything else to the number itself
    "hash": dict(slices=3e-6, statistics=2e-5, loss=4e-7, grads=7e-6),
    "sine": dict(slices=9e-5, statistics=2e-5, loss=2e-7, grads=8e-4),
    "float64": dict(statistics=2e-12, loss=3e-14, grads=2e-11),
}


def golden_cases(*prefixes):
    return sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem.startswith(prefixes))


def load_case(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


# ---------------------------------------------------------------------------- inputs, in numpy float64, then float32


def parameter(name, shape, fill, rule):
    """One filled parameter. fill: weight, norm, bias, token or one; rule: sine or hash."""
    n, h = int(np.prod(shape)), crc32(name.encode())
    if rule == "sine":
        i = np.arange(n, dtype=np.float64)
        s = np.sin(0.5 + i * (0.61803398875 + (h % 1009) / 1009.0) + (h % 8191))
        scale = dict(weight=0.05, norm=0.1, bias=0.02, token=0.02, one=0)[fill]
    else:
        x = np.arange(n, dtype=np.uint32) * np.uint32(0x9E3779B1) + np.uint32(h)  # uint32 wraps around, as meant
        x ^= x >> np.uint32(16)
        x *= np.uint32(0x85EBCA6B)
        x ^= x >> np.uint32(13)
        x *= np.uint32(0xC2B2AE35)
        x ^= x >> np.uint32(16)
        s = 2 * (x / 2.0**32) - 1
        scale = dict(weight=np.sqrt(3 * shape[0] / n), norm=0.3, bias=0.1, token=0.5, one=0)[fill]
    offset = 1 if fill in ("norm", "one") else 0
    return torch.from_numpy((offset + scale * s).reshape(shape).astype(np.float32))


def image_batch(batch, size):
    b, c, y, x = np.ogrid[:batch, :3, :size, :size]
    return torch.from_numpy(np.sin(0.07 * x * (b + 1) + 0.11 * y * (c + 1) + 0.9 * c + 0.3 * b).astype(np.float32))


def masking_noise(batch, length, seed):
    b, l = np.ogrid[:batch, :length]
    t = np.sin((b * 7919 + l * 104729) + 12.9898 + seed) * 43758.5453
    return torch.from_numpy((t - np.floor(t)).astype(np.float32))


def official_state(case, fixed):
    """All parameters of a case under their official names; `fixed` (name -> tensor) gives those that are not filled."""
    return {
        p["name"]: fixed(p["name"])
        if p["fill"] == "fixed"
        else parameter(p["name"], p["shape"], p["fill"], case["fill_rule"])
        for p in case["params"]
    }


# ---------------------------------------------------------------------------- comparison, {what: distance in
# tolerances}


def relative(ours, reference, scale=None):
    return abs(float(ours.detach() if hasattr(ours, "detach") else ours) - reference) / (
        abs(reference) if scale is None else scale
    )


def first_values(ours, reference, scale):
    ours, reference = np.asarray(ours, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    return np.abs(ours[: len(reference)] - reference).max() / scale


def compare_tensor(name, tensor, entry, tolerance):
    """Shape, mean, std and L2 of a tensor, and the first values of the last axis at the stored places."""
    x = tensor.detach().double().numpy()
    if "shape" in entry:
        assert list(x.shape) == entry["shape"], f"{name} has shape {x.shape}, expected {entry['shape']}"
    off = {
        "mean": relative(x.mean(), entry["mean"], entry["std"]),
        "std": relative(x.std(), entry["std"]),
        "l2": relative(np.linalg.norm(x), entry["l2"]),
    }
    off = {f"{name} {key}": value / tolerance["statistics"] for key, value in off.items()}
    for piece in entry.get("slices", []):
        at = tuple(piece["at"])
        off[f"{name} {list(at)}"] = first_values(x[at], piece["values"], entry["std"]) / tolerance["slices"]
    return off


def compare_grads(grads, entry, tolerance):
    """grads: official name -> gradient of every trainable parameter. First values are relative to the
    gradient's RMS."""
    l2 = {name: grad.double().norm() for name, grad in grads.items()}
    off = {"total": relative(torch.stack(list(l2.values())).norm(), entry["total_l2"])}
    for name, norm in {**entry.get("all_l2", {}), **entry.get("selected_l2", {})}.items():
        off[f"{name} l2"] = relative(l2[name], norm)
    for name, selected in entry.get("selected", {}).items():
        off[f"{name} l2"] = relative(l2[name], selected["l2"])
        rms = selected["l2"] / grads[name].numel() ** 0.5
        off[f"{name} first"] = first_values(grads[name].flatten(), selected["first"], rms)
    if "all_l2" in entry:
        assert set(entry["all_l2"]) == set(grads), "not the same parameters are trained"
    return {f"grad {key}": value / tolerance["grads"] for key, value in off.items()}


def assert_agree(off):
    worst = max(off, key=off.get)
    bad = {key: round(value, 1) for key, value in off.items() if not value <= LIMIT}
    assert not bad, f"{len(bad)} of {len(off)} numbers are off by more than {LIMIT} tolerances, worst {worst}: {bad}"
