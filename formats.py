"""Formats: one network under other people's names and axes, translated into the names of vit.py.

A block holds the same tensors everywhere. Published files differ in three ways:

    names    the first MLP layer is blocks.0.mlp.fc1 in timm, in MAE and here; in transformers it is
             encoder.layer.0.intermediate.dense, in JAX Transformer/encoderblock_0/MlpBlock_3/Dense_0
    axes     a linear layer is (out, in) in PyTorch, (in, out) in JAX and Paddle; JAX's convolutions are
             (height, width, in, out), and its attention has an axis for the heads
    q, k, v  one matrix here, three in JAX and transformers; BEiT's k has no bias: it cancels in the softmax

`read_npz` and `read_pickle` read what torch.load does not. `convert` recognizes the layout by its keys, keeps
encoder and classifier, and returns a state dict for vit.py, mixer.py, hierarchical.py or resnet.py, in the
file's sizes; checkpoints.py fits it to a model. No tensor shows the number of heads or the scale of the
input: see FORMATS. A pickle can run code on loading, so `read_pickle` admits NumPy arrays, numbers and plain
containers, and nothing else.

Names checked in the code of vision_transformer, transformers, mmpretrain, MIRL (Paddle), BEiT and MixMIM.
We differ: JAX's GELU is the tanh approximation, at most 5e-4 from ours; the layer norm of transformers has
eps 1e-12, ours 1e-6.
Needs: torch, numpy.
Demo: python formats.py (2 s on a CPU) translates one tensor of each layout, and refuses a pickle with code.
"""

import argparse
import collections
import math
import pickle
import re

import numpy as np
import torch

FORMATS = {  # how each source was trained; nothing of this can be read from the tensors
    "MAE": "input ImageNet mean/std; heads B 12, L 16, H 16; fixed sin-cos positions, column first",
    "MAE or timm": "same keys: MAE and DeiT use ImageNet mean/std, timm's augreg weights mean/std 0.5; "
                   "heads Ti 3, S 6 (MoCo v3 and MIRL: 12), B 12, L 16",
    "timm": "layer scale as ls1, ls2; input mean/std differs by model, see its timm config",
    "DeiT distilled": "input ImageNet mean/std; heads Ti 3, S 6, B 12; the distillation token is left out",
    "MoCo v3": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, row first",
    "BEiT": "input mean/std 0.5 by default in its code (a flag selects ImageNet's); heads B 12, L 16",
    "MIRL": "input ImageNet mean/std; heads S 12, B 12; fixed sin-cos positions, column first",
    "MixMIM": "input ImageNet mean/std; layer norm eps 1e-5",
    "vision_transformer": "JAX; input mean/std 0.5; heads Ti 3, S 6, B 12, L 16, H 16",
    "transformers": "input mean/std in preprocessor_config.json (ViT and BEiT 0.5, ViTMAE ImageNet's), "
                    "heads in config.json",
    "mmpretrain": "input and heads as in its config; most have ImageNet mean/std",
    "torchvision": "a ResNet; input ImageNet mean/std",
    "ours": "input and heads as in the run's args.json",
}

MARKS = {  # the first format with a key like this
    "vision_transformer": r".*/",
    "transformers": r"(\w+\.)?embeddings\.cls_token",
    "mmpretrain": r"backbone\.layers\.\d+\.ln1\.",
    "MoCo v3": r"base_encoder\.",
    "ours": r"encoder\.",  # MAE, MIRL, MixMIM around an encoder
    "MixMIM": r"layers\.\d+\.blocks\.",
    "BEiT": r"blocks\.\d+\.attn\.(q_bias|relative_position_bias_table)|rel_pos_bias\.",
    "MIRL": r"norm_low\.|decoder_embed0_1\.|mask_token\d",
    "DeiT distilled": r"dist_token$",
    "timm": r"blocks\.\d+\.ls1\.",
    "MAE": r"decoder_pred\.",
    "torchvision": r"layer1\.0\.conv1\.",
}
PREFIXES = {"MoCo v3": "base_encoder.", "ours": "encoder."}  # of the encoder's names

