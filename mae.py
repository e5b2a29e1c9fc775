"""MAE: hide three quarters of an image, encode the rest, predict the hidden part.

The encoder sees visible patches only, so it is cheap. A small decoder gets its output and one learned mask
token for every hidden patch, and predicts pixels. After pre-training the decoder is discarded. MAE is the
baseline of MIRL (mirl.py): with one loss at the very end, the deep blocks of a deep encoder learn less than
they could.

    V      = the int(N (1 - ratio)) patches with the smallest noise              visible
    z      = LN(Blocks([cls ; W x_V + b + pos_V]))                         (1)   encoder
    y      = P LN(Blocks(unshuffle([E z ; mask tokens]) + pos))            (2)   decoder
    L      = mean over hidden patches of (y - x~)^2                        (3)   x~: masking.py

E maps to the decoder's width, P to the pixels of a patch.

Source: He et al. 2021, arXiv 2111.06377. Written from the paper; details it leaves open follow the official
code, whose numbers this file reproduces (tests/golden/mae_*).
Needs: torch, torchvision, einops; vit.py, masking.py (and shapes.py for the demo).
Demo: python mae.py (20 s on a CPU) predicts held-out scenes and saves mae_demo.png.
"""

from typing import NamedTuple

import torch
from torch import nn

from masking import (choose_patches, hidden_error, masked_loss, normalize_patches, paste, patch_mean_loss,
                     patch_statistics, patchify, unpatchify, unshuffle)
from vit import Block, init_weights, sincos_pos_embed


class MAEOutput(NamedTuple):
    loss: torch.Tensor  # scalar
    pred: torch.Tensor  # (B, N, P), every patch, also the visible ones
    mask: torch.Tensor  # (B, N), 1 = removed


