"""How an adapter wants its images: kept in its file, applied where it acts, and refused in conflict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from snapshot import randomise

import mmadapt as mm
from mmadapt.tasks import segment
from mmadapt.tasks import volume as volumes
from mmadapt.tasks.volume import Volume

Refused = mm.errors.DataError
HOUNSFIELD = numpy.random.RandomState(0).randint(-900, 900, (3, 12, 20)).astype(numpy.int16)


def adapted(**said: Any) -> Any:
    model: Any = BACKBONES["hf_sam"].fresh()
    randomise(mm.attach(model, mm.MedSA(), name="liver", seed=1), 0.3)
    if said:
        segment.set_input(model, **said)
    return model


# -- what is said --------------------------------------------------------------------------------


def test_what_an_adapter_says_goes_with_its_file(tmp_path: Path) -> None:
    model = adapted(window="ct abdomen", depth=12)
    segment.set_input(model, "liver", window=(-54, 247.0))
    mm.save(model, tmp_path / "liver")
    manifest = json.loads((tmp_path / "liver" / "adapter.json").read_text())
    assert manifest["input"] == {"window": [-54.0, 247.0], "depth": 12}
    other: Any = BACKBONES["hf_sam"].fresh()
    assert segment.input_of(other) == segment.Input()
    mm.load_adapter(other, tmp_path / "liver")
    assert segment.input_of(other) == segment.Input((-54.0, 247.0), 12)
    with mm.disabled(other):
        assert segment.input_of(other) == segment.Input()


def test_what_others_wrote_is_kept() -> None:
    model = adapted()
    (attachment,) = mm.attachments(model).values()
    attachment.metadata["input"] = {"click_order": "row_col", "scanner": "3 T"}
    segment.set_input(model, window="mr")
    assert attachment.metadata["input"] == {
        "click_order": "row_col",
        "scanner": "3 T",
        "window": "mr",
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"windw": "mr"}, "no input is named 'windw'; did you mean 'window'"),
        ({"window": "ct liver"}, "no window is named 'ct liver'"),
        ({"window": (5, 5)}, "goes from 5 to 5, which is no range"),
        ({"window": (0, float("nan"))}, "which is no range"),
        ({"window": 7}, "expected a name or two numbers"),
        ({"window": (1, 2, 3)}, "expected a name or two numbers"),
        ({"depth": 0}, "depth is 0, expected a whole number"),
        ({"depth": 2.5}, "depth is 2.5"),
        ({"normalise": "z"}, "normalise is 'z', expected 'sam' or '0-1'"),
        ({"click_order": "zyx"}, "expected 'xy' or 'row_col'"),
    ],
)
def test_what_has_no_meaning_is_refused_and_nothing_written(said: dict, message: str) -> None:
    model = adapted(depth=3)
    with pytest.raises(Refused) as caught:
        segment.set_input(model, **said)
    text = f"{caught.value.message}; {caught.value.hint}"
    assert message in text
    assert segment.input_of(model) == segment.Input(depth=3)


def test_a_file_that_says_nonsense_is_named() -> None:
    model = adapted()
    (attachment,) = mm.attachments(model).values()
    attachment.metadata["input"] = {"window": "ct liver"}
    with pytest.raises(Refused, match="the input of 'liver': no window is named"):
        segment.Segmenter(model).encode(numpy.zeros((4, 4, 3), numpy.uint8))
    attachment.metadata["input"] = "ct abdomen"
    with pytest.raises(Refused, match="expected a table of names"):
        segment.input_of(model)


def test_two_that_act_together_must_agree() -> None:
    model = adapted(window="mr")
    mm.attach(model, mm.Bottleneck(2, at="vision.layers[*].mlp"), name="spleen")
    segment.set_input(model, "spleen", window="other")  # the same percentiles by another name
    mm.set_active(model, "liver", "spleen")
    assert segment.input_of(model).window == "mr"
    segment.set_input(model, "spleen", window="ct abdomen")
    with pytest.raises(Refused, match="'liver' was trained with window 'mr' and 'spleen' with"):
        segment.input_of(model)
    mm.set_active(model, "spleen")
    assert segment.input_of(model).window == "ct abdomen"


# -- what is done with it: images ------------------------------------------------------------------


def test_scanner_values_are_brought_to_the_window_of_the_adapter() -> None:
    model = adapted(window="ct kidney")
    sam = segment.Segmenter(model)
    windowed = segment.window(HOUNSFIELD, "ct kidney")
    for values in (HOUNSFIELD, HOUNSFIELD.astype(float), HOUNSFIELD.astype(">i2"), windowed):
        found = sam.encode_stack(values, grey=True).embedding
        assert torch.equal(found, sam.encode_stack(windowed, grey=True).embedding)
        one = sam.encode(values[1], grey=True).embedding
        assert torch.equal(one, sam.encode(windowed[1], grey=True).embedding)
    segment.set_input(model, window="ct lung")
    other = sam.encode(HOUNSFIELD[1], grey=True).embedding
    assert not torch.allclose(other, one, atol=1e-3)
    with mm.disabled(model), pytest.raises(Refused, match="int16 values from"):
        sam.encode(HOUNSFIELD[1], grey=True)  # nobody says what window
    holes = HOUNSFIELD[1].astype(float)
    holes[3, 4] = numpy.nan
    with pytest.raises(Refused, match="1 of 240 values are not numbers"):
        sam.encode(holes, grey=True)


def test_percentiles_are_those_of_the_whole_stack() -> None:
    model = adapted(window="mr")
    sam = segment.Segmenter(model)
    expected = sam.encode_stack(segment.window(HOUNSFIELD, "mr"), grey=True).embedding
    assert torch.equal(sam.encode_stack(HOUNSFIELD, grey=True).embedding, expected)


def test_pixels_and_clicks_are_given_as_in_training() -> None:
    """The habits of Med-SA's released code, which its checkpoints need."""
    image = (numpy.random.RandomState(1).rand(16, 16, 3) * 255).astype(numpy.uint8)
    model = adapted()
    sam = segment.Segmenter(model)
    usual = sam.predict(sam.encode(image), points=[(3, 9)], labels=[1])
    swapped = sam.predict(sam.encode(image), points=[(9, 3)], labels=[1])
    box = sam.predict(sam.encode(image), box=(2, 3, 9, 14))
    segment.set_input(model, click_order="row_col")
    found = sam.predict(sam.encode(image), points=[(3, 9)], labels=[1])
    assert torch.equal(found.logits, swapped.logits)
    assert not torch.equal(found.logits, usual.logits)
    assert torch.equal(sam.predict(sam.encode(image), box=(2, 3, 9, 14)).logits, box.logits)
    segment.set_input(model, normalise="0-1")
    pixels = sam.prepare(image)
    assert torch.allclose(pixels, torch.from_numpy(image / 255).permute(2, 0, 1).float(), atol=1e-6)


