"""Every layout, written out by hand under its own names and axes, must compute what its own code computes."""

import argparse
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import mirl
from checkpoints import encoder_options, load_pretrained, read_checkpoint
from formats import convert, convert_official
from mirl import MIRL
from mixer import Mixer
from resnet import create_resnet
from small_runs import refusal
from vit import ViT

SIZES = dict(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=5)


def fill(model, seed=0):
    """The same model with random numbers in every parameter, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def images(size=16):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_outputs(model, peer, size=16):
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images(size)), peer(images(size)), rtol=0, atol=1e-5)


# ---- JAX


def jax_layer(name, weight, bias):
    """A linear layer (out, in), or a convolution (out, in, h, w)."""
    axes = (2, 3, 1, 0) if weight.ndim == 4 else (1, 0)
    return {f"{name}/kernel": weight.numpy().transpose(axes), f"{name}/bias": bias.numpy()}


def jax_vit(state, depth=2, heads=2, attention=1, norm=2, mlp=3):
    """The arrays of vision_transformer's npz; the numbers in its names count the layers of a block."""
    s = {name: value.detach() for name, value in state.items()}
    width = s["norm.weight"].numel()
    arrays = {
        "cls": s["cls_token"].numpy(),
        "Transformer/posembed_input/pos_embedding": s["pos_embed"].numpy(),
        "Transformer/encoder_norm/scale": s["norm.weight"].numpy(),
        "Transformer/encoder_norm/bias": s["norm.bias"].numpy(),
        **jax_layer("embedding", s["patch_embed.proj.weight"], s["patch_embed.proj.bias"]),
        **jax_layer("head", s["head.weight"], s["head.bias"]),
    }
    for i in range(depth):
        ours, block = f"blocks.{i}", f"Transformer/encoderblock_{i}"
        for number, part in ((0, "norm1"), (norm, "norm2")):
            arrays[f"{block}/LayerNorm_{number}/scale"] = s[f"{ours}.{part}.weight"].numpy()
            arrays[f"{block}/LayerNorm_{number}/bias"] = s[f"{ours}.{part}.bias"].numpy()
        weights = s[f"{ours}.attn.qkv.weight"].chunk(3)
        biases = s[f"{ours}.attn.qkv.bias"].chunk(3)
        attn = f"{block}/MultiHeadDotProductAttention_{attention}"
        for part, weight, bias in zip(("query", "key", "value"), weights, biases):
            arrays[f"{attn}/{part}/kernel"] = weight.T.reshape(width, heads, width // heads).numpy()
            arrays[f"{attn}/{part}/bias"] = bias.reshape(heads, width // heads).numpy()
        proj = s[f"{ours}.attn.proj.weight"].T.reshape(heads, width // heads, width)
        arrays[f"{attn}/out/kernel"] = proj.numpy()
        arrays[f"{attn}/out/bias"] = s[f"{ours}.attn.proj.bias"].numpy()
        for number in (0, 1):
            fc = f"{ours}.mlp.fc{number + 1}"
            arrays |= jax_layer(f"{block}/MlpBlock_{mlp}/Dense_{number}", s[f"{fc}.weight"], s[f"{fc}.bias"])
    return arrays


def jax_mixer(state, depth=2):
    s = {name: value.detach() for name, value in state.items()}
    arrays = jax_layer("stem", s["stem.proj.weight"], s["stem.proj.bias"])
    arrays |= jax_layer("head", s["head.weight"], s["head.bias"])
    norms = {"pre_head_layer_norm": "norm"}
    for i in range(depth):
        norms[f"MixerBlock_{i}/LayerNorm_0"] = f"blocks.{i}.norm1"
        norms[f"MixerBlock_{i}/LayerNorm_1"] = f"blocks.{i}.norm2"
        for mixing, ours in (("token_mixing", "mlp_tokens"), ("channel_mixing", "mlp_channels")):
            for number in (0, 1):
                fc = f"blocks.{i}.{ours}.fc{number + 1}"
                name = f"MixerBlock_{i}/{mixing}/Dense_{number}"
                arrays |= jax_layer(name, s[f"{fc}.weight"], s[f"{fc}.bias"])
    for name, ours in norms.items():
        arrays |= {f"{name}/scale": s[f"{ours}.weight"].numpy(), f"{name}/bias": s[f"{ours}.bias"].numpy()}
    return arrays


def save(path, arrays):
    np.savez(path, **arrays)
    return path


VIT_JAX = dict(attention=1, norm=2, mlp=3)
BIG_VISION = dict(attention=0, norm=1, mlp=0)


@pytest.mark.parametrize("prefix, numbers", [("", VIT_JAX), ("opt/target/", VIT_JAX), ("params/", BIG_VISION)])
def test_a_vit_of_jax_computes_what_timm_makes_of_the_same_file(tmp_path, prefix, numbers):
    timm = pytest.importorskip("timm")
    source = fill(ViT(**SIZES))
    arrays = jax_vit(source.state_dict(), **numbers)
    if numbers is BIG_VISION:
        arrays["pos_embedding"] = arrays.pop("Transformer/posembed_input/pos_embedding")
    path = save(tmp_path / "vit.npz", {prefix + name: array for name, array in arrays.items()})
    peer = timm.models.vision_transformer.VisionTransformer(**SIZES)
    peer.load_pretrained(str(path))
    model = ViT(**SIZES)
    report = load_pretrained(model, path, verbose=False)
    assert report.format == "vision_transformer" and not report.missing and not report.skipped
    assert_same_outputs(model, peer.eval())
    assert_same_outputs(model, source)


def test_a_mixer_of_jax_computes_what_timms_mixer_computes(tmp_path):
    timm = pytest.importorskip("timm")
    peer = fill(timm.models.mlp_mixer.MlpMixer(img_size=16, patch_size=4, num_blocks=2, embed_dim=16, num_classes=5))
    model = Mixer(img_size=16, patch_size=4, depth=2, embed_dim=16, num_classes=5)
    report = load_pretrained(model, save(tmp_path / "mixer.npz", jax_mixer(peer.state_dict())), verbose=False)
    assert report.format == "vision_transformer" and not report.missing and not report.skipped
    assert_same_outputs(model, peer)


def test_bfloat16_saved_as_void_comes_back_as_the_numbers_it_was(tmp_path):
    source = fill(ViT(**SIZES)).bfloat16()
    arrays = {}
    for name, array in jax_vit(source.float().state_dict()).items():
        halves = np.ascontiguousarray(array).view(np.uint16).reshape(*array.shape, 2)[..., 1]  # the upper two bytes
        arrays[name] = np.ascontiguousarray(halves).view("|V2")
    path = save(tmp_path / "sam.npz", arrays)
    assert read_checkpoint(path)["cls"].dtype == torch.bfloat16
    model = ViT(**SIZES)
    load_pretrained(model, path, verbose=False)
    assert_same_outputs(model, source)


def test_a_layer_before_the_head_takes_the_head_with_it(tmp_path):
    source = fill(ViT(**SIZES))
    pre_logits = {"pre_logits/kernel": np.ones((16, 16), np.float32), "pre_logits/bias": np.ones(16, np.float32)}
    path = save(tmp_path / "in21k.npz", jax_vit(source.state_dict()) | pre_logits)
    report = load_pretrained(ViT(**SIZES), path, verbose=False)
    assert report.missing == ["head.weight", "head.bias"]


def test_an_npz_tells_patch_and_image_size(tmp_path):
    path = save(tmp_path / "vit.npz", jax_vit(fill(ViT(**SIZES)).state_dict()))
    assert encoder_options(read_checkpoint(path)) == dict(patch_size=4, img_size=(16, 16))


# ---- transformers and mmpretrain, names by hand


def rename(state, names, depth=2):
    """names: ours -> theirs; {i} is the block."""
    renamed = {}
    for ours, name in names.items():
        for i in range(depth if "{i}" in ours else 1):
            for kind in ("weight", "bias"):
                source = f"{ours.format(i=i)}.{kind}"
                if source in state:
                    renamed[f"{name.format(i=i)}.{kind}"] = state[source]
    return renamed


def transformers_file(state, prefix):
    names = {
        "patch_embed.proj": f"{prefix}embeddings.patch_embeddings.projection",
        "norm": f"{prefix}layernorm",
        "fc_norm": f"{prefix}pooler.layernorm",
        "head": "classifier",
    }
    layer = f"{prefix}encoder.layer.{{i}}"
    names |= {
        "blocks.{i}.norm1": f"{layer}.layernorm_before",
        "blocks.{i}.norm2": f"{layer}.layernorm_after",
        "blocks.{i}.attn.proj": f"{layer}.attention.output.dense",
        "blocks.{i}.mlp.fc1": f"{layer}.intermediate.dense",
        "blocks.{i}.mlp.fc2": f"{layer}.output.dense",
    }
    file = rename(state, names) | {f"{prefix}embeddings.cls_token": state["cls_token"]}
    if "pos_embed" in state:
        file[f"{prefix}embeddings.position_embeddings"] = state["pos_embed"]
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip(("query", "key", "value"), parts):
                file[f"{layer.format(i=i)}.attention.attention.{part}.{kind}"] = value
    return file


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_a_vit_of_transformers_loads_from_its_names(prefix):
    source, model = fill(ViT(**SIZES)), ViT(**SIZES)
    file = transformers_file(source.state_dict(), prefix)
    file |= {f"{prefix}pooler.dense.weight": torch.ones(16, 16), "decoder.decoder_embed.weight": torch.ones(8, 16)}
    report = load_pretrained(model, file, verbose=False)
    assert report.format == "transformers" and not report.missing and not report.skipped
    assert_same_outputs(model, source)


@pytest.mark.parametrize("table", ["block", "shared"])
def test_a_beit_of_transformers_loads_from_its_names(table):
    options = dict(rel_pos_bias=table, layer_scale=0.1, pos_embed=None, pool="mean")
    source, model = fill(ViT(**SIZES, **options)), ViT(**SIZES, **options)
    state = source.state_dict()
    for i in range(2):
        state[f"blocks.{i}.attn.qkv.bias"][16:32] = 0  # BEiT's k has no bias
    file = transformers_file(state, "beit.")
    bias = "relative_position_bias.relative_position_bias_table"
    if table == "shared":
        file[f"beit.encoder.{bias}"] = state["rel_pos_bias.relative_position_bias_table"]
    for i in range(2):
        layer = f"beit.encoder.layer.{i}"
        del file[f"{layer}.attention.attention.key.bias"]
        file |= {f"{layer}.lambda_{n}": state[f"blocks.{i}.gamma_{n}"] for n in (1, 2)}
        if table == "block":
            name = f"{layer}.attention.attention.{bias}"
            file[name] = state[f"blocks.{i}.attn.relative_position_bias_table"]
    report = load_pretrained(model, file, verbose=False)
    assert report.format == "transformers" and not report.missing and not report.skipped
    assert_same_outputs(model, source)


def test_a_vit_of_mmpretrain_loads_from_its_names():
    source, model = fill(ViT(**SIZES, layer_scale=0.1)), ViT(**SIZES, layer_scale=0.1)
    state = source.state_dict()
    layer = "backbone.layers.{i}"
    names = {
        "patch_embed.proj": "backbone.patch_embed.projection",
        "norm": "backbone.ln1",
        "head": "head.layers.head",
        "blocks.{i}.norm1": f"{layer}.ln1",
        "blocks.{i}.norm2": f"{layer}.ln2",
        "blocks.{i}.attn.qkv": f"{layer}.attn.qkv",
        "blocks.{i}.attn.proj": f"{layer}.attn.proj",
        "blocks.{i}.mlp.fc1": f"{layer}.ffn.layers.0.0",
        "blocks.{i}.mlp.fc2": f"{layer}.ffn.layers.1",
    }
    file = rename(state, names)
    file |= {"backbone.cls_token": state["cls_token"], "backbone.pos_embed": state["pos_embed"]}
    for i in range(2):
        file[f"backbone.layers.{i}.attn.gamma1.weight"] = state[f"blocks.{i}.gamma_1"]
        file[f"backbone.layers.{i}.ffn.gamma2.weight"] = state[f"blocks.{i}.gamma_2"]
    report = load_pretrained(model, {"state_dict": file, "meta": {}}, verbose=False)
    assert report.format == "mmpretrain" and not report.missing and not report.skipped
    assert_same_outputs(model, source)


def test_two_names_for_the_same_tensor_are_refused():
    file = transformers_file(fill(ViT(**SIZES)).state_dict(), "vit.")
    assert "norm.weight twice" in refusal(convert, file | {"layernorm.weight": torch.ones(16)})


# ---- transformers itself, where it is installed


HUGGING = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=16,
               patch_size=4)
OURS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)


def published(peer, folder):
    """The file that save_pretrained writes, under the names of published files."""
    peer.save_pretrained(folder)
    return Path(folder) / "model.safetensors"


def test_a_vit_of_transformers_computes_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = fill(transformers.ViTForImageClassification(transformers.ViTConfig(**HUGGING, num_labels=5)))
    model = ViT(**OURS, num_classes=5)
    assert not load_pretrained(model, published(peer, tmp_path), verbose=False).missing
    assert_same_outputs(model, lambda imgs: peer(imgs).logits)


@pytest.mark.parametrize("table", ["block", "shared"])
def test_a_beit_of_transformers_computes_the_same(tmp_path, table):
    transformers = pytest.importorskip("transformers")
    options = {"block": dict(use_relative_position_bias=True), "shared": dict(use_shared_relative_position_bias=True)}
    config = transformers.BeitConfig(**HUGGING, **options[table], layer_scale_init_value=0.1, num_labels=5)
    peer = fill(transformers.BeitForImageClassification(config))
    model = ViT(**OURS, num_classes=5, rel_pos_bias=table, layer_scale=0.1, pos_embed=None, pool="mean")
    assert not load_pretrained(model, published(peer, tmp_path), verbose=False).missing
    assert_same_outputs(model, lambda imgs: peer(imgs).logits)


def test_a_mae_of_transformers_computes_the_same_features_of_the_kept_patches(tmp_path):
    transformers = pytest.importorskip("transformers")
    peer = fill(transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**HUGGING, mask_ratio=0.5)))
    model = ViT(**OURS, num_classes=0)
    load_pretrained(model, published(peer, tmp_path), verbose=False)
    noise = torch.rand(2, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = peer.vit(images(), noise=noise).last_hidden_state
        kept = model.embed(images(), noise.argsort(dim=1)[:, :8])
        features = model.norm(model.forward_blocks(kept))
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


# ---- torchvision


def test_a_resnet_of_torchvision_brings_its_classifier():
    from torchvision.models import resnet18

    peer, model = fill(resnet18(num_classes=5)), create_resnet("resnet18", num_classes=5)
    report = load_pretrained(model, peer.state_dict(), verbose=False)
    assert report.format == "torchvision" and not report.missing and not report.skipped
    assert_same_outputs(model, peer, size=32)


# ---- MIRL's own files: pickles of Paddle


OFFICIAL = [
    (r"encoder\.", ""),
    (r"embeds\.0\.", "decoder_embed0_1."),
    (r"embeds\.(\d)\.", lambda m: f"decoder_embed{int(m[1]) - 1}."),
    (r"norms\.0\.", "norm_low."),
    (r"norms\.(\d)\.", lambda m: f"norm{int(m[1]) - 1}."),
    (r"decoders\.(\d)\.mask_token", r"mask_token\1"),
    (r"decoders\.(\d)\.pos_embed", r"decoder_pos_embed\1"),
    (r"decoders\.(\d)\.(blocks|norm)\.", r"decoder_\2\1."),
    (r"decoders\.(\d)\.pred\.parametrizations\.weight\.original0", r"decoder_pred\1.weight_g"),
    (r"decoders\.(\d)\.pred\.parametrizations\.weight\.original1", r"decoder_pred\1.weight_v"),
    (r"decoders\.(\d)\.pred\.", r"decoder_pred\1."),
]


def small_mirl():
    encoder = ViT(**{**SIZES, "num_classes": 0})
    return fill(MIRL(encoder, segments=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2))


def paddle_arrays(model):
    """The official names; matrices (in, out), and a weight norm along the inputs."""
    arrays = {}
    for name, value in model.state_dict().items():
        for pattern, replacement in OFFICIAL:
            if re.match(pattern, name):
                name = re.sub(f"^{pattern}", replacement, name)
                break
        array = value.numpy()
        if name.endswith("weight_g"):
            array = array.flatten()
        elif array.ndim == 2:
            array = np.ascontiguousarray(array.T)
        arrays[name] = array
    return arrays


def as_pairs(arrays):
    """Newer versions of Paddle save a tensor as (its name, the array)."""
    return {name: (f"linear_{i}.w_0", array) for i, (name, array) in enumerate(arrays.items())}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("wrap", [dict, as_pairs])
def test_mirls_own_pickle_loads_without_paddle(tmp_path, protocol, wrap):
    source = small_mirl()
    file = {"model": wrap(paddle_arrays(source)), "epoch": 799, "args": argparse.Namespace(lr=0.1),
            "scaler": {"scale": np.float32(2)}}
    path = tmp_path / "checkpoint-799.pd"
    path.write_bytes(pickle.dumps(file, protocol=protocol))
    saved = read_checkpoint(path)
    assert saved["epoch"] == 799 and saved["args"].lr == 0.1 and saved["scaler"]["scale"] == 2

    whole = small_mirl()
    fill(whole, seed=1)
    whole.load_state_dict(mirl.convert_official(saved["model"]), strict=True)
    for name, value in source.state_dict().items():
        assert torch.equal(whole.state_dict()[name], value), name

    encoder = ViT(**{**SIZES, "num_classes": 0})
    report = load_pretrained(encoder, path, verbose=False)
    assert report.format == "MIRL" and not report.missing
    assert_same_outputs(encoder, lambda imgs: source.encoder(imgs))


def test_a_pickle_of_arrays_with_pytorchs_axes_is_not_transposed(tmp_path):
    source, path = fill(ViT(**SIZES)), tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"model": {name: value.numpy() for name, value in source.state_dict().items()}}))
    model = ViT(**SIZES)
    load_pretrained(model, path, verbose=False)
    assert_same_outputs(model, source)