COMMON = {  # BEiT's biases, timm's layer scale
    r"attn\.([qv])_bias$": r"attn.\1.bias",
    r"\.ls([12])\.gamma$": r".gamma_\1",
}
RENAMES = {  # pattern -> replacement, one after the other
    "torchvision": {r"^fc\.": "head."},
    "vision_transformer": {
        r"^(opt/target|params)/": "",
        r"^cls$": "cls_token",
        r"^(Transformer/posembed_input/)?pos_embedding$": "pos_embed",
        r"^embedding/": "patch_embed/proj/",
        r"^stem/": "stem/proj/",
        r"^(Transformer/encoderblock|MixerBlock)_(\d+)/": r"blocks/\2/",
        r"^(Transformer/encoder_norm|pre_head_layer_norm)/": "norm/",
        r"/LayerNorm_0/": "/norm1/",
        r"/LayerNorm_[12]/": "/norm2/",
        r"/MultiHeadDotProductAttention_\d/": "/attn/",
        r"/attn/(query|key|value)/": lambda match: f"/attn/{match[1][0]}/",
        r"/attn/out/": "/attn/proj/",
        r"/MlpBlock_\d/": "/mlp/",
        r"/(token|channel)_mixing/": r"/mlp_\1s/",
        r"/Dense_0/": "/fc1/",
        r"/Dense_1/": "/fc2/",
        r"/(kernel|scale)$": "/weight",
        r"/": ".",
    },
    "transformers": {
        r"^(vit|beit|deit)\.": "",
        r"^encoder\.layer\.": "blocks.",
        r"^encoder\.relative_position_bias\.": "rel_pos_bias.",
        r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
        r"^embeddings\.distillation_token$": "dist_token",
        r"^embeddings\.position_embeddings$": "pos_embed",
        r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"\.attention\.attention\.(query|key|value)\.": lambda match: f".attn.{match[1][0]}.",
        r"\.attention\.attention\.relative_position_bias\.": ".attn.",
        r"\.attention\.output\.dense\.": ".attn.proj.",
        r"\.intermediate\.dense\.": ".mlp.fc1.",
        r"\.output\.dense\.": ".mlp.fc2.",
        r"\.layernorm_before\.": ".norm1.",
        r"\.layernorm_after\.": ".norm2.",
        r"\.lambda_([12])$": r".gamma_\1",
        r"^layernorm\.": "norm.",
        r"^pooler\.layernorm\.": "fc_norm.",
        r"^(cls_)?classifier\.": "head.",
    },
    "mmpretrain": {
        r"^head\.(layers\.head|fc)\.": "head.",
        r"^head\.layers\.pre_logits\.": "pre_logits.",
        r"^backbone\.": "",
        r"^layers\.": "blocks.",
        r"^pre_norm\.": "norm_pre.",
        r"^ln1\.": "norm.",
        r"^ln2\.": "fc_norm.",
        r"^patch_embed\.projection\.": "patch_embed.proj.",
        r"\.ln([12])\.": r".norm\1.",
        r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
        r"\.ffn\.layers\.1\.": ".mlp.fc2.",
        r"\.(attn|ffn)\.gamma([12])\.weight$": r".gamma_\2",
    },
}
WRAPPER = r"^(module\.)+"  # DataParallel, AveragedModel
INDEX = ("relative_position_index", "attn_mask")  # tables of constants, rebuilt by the model
NOT_ENCODER = (r"(decoder|mask_token|lm_head\.|norm_low\.|norm\d+\.|dist_token$|head_dist\."
               r"|momentum_encoder\.|predictor\.|distillation_classifier\.|pooler\.|pre_logits\.|neck\."
               r"|data_preprocessor\.|decode_head\.|auxiliary_head\.)|.*(relative_position_index|attn_mask)$")
CONTAINERS = ("model", "state_dict", "module", "model_ema")  # the first that exists is read
TABLES = {"pos_embed": 3, "relative_position_bias_table": 2}  # axes: (1, rows, D) and (rows, heads)


# ---------------------------------------------------------------------------- what was read


def flat_tensors(file, where="the file"):
    """The state dict in a checkpoint's dict, out of its containers; every tensor is dense and finite."""
    # as many steps as there are containers: a dict that holds itself ends too
    state = file
    for _ in CONTAINERS:
        inner = [state[key] for key in CONTAINERS if isinstance(state.get(key), dict)]
        state = inner[0] if inner else state

    # tensors
    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and torch.is_tensor(value):
            tensors[name] = value
            if not name.endswith(INDEX):
                check_tensor(value, f"{name} in {where}")
    if not tensors:
        keys = shorten(map(str, file))
        raise ValueError(f"{where} holds no tensors at its top or under {CONTAINERS}; keys: {keys}")
    return tensors