def test_an_adapter_for_another_side_is_refused() -> None:
    model = adapted(image_side=256)
    with pytest.raises(Refused, match="trained on images 256 pixels a side, this SAM takes 16"):
        segment.Segmenter(model).encode(numpy.zeros((4, 4, 3), numpy.uint8))


# -- volumes -----------------------------------------------------------------------------------------


def scan() -> Volume:
    return Volume(HOUNSFIELD, numpy.diag([1, 1, 2, 1.0]), name="ct")


def test_a_volume_is_brought_to_the_window_of_the_adapter() -> None:
    model = adapted(window="ct kidney")
    study = volumes.SliceSegmenter(model, scan())
    assert study.volume.array.tolist() == scan().window("ct kidney").array.tolist()
    named = scan().window(-54, 247)  # the same range by its numbers
    assert volumes.SliceSegmenter(model, named).volume is named
    cut = scan().window("ct kidney").crop((0, 2, 2, 3, 12, 18))
    assert volumes.SliceSegmenter(model, cut).volume is cut


def test_another_window_is_refused() -> None:
    model = adapted(window="ct kidney")
    for wrong in (scan().window("ct lung"), scan().window("mr"), scan().window("mr").window(0, 1)):
        with pytest.raises(Refused, match="active adapter was trained with 'ct kidney'") as caught:
            volumes.SliceSegmenter(model, wrong)
        assert "as it was read" in caught.value.hint
    bare = Volume(scan().window("ct lung").array, scan().affine)  # its history is lost
    with pytest.raises(Refused, match="holds values from 0.0714286 to 1.* 'ct kidney', -54 to"):
        volumes.SliceSegmenter(model, bare)
    with mm.disabled(model):
        assert volumes.SliceSegmenter(model, bare).volume is bare


def test_a_volume_in_its_file_is_windowed_where_that_needs_no_percentiles(tmp_path: Path) -> None:
    import nibabel

    path = tmp_path / "ct.nii"
    nibabel.Nifti1Image(HOUNSFIELD.T, numpy.eye(4)).to_filename(str(path))
    study = volumes.SliceSegmenter(adapted(window="ct kidney"), volumes.open_nifti(path))
    expected = scan().window("ct kidney").array
    assert numpy.abs(numpy.asarray(study.volume.array[:, 1]) - expected[:, 1]).max() < 1e-6
    with pytest.raises(Refused, match="made of percentiles"):
        volumes.SliceSegmenter(adapted(window="mr"), volumes.open_nifti(path))
