"""Med-SA and convolutions through the depth: their formulas, published sizes and invariants."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from backbones import BACKBONES, clicks
from snapshot import assert_close, assert_equal, differ, randomise
from test_backbones_sam import SIZES, hf_sam_of, original_of
from torch import Tensor
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.methods.med_sa import HyperPromptLayer, SpaceDepthLayer
from mmadapt.ops.reference import bottleneck
from mmadapt.ops.volume import (
    depth_grid,
    from_windows,
    through_depth,
    to_columns,
    to_slices,
    windows,
)


def adapted(
    adapter: Any, name: str = "hf_sam", amount: float = 0.3, **attach: Any
) -> tuple[Any, Any]:
    model: Any = BACKBONES[name].fresh()
    return model, randomise(mm.attach(model, adapter, **attach), amount)


def encode(model: Any, pixels: Tensor) -> Tensor:
    """Image embeddings (B, C, H, W)."""
    with torch.no_grad():
        return model.vision_encoder(pixels).last_hidden_state


def stack(slices: int) -> Tensor:
    return clicks(slices)["pixel_values"]


# -- grids and columns -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "grid"),
    [
        *((1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (7, (1, 7)), (8, (2, 4)), (12, (3, 4))),
        *((24, (4, 6)), (96, (8, 12))),
    ],
)
def test_the_grid_of_a_depth(depth: int, grid: tuple[int, int]) -> None:
    assert depth_grid(depth) == grid


def test_windows_of_sam_are_25_of_14_by_14() -> None:
    assert windows(torch.zeros(2, 64, 64, 1), 14, 14).shape == (50, 14, 14, 1)


def test_windows_are_those_of_transformers() -> None:
    layer: Any = BACKBONES["hf_sam"].fresh().vision_encoder.layers[0]  # type: ignore[union-attr]
    grid = torch.randn(3, 4, 5, 2)
    assert torch.equal(windows(grid, 3, 3), layer.window_partition(grid, 3)[0])


@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (2, 2), (1, 5), (3, 4)])
def test_columns_hold_the_slices_of_one_volume_at_one_position(rows: int, columns: int) -> None:
    depth = rows * columns
    grid = torch.arange(2 * depth * 3 * 5).view(2 * depth, 3, 5, 1)
    found = to_columns(grid, rows, columns)
    assert found.shape == (2 * 3 * 5, rows, columns, 1)
    for volume in range(2):
        own = grid[volume * depth : (volume + 1) * depth]
        column = found[volume * 15 + 2 * 5 + 4]  # row 2, column 4
        assert torch.equal(column.flatten(), own[:, 2, 4].flatten())
    assert torch.equal(to_slices(found, 3, 5), grid)


# -- Med-SA ----------------------------------------------------------------------------------------


def test_the_bottleneck_by_hand() -> None:
    ones = torch.ones(1, 8, dtype=torch.float64)
    down, up = 0.1 * torch.ones(2, 8).double(), 0.2 * torch.ones(8, 2).double()
    bias = 0.05 * torch.ones(8, dtype=torch.float64)
    found = bottleneck(ones, down, torch.zeros(2).double(), up, bias, "gelu", 1.0)
    assert found[0, 0].item() == pytest.approx(0.3022062724533131, abs=1e-9)
    assert (ones + found)[0, 0].item() == pytest.approx(1.3022062724533132, abs=1e-9)


#: both bottlenecks of every block, and all three
ENCODER = {
    "vit_b": (295_872, 7_100_928, 10_651_392),
    "vit_l": (525_568, 25_227_264, 37_840_896),
    "vit_h": (820_800, 52_531_200, 78_796_800),
}


def planned(model: Any, adapter: Any) -> list[int]:
    return [row["parameters"] for row in mm.plan(model, adapter).records()]


@pytest.mark.parametrize("size", SIZES)
def test_the_encoders_adapters_have_the_published_sizes(size: str) -> None:
    model = hf_sam_of(size)
    one, two, three = ENCODER[size]
    flat = planned(model, mm.MedSA(decoder="frozen"))
    assert set(flat) == {one}
    assert sum(flat) == two
    assert sum(planned(model, mm.MedSA(decoder="frozen", depth=True))) == three


@pytest.mark.parametrize("build", [hf_sam_of, original_of])
def test_the_released_variant_has_the_released_numbers(build: Any) -> None:
    model = build("vit_b")
    assert sum(planned(model, mm.MedSA("released"))) == 11_159_268
    assert sum(planned(model, mm.MedSA("released", depth=True))) == 14_709_732


def test_the_papers_decoder_has_six_adapters() -> None:
    records = mm.plan(hf_sam_of("vit_b"), mm.MedSA()).records()
    found = {r["site"]: r["parameters"] for r in records if r["site"].startswith("decoder")}
    hyper = (2 * 256 * 32 + 32 + 256) + (256 * 16 + 16) + 2 * (32 * 32) * (16 + 1)
    plain = 2 * 256 * 64 + 64 + 256
    words = {"token_to_image": hyper, "mlp": plain, "image_to_token": plain}
    assert found == {
        f"decoder.layers[{layer}].{word}:out": size
        for layer in range(2)
        for word, size in words.items()
    }


def by_hand(model: Any, attachment: Any, pixels: Tensor, depth: int, rows: int) -> Tensor:
    """The paper's block, step by step, over the bare modules."""
    encoder, layers = model.vision_encoder, attachment.layers
    x = encoder.patch_embed(pixels) + encoder.pos_embed
    for place, block in enumerate(encoder.layers):
        site = layers[f"0/vision.layers[{place}].attn:out"]
        normed = block.layer_norm1(x)
        size = block.window_size
        cut, padded = block.window_partition(normed, size) if size else (normed, None)
        attended = block.attn(cut)[0]
        if size:
            attended = block.window_unpartition(attended, size, padded, normed.shape[1:3])

        def change(z: Tensor, branch: str, site: Any = site) -> Tensor:
            t = {name: getattr(site, f"{branch}_{name}") for name in ("down", "up")}
            bias = {name: getattr(site, f"{branch}_{name}_bias") for name in ("down", "up")}
            return F.relu(z @ t["down"].T + bias["down"]) @ t["up"].T + bias["up"]

        total = x + attended + change(attended, "space")
        volumes = normed.view(-1, depth, *normed.shape[1:])
        deep = torch.empty_like(volumes)
        for row in range(normed.shape[1]):
            for column in range(normed.shape[2]):
                grid = volumes[:, :, row, column].unflatten(1, (rows, depth // rows))
                deep[:, :, row, column] = block.attn(grid)[0].flatten(1, 2)
        x = total + change(deep.flatten(0, 1), "depth")
        beside = layers[f"0/vision.layers[{place}].mlp:out"]
        normed = block.layer_norm2(x)
        inner = F.relu(normed @ beside.down.T + beside.down_bias)
        x = x + block.mlp(normed) + 0.5 * (inner @ beside.up.T + beside.up_bias)
    return encoder.neck(x)


@pytest.mark.parametrize(
    ("depth", "layout", "rows"), [(4, "line", 1), (4, "grid", 2), (3, "line", 1), (2, "grid", 1)]
)
def test_space_and_depth_are_their_formula(depth: int, layout: Any, rows: int) -> None:
    """In windowed and global blocks, two volumes at a time."""
    adapter = mm.MedSA(depth=True, depth_layout=layout, decoder="frozen")
    model, attachment = adapted(adapter)
    pixels = stack(2 * depth)
    with mm.context(model, depth=depth):
        found = encode(model, pixels)
    with mm.disabled(model), torch.no_grad():
        expected = by_hand(model, attachment, pixels, depth, rows)
    assert differ((found,), (encode(BACKBONES["hf_sam"].fresh(), pixels),))
    assert_close((found,), (expected,), 1e-5)


@pytest.mark.parametrize("depth", [1, 2, 6, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hf_sam", "hf_sam2"])
def test_zero_up_projections_are_exactly_sam(name: str, depth: int, dtype: Any) -> None:
    tiny = BACKBONES[name]
    model, bare = tiny.fresh().to(dtype), tiny.fresh().to(dtype).requires_grad_(False)
    mm.attach(model, mm.MedSA(depth=True))
    pixels = tiny.batch(depth)["pixel_values"].to(dtype)
    with torch.no_grad(), mm.context(model, depth=depth):
        found = model.vision_encoder(pixels).last_hidden_state  # type: ignore[operator,union-attr]
        expected = bare.vision_encoder(pixels).last_hidden_state  # type: ignore[operator,union-attr]
    assert torch.equal(found, expected)


def test_one_slice_has_no_depth_branch() -> None:
    model, attachment = adapted(mm.MedSA(depth=True, decoder="frozen"))
    flat: Any = BACKBONES["hf_sam"].fresh()
    other = mm.attach(flat, mm.MedSA(decoder="frozen"))
    with torch.no_grad():
        for key, layer in other.layers.items():
            deep = attachment.layers[key]
            branch = "space_" if isinstance(deep, SpaceDepthLayer) else ""
            for name, tensor in layer.named_parameters():
                tensor.copy_(getattr(deep, branch + name))
    with mm.context(model, depth=1):
        assert_close((encode(model, stack(3)),), (encode(flat, stack(3)),), 1e-6)


@pytest.mark.parametrize("adapter", [mm.MedSA(depth=True), mm.ConvDepth(4)], ids=str)
def test_a_slice_changes_those_of_its_volume_and_no_others(adapter: Any) -> None:
    model, _ = adapted(adapter)
    pixels = stack(6)
    other = pixels.clone()
    other[4] += 1.0
    with mm.context(model, depth=3):
        before, after = encode(model, pixels), encode(model, other)
    changed = [(before[i] - after[i]).abs().max().item() for i in range(6)]
    assert changed[:3] == [0.0, 0.0, 0.0]
    assert min(changed[3:]) > 1e-4


def test_the_depth_branch_sees_one_column_at_a_time() -> None:
    model, attachment = adapted(mm.MedSA(depth=True), amount=0.2)
    (layer,) = (v for k, v in attachment.layers.items() if k.endswith("layers[0].attn:out"))
    from mmadapt.core.anatomy import find_anatomy

    anatomy = find_anatomy(model)
    role = "vision.layers[0].attn"
    site = anatomy.view(model, role, "out", anatomy.roles(model)[role])
    grid = torch.randn(4, 4, 4, 16)
    other = grid.clone()
    other[2, 1, 3] += 1.0
    with torch.no_grad():
        change = layer._along_depth(grid, 4, site) - layer._along_depth(other, 4, site)
    touched = change.abs().amax(dim=-1) > 0  # (D, H, W)
    assert touched[:, 1, 3].all()
    touched[:, 1, 3] = False
    assert not touched.any()


@pytest.mark.parametrize("adapter", [mm.MedSA(depth=True), mm.ConvDepth(4)], ids=str)
def test_a_depth_is_needed_and_has_to_divide(adapter: Any) -> None:
    model, _ = adapted(adapter)
    with pytest.raises(mm.errors.CheckError, match="was not told how many slices") as caught:
        encode(model, stack(4))
    assert "mmadapt.context(model, depth=" in caught.value.hint
    for wrong in (3, 0, 2.0, True):
        with mm.context(model, depth=wrong), pytest.raises(mm.errors.CheckError, match="4 rows"):
            encode(model, stack(4))


def test_a_depth_for_flat_images_is_refused() -> None:
    model, _ = adapted(mm.MedSA())
    refused = pytest.raises(mm.errors.AttachError, match="no attached layer asks for the fact")
    with refused, mm.context(model, depth=2):
        pass


def test_where_a_stage_of_sam2_begins_there_is_no_depth_branch() -> None:
    model: Any = BACKBONES["hf_sam2"].fresh()
    layers = mm.attach(model, mm.MedSA(depth=True)).layers
    deep = {key for key, layer in layers.items() if isinstance(layer, SpaceDepthLayer)}
    assert deep == {"0/vision.layers[0].attn:out", "0/vision.layers[3].attn:out"}


@pytest.mark.parametrize("depth", [False, True])
def test_without_relative_positions_it_is_a_sam_whose_tables_are_zero(depth: bool) -> None:
    """In both branches, and in the attention over depth."""
    found, pixels = [], stack(6)
    for positions in ("zero", "kept"):
        adapter = mm.MedSA("released", depth=depth, relative_positions=positions)  # type: ignore[arg-type]
        model: Any = BACKBONES["hf_sam"].fresh()
        if positions == "kept":
            with torch.no_grad():
                for block in model.vision_encoder.layers:
                    block.attn.rel_pos_h.zero_()
                    block.attn.rel_pos_w.zero_()
        randomise(mm.attach(model, adapter, at="vision.layers[*].attn:out", seed=1), 0.3)
        if positions == "zero":
            rest = mm.MedSA(relative_positions="zero")
            mm.attach(model, rest, "tables", at=list(rest.patterns[2:4]))
            mm.set_active(model, "default", "tables")
        with contextlib.nullcontext() if not depth else mm.context(model, depth=3):
            found.append(encode(model, pixels))
    assert torch.equal(*found)
    with_tables, _ = adapted(mm.MedSA("released"), at="vision.layers[*].attn:out")
    assert differ((encode(with_tables, pixels),), (found[0],))


def test_a_plain_vision_transformer_is_refused() -> None:
    with pytest.raises(mm.errors.SiteError, match=r"grid of image tokens \(BHWC\)"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.MedSA())


def test_variants_are_two_published_methods() -> None:
    paper, released = mm.MedSA(), mm.MedSA("released")
    assert (paper.activation, paper.decoder) == ("relu", "adapters")
    assert (released.activation, released.decoder) == ("gelu", "trained")
    assert mm.MedSA("released", decoder="frozen").patterns == mm.MedSA(decoder="frozen").patterns
    for wrong in ({"variant": "mine"}, {"decoder": "full"}, {"ratio": 0.0}, {"depth": 3}):
        with pytest.raises(mm.errors.AdapterError, match=f"MedSA: {next(iter(wrong))} is"):
            mm.MedSA(**wrong)  # type: ignore[arg-type]


# -- the bottleneck a prompt makes --------------------------------------------------------------------


def hyper(model: Any, adapter: Any = None) -> Any:
    """Only the prompt-made bottlenecks, with random tensors."""
    at = "decoder.layers[*].token_to_image"
    return randomise(mm.attach(model, adapter or mm.MedSA(), at=at), 0.3)


def test_the_prompt_made_bottleneck_is_its_formula() -> None:
    model: Any = BACKBONES["hf_sam"].fresh()
    attachment = hyper(model, mm.MedSA(hyper_width=5, hyper_layers=3, prompt_width=4))
    layer = attachment.layers["0/decoder.layers[0].token_to_image:out"]
    assert isinstance(layer, HyperPromptLayer)
    batch = clicks(2)
    batch["input_points"] = batch["input_points"].repeat(1, 3, 1, 1)  # three prompts an image
    batch["input_points"][:, 1:] *= 0.5
    batch["input_labels"] = batch["input_labels"].repeat(1, 3, 1)
    seen: list[Tensor] = []
    bare: Any = BACKBONES["hf_sam"].fresh()
    for each in (bare, model):
        each.mask_decoder.transformer.layers[0].cross_attn_token_to_image.register_forward_hook(
            lambda module, args, output: seen.append(output[0])
        )
    with torch.no_grad():
        bare(**batch)
        model(**batch)
        y, found = seen
        prompt = bare.prompt_encoder(
            batch["input_points"], batch["input_labels"], None, batch["input_masks"]
        )[0]
        for image in range(2):
            for one in range(3):
                numbers = layer.reduce @ prompt[image, one].mean(dim=0) + layer.reduce_bias
                hidden = y[image, one] @ layer.down.T + layer.down_bias
                for k in range(3):
                    made = (layer.generate[k] @ numbers + layer.generate_bias[k]).view(5, 5)
                    mixed = hidden @ made
                    mean, var = mixed.mean(-1, True), mixed.var(-1, correction=0, keepdim=True)
                    hidden = ((mixed - mean) / (var + 1e-5).sqrt()).clamp(min=0)
                expected = y[image, one] + hidden @ layer.up.T + layer.up_bias
                assert_close((found[image, one],), (expected,), 1e-4)


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_clicking_one_image_again_leaves_the_others_masks(name: str) -> None:
    model: Any = BACKBONES[name].fresh()
    hyper(model)
    batch = clicks(3)
    again = {**batch, "input_points": batch["input_points"].clone()}
    again["input_points"][2] = torch.tensor([[[1.0, 2.0], [12.0, 3.0]]])
    with torch.no_grad():
        before = BACKBONES[name].outputs(model, batch)
        after = BACKBONES[name].outputs(model, again)
    assert_equal(tuple(o[:2] for o in before), tuple(o[:2] for o in after))
    assert differ(tuple(o[2:] for o in before), tuple(o[2:] for o in after))


# -- convolution through the depth --------------------------------------------------------------------


@pytest.mark.parametrize("norm", [True, False])
def test_conv_depth_is_its_formula(norm: bool) -> None:
    model, attachment = adapted(mm.ConvDepth(4, kernel=3, norm=norm), at="vision.layers[1]:in")
    (layer,) = attachment.layers.values()
    seen: list[Tensor] = []
    bare: Any = BACKBONES["hf_sam"].fresh()
    bare.vision_encoder.layers[1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    # behind the adapter's own hook
    model.vision_encoder.layers[1].layer_norm1.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    pixels = stack(6)
    encode(bare, pixels)
    with mm.context(model, depth=3):
        encode(model, pixels)
    x, found = seen
    z = F.layer_norm(x, (16,), layer.norm_weight, layer.norm_bias) if norm else x
    hidden = (z @ layer.down.T).view(2, 3, 4, 4, 4).permute(0, 4, 1, 2, 3)  # (B, C, D, H, W)
    kernel = layer.kernel[..., None, None]
    hidden = F.gelu(F.conv3d(hidden, kernel, layer.kernel_bias, padding=(1, 0, 0)))
    expected = x + (hidden.permute(0, 2, 3, 4, 1).flatten(0, 1) @ layer.up.T)
    assert_close((found,), (expected.detach(),), 1e-5)


def test_conv_depth_by_hand() -> None:
    """Two volumes of three slices, one channel: sums over the neighbours, none across."""
    values = torch.tensor([1.0, 2.0, 3.0, 10.0, 20.0, 30.0]).view(6, 1, 1)
    found = through_depth(values, torch.ones(1, 1, 3), None, 3)
    assert found.flatten().tolist() == [3.0, 6.0, 5.0, 30.0, 60.0, 50.0]


@pytest.mark.parametrize("build", [hf_sam_of, original_of])
def test_conv_depth_at_both_places_of_vit_b_has_the_published_size(build: Any) -> None:
    """MA-SAM has two such adapters a block, 24,818,688 numbers."""
    model = build("vit_b")
    both = planned(model, mm.ConvDepth(384, second=True))
    assert (len(both), sum(both)) == (24, 24_818_688)
    assert 2 * sum(planned(model, mm.ConvDepth(384))) == 24_818_688


@pytest.mark.parametrize(("rows", "columns", "side"), [(4, 5, 3), (64, 64, 14), (3, 4, 4)])
def test_a_grid_is_put_together_from_its_windows(rows: int, columns: int, side: int) -> None:
    grid = torch.randn(2, rows, columns, 2)
    assert torch.equal(from_windows(windows(grid, side, side), rows, columns), grid)


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
def test_the_second_place_is_the_stream_between_attention_and_mlp(name: str) -> None:
    """MA-SAM's block, step by step over the bare modules, in windowed and global blocks."""
    model, attachment = adapted(mm.ConvDepth(4, second=True), name)
    ours = name == "hf_sam"
    encoder = model.vision_encoder if ours else model.image_encoder
    names = ("layer_norm1", "layer_norm2") if ours else ("norm1", "norm2")
    pixels = stack(6)
    with torch.no_grad(), mm.context(model, depth=3):
        found = encoder(pixels)
    layers = attachment.layers

    def convolved(x: Tensor, layer: Any) -> Tensor:
        z = F.layer_norm(x, (16,), layer.norm_weight, layer.norm_bias) @ layer.down.T
        z = z.view(2, 3, 4, 4, 4).permute(0, 4, 1, 2, 3)  # (B, C, D, H, W)
        z = F.conv3d(z, layer.kernel[..., None, None], layer.kernel_bias, padding=(1, 0, 0))
        return x + F.gelu(z).permute(0, 2, 3, 4, 1).flatten(0, 1) @ layer.up.T

    with mm.disabled(model), torch.no_grad():
        x = encoder.patch_embed(pixels) + encoder.pos_embed
        for place, block in enumerate(encoder.layers if ours else encoder.blocks):
            norms = [getattr(block, word) for word in names]
            x = convolved(x, layers[f"0/vision.layers[{place}]:in"])
            size = block.window_size or 4
            attended = block.attn(windows(norms[0](x), size, size))
            attended = attended[0] if ours else attended
            x = x + from_windows(attended, 4, 4)
            x = convolved(x, layers[f"0/vision.layers[{place}].attn:out"])
            x = x + block.mlp(norms[1](x))
        expected = encoder.neck(x if ours else x.permute(0, 3, 1, 2))
    found = found.last_hidden_state if ours else found
    assert_close((found,), (expected,), 1e-5)
    mm.detach(model)
    with torch.no_grad():
        bare = encoder(pixels)
    assert differ((found,), (bare.last_hidden_state if ours else bare,))


def test_the_second_place_is_known_in_sam_alone() -> None:
    with pytest.raises(mm.errors.SiteError, match=r"second=True\) reads a grid of image tokens"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.ConvDepth(4, second=True))


def test_slices_may_go_through_any_vision_transformer() -> None:
    model: Any = BACKBONES["hf_vit"].fresh()
    randomise(mm.attach(model, mm.ConvDepth(4)), 0.3)
    pixels = stack(6)
    other = pixels.clone()
    other[0] += 1.0
    with torch.no_grad(), mm.context(model, depth=3):
        before, after = (model(pixel_values=p).last_hidden_state for p in (pixels, other))
    assert torch.equal(before[3:], after[3:])
    assert not torch.allclose(before[1], after[1])


def test_conv_depth_refuses_what_has_no_slices() -> None:
    for at in ("vision.layers[0].attn", "decoder.layers[*].mlp"):
        with pytest.raises(mm.errors.AdapterError, match="windows or prompts"):
            mm.attach(BACKBONES["hf_sam"].fresh(), mm.ConvDepth(4), at=at)
    with pytest.raises(mm.errors.AdapterError, match="no positions"):
        mm.attach(BACKBONES["open_clip"].fresh(), mm.ConvDepth(4), at="vision.pooled")
    with pytest.raises(mm.errors.AdapterError, match="odd number of slices"):
        mm.ConvDepth(kernel=2)