def check_tensor(value, name):
    strided = value.layout == torch.strided and not value.is_nested
    if not strided or value.is_quantized or value.is_meta or value.is_complex():
        raise ValueError(f"{name} is sparse, nested, quantized, complex or without data; save it as a dense "
                         "tensor of real numbers")
    if value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise ValueError(f"{name} has shape {tuple(value.shape)} but too few numbers; save a copy of it")
    if value.is_floating_point() and value.numel():
        low, high = value.float().aminmax()  # NaN if any is
        if math.isfinite(low) and math.isfinite(high):
            return
        raise ValueError(f"{name} holds NaN or infinity; use a checkpoint from before the training diverged")


def shorten(names, limit=4):
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more


# ---------------------------------------------------------------------------- names


def convert(state_dict):
    """-> (format, state dict under our names, names left out: not of encoder or classifier)."""
    # recognize
    state = {}
    for key, value in state_dict.items():
        state[re.sub(WRAPPER, "", key.replace("_orig_mod.", ""))] = value
    kind = find_format(state)

    # rename
    state = rename(state, RENAMES.get(kind, {}) | COMMON)
    if kind == "vision_transformer":
        state = {name: from_jax(name, value) for name, value in state.items()}

    # keep encoder and classifier; a layer before the head (pre_logits) goes, and its head with it
    prefix = PREFIXES.get(kind, "")
    converted, dropped = {}, []
    no_head = kind == "MoCo v3" or has(state, r"pre_logits\.")  # MoCo v3's is a projection of three layers
    for full, value in state.items():
        key = re.sub(WRAPPER, "", full.removeprefix(prefix))
        without_head = no_head and key.startswith("head.")
        if not full.startswith(prefix) or re.match(NOT_ENCODER, key) or without_head:
            dropped.append(full)
        else:
            converted[key] = value

    # tables and biases
    check_tables(converted)
    if "dist_token" in state and "pos_embed" in converted:  # rows: class, distillation, patches
        table = converted["pos_embed"]
        converted["pos_embed"] = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    return kind, join_qkv(converted), dropped


def convert_official(state_dict):
    """Encoder and classifier of any layout in FORMATS, in the file's sizes, under the names of vit.py."""
    return convert(state_dict)[1]


def has(names, pattern):
    return any(re.match(pattern, name) for name in names)


def find_format(state):
    """A key of FORMATS."""
    if has(state, r"(backbone\.)?pyramid\."):
        raise ValueError("the checkpoint is of a detector or segmentation network with resized tables; "
                         "use the checkpoint of the encoder that it started from")
    for kind, pattern in MARKS.items():
        if has(state, pattern):
            return kind
    return "MAE or timm"


def rename(state, patterns):
    renamed = {}
    for full, value in state.items():
        name = full
        for pattern, replacement in patterns.items():
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"the checkpoint has {name} twice, also as {full}; delete one of them")
        renamed[name] = value
    return renamed


def check_tables(state):
    """What is sliced and resampled later must have the axes of a table."""
    for name, value in state.items():
        for ending, axes in TABLES.items():
            fits = value.ndim == axes and value.numel() > 0 and (axes == 2 or len(value) == 1)
            if name.endswith(ending) and not fits:
                raise ValueError(f"{name} of shape {tuple(value.shape)} is no table of positions, which has "
                                 f"{axes} axes; is the checkpoint of another model?")


def join_qkv(state):
    """Three matrices (D, D) or biases (D,) under attn.q, attn.k, attn.v -> one of 3 D rows under attn.qkv."""
    joined = {}
    for name, value in state.items():
        match = re.fullmatch(r"(.*attn\.)([qkv])\.(weight|bias)", name)
        if not match:
            joined[name] = value
            continue
        block, part, kind = match.groups()
        if f"{block}q.{kind}" not in state:
            joined[name] = value
        if part != "q":
            continue
        q, k, v = (state.get(f"{block}{letter}.{kind}") for letter in "qkv")
        if k is None and kind == "bias":
            k = torch.zeros_like(q)
        shapes = [None if tensor is None else tensor.shape for tensor in (q, k, v)]
        if shapes != [q.shape] * 3 or q.ndim == 0:
            raise ValueError(f"{name} of the checkpoint lacks a k or v of its shape; is the file complete?")
        joined[f"{block}qkv.{kind}"] = torch.cat([q, k, v])
    return joined


# ---------------------------------------------------------------------------- axes


def from_jax(name, value):
    """An array with JAX's axes -> PyTorch's; names are ours already."""
    if name.endswith("bias"):
        return value.flatten()  # of q, k, v: (heads, d)
    if not name.endswith("weight"):
        return value
    if value.ndim == 4:  # convolution
        return value.permute(3, 2, 0, 1)
    if value.ndim == 3:  # q, k, v: (D, heads, d); projection: (heads, d, D)
        value = value.flatten(0, 1) if "attn.proj." in name else value.flatten(1)
    return value.T if value.ndim == 2 else value


