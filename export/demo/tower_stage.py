"""Stage one: the vision tower on dense labels. Each patch on a digit names the digit, its ink, whether the digit is the
highest or the leftmost, and how many digits there are; background patches only say that they are background. Three
helpers break the long plateau before digits are learnt: early layers say where in the patch the ink is and where in its
digit the patch lies, the last one draws the digit.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration

from tokprune.export.demo.batches import IGNORE, PatchBatch, patch_batch, training_scene
from tokprune.export.demo.scenes import GRID, MAX_DIGITS
from tokprune.export.demo.tower import LABELS, PatchHeads, encode, initialise

# A step's scenes by number of digits, in two groups, with the patches kept of each scene (a digit inks about 21, at
# most 31) and the group's weight.
GROUPS = (({1: 2, 2: 3}, 64, 0.3), ({3: 4, 4: 7}, 108, 0.7))
WEIGHTS = {
    "digit": 1.0,
    "ink": 0.5,
    "highest": 0.3,
    "leftmost": 0.3,
    "count": 0.3,
    "mask": 4.0,
    "frame": 10.0,
    "shape": 2.0,
}
BACKGROUND = 0.2  # weight of a background patch beside one on a digit


def draw(seed: int, step: int) -> list[PatchBatch]:
    """One step's scenes, a batch per group."""
    rng = np.random.default_rng([seed, step])
    return [
        patch_batch([training_scene(rng, n) for n, share in scenes.items() for _ in range(share)], tokens, rng)
        for scenes, tokens, _ in GROUPS
    ]


def prepare(model: LlavaForConditionalGeneration, heads: PatchHeads, seed: int) -> None:
    """Convolution-like start, filters from a sample of patches."""
    torch.manual_seed(seed)
    sample = torch.cat([batch.patches().flatten(0, 1) for step in range(4) for batch in draw(seed, step)])
    initialise(model.model.vision_tower, sample)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)


def dense_losses(heads: PatchHeads, features: tuple[torch.Tensor, ...], batch: PatchBatch) -> dict[str, torch.Tensor]:
    """Mean losses over labelled patches by name, as in `WEIGHTS`; `features` as `encode` returns them."""
    last, for_mask, for_frame = features
    inked = torch.from_numpy(batch.labels["digit"] > 0)
    weight = torch.where(inked, 1.0, BACKGROUND).flatten()
    losses = {}
    for name, head in heads.labels.items():
        target = torch.from_numpy(batch.labels[name]).flatten()
        each = F.cross_entropy(head(last).flatten(0, 1), target, ignore_index=IGNORE, reduction="none")
        labelled = weight * (target != IGNORE)
        losses[name] = (each * labelled).sum() / labelled.sum().clamp_min(1)
    ink, shape = (torch.from_numpy(x).float() / 255 for x in (batch.ink, batch.shape))
    losses["mask"] = F.binary_cross_entropy_with_logits(heads.mask(for_mask), ink)
    losses["frame"] = F.mse_loss(heads.frame(for_frame)[inked], torch.from_numpy(batch.frame)[inked])
    losses["shape"] = F.binary_cross_entropy_with_logits(heads.shape(last)[inked], shape[inked])
    return losses


def backward(model: LlavaForConditionalGeneration, heads: PatchHeads, batches: list[PatchBatch]) -> dict[str, float]:
    """Gradients of the weighted losses; returns the losses."""
    totals = dict.fromkeys(WEIGHTS, 0.0)
    for batch, (_, _, share) in zip(batches, GROUPS, strict=True):
        features = encode(model.model.vision_tower, batch.patches(), torch.from_numpy(batch.cells))
        losses = dense_losses(heads, features, batch)
        (share * torch.stack([WEIGHTS[name] * loss for name, loss in losses.items()]).sum()).backward()
        for name, loss in losses.items():
            totals[name] += share * float(loss.detach())
    return totals


@torch.no_grad()
def measure(model: LlavaForConditionalGeneration, heads: PatchHeads, scenes: int = 64) -> dict[str, float]:
    """Held-out accuracy per digit (its patches vote) and of background patches, on all 576 patches."""
    rng = np.random.default_rng(99)
    right: dict[str, list[float]] = {k: [] for k in (*LABELS, "background")}
    for k in range(0, scenes, 8):
        drawn = [training_scene(rng, 1 + (k + j) % MAX_DIGITS, held_out=True) for j in range(8)]
        batch = patch_batch(drawn, GRID * GRID, rng)
        features = encode(model.model.vision_tower, batch.patches(), torch.from_numpy(batch.cells))[0]
        answers = {name: head(features) for name, head in heads.labels.items()}
        for row, scene in enumerate(drawn):
            digit = batch.labels["digit"][row]
            right["background"].append(float((answers["digit"][row].argmax(-1).numpy() == 0)[digit == 0].mean()))
            for d in scene.digits:
                at = digit == d.value + 1
                for name in LABELS:
                    label = int(batch.labels[name][row][at][0])
                    if label != IGNORE:
                        vote = answers[name][row][torch.from_numpy(at)].log_softmax(-1).mean(0)
                        right[name].append(float(vote.argmax() == label))
    return {f"held_{k}": float(np.mean(v)) for k, v in right.items()}
