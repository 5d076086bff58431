"""3DSAM-adapter: published sizes and values, what holds for volumes, and the authors' files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES, volumes
from snapshot import assert_close, assert_equal, differ, randomise, state
from test_backbones_sam import SIZES, hf_sam_of, original_of
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.ops.volume import (
    cube_attention,
    cubes,
    cubes_apart,
    distances,
    from_cubes,
    places_of,
    resized_positions,
    sample,
)

TINY: dict[str, Any] = {"zoom": 2, "window": 2, "planes": 3, "queries": 3, "heads": 2}
LIBRARIES = ("hf_sam", "segment_anything")


def adapted(name: str = "hf_sam", amount: float = 0.1, **changes: Any) -> tuple[Any, Any]:
    model: Any = BACKBONES[name].fresh()
    attachment = mm.attach(model, mm.ThreeDSAM(**{**TINY, **changes}))
    return model, randomise(attachment, amount) if amount else attachment


def run(model: Any, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**{**volumes(2), **batch})


# -- sizes ----------------------------------------------------------------------------------------


def sizes(model: Any, adapter: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for row in mm.plan(model, adapter).records():
        role, _, port = row["site"].rpartition(":")
        part = "adapters" if port == "in" else role.partition(".")[0]
        found[part] = found.get(part, 0) + row["parameters"]
    return found


@pytest.mark.parametrize("build", [hf_sam_of, original_of])
def test_the_published_sizes(build: Any) -> None:
    released = sizes(build("vit_b"), mm.ThreeDSAM("released"))
    never_called = 263_424  # counted by the authors: an attention of every layer of the clicks
    assert released["adapters"] == 7_220_736
    assert released["adapters"] + released["vision"] == 15_209_984
    assert released["prompt"] == 3_164_160 - never_called
    assert released["decoder"] == 7_088_256
    assert sum(released.values()) == 25_462_400 - never_called
    general = sizes(build("vit_b"), mm.ThreeDSAM())
    kinds = 2 * 256  # clicks on the object and beside it; the attention is called here
    assert sum(general.values()) == 25_462_400 + kinds


@pytest.mark.parametrize(("size", "one"), [("vit_l", 1_064_448), ("vit_h", 1_658_240)])
def test_the_larger_encoders_fit_too(size: str, one: int) -> None:
    found = sizes(hf_sam_of(size), mm.ThreeDSAM())
    assert found["adapters"] == SIZES[size][1] * one


# -- values by hand ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["general", "released"])
def test_the_bottleneck_by_hand(variant: Any) -> None:
    from mmadapt.core.context import Context
    from mmadapt.methods.three_d_sam import SpatialLayer

    _, attachment = adapted(variant=variant, ratio=0.25)
    layer = attachment.layers["0/vision.layers[0]:in"]
    assert isinstance(layer, SpatialLayer)
    with torch.no_grad():
        for name, tensor in layer.named_parameters():
            tensor.fill_(0.0 if name.endswith("bias") else 0.1)
    ones = torch.zeros(3, 3, 3, 16)
    ones[..., :8] = 1.0  # of 16 channels, as if there were 8
    context = Context({"planes": 3})
    found = layer.before(ones, context, None)[..., 0]  # type: ignore[arg-type]
    places = {(0, 0, 0): 1.256, (0, 0, 1): 1.384, (0, 1, 1): 1.576, (1, 1, 1): 1.864}
    for place, value in places.items():
        assert found[place].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(("padding", "corner"), [("zeros", 0.244140625), ("border", 1.0)])
def test_clicks_at_the_border_are_attenuated_only_by_zeros(padding: Any, corner: float) -> None:
    ones = torch.ones(1, 1, 32, 32, 32)
    at = places_of(torch.tensor([[[0.0, 0, 0], [64, 64, 64]]]), (128, 128, 128))
    found = sample(ones, at, padding).flatten()
    assert found.tolist() == pytest.approx([corner, 1.0], abs=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize(("index", "place"), [(66, 16.125), (2, 0.125)])
def test_a_click_reads_its_own_axis(axis: int, index: int, place: float) -> None:
    """The features grow along one axis alone; clicks are (z, y, x), the axes (D, H, W)."""
    shape = [1, 1, 1]
    shape[axis] = 32
    ramp = torch.arange(32.0).view(shape).expand(32, 32, 32)
    click = torch.full((1, 1, 3), 60.0)
    click[..., axis] = index
    found = sample(ramp[None, None], places_of(click, (128, 128, 128)))
    assert found.item() == pytest.approx(place, abs=1e-4)


def test_positions_are_pooled_by_whole_blocks() -> None:
    positions = torch.randn(1, 64, 64, 5)
    pooled = positions.view(1, 32, 2, 32, 2, 5).mean((2, 4))
    assert torch.allclose(resized_positions(positions, 32, 32), pooled, atol=1e-6)
    assert resized_positions(positions, 24, 40).shape == (1, 24, 40, 5)


# -- cubes -------------------------------------------------------------------------------------------


def test_cubes_and_back() -> None:
    volume = torch.arange(2 * 4 * 6 * 4 * 3.0).view(2, 4, 6, 4, 3)
    found = cubes(volume, (2, 3, 2))
    assert found.shape == (2 * 2 * 2 * 2, 12, 3)
    assert torch.equal(found[8 + 3], volume[1, 0:2, 3:6, 2:4].flatten(0, 2))
    assert torch.equal(from_cubes(found, (2, 3, 2), (4, 6, 4)), volume)


@pytest.mark.parametrize("size", [2, 4, 7, 14])
def test_relative_positions_are_those_of_transformers(size: int) -> None:
    layer: Any = BACKBONES["hf_sam"].fresh().vision_encoder.layers[1].attn  # type: ignore[union-attr]
    table = torch.randn(7, 8)
    assert torch.allclose(distances(table, size), layer.get_rel_pos(size, size, table), atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 4, 4), (5, 4, 7)])
@pytest.mark.parametrize("shift", [0, 1])
def test_tokens_see_each_other_within_cubes_alone(grid: Any, shift: int) -> None:
    """By brute force: which tokens change when one does."""
    size = (2, 2, 2)
    volume = torch.randn(1, *grid, 6)
    over = [-n % 2 for n in grid]

    def attend(x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, over[2], 0, over[1], 0, over[0]))
        rolled = torch.roll(padded, [-shift] * 3, (1, 2, 3))
        q = cubes(rolled, size)[:, None]
        apart = cubes_apart(grid, size, [shift] * 3, x.device)
        found = cube_attention(q, q, q, size, (None, None, None), apart)[:, 0]
        back = torch.roll(from_cubes(found, size, rolled.shape[1:4]), [shift] * 3, (1, 2, 3))
        return back[:, : grid[0], : grid[1], : grid[2]]

    before = attend(volume)
    place = (2, 1, 3)
    other = volume.clone()
    other[0][place] += 1.0
    touched = {
        tuple(at) for at in ((attend(other) - before)[0].abs().amax(-1) > 0).nonzero().tolist()
    }
    cube = [(index + shift) // 2 for index in place]
    expected = {
        (z, y, x)
        for z in range(grid[0])
        for y in range(grid[1])
        for x in range(grid[2])
        if [(index + shift) // 2 for index in (z, y, x)] == cube
    }
    assert touched == expected


# -- volumes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("shape", [(8, 8, 8), (4, 8, 12), (14, 6, 4), (16, 16, 16)])
def test_any_volume_that_fits_gives_logits_of_its_size(name: str, shape: Any) -> None:
    model, _ = adapted(name, classes=3)
    volume = torch.randn(2, 1, *shape)
    found = run(model, pixel_values=volume, input_points=torch.ones(2, 2, 3))
    assert found.shape == (2, 3, *shape)
    assert torch.isfinite(found).all()
    three = run(model, pixel_values=volume.repeat(1, 3, 1, 1, 1), input_points=torch.ones(2, 2, 3))
    assert_close((three,), (found,), 1e-4)


def test_both_libraries_compute_the_same() -> None:
    from mmadapt.interop.sam import to_segment_anything

    model, attachment = adapted("hf_sam")
    other: Any = BACKBONES["segment_anything"].fresh()
    bare = {k: v for k, v in model.state_dict().items() if not k.startswith("_mmadapt.")}
    other.load_state_dict(to_segment_anything(bare))
    twin = mm.attach(other, attachment.adapter)
    with torch.no_grad():
        for key, layer in twin.layers.items():
            layer.load_state_dict(attachment.layers[key].state_dict())
    assert_close((run(other),), (run(model),), 1e-4)


def test_a_volume_that_is_constant_along_the_depth_stays_so() -> None:
    """Without bottlenecks, depth positions and shifts."""
    model, attachment = adapted(amount=0.0, window=4, prompts=False)
    with torch.no_grad():
        for layer in attachment.layers.values():
            if hasattr(layer, "depth"):
                layer.depth.zero_()
    features: list[Tensor] = []
    model.vision_encoder.layers[-1].register_forward_hook(lambda *call: features.append(call[-1]))
    plane = torch.randn(1, 1, 1, 8, 8).expand(-1, -1, 8, -1, -1)
    with torch.no_grad():
        model(pixel_values=plane)
    tokens = features[0]  # (D, H, W, C)
    assert tokens.std((1, 2)).mean() > 0.1
    assert (tokens - tokens[:1]).abs().max() < 1e-5


def test_a_click_changes_its_own_volume_alone() -> None:
    model, _ = adapted()
    batch = volumes(2)
    moved = batch["input_points"].clone()
    moved[1, 0] = torch.tensor([7.0, 0.0, 3.0])
    before, after = run(model), run(model, input_points=moved)
    assert torch.equal(before[0], after[0])
    assert (before[1] - after[1]).abs().max() > 1e-4


def test_the_label_and_the_place_of_a_click_count() -> None:
    model, _ = adapted()
    batch = volumes(2)
    assert differ((run(model, input_labels=1 - batch["input_labels"]),), (run(model),))
    flat = torch.ones(2, 1, 8, 8, 8)  # the same everywhere, so that places alone can tell
    moved = 7 - batch["input_points"]
    assert differ(
        (run(model, pixel_values=flat, input_points=moved),), (run(model, pixel_values=flat),)
    )
    released, _ = adapted(variant="released", planes=4)
    other = run(released, input_labels=1 - batch["input_labels"])
    assert_equal((other,), (run(released),))


def test_the_order_of_clicks_and_clicks_that_are_none_mean_nothing() -> None:
    model, _ = adapted()
    batch = volumes(2)
    points, labels = batch["input_points"], batch["input_labels"]
    expected = run(model)
    swapped = run(model, input_points=points.flip(1), input_labels=labels.flip(1))
    assert_close((swapped,), (expected,), 1e-5)
    more = torch.cat([points, torch.full((2, 2, 3), 99.0)], 1)
    padded = run(model, input_points=more, input_labels=F.pad(labels, (0, 2), value=-1))
    assert_close((padded,), (expected,), 1e-5)


def test_without_prompts_the_volume_is_enough() -> None:
    model, attachment = adapted(prompts=False)
    assert not any("prompt" in key for key in attachment.layers)
    found = run(model, input_points=None, input_labels=None)
    assert found.shape == (2, 2, 8, 8, 8)
    with pytest.raises(mm.errors.DataError, match="made without prompts"):
        run(model)


@pytest.mark.parametrize("name", LIBRARIES)
def test_blocks_that_are_recomputed_have_the_same_gradients(name: str) -> None:
    found = []
    for recompute in (False, True):
        model, attachment = adapted(name, recompute=recompute)
        model(**volumes(2)).square().mean().backward()
        found.append(tuple(p.grad for p in attachment.parameters()))
    assert_close(found[1], found[0], 1e-5)


def test_volumes_alone_begin_a_pass_and_images_go_to_the_bare_sam() -> None:
    model, _ = adapted()
    images = BACKBONES["hf_sam"].batch(2)
    with pytest.raises(mm.errors.DataError, match="was given input_masks") as caught:
        model(**images)
    assert "mmadapt.disabled" in caught.value.hint
    with pytest.raises(mm.errors.CheckError, match="did not begin with a volume"):
        model.vision_encoder.layers[0](torch.zeros(1, 4, 4, 16))
    with mm.disabled(model), torch.no_grad():
        BACKBONES["hf_sam"].outputs(model, images)


def test_the_relu_behind_a_bottleneck_is_why_it_must_not_start_at_zero() -> None:
    """In our variant it is gone: bottlenecks start as the identity, and learn."""
    for variant, planes in (("general", 3), ("released", 4)):
        model, attachment = adapted(amount=0.0, variant=variant, planes=planes)
        layer = attachment.layers["0/vision.layers[0]:in"]
        if variant == "released":
            assert layer.up.abs().max() > 0
            with torch.no_grad():
                layer.up.zero_()
                layer.up_bias.zero_()
        model(**volumes(2)).square().mean().backward()
        assert bool(layer.up.grad.abs().max() > 0) == (variant == "general")


@pytest.mark.parametrize(
    ("batch", "message", "hint"),
    [
        ({"pixel_values": torch.zeros(2, 1, 8, 8, 9)}, "does not divide", r"multiple of 2"),
        ({"pixel_values": torch.zeros(2, 3, 8, 8)}, "an image, expected", "mmadapt.disabled"),
        ({"pixel_values": torch.zeros(2, 1, 8, 8, 8).short()}, "torch.int16", "adds the batch"),
        (
            {"pixel_values": torch.zeros(2, 8, 8, 8, 1), "input_points": torch.zeros(2, 2, 3)},
            "8 channels",
            "movedim",
        ),
        ({"pixel_values": torch.zeros(2, 8, 8, 8, 8)}, "8 channels", "one volume a row"),
        ({"pixel_values": None}, "there is no volume", "pixel_values="),
        ({"input_labels": None}, "without input_labels", "prompts=False"),
        ({"input_points": None, "input_labels": None}, "without input_points", "prompts=False"),
        ({"input_points": torch.ones(1, 2, 3)}, r"expected \(2, N, 3\)", "a row for every volume"),
        ({"input_points": torch.ones(2, 2, 2)}, r"expected \(2, N, 3\)", "a row for every volume"),
        ({"input_points": torch.full((2, 2, 3), 8.0)}, "outside of", r"\(z, y, x\)"),
        ({"input_points": torch.full((2, 2, 3), torch.nan)}, "outside of", r"\(z, y, x\)"),
        ({"input_labels": torch.full((2, 2), 7)}, "label 7 means nothing", "1 is the object"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(batch: Any, message: str, hint: str) -> None:
    model, _ = adapted()
    with pytest.raises(mm.errors.DataError, match=message) as caught:
        run(model, **batch)
    assert re.search(hint, caught.value.hint)


def test_the_released_layout_takes_its_cubes_alone() -> None:
    model, _ = adapted(variant="released", planes=4)
    with pytest.raises(mm.errors.DataError, match="crops are cubes") as caught:
        run(model, pixel_values=torch.zeros(2, 1, 12, 12, 12))
    assert "the side is 8" in caught.value.hint


def test_hyper_parameters_that_do_not_fit_are_refused() -> None:
    for wrong, message in (({"zoom": 3}, "zoom is 3"), ({"heads": 5}, "5 heads do not divide")):
        model = BACKBONES["hf_sam"].fresh()
        before = state(model)
        with pytest.raises(mm.errors.AdapterError, match=message):
            mm.attach(model, mm.ThreeDSAM(**{**TINY, **wrong}))
        assert state(model) == before
    with pytest.raises(mm.errors.AdapterError, match="compute only together"):
        mm.ThreeDSAM(at="vision.layers[*]")
    with pytest.raises(mm.errors.SiteError):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.ThreeDSAM())


# -- the authors' files -----------------------------------------------------------------------------


def released_file(base: Any, planes: int = 4, queries: int = 3, seed: int = 2) -> dict[str, Any]:
    """A checkpoint as the authors' training writes them, of the sizes of a tiny Sam."""
    draw = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / max(1, torch.tensor(shape[1:]).prod()) ** 0.5

    encoder = {k: v.clone() for k, v in base.image_encoder.state_dict().items() if "neck" not in k}
    channels, features, width = 16, 32, 8
    patch = 4
    encoder["slice_embed.weight"] = make(channels, 1, 1, 1, patch)
    encoder["slice_embed.bias"] = make(channels)
    encoder["depth_embed"] = make(1, planes, channels)
    for i in range(2):
        block = f"blocks.{i}"
        encoder[f"{block}.adapter.linear1.weight"] = make(width, channels)
        encoder[f"{block}.adapter.linear1.bias"] = make(width)
        encoder[f"{block}.adapter.conv.weight"] = make(width, 1, 3, 3, 3)
        encoder[f"{block}.adapter.conv.bias"] = make(width)
        encoder[f"{block}.adapter.linear2.weight"] = make(channels, width)
        encoder[f"{block}.adapter.linear2.bias"] = make(channels)
        encoder[f"{block}.attn.rel_pos_d"] = make(*encoder[f"{block}.attn.rel_pos_h"].shape)
        encoder[f"{block}.attn.lr"] = torch.ones(1)
        for norm in ("norm1", "norm2"):
            encoder[f"{block}.{norm}.weight"] += 0.2 * make(channels)
            encoder[f"{block}.{norm}.bias"] += 0.2 * make(channels)
    encoder["blocks.0.attn_mask".replace("attn_mask", "attn.attn_mask")] = torch.zeros(8, 8, 8)
    for k in range(4):
        encoder[f"neck_3d.{k}.0.weight"] = make(features, channels, 1, 1, 1)
        encoder[f"neck_3d.{k}.2.weight"] = make(features, features, 3, 3, 3)
        for place in (1, 3):
            encoder[f"neck_3d.{k}.{place}.weight"] = 1 + 0.2 * make(features)
            encoder[f"neck_3d.{k}.{place}.bias"] = make(features)
    click: dict[str, Tensor] = {"pe_layer.positional_encoding_gaussian_matrix": make(3, 16)}
    for i in range(2):
        layer = f"transformer.layers.{i}"
        click[f"{layer}.global_query"] = make(1, queries, features)
        for kind, inner in (
            ("self_attn", features),
            ("cross_attn_token_to_image", features // 2),
            ("cross_attn_image_to_token", features // 2),
        ):
            for word in "qkv":
                click[f"{layer}.{kind}.{word}_proj.weight"] = make(inner, features)
                click[f"{layer}.{kind}.{word}_proj.bias"] = make(inner)
            click[f"{layer}.{kind}.out_proj.weight"] = make(features, inner)
            click[f"{layer}.{kind}.out_proj.bias"] = make(features)
        for n in range(1, 5):
            click[f"{layer}.norm{n}.weight"] = 1 + 0.2 * make(features)
            click[f"{layer}.norm{n}.bias"] = make(features)
        click[f"{layer}.mlp.lin1.weight"] = make(8 * features, features)
        click[f"{layer}.mlp.lin1.bias"] = make(8 * features)
        click[f"{layer}.mlp.lin2.weight"] = make(features, 8 * features)
        click[f"{layer}.mlp.lin2.bias"] = make(features)
    decoder = {}
    for level in range(2, 6):
        decoder[f"mlahead.head{level}.0.weight"] = make(features // 2, features, 3, 3, 3)
        decoder[f"mlahead.head{level}.3.weight"] = make(features // 2, features // 2, 3, 3, 3)
    decoder["cls.0.weight"] = make(features // 2, 2 * features + 1, 3, 3, 3)
    decoder["cls.3.weight"] = make(2, features // 2, 3, 3, 3)
    return {
        "epoch": 3,
        "best_val_loss": numpy.float64(0.25),
        "encoder_dict": encoder,
        "feature_dict": [{"unused": make(1)}] * 3 + [click],
        "decoder_dict": decoder,
        "encoder_opt": {"state": {}},
    }


class Released:
    """The authors' computation step by step, one volume, axes (height, width, depth)."""

    def __init__(self, base: Any, stored: dict[str, Any]) -> None:
        self.base = base
        self.encoder, self.decoder = stored["encoder_dict"], stored["decoder_dict"]
        self.click = stored["feature_dict"][3]

    def __call__(self, volume: Tensor, clicks: Tensor, zoom: int) -> Tensor:
        """Logits (2, D, H, W) of a volume (D, H, W), with clicks (N, 3) as (z, y, x)."""
        crop = volume.shape[0]
        large = F.interpolate(volume.expand(1, 3, -1, -1, -1), scale_factor=zoom, mode="trilinear")
        slices = self.base.image_encoder.patch_embed(large[0].transpose(0, 1))  # (D, h, w, C)
        x = slices.permute(3, 1, 2, 0)[None]  # (1, C, h, w, D)
        kernel = self.encoder["slice_embed.weight"]
        depth = kernel.shape[-1]
        x = F.conv3d(
            x, kernel, self.encoder["slice_embed.bias"], stride=(1, 1, depth), groups=len(kernel)
        )
        x = x.permute(0, 2, 3, 4, 1)  # (1, h, w, d, C)
        x = (
            x
            + self.encoder["pos_embed"][:, :, :, None]
            + self.encoder["depth_embed"][:, None, None]
        )
        features = []
        for i in range(2):
            x = self.block(i, x)
            features += [self.neck(2 * i, x), self.neck(2 * i + 1, x)]
        features[3] = self.clicks(features[3], clicks, crop)
        levels = [self.level(k, z) for k, z in enumerate(features)]
        side = levels[0].shape[-1]
        image = volume.permute(1, 2, 0)[None, None]
        levels.append(F.interpolate(image, (side,) * 3, mode="trilinear"))
        z = F.conv3d(torch.cat(levels, 1), self.decoder["cls.0.weight"], padding=1)
        z = F.conv3d(F.relu(F.instance_norm(z)), self.decoder["cls.3.weight"], padding=1)
        z = F.interpolate(z, scale_factor=crop / side, mode="trilinear")
        return z[0].permute(0, 3, 1, 2)

    def block(self, i: int, x: Tensor, window: int = 2) -> Tensor:
        t = {k.removeprefix(f"blocks.{i}."): v for k, v in self.encoder.items()}
        z = F.relu(F.linear(x, t["adapter.linear1.weight"], t["adapter.linear1.bias"]))
        z = F.conv3d(
            z.permute(0, 4, 1, 2, 3),
            t["adapter.conv.weight"],
            t["adapter.conv.bias"],
            padding=1,
            groups=z.shape[-1],
        )
        z = F.relu(z).permute(0, 2, 3, 4, 1)
        x = x + F.relu(F.linear(z, t["adapter.linear2.weight"], t["adapter.linear2.bias"]))
        n = F.layer_norm(x, (16,), t["norm1.weight"], t["norm1.bias"], 1e-6)[0]
        by = window // 2 if i % 2 == 0 else 0
        side, out = n.shape[0], torch.zeros_like(n)
        cell = [(place + side - by) % side // window for place in range(side)]
        ends = [(place + side - by) % side >= side - by if by else False for place in range(side)]
        every = [(h, w, d) for h in range(side) for w in range(side) for d in range(side)]
        group: dict[Any, list[Any]] = {}
        for at in every:  # tokens of one cube, those that the shift brought together apart
            group.setdefault(tuple((cell[a], ends[a]) for a in at), []).append(at)
        tables = [t[f"attn.rel_pos_{axis}"] for axis in "hwd"]
        tables = [
            F.interpolate(table.T[None], 2 * window - 1, mode="linear")[0].T for table in tables
        ]
        for tokens in group.values():
            rows = torch.stack([n[at] for at in tokens])
            fused = F.linear(rows, t["attn.qkv.weight"], t["attn.qkv.bias"]).view(-1, 3, 2, 8)
            q, k, v = fused.permute(1, 2, 0, 3)
            logits = q @ k.transpose(1, 2) / 8**0.5
            for a, one in enumerate(tokens):
                for b, other in enumerate(tokens):
                    for axis, table in enumerate(tables):
                        apart = (one[axis] - by) % side - (other[axis] - by) % side
                        logits[:, a, b] += q[:, a] @ table[apart + window - 1]
            mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
            mixed = F.linear(mixed, t["attn.proj.weight"], t["attn.proj.bias"])
            for at, value in zip(tokens, mixed, strict=True):
                out[at] = value
        x = x + out
        n = F.layer_norm(x, (16,), t["norm2.weight"], t["norm2.bias"], 1e-6)
        return x + self.base.image_encoder.blocks[i].mlp(n)

    def neck(self, k: int, x: Tensor) -> Tensor:
        t = {key.removeprefix(f"neck_3d.{k}."): v for key, v in self.encoder.items()}
        z = F.conv3d(x.permute(0, 4, 1, 2, 3), t["0.weight"])
        z = F.layer_norm(z.movedim(1, -1), (32,), t["1.weight"], t["1.bias"]).movedim(-1, 1)
        z = F.conv3d(z, t["2.weight"], padding=1)
        return F.layer_norm(z.movedim(1, -1), (32,), t["3.weight"], t["3.bias"]).movedim(-1, 1)

    def clicks(self, deepest: Tensor, clicks: Tensor, crop: int) -> Tensor:
        dwh = clicks[:, [0, 2, 1]]  # last, middle, first axis of the features
        places = ((dwh + 0.5) * 2 / crop - 1)[None, :, None, None]
        tokens = F.grid_sample(deepest, places, align_corners=False).flatten(2).transpose(1, 2)
        image = deepest.flatten(2).transpose(1, 2)

        def attend(t: dict[str, Tensor], name: str, q: Tensor, k: Tensor) -> Tensor:
            heads = [
                F.linear(x, t[f"{name}.{w}_proj.weight"], t[f"{name}.{w}_proj.bias"])
                .unflatten(-1, (2, -1))
                .transpose(1, 2)
                for w, x in (("q", q), ("k", k), ("v", k))
            ]
            found = (heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5).softmax(-1)
            found = (found @ heads[2]).transpose(1, 2).flatten(2)
            return F.linear(found, t[f"{name}.out_proj.weight"], t[f"{name}.out_proj.bias"])

        def norm(t: dict[str, Tensor], n: int, x: Tensor) -> Tensor:
            return F.layer_norm(x, (32,), t[f"norm{n}.weight"], t[f"norm{n}.bias"])

        for i in range(2):
            prefix = f"transformer.layers.{i}."
            t = {k.removeprefix(prefix): v for k, v in self.click.items() if k.startswith(prefix)}
            count = t["global_query"].shape[1]
            both = torch.cat([t["global_query"], tokens], 1)
            both = norm(t, 2, both + norm(t, 1, attend(t, "self_attn", both, both)))
            queries, tokens = both[:, :count], both[:, count:]
            inner = F.relu(F.linear(queries, t["mlp.lin1.weight"], t["mlp.lin1.bias"]))
            queries = norm(
                t, 3, queries + F.linear(inner, t["mlp.lin2.weight"], t["mlp.lin2.bias"])
            )
            image = norm(t, 4, image + attend(t, "cross_attn_image_to_token", image, queries))
        return image.transpose(1, 2).view_as(deepest)

    def level(self, k: int, z: Tensor) -> Tensor:
        for place in (0, 3):
            z = F.conv3d(z, self.decoder[f"mlahead.head{k + 2}.{place}.weight"], padding=1)
            z = F.relu(F.instance_norm(z))
        return F.interpolate(z, scale_factor=2, mode="trilinear", align_corners=True)


def written(tmp_path: Path, stored: Any) -> Path:
    path = tmp_path / "best.pth.tar"
    torch.save(stored, path)
    return path


def hf_and_original() -> tuple[Any, Any]:
    from mmadapt.interop.sam import to_segment_anything

    model: Any = BACKBONES["hf_sam"].fresh()
    original: Any = BACKBONES["segment_anything"].fresh()
    original.load_state_dict(to_segment_anything(model.state_dict()))
    return model, original


def test_a_released_file_computes_as_the_authors_do(tmp_path: Path) -> None:
    model, original = hf_and_original()
    stored = released_file(original)
    path = written(tmp_path, stored)
    report = mm.interop.read_three_d_sam(model, path, crop=8, heads=2)
    adapter = report.attachment.adapter  # type: ignore[union-attr]
    assert adapter == mm.ThreeDSAM("released", zoom=2, window=2, planes=4, queries=3, heads=2)
    held = len(stored["encoder_dict"]) + len(stored["decoder_dict"])
    held += len(stored["feature_dict"][3])
    assert report.tensors + len(report.ignored) == held
    assert "blocks.0.attn.attn_mask" in report.ignored
    assert any("never called" in note for note in report.notes)
    batch = volumes(2)
    reference = Released(original, stored)
    with torch.no_grad():
        expected = torch.stack(
            [
                reference(v[0], c, 2)
                for v, c in zip(batch["pixel_values"], batch["input_points"], strict=True)
            ]
        )
        found = [run(model)]
        mm.interop.read_three_d_sam(original, path, crop=8, heads=2)
        found.append(run(original))
    for each in found:
        assert_close((each,), (expected,), 1e-4)


def refused(tmp_path: Path, match: str, change: Any, **arguments: Any) -> None:
    model, original = hf_and_original()
    stored = released_file(original)
    change(stored)
    before = state(model)
    with pytest.raises(mm.errors.AdapterFileError, match=match):
        mm.interop.read_three_d_sam(
            model, written(tmp_path, stored), **{"crop": 8, "heads": 2, **arguments}
        )
    assert state(model) == before


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    def another_base(stored: Any) -> None:
        stored["encoder_dict"]["blocks.1.attn.qkv.weight"] += 1

    def surplus(stored: Any) -> None:
        stored["decoder_dict"]["cls.6.weight"] = torch.zeros(1)

    def factor(stored: Any) -> None:
        stored["encoder_dict"]["blocks.1.attn.lr"] *= 2

    refused(tmp_path, r"blocks.1.attn.qkv.weight .* differs from the backbone's", another_base)
    refused(tmp_path, r"1 unexpected: decoder_dict: cls.6.weight", surplus)
    refused(tmp_path, r"attn.lr is \[2.0\], expected 1", factor)
    for part, key in (
        ("encoder_dict", "neck_3d.2.2.weight"),
        ("encoder_dict", "blocks.0.adapter.conv.bias"),
        ("decoder_dict", "mlahead.head3.0.weight"),
    ):
        refused(tmp_path, f"1 missing: {part}: {key}", lambda s, p=part, k=key: s[p].pop(k))
    refused(tmp_path, "crop is 10, .* fit the sides 8, 16", lambda stored: None, crop=10)
    refused(tmp_path, "no checkpoint of 3DSAM", lambda stored: stored.pop("encoder_dict"))


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    refused(tmp_path, "cannot be read as tensors", lambda s: s.update(epoch=Path("elsewhere")))


def test_a_file_without_clicks_gives_an_adapter_without_prompts(tmp_path: Path) -> None:
    model, original = hf_and_original()
    stored = released_file(original)
    del stored["feature_dict"]
    report = mm.interop.read_three_d_sam(model, written(tmp_path, stored), crop=8)
    assert not report.attachment.adapter.prompts  # type: ignore[union-attr]
    found = run(model, input_points=None, input_labels=None)
    assert torch.isfinite(found).all()
