"""MIRL: shallow blocks paint the image, deep blocks paint what is still missing.

Masked image modelling with one loss at the end trains the deep blocks of a deep ViT badly:
more depth stops helping. MIRL cuts the encoder into K segments and gives each a small
decoder. Decoders are paired from the outside in, 1 with K, 2 with K-1, ... The shallow one
predicts the main component of the hidden patches, the deep one the residual; only their sum
is compared with the image. So every segment has a short path to a loss, and the deep ones
an easier target. Afterwards all decoders are thrown away: a plain ViT remains.

    z_0 = [cls ; visible patches + pos],   z_k = Segment_k(z_{k-1}),   k = 1 .. K     (1)
    t_0 = E_0 LN z_0,   t_k = E_k LN_k z_k                                            (2)
    u_k = unshuffle(t_k, mask tokens) + pos                                           (3)
    decoder k:  u = u + SelfAttn(LN u);  u = u + CrossAttn(LN u, LN C_k);  u = u + MLP(LN u)
                with the dense context C_k = [t_{k-1}, ..., t_1, t_0]                 (4)
    y_k = P_k LN u_k,  every column of P_k of unit length                             (5)
    L   = 2/K sum_{j <= K/2} mean over hidden patches of (y_j + y_{K+1-j} - x~)^2     (6)

Nothing forces y_j to be the image and y_{K+1-j} the residual: a constant could move between
them without changing (6), and there is no loss on y_j alone. The roles emerge, or do not:
look at the parts and their sum.

Source: Huang, Fu, Bors 2023, arXiv 2309.14136. Written from the paper; details it leaves
open follow the official code's behaviour, whose numbers are met (tests/golden/mirl_*). We
differ: any even K that divides the depth (the release is fixed to 6 and its 12-block
presets do not run), x~ is always patch-normalised as in the release whatever its flag says.
Needs: torch, torchvision, einops; vit.py, masking.py (and shapes.py for the demo).
Demo: python mirl.py (half a minute on a CPU) overfits 16 scenes and saves mirl_demo.png.
"""

import re
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from masking import (choose_patches, hide, masked_loss, normalize_patches, paste, patch_statistics, patchify, unpatchify,
                     unshuffle)
from vit import Attention, Mlp, attention, init_weights, sincos_pos_embed


class CrossAttention(nn.Module):
    """Queries x (B, N, D) read from the context c (B, M, D) -> (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, c):
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(c), "b m (two h d) -> two b h m d", two=2, h=self.num_heads)
        return self.proj(rearrange(attention(q, k, v), "b h n d -> b n (h d)"))


class CrossBlock(nn.Module):
    """Decoder block (4): look at yourself, look at the context, think."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)  # queries
        self.norm3 = nn.LayerNorm(dim, eps=1e-6)  # context
        self.cross_attn = CrossAttention(dim, num_heads)
        self.norm4 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, u, context):
        u = u + self.attn(self.norm1(u))
        u = u + self.cross_attn(self.norm2(u), self.norm3(context))
        return u + self.mlp(self.norm4(u))


class Decoder(nn.Module):
    """One segment's decoder, (3) to (5): visible tokens t_k (B, 1 + n, D) -> predictions (B, N, P)."""

    def __init__(self, grid_size, dim, depth, num_heads, patch_dim, weight_norm_pred):
        super().__init__()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, *grid_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(CrossBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.pred = nn.Linear(dim, patch_dim)
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)
        if weight_norm_pred:
            # dim=1: one norm per INPUT feature, over the outputs (Paddle stores [in, out] and norms its dim 0);
            # the magnitudes stay at 1
            self.pred = weight_norm(self.pred, dim=1)
            magnitude = self.pred.parametrizations.weight.original0
            nn.init.ones_(magnitude)
            magnitude.requires_grad_(False)

    def forward(self, t, context, ids_restore):
        u = torch.cat([t[:, :1], unshuffle(t[:, 1:], self.mask_token, ids_restore)], dim=1) + self.pos_embed
        for block in self.blocks:
            u = block(u, context)
        return self.pred(self.norm(u))[:, 1:]  # the class token was a query like the others; drop it now


class MIRLOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    pred: list  # K tensors (B, N, P), shallow to deep
    mask: torch.Tensor  # (B, N), 1 = removed
    pairs: list  # K / 2 scalars: pairs[j] scores pred[j] + pred[K-1-j] (pairing=False: K scalars, one each)


