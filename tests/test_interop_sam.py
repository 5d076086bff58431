"""Checkpoints of Med-SA and SAM-Med2D: whole models, of which the trained part is attached."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES, clicks
from snapshot import assert_close, assert_equal, differ, state
from test_backbones_sam import outputs, twins
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import AdapterFileError

LIBRARIES = ("segment_anything", "hf_sam")
WIDTH, HIDDEN, LAYERS = 16, 4, 2


def fresh(name: str) -> Any:
    """One SAM in either library."""
    return twins()[LIBRARIES.index(name)]


def draws(seed: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in shapes.items()}


def bottlenecks(branch: str, width: int = HIDDEN) -> dict[str, Tensor]:
    shapes = {"D_fc1.weight": (width, WIDTH), "D_fc1.bias": (width,)}
    shapes |= {"D_fc2.weight": (WIDTH, width), "D_fc2.bias": (WIDTH,)}
    at = "image_encoder.blocks.{}." + branch + "_Adapter.{}"
    return draws(
        len(branch), {at.format(i, k): s for i in range(LAYERS) for k, s in shapes.items()}
    )


def sam(zero: bool, parts: tuple[str, ...] = ("mask_decoder.",)) -> dict[str, Tensor]:
    """The tensors of SAM in a file: trained parts moved, tables of relative positions perhaps zero."""
    found = {}
    draw = torch.Generator().manual_seed(8)
    for key, value in BACKBONES["segment_anything"].fresh().state_dict().items():
        value = value.clone()
        if key.startswith(parts):
            value += 0.1 * torch.randn(value.shape, generator=draw)
        if zero and ".rel_pos_" in key:
            key, value = key.replace(".rel_pos_", ".rel_"), torch.zeros_like(value)
        found[key] = value
    return found


def med_sa(
    path: Path, zero: bool = True, module: str = "", changes: Any = None
) -> dict[str, Tensor]:
    """A file as the released code writes it; `changes` are other tensors, None takes one away."""
    tensors = sam(zero)
    for branch in ("Space", "MLP", "Depth"):
        tensors |= bottlenecks(branch)
    tensors = {k: v for k, v in {**tensors, **(changes or {})}.items() if v is not None}
    torch.save(
        {
            "epoch": 3,
            "model": "sam",
            "state_dict": {module + key: value for key, value in tensors.items()},
            "optimizer": {"state": {}, "param_groups": [{"lr": 1e-4}]},
            "best_tol": numpy.float64(0.5),
            "path_helper": {"prefix": "logs"},
        },
        path,
    )
    return tensors


def read(model: Any, path: Path, zero: bool = True, **options: Any) -> mm.interop.ForeignFile:
    """Read a Med-SA file; a warning tells of zero tables, and only of those."""
    options.setdefault("depth", False)
    told = pytest.warns(UserWarning, match="trained without SAM's relative positions")
    with told if zero else contextlib.nullcontext():
        return mm.interop.read_med_sa(model, path, **options)


def released(tensors: dict[str, Tensor]) -> Any:
    """The released model for single images, put together from bare modules and plain hooks."""
    model: Any = BACKBONES["segment_anything"].fresh()
    base = {
        k.replace(".rel_h", ".rel_pos_h").replace(".rel_w", ".rel_pos_w"): v
        for k, v in tensors.items()
    }
    model.load_state_dict({k: v for k, v in base.items() if "Adapter" not in k}, strict=True)
    for i, block in enumerate(model.image_encoder.blocks):

        def change(z: Tensor, branch: str, i: int = i) -> Tensor:
            at = f"image_encoder.blocks.{i}.{branch}_Adapter.D_fc"
            down, up = ((tensors[f"{at}{k}.weight"], tensors[f"{at}{k}.bias"]) for k in (1, 2))
            return F.linear(F.gelu(F.linear(z, *down)), *up)

        block.attn.register_forward_hook(
            lambda m, args, out, change=change: out + change(out, "Space")
        )
        block.mlp.register_forward_hook(
            lambda m, args, out, change=change: out + 0.5 * change(args[0], "MLP")
        )
    return model


# -- Med-SA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(("zero", "module"), [(True, ""), (False, "module.")])
def test_a_med_sa_checkpoint_computes_as_the_released_model(
    tmp_path: Path, name: str, zero: bool, module: str
) -> None:
    tensors = med_sa(tmp_path / "a.pth", zero, module)
    model = fresh(name)
    bare = outputs(name, model)
    report = read(model, tmp_path / "a.pth", zero, name="isic")
    assert report.attachment is not None
    assert report.attachment.name == "isic"
    assert report.attachment.adapter == mm.MedSA(
        "released", depth_layout="grid", relative_positions="zero" if zero else "kept"
    )
    expected = outputs("segment_anything", released(tensors))
    assert differ(outputs(name, model), bare)
    assert_close(outputs(name, model), expected, 1e-5 if name == "segment_anything" else 1e-3)
    with mm.disabled(model):
        assert_equal(outputs(name, model), bare)


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_report_counts_every_tensor_of_the_file(tmp_path: Path, name: str) -> None:
    tensors = med_sa(tmp_path / "a.pth")
    report = read(fresh(name), tmp_path / "a.pth")
    decoder = {key for key in tensors if key.startswith("mask_decoder.")}
    assert report.layout == "med_sa"
    assert report.tensors == 2 * 4 * LAYERS + len(decoder)
    assert set(report.converted) == decoder
    assert report.tensors + len(report.ignored) == len(tensors)
    assert sum("Depth_Adapter" in key for key in report.ignored) == 4 * LAYERS
    assert report.dropped == ("epoch", "model", "optimizer", "best_tol", "path_helper")
    assert (report.missing, report.notes) == ((), ())
    lines = str(report).splitlines()
    assert lines[0] == f"med_sa: {report.tensors} tensors loaded, {len(decoder)} of them converted"
    assert lines[2] == "  5 dropped: epoch, model, optimizer, best_tol …"


@pytest.mark.parametrize("name", LIBRARIES)
def test_what_the_checkpoint_expects_of_its_input_is_kept_with_the_adapter(
    tmp_path: Path, name: str
) -> None:
    med_sa(tmp_path / "a.pth")
    model = fresh(name)
    read(model, tmp_path / "a.pth")
    mm.save(model, tmp_path / "ours")
    loaded = mm.load_adapter(fresh(name), tmp_path / "ours")
    assert loaded.metadata["input"] == {"click_order": "row_col", "normalise": "0-1"}
    assert_equal(outputs(name, loaded.model), outputs(name, model))


def test_the_depth_branch_is_loaded_where_it_was_trained(tmp_path: Path) -> None:
    tensors = med_sa(tmp_path / "a.pth", zero=False)
    model = fresh("hf_sam")
    with pytest.raises(AdapterFileError, match="holds adapters for the depth") as caught:
        mm.interop.read_med_sa(model, tmp_path / "a.pth")
    assert "depth=False" in caught.value.hint
    report = read(model, tmp_path / "a.pth", zero=False, depth=True)
    assert report.attachment is not None
    assert report.attachment.adapter == mm.MedSA("released", depth=True, depth_layout="grid")
    for i in range(LAYERS):
        layer: Any = report.attachment.layers[f"0/vision.layers[{i}].attn:out"]
        at = f"image_encoder.blocks.{i}"
        for branch in ("Space", "Depth"):
            kept = getattr(layer, f"{branch.lower()}_up_bias")
            assert torch.equal(kept, tensors[f"{at}.{branch}_Adapter.D_fc2.bias"])
    without = {key: None for key in tensors if "Depth_Adapter" in key}
    med_sa(tmp_path / "b.pth", False, changes=without)
    assert (
        read(fresh("hf_sam"), tmp_path / "b.pth", False, depth=None).tensors == report.tensors - 8
    )
    with pytest.raises(AdapterFileError, match=r"8 missing: image_encoder\.blocks\.0\.Depth"):
        mm.interop.read_med_sa(fresh("hf_sam"), tmp_path / "b.pth", depth=True)


def test_another_width_is_read_off_the_file(tmp_path: Path) -> None:
    wide = {k: v for branch in ("Space", "MLP", "Depth") for k, v in bottlenecks(branch, 7).items()}
    med_sa(tmp_path / "a.pth", False, changes=wide)
    report = read(fresh("hf_sam"), tmp_path / "a.pth", False)
    assert report.attachment is not None
    adapter: Any = report.attachment.adapter
    assert adapter.width_of(WIDTH) == 7


def test_a_file_of_adapters_alone_leaves_the_decoder_as_it_is(tmp_path: Path) -> None:
    without: dict[str, Any] = dict.fromkeys(sam(False))
    med_sa(tmp_path / "a.pth", False, changes=without)
    model = fresh("hf_sam")
    report = read(model, tmp_path / "a.pth", False)
    assert report.attachment is not None
    assert report.attachment.adapter == mm.MedSA("released", decoder="frozen", depth_layout="grid")
    assert len(report.missing) == len(fresh("hf_sam").state_dict())
    assert "no mask decoder" in report.notes[0]


@pytest.mark.parametrize("name", LIBRARIES)
def test_another_sam_is_told_by_its_frozen_tensors(tmp_path: Path, name: str) -> None:
    other = {"image_encoder.neck.0.weight": torch.zeros(8, WIDTH, 1, 1)}
    other["image_encoder.pos_embed"] = torch.zeros(1, 9, 9, WIDTH)
    med_sa(tmp_path / "a.pth", changes=other)
    report = read(fresh(name), tmp_path / "a.pth")
    assert len(report.notes) == 1
    assert report.notes[0].startswith("2 frozen tensors of the file are not this backbone's")
    assert "image_encoder.neck.0.weight" in report.notes[0]


SPACE = "image_encoder.blocks.1.Space_Adapter.D_fc1.weight"
TOKENS = "mask_decoder.mask_tokens.weight"


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({SPACE: None}, r"1 missing: image_encoder\.blocks\.1\.Space_Adapter\.D_fc1"),
        ({SPACE.replace("1", "7", 1): torch.ones(1)}, r"1 unexpected: image_encoder\.blocks\.7"),
        ({"mask_decoder.My_Adapter.weight": torch.ones(1)}, r"1 unexpected: mask_decoder\.My_"),
        ({SPACE: torch.ones(9, 9)}, r"1 of another shape or kind: 0/vision\.layers\[1\]\.attn"),
        ({TOKENS: torch.ones(6, 8)}, r"mask_tokens\.weight is \(6, 8\)"),
        ({TOKENS: None}, r"1 missing: mask_decoder\.mask_tokens"),
    ],
)
def test_a_med_sa_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, name: str, changes: Any, said: str
) -> None:
    med_sa(tmp_path / "a.pth", False, changes=changes)
    model = fresh(name)
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_med_sa(model, tmp_path / "a.pth", depth=False)
    assert state(model) == before


class Harm:
    """What a pickle may do on loading."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("harmed"), "x"))


