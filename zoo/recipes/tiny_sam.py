"""Train `tiny/sam`: a small transformers SamModel that knows the generated scenes and nothing else.

    python zoo/recipes/tiny_sam.py [--out zoo/tiny/sam] [--work DIR] [--steps N]

One CPU thread, resumes from the last checkpoint in the work directory. The shapes in
`HELD_OUT_SHAPES` never enter training.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from training import Run, options_of, save_halves, train

from mmadapt.tasks.segment.clicks import boxes_around, click_on_error, first_clicks
from mmadapt.tasks.segment.model import decode, embed
from mmadapt.tasks.segment.scenes import HELD_OUT_SHAPES, LEAST_AREA, SIDE, draw_scenes
from mmadapt.tasks.segment.segmenter import DEVIATION, MEAN

SEED = 0
BATCH = 16
STEPS = 7000
HORIZON, COOL_DOWN = 12273, 2000  # steps: a longer cosine, cut short by a linear end
PEAK_LEARNING_RATE = 1.2e-3
SMALL = {"scale": (0.5, 1.0), "least": 150}  # until the rate cools down, smaller things are shown

PATCH, WIDTH, LAYERS, CHANNELS = 8, 128, 4, 64
VISION = {
    "hidden_size": WIDTH, "output_channels": CHANNELS, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "image_size": SIDE, "patch_size": PATCH, "window_size": 4,
    "global_attn_indexes": [1, 3], "num_pos_feats": CHANNELS // 2,
    "initializer_range": 0.02,  # its default, 1e-10, leaves an encoder that gives a constant
}  # fmt: skip
PROMPTS = {
    "hidden_size": CHANNELS, "image_size": SIDE, "patch_size": PATCH, "mask_input_channels": 16,
}  # fmt: skip
DECODER = {
    "hidden_size": CHANNELS, "mlp_dim": 2 * CHANNELS, "num_hidden_layers": 2,
    "num_attention_heads": 4, "iou_head_hidden_dim": CHANNELS,
}  # fmt: skip


def build_model() -> torch.nn.Module:
    """The untrained model: positions of patches as sines and cosines, and of prompts of low frequency.

    transformers draws the prompts' frequencies 64 times wider than the authors of SAM do, so that two
    neighbouring pixels have nothing in common.
    """
    from transformers import SamConfig, SamModel

    model = SamModel(
        SamConfig(vision_config=VISION, prompt_encoder_config=PROMPTS, mask_decoder_config=DECODER)
    )
    frequencies = model.shared_image_embedding.positional_embedding
    frequencies.data.normal_()
    frequencies.requires_grad_(False)
    side, quarter = SIDE // PATCH, WIDTH // 4
    frequency = math.pi / 2 / 30 ** (torch.arange(quarter) / quarter)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place[..., None] * 4 / side * frequency for place in (y, x)]
    waves = [wave(angle) for angle in angles for wave in (torch.sin, torch.cos)]
    model.vision_encoder.pos_embed.data[0] = torch.cat(waves, -1)
    return model


def normalised(images: Tensor) -> Tensor:
    """Images in [0, 1], (n, 3, side, side), as `Segmenter.prepare` gives them."""
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, DEVIATION))
    return (images * 255 - mean) / deviation


# Losses


def mask_losses(low: Tensor, overlaps: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Dice plus cross-entropy of each answer, the error of the expected overlap, and full logits.

    low (P, K, s, s), overlaps (P, K), truth bool (P, side, side) → (P, K), (P, K),
    (P, K, side, side).
    """
    logits = F.interpolate(low, (SIDE, SIDE), mode="bilinear", align_corners=False)
    target = truth[:, None].float().expand_as(logits)
    chance = logits.sigmoid()
    both, either = (chance * target).sum((2, 3)), (chance + target).sum((2, 3))
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    loss = 1 - (2 * both + 1) / (either + 1) + 2 * cross_entropy.mean((2, 3))
    error = (overlaps - intersection_over_union(logits.detach() > 0, truth[:, None])) ** 2
    return loss, error, logits


def intersection_over_union(found: Tensor, truth: Tensor) -> Tensor:
    """Of masks (…, H, W), over the last two axes."""
    return (found & truth).sum((-2, -1)) / (found | truth).sum((-2, -1)).clamp(min=1)


