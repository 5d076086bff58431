"""The few-shot task: data, classifier, features, caches, methods and their table."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import AttachError, BackboneError, DataError
from mmadapt.tasks import few_shot
from mmadapt.tasks.few_shot.classifier import CosineHead
from mmadapt.tasks.scenes import DIGITS, handwriting, object_names, scenes

NAMES = tuple(f"digit {name}" for name in DIGITS)
TEMPLATES = ("a photo of a {}", "a {}")


@pytest.fixture(scope="module")
def clip():
    return mm.load("tiny/clip")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMADAPT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def digits():
    return few_shot.labelled(*handwriting("train", 300, seed=1), NAMES)


def grey(n=4):
    return np.full((n, 32, 32, 3), 128, dtype=np.uint8)


# -- data ---------------------------------------------------------------------------------------


def test_labels_and_names_are_checked_against_each_other():
    with pytest.raises(DataError, match="4 images but 3 labels"):
        few_shot.labelled(grey(), [0, 1, 0], ("a", "b"))
    with pytest.raises(DataError, match="labels run from 0 to 2, but there are 2 class names"):
        few_shot.labelled(grey(), [0, 1, 2, 0], ("a", "b"))
    with pytest.raises(DataError, match="labels are float64"):
        few_shot.labelled(grey(), [0.0, 1.0, 1.0, 0.0], ("a", "b"))
    with pytest.raises(DataError, match="class names repeat: a"):
        few_shot.labelled(grey(), [0, 1, 1, 0], ("a", "a"))
    with pytest.raises(DataError, match="there are no images"):
        few_shot.labelled(grey(0), np.zeros(0, dtype=int), ("a", "b"))


def test_one_class_is_no_task():
    with pytest.raises(DataError, match="all 4 images belong to one class, 'b'"):
        few_shot.labelled(grey(), [1, 1, 1, 1], ("a", "b"))


def test_sample_draws_k_of_each_class_and_disjoint_validation(digits):
    support, validation = few_shot.sample(digits, 4, seed=3)
    assert np.bincount(support.labels).tolist() == [4] * 10
    assert np.bincount(validation.labels).tolist() == [4] * 10
    seen = {image.tobytes() for image in support.images}
    assert not seen & {image.tobytes() for image in validation.images}
    again, _ = few_shot.sample(digits, 4, seed=3)
    other, _ = few_shot.sample(digits, 4, seed=4)
    assert np.array_equal(support.images, again.images)
    assert not np.array_equal(support.images, other.images)


def test_validation_is_at_most_four_a_class(digits):
    _, validation = few_shot.sample(digits, 16, seed=0)
    assert len(validation) == 40
    assert len(few_shot.sample(digits, 1, seed=0, validation=0)[1]) == 0


def test_too_many_shots_name_the_classes_that_fall_short():
    data = few_shot.labelled(grey(5), [0, 0, 0, 1, 1], ("many", "few"))
    with pytest.raises(
        DataError, match=r"need 4 images of every class; too few of many \(3\), few \(2\)"
    ):
        few_shot.sample(data, 2)
    with pytest.raises(DataError, match="shots is 0"):
        few_shot.sample(data, 0)


# -- images -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((32, 32), np.uint8), r"shape \(32, 32\)"),
        (np.zeros((32, 32, 4), np.uint8), "drop the alpha channel"),
        (np.zeros((3, 32, 32), np.uint8), "channels come last"),
        (np.zeros((32, 32, 3), np.float32), "expected uint8 from 0 to 255"),
        (np.full((32, 32, 3), 300, np.int64), "values 300 to 300"),
        (torch.zeros(3, 32, 32), "expected a PIL image or a uint8 array"),
        ("photo.png", "image 0 is a str"),
    ],
)
def test_an_image_of_the_wrong_kind_is_named(clip, image, words):
    with pytest.raises(DataError, match=words):
        clip.preprocess([image])


def test_an_empty_list_of_images_is_an_error(clip):
    with pytest.raises(DataError, match="no image was given"):
        clip.preprocess([])


def test_pil_images_and_arrays_give_the_same_pixels(clip):
    from PIL import Image

    images, _ = scenes(3, seed=1)
    assert torch.equal(
        clip.preprocess(images), clip.preprocess([Image.fromarray(i) for i in images])
    )
    assert clip.preprocess(images[0]).shape == (1, 3, 32, 32)


def test_deep_pil_images_are_refused(clip):
    from PIL import Image

    with pytest.raises(DataError, match="more than 8 bits"):
        clip.preprocess(Image.new("I;16", (32, 32)))


# -- classifier ---------------------------------------------------------------------------------


def test_zero_shot_head_is_the_renormalised_mean_of_unit_template_embeddings(clip):
    classifier = few_shot.zero_shot(clip, NAMES, TEMPLATES)
    with torch.no_grad():
        per_template = [
            F.normalize(clip.model.encode_text(clip.tokenize([t.format(n) for n in NAMES])), dim=-1)
            for t in TEMPLATES
        ]
    expected = F.normalize(sum(per_template), dim=-1)
    assert torch.allclose(classifier.head.weight, expected, atol=1e-6)


def test_zero_shot_head_equals_open_clips_own(clip):
    import open_clip

    mine = few_shot.zero_shot(clip, NAMES, TEMPLATES).head.weight
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenize, NAMES, TEMPLATES)
    assert torch.allclose(mine, theirs.T, atol=1e-6)


def test_classify_names_what_it_sees(clip):
    pictures, attributes = scenes(64, seed=3, split="seen")
    classifier = few_shot.zero_shot(clip, object_names(), TEMPLATES)
    said = classifier.classify(pictures)
    right = [
        answer == object_names()[truth]
        for answer, truth in zip(said, attributes[:, 0], strict=True)
    ]
    assert sum(right) > 48  # chance is 3 of 64


@pytest.mark.parametrize(
    ("names", "templates", "words"),
    [
        (("a", "b"), ("a photo",), "does not hold one"),
        (("a", "b"), (), "no template"),
        (("a", "a"), ("{}",), "class names repeat"),
        (("a",), ("{}",), "at least two"),
    ],
)
def test_names_and_templates_are_checked(clip, names, templates, words):
    with pytest.raises(DataError, match=words):
        few_shot.zero_shot(clip, names, templates)


def test_a_text_that_fills_the_context_warns(clip):
    with pytest.warns(UserWarning, match="fill the tokenizer's 20 tokens"):
        few_shot.zero_shot(clip, ("red " * 30, "blue"), ("{}",))


def test_a_bare_module_is_refused(clip):
    with pytest.raises(
        BackboneError, match="needs a Backbone with preprocess and tokenize, got CLIP"
    ):
        few_shot.zero_shot(clip.model, NAMES)


# -- features -----------------------------------------------------------------------------------


def test_features_are_those_of_the_bare_backbone_and_come_from_disk_again(clip, own_cache):
    images, _ = scenes(5, seed=2)
    first = few_shot.features(clip, images)
    files = list(own_cache.rglob("*.safetensors"))
    assert len(files) == 1
    assert torch.equal(first, few_shot.embed(clip, images))
    before = files[0].stat().st_mtime_ns
    assert torch.equal(few_shot.features(clip, images), first)
    assert files[0].stat().st_mtime_ns == before
    few_shot.features(clip, images[:4])
    assert len(list(own_cache.rglob("*.safetensors"))) == 2


def test_a_damaged_cache_file_is_made_again(clip, own_cache):
    images, _ = scenes(3, seed=2)
    first = few_shot.features(clip, images)
    next(own_cache.rglob("*.safetensors")).write_bytes(b"not a file")
    assert torch.equal(few_shot.features(clip, images), first)


def test_other_weights_get_other_features(clip):
    images, _ = scenes(3, seed=2)
    first = few_shot.features(clip, images)
    other = mm.load("tiny/clip")
    with torch.no_grad():
        other.model.visual.proj.mul_(1.5)
    assert torch.allclose(few_shot.features(other, images), first * 1.5, atol=1e-5)


def test_features_are_refused_while_something_upstream_acts(clip):
    images, _ = scenes(2, seed=2)
    mm.attach(clip, mm.Bottleneck(4), at="vision.layers[1].mlp")
    try:
        with pytest.raises(
            AttachError, match=r"an active adapter changes them at vision.layers\[1\].mlp"
        ):
            few_shot.features(clip, images)
        with mm.disabled(clip):
            few_shot.features(clip, images)
        clip.model.visual.proj.requires_grad_(True)
        with mm.disabled(clip), pytest.raises(AttachError, match=r"first 'visual.proj'"):
            few_shot.features(clip, images)
    finally:
        mm.detach(clip)


def test_a_pooled_adapter_may_act_and_replays_on_cached_features(clip):
    images, _ = scenes(6, seed=2)
    mm.attach(clip, mm.ClipAdapter(ratio=0.5))
    try:
        frozen = few_shot.features(clip, images)
        with torch.no_grad():
            assert torch.allclose(
                few_shot.adapted(clip, frozen), few_shot.embed(clip, images), atol=1e-6
            )
            assert not torch.allclose(frozen, few_shot.embed(clip, images), atol=1e-3)
    finally:
        mm.detach(clip)


# -- Tip-Adapter --------------------------------------------------------------------------------


@pytest.fixture
def head():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, generator=generator)
    return few_shot.ZeroShotClassifier(None, CosineHead(weight, 20.0), ("a", "b", "c")).eval()


def test_a_filled_cache_votes_by_the_published_formula(head):
    generator = torch.Generator().manual_seed(1)
    shots, query = torch.randn(6, 8, generator=generator), torch.randn(4, 8, generator=generator)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    base = head(query)
    attachment = mm.attach(head, mm.TipAdapter(entries=8, residual=2.0, sharpness=3.0))
    assert torch.equal(head(query), base)  # an empty cache casts no vote
    few_shot.remember(attachment, shots, labels)
    affinity = F.normalize(query, dim=-1) @ F.normalize(shots, dim=-1).T
    expected = base + 2.0 * torch.exp(-3.0 * (1 - affinity)) @ F.one_hot(labels, 3).float()
    assert torch.allclose(head(query), expected, atol=1e-6)


def test_remember_says_what_does_not_fit(head):
    attachment = mm.attach(head, mm.TipAdapter(entries=2))
    with pytest.raises(
        DataError, match="3 embeddings of 8 numbers do not fit a cache of 2 entries"
    ):
        few_shot.remember(attachment, torch.randn(3, 8), torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match="do not fit a cache of 2 entries of 8"):
        few_shot.remember(attachment, torch.randn(2, 5), torch.tensor([0, 1]))
    with pytest.raises(DataError, match="labels run from 0 to 3"):
        few_shot.remember(attachment, torch.randn(2, 8), torch.tensor([0, 3]))
    for bad in (math.nan, 0.0):
        with pytest.raises(DataError, match="zero vector"):
            few_shot.remember(attachment, torch.full((2, 8), bad), torch.tensor([0, 1]))
    assert (next(iter(attachment.layers.values())).labels == -1).all()


def test_search_takes_the_best_on_validation_and_refuses_the_cache_itself(head):
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(3, 8, generator=generator)
    labels = torch.arange(3).repeat(5)
    shots = centres[labels] + 0.1 * torch.randn(15, 8, generator=generator)
    held = centres[labels] + 0.1 * torch.randn(15, 8, generator=generator)
    attachment = mm.attach(head, mm.TipAdapter(entries=15))
    few_shot.remember(attachment, shots, labels)
    residual, sharpness, accuracy = few_shot.search(head, attachment, held, labels)
    assert accuracy == 1.0 and residual > 0
    layer = next(iter(attachment.layers.values()))
    assert (float(layer.residual), float(layer.sharpness)) == pytest.approx((residual, sharpness))
    assert few_shot.score(head(held), labels).accuracy == accuracy
    with pytest.raises(DataError, match="every validation image is in the cache already"):
        few_shot.search(head, attachment, shots, labels)


# -- scores and comparisons ---------------------------------------------------------------------


def test_the_interval_is_wilsons():
    low, high = few_shot.Score(80, 100).interval
    assert (low, high) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert few_shot.Score(0, 10).interval[0] == 0.0


def test_score_refuses_what_does_not_match():
    with pytest.raises(DataError, match="expected"):
        few_shot.score(torch.zeros(3, 2), torch.zeros(2))


def test_compare_runs_every_method_and_leaves_the_backbone_as_it_came(clip, digits):
    test = few_shot.labelled(*handwriting("test", 60, seed=2), NAMES)
    pictures, attributes = scenes(40, seed=9)
    source = few_shot.Source(
        few_shot.labelled(pictures, attributes[:, 0], object_names()), TEMPLATES
    )
    before = {key: value.clone() for key, value in clip.model.state_dict().items()}
    lines = []
    comparison = few_shot.compare(
        clip, digits, test, templates=TEMPLATES, shots=(2,), seeds=(1, 2), source=source, steps=3,
        show=lines.append,
    )  # fmt: skip
    assert [result.method for result in comparison.results] == list(few_shot.METHODS)
    assert len(lines) == 1 + len(few_shot.METHODS)
    for result in comparison.results:
        assert len(result.accuracies) == 2
        adapted = result.outcomes[0].source_off is not None
        assert (
            result.source("off") == comparison.original
        ) == adapted  # taken away, nothing is lost
    assert comparison.find("Bottleneck", 2).outcomes[0].parameters == 4 * (2 * 128 * 16 + 16 + 128)
    assert comparison.find("LoRA (q, v)", 2).outcomes[0].parameters == 8 * 8 * (128 + 128)
    assert comparison.find("CLIP-Adapter", 2).outcomes[0].parameters == 2 * 128 * 128 // 4
    assert comparison.find("Tip-Adapter-F", 2).outcomes[0].parameters == 20 * 128
    after = clip.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not mm.attachments(clip)
    assert "<table>" in comparison._repr_html_() and "Tip-Adapter-F" in repr(comparison)
    comparison.plot().savefig(__import__("io").BytesIO(), format="png")


def test_compare_checks_everything_before_it_runs(clip, digits):
    with pytest.raises(
        DataError, match=r"unknown method 'Bottlneck'.*(\n.*)?did you mean 'Bottleneck'"
    ):
        few_shot.compare(clip, digits, digits, methods=("Bottlneck",))
    with pytest.raises(DataError, match="need 1004 images of every class"):
        few_shot.compare(clip, digits, digits, shots=(1000,))
    other = few_shot.labelled(grey(), [0, 1, 0, 1], ("a", "b"))
    with pytest.raises(DataError, match="name other classes"):
        few_shot.compare(clip, digits, other)