def from_numpy(array):
    """NumPy has no bfloat16 and keeps the two bytes: void from JAX, unsigned integers from Paddle."""
    if array.dtype.str in ("|V2", "<u2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def from_pickle(saved):
    """A dict of arrays, perhaps in dicts -> of tensors; Paddle's linear layers become (out, in)."""
    # Paddle saves a tensor as (its name, the array)
    arrays = {}
    for name, value in saved.items():
        pair = isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], np.ndarray)
        arrays[name] = value[1] if pair else value

    # a bias has as many numbers as its layer has outputs
    matrices = {name: value for name, value in arrays.items() if is_matrix(name, value)}
    in_out = False
    for name, value in matrices.items():
        bias = arrays.get(re.sub(r"weight(_v)?$", "bias", name))
        if isinstance(bias, np.ndarray):
            in_out |= value.shape[0] != bias.size == value.shape[1]

    # tensors
    state = {}
    for name, value in arrays.items():
        if isinstance(value, dict):
            value = from_pickle(value)
        elif isinstance(value, np.ndarray):
            value = from_numpy(value.T if in_out and name in matrices else value)
        state[name] = value
    return state


def is_matrix(name, value):
    return isinstance(name, str) and name.endswith(("weight", "weight_v")) and np.ndim(value) == 2


# ---------------------------------------------------------------------------- readers


def read_npz(path):
    """JAX's .npz as a flat dict of tensors; NumPy compares the checksums and refuses pickled objects."""
    with np.load(path, allow_pickle=False) as file:
        return {name: from_numpy(file[name]) for name in file.files}


class Flags(argparse.Namespace):
    """Stands for the Namespace in a pickle, which could otherwise change argparse's class."""


# what NumPy calls to rebuild arrays and numbers, under the names of its versions 1 and 2
NUMPY = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
for package in ("numpy.core", "numpy._core"):
    NUMPY[f"{package}.multiarray._reconstruct"] = np.zeros(1).__reduce__()[0]
    NUMPY[f"{package}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
    NUMPY[f"{package}.numeric._frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
PLAIN = {
    **NUMPY,
    "_codecs.encode": str.encode,  # bytes in protocol 2
    "builtins.tuple": tuple,
    "__builtin__.tuple": tuple,
    "collections.OrderedDict": collections.OrderedDict,
    "argparse.Namespace": Flags,
}


class PlainUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if f"{module}.{name}" not in PLAIN:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name} is not admitted")
        return PLAIN[f"{module}.{name}"]


def is_pickle(path):
    """A plain pickle: no zip file, and not torch's older format, which begins with a magic number."""
    with open(path, "rb") as stream:
        head = stream.read(32)
    return bool(re.match(rb"\x80[\x02-\x05]", head)) and b"\x8a\x0a" not in head


def read_pickle(path):
    """A pickle of NumPy arrays, such as Paddle's .pd and .pdparams -> a dict of tensors, as it is nested."""
    with open(path, "rb") as stream:
        saved = PlainUnpickler(stream).load()
    return from_pickle(saved) if isinstance(saved, dict) else saved


def numpy_globals():
    """For torch.serialization.safe_globals: NumPy's arrays and numbers beside the weights."""
    dtypes = [type(np.dtype(letter)) for letter in "?bhilqBHILQefd"]
    return dtypes + [(value, name) for name, value in NUMPY.items()]


if __name__ == "__main__":
    import os
    import tempfile

    layouts = {
        "vision_transformer": ("MixerBlock_0/token_mixing/Dense_0/kernel", (16, 4)),
        "transformers": ("vit.encoder.layer.0.intermediate.dense.weight", (32, 8)),
    }
    for layout, (name, shape) in layouts.items():
        state = {name: torch.zeros(shape)}
        if layout == "transformers":  # recognized by this
            state["vit.embeddings.cls_token"] = torch.zeros(1, 1, 8)
        converted = convert_official(state)
        ours = next(iter(converted))
        print(f"{layout}: {name} {shape}\n    -> {ours} {tuple(converted[ours].shape)}")
    print("expect fc1.weight as (outputs, inputs) everywhere")

    class Bomb:
        def __reduce__(self):
            return os.system, ("echo this must not run",)

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "bomb.pd")
        with open(path, "wb") as stream:
            pickle.dump({"model": {}, "args": Bomb()}, stream)
        try:
            read_pickle(path)
        except pickle.UnpicklingError as error:
            print(f"a pickle with code in it is refused: {error}")