class MIRL(nn.Module):
    """Masked image residual learning around a ViT.

    encoder           a ViT with class token; it loses its head, and its position table becomes the fixed
                      sin-cos one, frozen
    segments          K, even, divides the encoder's depth
    weight_norm_pred  unit-norm prediction weights (5)
    pairing           False: plain deep supervision, every decoder predicts the whole image (a contrast)
    dense_context     False: decoders read t_0 only, not the earlier segments (a contrast)

    out = model(imgs) has out.loss, out.pred, out.mask, out.pairs. ValueError where sizes do not fit.
    """

    def __init__(self, encoder, segments=6, decoder_embed_dim=512, decoder_depth=2, decoder_num_heads=16,
                 weight_norm_pred=True, pairing=True, dense_context=True):
        super().__init__()
        depth, dim = len(encoder.blocks), encoder.embed_dim
        if segments < 2 or segments % 2 or depth % segments:
            even = [k for k in range(2, depth + 1, 2) if depth % k == 0]
            raise ValueError(f"segments {segments} must be even and divide the depth {depth}; "
                             + (f"try {' or '.join(map(str, even))}" if even else "MIRL needs an encoder of even depth"))
        if decoder_embed_dim % decoder_num_heads:
            raise ValueError(f"decoder_embed_dim {decoder_embed_dim} is not a multiple of decoder_num_heads {decoder_num_heads}")
        encoder.prepare_for_masking()
        self.encoder, self.segments, self.pairing, self.dense_context = encoder, segments, pairing, dense_context
        # LN for z_0 .. z_{K-1}; the encoder's own last norm serves z_K
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=1e-6) for _ in range(segments))
        self.embeds = nn.ModuleList(nn.Linear(dim, decoder_embed_dim) for _ in range(segments + 1))
        self.embeds.apply(init_weights)
        self.decoders = nn.ModuleList(
            Decoder(encoder.grid_size, decoder_embed_dim, decoder_depth, decoder_num_heads,
                    encoder.patch_size**2 * encoder.in_chans, weight_norm_pred)
            for _ in range(segments))

    def forward_encoder(self, imgs, ids_keep):
        """(1) and LN of (2): normalised z_0 .. z_K, each (B, 1 + n, D)."""
        z = self.encoder.embed(imgs, ids_keep)
        features, step = [self.norms[0](z)], len(self.encoder.blocks) // self.segments
        for k, norm in enumerate([*self.norms[1:], self.encoder.norm]):
            z = self.encoder.forward_blocks(z, k * step, (k + 1) * step)  # flows on un-normalised
            features.append(norm(z))
        return features

    def forward_decoders(self, features, ids_restore):
        """(2) to (5): K predictions (B, N, P), shallow to deep."""
        t = [embed(z) for embed, z in zip(self.embeds, features, strict=True)]
        preds = []
        for k, decoder in enumerate(self.decoders, start=1):
            context = torch.cat(t[:k] if self.dense_context else t[:1], dim=1)
            preds.append(decoder(t[k], context, ids_restore))
        return preds

    def forward(self, imgs, mask_ratio=0.75, noise=None, mask=None):
        """imgs (B, C, H, W) -> MIRLOutput.

        noise (B, N): fixes which patches stay, the smallest; mask (B, N) or (B, gh, gw) gives them outright.
        """
        split = choose_patches(imgs, self.encoder.img_size, self.encoder.patch_size, mask_ratio, noise, mask)
        preds = self.forward_decoders(self.forward_encoder(imgs, split.ids_keep), split.ids_restore)
        target = normalize_patches(patchify(imgs, self.encoder.patch_size))
        if self.pairing:  # (6); no gradient is stopped between the two
            guesses = [preds[j] + preds[-1 - j] for j in range(self.segments // 2)]
        else:
            guesses = preds
        losses = [masked_loss(guess, target, split.mask) for guess in guesses]
        return MIRLOutput(torch.stack(losses).mean(), preds, split.mask, losses)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None, mask=None, use_true_patch_statistics=False, center=False):
        """For pictures: a list of K / 2 Reconstructions of images (B, C, H, W); no true pixel in any.

        center=True moves what (6) leaves undetermined: at each hidden position the residual's mean over the
        batch goes to the main component. The sum stays the same.

        Normalised predictions need each patch's mean and std back. By default they are guessed from the
        visible neighbours; use_true_patch_statistics=True takes the true ones, which LEAK part of the answer.
        pairing=False: a list of K pictures (B, C, H, W), shallow to deep.
        """
        out = self(imgs, mask_ratio, noise, mask)
        mean, std = patch_statistics(imgs, self.encoder.patch_size, out.mask, use_true_patch_statistics)

        def picture(patches):
            return unpatchify(patches, self.encoder.patch_size, self.encoder.grid_size)

        if not self.pairing:
            return [picture(pred.float() * std + mean) for pred in out.pred]
        rows = []
        for j in range(self.segments // 2):
            main, residual = out.pred[j].float(), out.pred[-1 - j].float()
            if center:
                hidden = out.mask[..., None]
                constant = (residual * hidden).sum(dim=0) / hidden.sum(dim=0).clamp(min=1)  # (N, P)
                main, residual = main + constant, residual - constant
            rows.append(Reconstruction(picture(main * std + mean), picture(residual * std), picture((main + residual) * std + mean)))
        return rows


class Reconstruction(NamedTuple):
    main: torch.Tensor
    residual: torch.Tensor  # a difference, around 0; main + residual = sum
    sum: torch.Tensor


def convert_official(state_dict):
    """The official pre-training state dict, as torch tensors with [out, in] weights, under our names.

    Official counting: decoder_embed0_1 embeds the raw input, decoder_embed{k} segment k (from 0), norm_low and
    norm{k} go with them; decoder_pred{k}.weight_g / weight_v are weight norm's magnitude and direction.
    """
    weight = "pred.parametrizations.weight.original"
    rules = [(r"decoder_embed0_1\.", lambda m: "embeds.0."),
             (r"decoder_embed(\d+)\.", lambda m: f"embeds.{int(m[1]) + 1}."),
             (r"norm_low\.", lambda m: "norms.0."),
             (r"norm(\d+)\.", lambda m: f"norms.{int(m[1]) + 1}."),
             (r"mask_token(\d+)$", lambda m: f"decoders.{m[1]}.mask_token"),
             (r"decoder_pos_embed(\d+)$", lambda m: f"decoders.{m[1]}.pos_embed"),
             (r"decoder_blocks(\d+)\.", lambda m: f"decoders.{m[1]}.blocks."),
             (r"decoder_norm(\d+)\.", lambda m: f"decoders.{m[1]}.norm."),
             (r"decoder_pred(\d+)\.weight_g$", lambda m: f"decoders.{m[1]}.{weight}0"),
             (r"decoder_pred(\d+)\.weight_v$", lambda m: f"decoders.{m[1]}.{weight}1"),
             (r"decoder_pred(\d+)\.", lambda m: f"decoders.{m[1]}.pred."),
             (r"", lambda m: "encoder.")]
    converted = {}
    for key, value in state_dict.items():
        pattern, new = next(rule for rule in rules if re.match(rule[0], key))
        value = value.reshape(1, -1) if key.endswith("weight_g") else value
        converted[re.sub(pattern, new, key, count=1)] = value
    return converted


if __name__ == "__main__":
    from shapes import save_grid, shapes
    from vit import create_vit

    torch.manual_seed(0)
    model = MIRL(create_vit("vit_demo"), segments=4, decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)
    imgs = shapes(16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(401):
        out = model(imgs)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss {out.loss.item():.2f} = mean of pairs {[round(pair.item(), 2) for pair in out.pairs]}")
    print("(predicting each patch's mean scores 0.98; expect below 0.70 at the end)")

    model.eval()
    noise = torch.rand(16, 64)
    out = model(imgs, noise=noise)
    target = normalize_patches(patchify(imgs, 4))
    for j in range(2):
        main, residual = out.pred[j], out.pred[-1 - j]
        # (6) leaves a constant free to move between the parts: give the residual's mean over images to main
        hidden = out.mask[..., None]
        constant = (residual * hidden).sum(dim=0) / hidden.sum(dim=0).clamp(min=1)
        print(f"pair {j + 1}: error of main alone {masked_loss(main + constant, target, out.mask):.2f}, of main + residual "
              f"{masked_loss(main + residual, target, out.mask):.2f} (expect the sum to be better)")
    pair = model.reconstruct(imgs, noise=noise, center=True)[1]  # segments 2 and 3
    asked = 1 - out.mask  # predictions at visible patches were never trained: leave them grey
    columns = {
        "input: all true pixels": imgs,
        "model's view: true pixels, grey hidden": hide(imgs, out.mask, 4),
        "main, segment 2: no true pixels": hide(pair.main, asked, 4),
        "residual, segment 3: grey is zero": hide(pair.residual + 0.5, asked, 4),
        "sum of both: no true pixels": hide(pair.sum, asked, 4),
        "true where visible, else the sum": paste(imgs, pair.sum, out.mask, 4),
    }
    save_grid("mirl_demo.png", {caption: pictures[:6] for caption, pictures in columns.items()})
    print("saved mirl_demo.png")