def test_other_files_and_other_backbones_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(sam(False), "bare.pth")
    torch.save({"epoch": 1, "encoder_dict": {}, "decoder_dict": {}}, "3d.pth")
    torch.save({"model": {"a.Adapter.weight": torch.ones(1)}}, "other.pth")
    torch.save({"state_dict": Harm()}, "harm.pth")
    Path("text.pth").write_text("no pickle")
    both = {"a": torch.ones(1), "module.a": torch.ones(1)}
    torch.save(both, "both.pth")
    model = fresh("hf_sam")
    before = state(model)
    for read_file in (mm.interop.read_med_sa, mm.interop.read_sam_med2d):
        for file, said in (
            ("bare.pth", "it is a bare SAM: load it into the model itself"),
            ("3d.pth", "it holds epoch, encoder_dict, decoder_dict"),
            ("other.pth", r"is no (Med-SA|SAM-Med2D) file: it holds a\.Adapter\.weight"),
            ("harm.pth", "cannot be read as tensors"),
            ("text.pth", "cannot be read as tensors"),
            ("both.pth", "both with and without"),
            ("none.pth", r"there is no file none\.pth"),
            (".", "is a folder"),
        ):
            with pytest.raises(AdapterFileError, match=said):
                read_file(model, file)
        for name in ("hf_sam2", "hf_vit"):
            with pytest.raises(AdapterFileError, match=r"fit SAM, and this is a \w+ \(family '"):
                read_file(BACKBONES[name].fresh(), "bare.pth")
    assert state(model) == before
    assert not Path("harmed").exists()
    med_sa(tmp_path / "med_sa.pth")
    with pytest.raises(AdapterFileError, match="is no SAM-Med2D file"):
        mm.interop.read_sam_med2d(model, "med_sa.pth")