class Bomb:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("place", ["model", "args", "inside"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, protocol, place):
    planted, path = tmp_path / "planted", tmp_path / "checkpoint-799.pd"
    arrays = paddle_arrays(small_mirl())
    for bomb in (Bomb(Path.touch, planted), Bomb(exec, f"open({str(planted)!r}, 'w')"), Bomb(eval, "1"),
                 Bomb(getattr, dict, "x"), Bomb(np.load, "x")):
        if place == "inside":
            arrays["norm.bias"] = np.array([bomb], dtype=object)
        file = {"model": arrays} | ({} if place == "inside" else {place: bomb})
        path.write_bytes(pickle.dumps(file, protocol=protocol))
        message = refusal(read_checkpoint, path)
        assert "was not loaded" in message and str(path) in message
        assert not planted.exists()
    pickle.loads(pickle.dumps(Bomb(Path.touch, planted)))  # the trap works: without protection it springs
    assert planted.exists()


def test_a_pickle_cannot_change_a_class_of_python(tmp_path):
    before = dict(vars(argparse.Namespace))
    # the class, then a state that sets attributes on it
    (tmp_path / "x.pd").write_bytes(b"\x80\x02cargparse\nNamespace\nN}X\x06\x00\x00\x00__eq__K\x01s\x86b.")
    refusal(read_checkpoint, tmp_path / "x.pd")
    assert dict(vars(argparse.Namespace)) == before


def test_pickled_objects_in_an_npz_are_refused_and_not_run(tmp_path):
    planted = tmp_path / "planted"
    np.savez(tmp_path / "vit.npz", cls=np.array([Bomb(Path.touch, planted)], dtype=object), allow_pickle=True)
    assert "was not loaded" in refusal(read_checkpoint, tmp_path / "vit.npz")
    assert not planted.exists()


def test_numpys_numbers_and_arrays_beside_the_weights_are_admitted(tmp_path):
    file = {"model": ViT(**SIZES).state_dict(), "best": np.float64(83.6), "epoch": np.int64(3), "done": np.bool_(True),
            "rng": np.arange(3)}
    torch.save(file, tmp_path / "x.pth")
    saved = read_checkpoint(tmp_path / "x.pth")
    assert saved["best"] == 83.6 and saved["epoch"] == 3 and saved["done"] and saved["rng"].tolist() == [0, 1, 2]
    assert not load_pretrained(ViT(**SIZES), saved, verbose=False).missing


# ---- parts that no model here has


@pytest.mark.parametrize(
    "name, shape",
    [
        ("norm_pre.weight", (16,)),
        ("attn_pool.latent", (1, 1, 16)),
        ("reg_token", (1, 4, 16)),
        ("register_tokens", (1, 4, 16)),
        ("blocks.0.attn.q_norm.weight", (8,)),
        ("blocks.1.attn.k_norm.bias", (8,)),
    ],
)
def test_a_part_that_the_model_lacks_is_refused_by_name(name, shape):
    message = refusal(load_pretrained, ViT(**SIZES), ViT(**SIZES).state_dict() | {name: torch.ones(shape)})
    assert name in message and "compute something else" in message


@pytest.mark.parametrize(
    "options, part",
    [
        (dict(pre_norm=True), "norm_pre"),
        (dict(reg_tokens=4), "reg_token"),
        (dict(global_pool="map"), "attn_pool"),
        (dict(qk_norm=True), "attn.q_norm"),
        (dict(class_token=False, global_pool="avg"), "class token"),
        (dict(qkv_bias=False), "biases of q, k and v"),
    ],
)
def test_what_timms_variants_compute_otherwise_is_refused(options, part):
    timm = pytest.importorskip("timm")
    peer = timm.models.vision_transformer.VisionTransformer(**SIZES, **options)
    assert part in refusal(load_pretrained, ViT(**SIZES), peer.state_dict())


def test_attention_pooling_and_registers_are_refused_in_other_layouts_too(tmp_path):
    state = fill(ViT(**SIZES)).state_dict()
    pooled = jax_vit(state) | {"MAPHead_0/probe": np.ones((1, 1, 16), np.float32)}
    assert "attention pooling" in refusal(load_pretrained, ViT(**SIZES), save(tmp_path / "map.npz", pooled))
    file = transformers_file(state, "vit.") | {"vit.embeddings.register_tokens": torch.ones(1, 4, 16)}
    assert "register_tokens" in refusal(load_pretrained, ViT(**SIZES), file)


def test_q_k_and_v_of_different_shapes_are_refused():
    file = transformers_file(fill(ViT(**SIZES)).state_dict(), "vit.")
    for part, value in (("key", torch.ones(8)), ("value", torch.tensor(1.0))):
        broken = file | {f"vit.encoder.layer.1.attention.attention.{part}.bias": value}
        assert "blocks.1.attn.q.bias" in refusal(convert_official, broken)