class MAE(nn.Module):
    """Masked autoencoder around a ViT.

    encoder        a ViT with class token; it loses its head, and its position table becomes the fixed
                   sin-cos one, frozen
    norm_pix_loss  predict patches normalized to mean 0, variance 1 (better features) instead of raw pixels

    out = model(imgs) has out.loss, out.pred (B, N, P) and out.mask (B, N).
    """

    def __init__(self, encoder, decoder_embed_dim=512, decoder_depth=8, decoder_num_heads=16,
                 norm_pix_loss=True):
        super().__init__()
        width, heads = decoder_embed_dim, decoder_num_heads
        if width % heads:
            raise ValueError(f"decoder_embed_dim {width} is not a multiple of decoder_num_heads {heads}")
        encoder.prepare_for_masking()
        self.encoder = encoder
        self.norm_pix_loss = norm_pix_loss

        # (2)
        self.decoder_embed = nn.Linear(encoder.embed_dim, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        table = sincos_pos_embed(width, *encoder.grid_size)
        self.decoder_pos_embed = nn.Parameter(table[None], requires_grad=False)
        self.decoder_blocks = nn.ModuleList(Block(width, heads) for _ in range(decoder_depth))
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, encoder.patch_size**2 * encoder.in_chans)
        for module in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            module.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward_encoder(self, imgs, ids_keep):
        """(1): visible patches only -> (B, 1 + n, D)."""
        z = self.encoder.embed(imgs, ids_keep)
        return self.encoder.norm(self.encoder.forward_blocks(z))

    def forward_decoder(self, z, ids_restore):
        """(2): (B, 1 + n, D) -> (B, N, P)."""
        x = self.decoder_embed(z)
        patches = unshuffle(x[:, 1:], self.mask_token, ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def forward(self, imgs, mask_ratio=0.75, noise=None, mask=None):
        """imgs (B, C, H, W) -> MAEOutput.

        noise (B, N) fixes the mask: the smallest stay. Or mask (B, N) or (B, gh, gw) gives it.
        """
        encoder = self.encoder
        split = choose_patches(imgs, encoder.img_size, encoder.patch_size, mask_ratio, noise, mask)
        z = self.forward_encoder(imgs, split.ids_keep)
        pred = self.forward_decoder(z, split.ids_restore)
        target = patchify(imgs, encoder.patch_size)
        if self.norm_pix_loss:
            target = normalize_patches(target)
        loss = masked_loss(pred, target, split.mask)  # (3)
        return MAEOutput(loss, pred, split.mask)

    def to_pixels(self, imgs, out, use_true_patch_statistics=False):
        pred, patch_size = out.pred.float(), self.encoder.patch_size
        if self.norm_pix_loss:
            mean, std = patch_statistics(imgs, patch_size, out.mask, use_true_patch_statistics)
            pred = pred * std + mean
        return unpatchify(pred, patch_size, self.encoder.grid_size)

    @torch.no_grad()
    def reconstruct(self, imgs, mask_ratio=0.75, noise=None, mask=None, use_true_patch_statistics=False):
        """The predicted image (B, C, H, W): every patch from the decoder, no true pixel in it.

        Normalized predictions need each patch's mean and std. By default these are estimated from visible
        patches nearby; use_true_patch_statistics=True takes the true ones, which LEAK part of the answer.
        """
        out = self(imgs, mask_ratio, noise, mask)
        return self.to_pixels(imgs, out, use_true_patch_statistics)

    @torch.no_grad()
    def pictures(self, images, mask_ratio=0.75, noise=None, gray=0.5):
        """Columns of a picture, caption -> (B, C, H, W), in the same space as images (B, C, H, W).

        gray  mid-gray in that space, (C, 1, 1): it fills what the model does not see or is not trained for

        The caption of a prediction ends with its mean squared error on hidden patches, over all images.
        """
        patch_size = self.encoder.patch_size
        gray = torch.as_tensor(gray).to(images)
        out = self(images, mask_ratio, noise)
        pred = self.to_pixels(images, out)
        error = hidden_error(pred, images, out.mask, patch_size)
        return {
            "input, all pixels true": images,
            "true pixels, hidden in gray": paste(images, gray, out.mask, patch_size),
            # predictions of visible patches are not trained: gray
            f"prediction, no true pixels, {error}": paste(pred, gray, 1 - out.mask, patch_size),
            "true pixels + prediction": paste(images, pred, out.mask, patch_size),
        }


def convert_official(state_dict):
    """The official MAE pre-training state dict (encoder and decoder) under our names, for load_state_dict."""
    converted = {}
    for key, value in state_dict.items():
        ours = key.startswith(("mask_token", "decoder_"))
        converted[key if ours else f"encoder.{key}"] = value
    return converted


if __name__ == "__main__":
    from shapes import Shapes, save_grid
    from vit import create_vit

    torch.manual_seed(0)
    # simple scenes are flat, and a flat patch has no contrast to normalize: raw pixels
    encoder = create_vit("vit_demo", depth=4, patch_size=8)
    model = MAE(encoder, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2, norm_pix_loss=False)
    trained = Shapes(1024, scenes="simple").images / 255
    held_out = Shapes(256, train=False, scenes="simple").images / 255
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(401):
        batch = trained[torch.randint(len(trained), (32,))]
        loss = model(batch, mask_ratio=0.5).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:3d}  loss on hidden patches {loss.item():.4f}")

    model.eval()
    for name, imgs in (("trained", trained[:256]), ("held-out", held_out)):
        with torch.no_grad():
            loss = model(imgs, mask_ratio=0.5).loss.item()
        baseline = patch_mean_loss(imgs, 8, normalize=False)
        print(f"{name} images: loss {loss:.4f}, predicting each patch's mean {baseline:.4f}")
    print("expect a loss below the patch mean's, on both")
    save_grid("mae_demo.png", model.pictures(torch.cat([trained[:4], held_out[:4]]), mask_ratio=0.5))
    print("saved mae_demo.png: 4 trained images, below them 4 held-out ones")
