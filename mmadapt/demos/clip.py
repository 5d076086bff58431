"""Few-shot CLIP from end to end: compare methods, keep one adapter, load it elsewhere, report.

The backbone has seen generated scenes with printed digits only; the task is real handwriting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch

import mmadapt as mm
from mmadapt.core.table import Table
from mmadapt.demos import kept
from mmadapt.tasks import few_shot
from mmadapt.tasks.scenes import DIGITS, augment, handwriting, object_names, scenes, to_bytes
from mmadapt.train.cache import data_digest

BACKBONE = "tiny/clip"
TEMPLATES = ("a photo of a {}", "an image of a {}", "a picture of the {}", "a {}")
NAMES = tuple(f"digit {name}" for name in DIGITS)
ADAPTER = mm.Bottleneck(16)
AT = "vision.layers[*].mlp"
VIEWS = 16


def task(test_images: int = 1000) -> tuple[few_shot.Labelled, few_shot.Labelled]:
    """Handwritten digits on photographs: images to draw shots from, and test images with other scans."""
    train = few_shot.labelled(*handwriting("train", 900, seed=700), NAMES)
    return train, few_shot.labelled(*handwriting("test", test_images, seed=5), NAMES)


def source(images: int = 500) -> few_shot.Source:
    """What the backbone was trained for, in combinations it never saw: 22 objects in scenes."""
    pictures, attributes = scenes(images, seed=99, split="held_out_triples")
    return few_shot.Source(few_shot.labelled(pictures, attributes[:, 0], object_names()), TEMPLATES)


def variations(images: numpy.ndarray, seed: int) -> numpy.ndarray:
    """The same digits tilted, moved and in other colours; uint8 (N, H, W, 3) to the same."""
    scaled = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return to_bytes(augment(scaled, torch.Generator().manual_seed(seed)))


def run(
    out: Path, shots: int = 16, seeds: tuple[int, ...] = (1,), show: Callable[[str], None] = print
) -> few_shot.Comparison:
    """Run the whole job and write `report.html`, `results.json` and the adapter into `out`."""
    started = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    clip = mm.load(BACKBONE)
    train, test = task()
    show(f"{clip!r}\n{len(test.names)} classes, {shots} shots each, {len(test)} test images\n")
    comparison = few_shot.compare(
        clip,
        train,
        test,
        templates=TEMPLATES,
        shots=(shots,),
        seeds=seeds,
        source=source(),
        augment=variations,
        views=VIEWS,
        show=show,
    )
    show("")
    before, attachment, history = _keep(clip, train, test, shots, seeds[0], out)
    show(f"saved {out / 'adapter'}: {kept.size(out / 'adapter')}, accuracy {100 * before:.2f} %")
    kept.confirm("clip", out / "adapter", _verdict(before, test))
    show(f"loaded into a fresh backbone in a second process: accuracy {100 * before:.2f} %, equal")
    (out / "results.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n")
    report = _report(out, clip, comparison, attachment, history, train, test, before)
    show(f"report: {report}\n{time.perf_counter() - started:.0f} s in all")
    return comparison


def verify(adapter: Path) -> str:
    """Score a saved adapter on the demo's test images, in a fresh backbone; one line of JSON."""
    clip = mm.load(BACKBONE)
    mm.load_adapter(clip, adapter)
    _, test = task()
    return json.dumps(_verdict(_accuracy(clip, test), test))


def _verdict(accuracy: float, test: Any) -> dict[str, Any]:
    return {"accuracy": accuracy, "data": data_digest(test.images)}


def _keep(
    clip: mm.Backbone, train: Any, test: Any, shots: int, seed: int, out: Path
) -> tuple[float, mm.Attachment, mm.History]:
    """Train the adapter that is kept, by hand, as the tutorial does."""
    support, _ = few_shot.sample(train, shots, seed)
    classifier = few_shot.zero_shot(clip, NAMES, TEMPLATES)
    views = few_shot.vary(support, variations, VIEWS, seed)
    pixels = few_shot.pixels(clip, views.images)
    labels = torch.from_numpy(views.labels)

    def loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, targets = batch
        logits = classifier(model.encode_image(images))
        return torch.nn.functional.cross_entropy(logits, targets)

    attachment = mm.attach(clip, ADAPTER, name="handwriting", at=AT, seed=seed, replace=True)
    history = mm.fit(
        clip,
        (pixels, labels),
        loss=loss,
        steps=200,
        lr=5e-3,
        batch_size=40,
        seed=seed,
        progress=False,
    )
    accuracy = _accuracy(clip, test)
    mm.save(clip, out / "adapter", "handwriting", metrics={"handwriting": accuracy, "shots": shots})
    return accuracy, attachment, history


def _accuracy(clip: mm.Backbone, test: Any) -> float:
    classifier = few_shot.zero_shot(clip, NAMES, TEMPLATES)
    logits = classifier(few_shot.embed(clip, test.images))
    return few_shot.score(logits, torch.from_numpy(test.labels)).accuracy


def _report(
    out: Path,
    clip: mm.Backbone,
    comparison: few_shot.Comparison,
    attachment: mm.Attachment,
    history: mm.History,
    train: Any,
    test: Any,
    accuracy: float,
) -> Path:
    from mmadapt.ui.page import Page, image_grid, loss_figure

    page = Page("Few-shot CLIP with adapters")
    page.text(
        f"{BACKBONE}, a small CLIP trained on generated scenes, meets real handwritten digits set "
        "on photographs. Every method below gets the same few images, and tilted, moved and recoloured "
        "views of them; the test images show other scans on other parts of the photographs."
    )
    seen = source(16)
    page.figure(
        image_grid(seen.data.images, [object_names()[i] for i in seen.data.labels]),
        "What the backbone was trained for (combinations of object, colour and background it never saw).",
    )
    page.figure(
        image_grid(train.images[:16], [NAMES[i] for i in train.labels[:16]]),
        "The new task: scikit-learn's handwritten digits on crops of scikit-image's photographs.",
    )
    page.heading("Results")
    page.figure(comparison.plot(), "Test accuracy; lines show the standard deviation over seeds.")
    page.table(comparison.table)
    page.text(
        "Read across: an adapter that is on may cost more of the source task than full fine-tuning "
        "does; taken away, it costs nothing, since the backbone was never changed."
    )
    page.heading("The adapter that was kept")
    page.table(attachment.summary())
    page.figure(loss_figure({repr(ADAPTER): history.losses}), "Training loss.")
    page.table(_confusions(clip, test))
    page.code(
        "import mmadapt as mm\n\n"
        f'clip = mm.load("{BACKBONE}")\n'
        f'mm.load_adapter(clip, "./{out.name}/adapter")   # {100 * accuracy:.1f} % on the test images'
    )
    return page.write(out / "report.html")


def _confusions(clip: mm.Backbone, test: Any) -> Table:
    """The pairs of classes that are mistaken for each other most, with the adapter on."""
    classifier = few_shot.zero_shot(clip, NAMES, TEMPLATES)
    said = classifier(few_shot.embed(clip, test.images)).argmax(1).tolist()
    counts: dict[tuple[int, int], int] = {}
    for truth, answer in zip(test.labels.tolist(), said, strict=True):
        if truth != answer:
            counts[truth, answer] = counts.get((truth, answer), 0) + 1
    worst = sorted(counts.items(), key=lambda item: -item[1])[:5]
    table = Table(("it was", "taken for", "times"), title="Most frequent mistakes")
    table.rows = [(NAMES[truth], NAMES[answer], times) for (truth, answer), times in worst]
    return table