def test_numbers_under_numpys_older_names_are_read(tmp_path: Path) -> None:
    """As files were pickled before numpy renamed its core."""
    med_sa(tmp_path / "a.pth", False)
    whole = (tmp_path / "a.pth").read_bytes()
    assert b"numpy._core.multiarray" in whole  # else this proves nothing
    import zipfile

    with (
        zipfile.ZipFile(tmp_path / "a.pth") as old,
        zipfile.ZipFile(tmp_path / "b.pth", "w") as new,
    ):
        for entry in old.namelist():
            content = old.read(entry)
            if entry.endswith("data.pkl"):
                content = content.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
            new.writestr(entry, content)
    assert read(fresh("hf_sam"), tmp_path / "b.pth", False).dropped[3] == "best_tol"


# -- SAM-Med2D --------------------------------------------------------------------------------------


SHAPES = {
    "channel.0.weight": (HIDDEN, WIDTH),
    "channel.2.weight": (WIDTH, HIDDEN),
    "spatial.0.weight": (WIDTH, WIDTH, 3, 3),
    "spatial.2.weight": (WIDTH, WIDTH, 4, 4),
    "norm.weight": (WIDTH,),
    "norm.bias": (WIDTH,),
}


def sam_med2d(path: Path, **changes: Any) -> dict[str, Tensor]:
    tensors = sam(False, ("mask_decoder.", "prompt_encoder.point", "prompt_encoder.mask"))
    at = "image_encoder.blocks.{}.Adapter.{}"
    tensors |= draws(3, {at.format(i, k): s for i in range(LAYERS) for k, s in SHAPES.items()})
    tensors = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
    torch.save({"model": tensors}, path)
    return tensors


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_sam_med2d_checkpoint_computes_as_its_formula(tmp_path: Path, name: str) -> None:
    tensors = sam_med2d(tmp_path / "a.pth")
    model = fresh(name)
    report = mm.interop.read_sam_med2d(model, tmp_path / "a.pth")
    theirs: Any = BACKBONES["segment_anything"].fresh()
    theirs.load_state_dict({k: v for k, v in tensors.items() if "Adapter" not in k})
    for i, block in enumerate(theirs.image_encoder.blocks):
        t = {key: tensors[f"image_encoder.blocks.{i}.Adapter.{key}"] for key in SHAPES}

        def beside(module: Any, args: Any, y: Tensor, t: Any = t) -> Tensor:
            n = args[0].permute(0, 3, 1, 2)
            squeezed = (t["channel.0.weight"] @ n.mean((2, 3)).T).clamp(min=0)  # (H, B)
            gate = 1 / (1 + torch.exp(-(t["channel.2.weight"] @ squeezed)))  # (C, B)
            maps = F.conv2d(n * gate.T[..., None, None], t["spatial.0.weight"], None, 2, 1).relu()
            maps = F.conv_transpose2d(maps, t["spatial.2.weight"], None, 2, 1).relu()
            added = (n + maps).permute(0, 2, 3, 1)
            return y + F.layer_norm(added, (WIDTH,), t["norm.weight"], t["norm.bias"])

        block.mlp.register_forward_hook(beside)
    expected = outputs("segment_anything", theirs)
    assert differ(expected, outputs(name, fresh(name)))
    assert_close(outputs(name, model), expected, 1e-5 if name == "segment_anything" else 1e-3)
    trained = {k for k in tensors if k.startswith(("mask_decoder.", "prompt_encoder."))}
    trained -= {"prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"}
    assert set(report.converted) == trained
    assert report.tensors == 6 * LAYERS + len(trained)
    assert report.tensors + len(report.ignored) == len(tensors)
    assert report.attachment is not None
    assert report.attachment.adapter == mm.SAMMed2D(decoder="trained")
    assert report.attachment.metadata["input"] == {"image_side": 16}
    assert report.notes == report.missing == report.dropped == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_encoder.blocks.0.Adapter.norm.bias": None}, r"1 missing: .*norm\.bias"),
        (
            {"image_encoder.blocks.2.Adapter.norm.bias": torch.ones(16)},
            r"1 unexpected: .*blocks\.2",
        ),
        ({"image_encoder.blocks.0.Adapter.spatial.0.bias": torch.ones(16)}, "1 unexpected"),
        ({"image_encoder.blocks.0.Adapter.norm.bias": torch.ones(15)}, "another shape"),
    ],
)
def test_a_sam_med2d_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, changes: Any, said: str
) -> None:
    sam_med2d(tmp_path / "a.pth", **changes)
    model = fresh("hf_sam")
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_sam_med2d(model, tmp_path / "a.pth")
    assert state(model) == before


def test_positions_of_another_grid_are_told(tmp_path: Path) -> None:
    sam_med2d(tmp_path / "a.pth", **{"image_encoder.pos_embed": torch.zeros(1, 8, 8, WIDTH)})
    report = mm.interop.read_sam_med2d(fresh("hf_sam"), tmp_path / "a.pth")
    assert report.attachment is not None
    assert report.attachment.metadata["input"] == {"image_side": 32}
    assert "image_encoder.pos_embed" in report.notes[0]


def test_what_is_read_trains_on(tmp_path: Path) -> None:
    """Tables that are out stay out; the adapters and the decoder move."""
    med_sa(tmp_path / "a.pth")
    model = fresh("hf_sam")
    report = read(model, tmp_path / "a.pth")
    assert report.attachment is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks = BACKBONES["hf_sam"].outputs(model, clicks(2))[0]
    masks.square().mean().backward()
    reached = {name for name, p in report.attachment.named_parameters() if p.grad is not None}
    assert "0/vision.layers[0].attn:out.down" in reached
    assert "0/decoder.tokens.masks:weight.change" in reached
    assert not any("rel_" in name for name in reached)
    assert model.vision_encoder.layers[0].attn.rel_pos_h.grad is None