class Training(Run):
    """Every scene is encoded once; its things are asked for by a box, a click, and further clicks."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(SEED)
        modules = {"model": build_model()}
        super().__init__(modules, steps, PEAK_LEARNING_RATE, SEED, HORIZON, COOL_DOWN)

    def losses(self) -> dict[str, Tensor]:
        early = self.step < self.steps - self.cool_down
        images, masks = draw_scenes(BATCH, self.generator, **(SMALL if early else {}))
        asked = masks.any(-1).any(-1).nonzero()
        truth = masks[asked[:, 0], asked[:, 1]]
        embeddings = embed(self.model, normalised(images))[asked[:, 0]]
        boxed, box_error, _ = mask_losses(
            *decode(self.model, embeddings, boxes=boxes_around(truth, self.generator)), truth
        )
        # a click may mean several things, so the best of three answers counts; in turns with one
        several = self.step % 2 == 0
        points, labels = first_clicks(truth, self.generator)
        low, overlaps = decode(self.model, embeddings, points, labels, several=several)
        clicked, click_error, logits = mask_losses(low, overlaps, truth)
        best = clicked.detach().argmin(1)
        total = boxed.mean() + clicked.amin(1).mean() + box_error.mean() + click_error.mean()
        again = boxed.new_zeros(())
        if self.step % 4 >= 2:  # a second click where the first answer is wrong, with that answer
            every = torch.arange(len(best))
            answer = logits.detach()[every, best] > 0
            more = click_on_error(answer, truth, self.generator)
            points, labels = torch.cat([points, more[0]], 1), torch.cat([labels, more[1]], 1)
            before = low.detach()[every, best, None] if self.step % 8 >= 4 else None
            found = decode(self.model, embeddings, points, labels, masks=before)
            loss, error, _ = mask_losses(*found, truth)
            again = loss.mean()
            total = total + again + error.mean()
        return {
            "total": total,
            "box": boxed.mean(),
            "click": clicked.amin(1).mean(),
            "again": 2 * again,  # every second step
        }

    def averaged_model(self) -> torch.nn.Module:
        model = build_model()
        model.load_state_dict(self.averaged())
        return model.eval()


# Measurement


@torch.no_grad()
def accuracy(model: torch.nn.Module, count: int, seed: int, **scenes: Any) -> dict[str, float]:
    """Mean overlap (IoU) on new scenes, for each way to ask; `scenes` as `draw_scenes` takes them."""
    generator = torch.Generator().manual_seed(1_000_000 + seed)
    found: dict[str, list[Tensor]] = {}
    for start in range(0, count, 64):
        images, masks = draw_scenes(min(64, count - start), generator, **scenes)
        asked = masks.any(-1).any(-1).nonzero()
        truth = masks[asked[:, 0], asked[:, 1]]
        embeddings = embed(model, normalised(images))[asked[:, 0]]
        for name, reached in _ask(model, embeddings, truth, generator).items():
            found.setdefault(name, []).append(reached)
    return {name: round(float(torch.cat(values).mean()), 4) for name, values in found.items()}


def _ask(
    model: torch.nn.Module, embeddings: Tensor, truth: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Overlaps (P,) that a box, a click, and a second click reach."""

    def answer(several: bool = False, **prompt: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, overlaps = decode(model, embeddings, several=several, **prompt)
        found = F.interpolate(low, (SIDE, SIDE), mode="bilinear", align_corners=False) > 0
        return found[:, 0], intersection_over_union(found, truth[:, None]), overlaps

    _, boxed, _ = answer(boxes=boxes_around(truth, generator))
    points, labels = first_clicks(truth, generator)
    first, clicked, _ = answer(points=points, labels=labels)
    _, three, expected = answer(True, points=points, labels=labels)
    more = click_on_error(first, truth, generator)
    points, labels = torch.cat([points, more[0]], 1), torch.cat([labels, more[1]], 1)
    _, again, _ = answer(points=points, labels=labels)
    return {
        "box": boxed[:, 0],
        "point": clicked[:, 0],
        "point_chosen_of_three": three.gather(1, expected.argmax(1, keepdim=True))[:, 0],
        "point_best_of_three": three.amax(1),
        "two_points": again[:, 0],
    }


def measure(run: Training, count: int = 2000) -> dict:
    """Measure the averaged fp16 weights on scenes that training never drew."""
    model = run.averaged_model()
    return {
        "iou": {
            "seen": accuracy(model, count, 0),
            "held_out_shapes": accuracy(model, count, 0, kind="held_out_shapes"),
            "small_things": accuracy(model, count, 0, **SMALL),
        },
        "n": count,
        "seed": 0,
        "definitions": {
            "iou": "mean over the things of n new scenes of intersection over union, "
            f"in pixels; things of fewer than {LEAST_AREA} visible pixels are not asked for",
            "box": "the box around the thing, each side moved by N(0, 0.05²) of its extent",
            "point": "one click drawn on the thing, the single answer",
            "point_chosen_of_three": "the same click, of three answers the one of which the model "
            "expects most",
            "point_best_of_three": "the same click, the best of three answers",
            "two_points": "a second click where the first answer is wrong",
            "seen": "the kinds of things that training shows",
            "held_out_shapes": f"scenes of {' and '.join(f'{s}s' for s in HELD_OUT_SHAPES)}, which it does not",
            "small_things": f"scenes with smaller things, asked for from {SMALL['least']} pixels on",
        },
        "training_loss": "Dice plus twice cross-entropy; of three answers to a click the best one "
        "counts; mask prompts were given with the second click",
        "weights": "averaged over steps, after rounding to fp16",
        "selection": "one seed, last step. The length of the run and the size of the things were "
        "settled looking at 192 other scenes",
        "training_seed": SEED,
        "steps": run.steps,
        "batch": BATCH,
        "cpu_seconds": round(run.cpu_seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": torch.__version__,
    }


def look(run: Run) -> str:
    """Overlaps on a few new scenes."""
    assert isinstance(run, Training)
    found = accuracy(run.averaged_model(), 192, 1)
    return "IoU " + " ".join(f"{name} {value:.3f}" for name, value in found.items())


def write(run: Training, out: Path) -> None:
    """Write weights, configuration, preprocessing and measurements."""
    from transformers import SamImageProcessor

    model = run.averaged_model()
    save_halves(model, out)
    SamImageProcessor(
        size={"longest_edge": SIDE}, pad_size={"height": SIDE, "width": SIDE},
        mask_size={"longest_edge": SIDE // 2}, image_mean=[m / 255 for m in MEAN],
        mask_pad_size={"height": SIDE // 2, "width": SIDE // 2},
        image_std=[d / 255 for d in DEVIATION],
    ).save_pretrained(out)  # fmt: skip
    metrics = measure(run)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics["iou"], indent=2))


def main() -> None:
    options = options_of("sam", STEPS)
    run = Training(options.steps)
    train(run, options.work / "checkpoint.pt", look)
    write(run, options.out)


if __name__ == "__main__":
    main()
