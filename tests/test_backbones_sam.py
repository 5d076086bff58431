"""SAM: what its tables say is what the modules do, in both libraries, and at the published sizes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from backbones import BACKBONES, clicks
from snapshot import assert_close, assert_equal, differ, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.interop.sam import resize_positions, to_segment_anything, to_transformers

SAMS = ("hf_sam", "segment_anything", "hf_sam2")


def outputs(name: str, model: Any, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return BACKBONES[name].outputs(model, batch)


# -- the published sizes ---------------------------------------------------------------------------


#: width, layers, heads, global layers; parameters of all, of the encoder, of the two kinds of blocks
SIZES = {
    "vit_b": (768, 12, 12, (2, 5, 8, 11), 93_735_472, 89_670_912, 7_091_328, 7_104_128),
    "vit_l": (1024, 24, 16, (5, 11, 17, 23), 312_342_832, 308_278_272, 12_599_680, 12_612_480),
    "vit_h": (1280, 32, 16, (7, 15, 23, 31), 641_090_608, 637_026_048, 19_681_760, 19_697_760),
}


def hf_sam_of(size: str) -> Any:
    from transformers import SamConfig, SamModel

    width, layers, heads, everywhere = SIZES[size][:4]
    vision = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "global_attn_indexes": list(everywhere),
        "mlp_dim": 4 * width,
    }
    with torch.device("meta"):
        return SamModel(SamConfig(vision_config=vision))


def original_of(size: str) -> Any:
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        return sam_model_registry[size]()


def counted(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("build", [hf_sam_of, original_of])
def test_a_real_sam_has_the_published_numbers_and_every_role(size: str, build: Any) -> None:
    width, layers, _, everywhere, total, encoder, windowed, whole = SIZES[size]
    model = build(size)
    ours = build is hf_sam_of
    # transformers trains the matrix of 2 × 128 that the original keeps as a buffer
    assert counted(model) == total + (256 if ours else 0)
    vision = model.vision_encoder if ours else model.image_encoder
    assert counted(vision) == encoder
    assert counted(model.mask_decoder) == 4_058_340
    assert counted(model.prompt_encoder) == 6_220 + (256 if ours else 0)
    blocks = vision.layers if ours else vision.blocks
    for place, block in enumerate(blocks):
        assert counted(block) == (whole if place in everywhere else windowed)
    assert len(model.state_dict()) == {"vit_b": 314, "vit_l": 482, "vit_h": 594}[size] + ours
    roles = find_anatomy(model).roles(model)
    assert sum(role.endswith(".attn.q") for role in roles if role.startswith("vision")) == layers
    view = find_anatomy(model).view(
        model, "vision.layers[1].mlp", "out", roles["vision.layers[1].mlp"]
    )
    assert view.width == width


@pytest.mark.parametrize(
    ("blocks", "widths", "heads", "everywhere", "windows", "total"),
    [
        ((1, 2, 7, 2), (96, 192, 384, 768), (1, 2, 4, 8), (5, 7, 9), (8, 4, 14, 7), 31_440_721),
        ((1, 2, 11, 2), (96, 192, 384, 768), (1, 2, 4, 8), (7, 10, 13), (8, 4, 14, 7), 38_538_577),
        (
            (2, 3, 16, 3),
            (112, 224, 448, 896),
            (2, 4, 8, 16),
            (12, 16, 20),
            (8, 4, 14, 7),
            73_328_401,
        ),
        (
            (2, 6, 36, 4),
            (144, 288, 576, 1152),
            (2, 4, 8, 16),
            (23, 33, 43),
            (8, 4, 16, 8),
            216_924_865,
        ),
    ],
    ids=["tiny", "small", "base-plus", "large"],
)
def test_a_real_sam2_has_the_published_numbers_and_every_role(
    blocks: Any, widths: Any, heads: Any, everywhere: Any, windows: Any, total: int
) -> None:
    from transformers import Sam2Config, Sam2Model

    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": widths[0],
        "num_attention_heads": heads[0],
        "blocks_per_stage": list(blocks),
        "embed_dim_per_stage": list(widths),
        "num_attention_heads_per_stage": list(heads),
        "global_attention_blocks": list(everywhere),
        "window_size_per_stage": list(windows),
        "window_positional_embedding_background_size": [14, 14] if widths[0] == 112 else [7, 7],
    }
    vision = {"backbone_config": hiera, "backbone_channel_list": list(widths[::-1])}
    with torch.device("meta"):
        model = Sam2Model(Sam2Config(vision_config=vision))
    assert counted(model) == total
    anatomy = find_anatomy(model)
    roles = anatomy.roles(model)
    for stage in range(1, 4):  # where a stage begins, attention widens and pools
        role = f"vision.layers[{sum(blocks[:stage])}].attn"
        view = anatomy.view(model, role, "out", roles[role])
        assert (view.width_in, view.width) == (widths[stage - 1], widths[stage])
        assert not roles[role].aligned


@pytest.mark.parametrize("name", SAMS)
def test_every_tensor_of_encoder_and_decoder_belongs_to_one_role(name: str) -> None:
    model = BACKBONES[name].fresh()
    anatomy = find_anatomy(model)
    found: dict[str, int] = {}
    for role, span in anatomy.roles(model).items():
        if span.weight:
            view = anatomy.view(model, role, "weight", span)
            found[span.weight] = found.get(span.weight, 0) + view.rows[1] - view.rows[0]
    for path, parameter in model.named_parameters():
        if "shared" in path or path == "no_memory_embedding":  # Fourier features; SAM 2's memory
            continue
        assert found[path] == parameter.shape[0], path


# -- one SAM in two libraries -----------------------------------------------------------------------


def twins() -> tuple[Any, Any]:
    """The same tiny SAM in segment_anything and in transformers."""
    original, ours = BACKBONES["segment_anything"].fresh(), BACKBONES["hf_sam"].fresh()
    ours.load_state_dict(to_transformers(original.state_dict()), strict=True)
    return original, ours


def test_a_converted_sam_computes_the_same() -> None:
    """Up to the small number in the norms of the decoder's blocks, which the libraries set apart."""
    original, ours = twins()
    expected = outputs("segment_anything", original)
    assert_close(outputs("hf_sam", ours), expected, 1e-3)
    for name, norm in ours.mask_decoder.transformer.named_modules():
        if isinstance(norm, nn.LayerNorm):
            assert norm.eps == (1e-5 if name == "layer_norm_final_attn" else 1e-6)
            norm.eps = 1e-5
    assert_close(outputs("hf_sam", ours), expected, 1e-5)
    assert differ(outputs("hf_sam", BACKBONES["hf_sam"].fresh()), expected)


def test_conversion_and_back_is_the_identity_key_for_key() -> None:
    for name, there, back in (
        ("segment_anything", to_transformers, to_segment_anything),
        ("hf_sam", to_segment_anything, to_transformers),
    ):
        state = BACKBONES[name].fresh().state_dict()
        again = back(there(state))
        assert set(again) == set(state)
        assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("convert", [to_transformers, to_segment_anything])
def test_a_foreign_key_is_refused_by_name(convert: Any) -> None:
    with pytest.raises(mm.errors.BackboneError, match=r"'module\.neck' is no tensor of SAM"):
        convert({"module.neck": torch.zeros(1)})


@pytest.mark.parametrize("grid", [4, 6, 9])
def test_positions_are_resized_as_sam_itself_looks_them_up(grid: int) -> None:
    """A table of a smaller grid read at a larger one: SAM interpolates it while it runs."""
    from segment_anything.modeling.image_encoder import get_rel_pos

    state = BACKBONES["segment_anything"].fresh().state_dict()
    found = resize_positions(state, grid)
    assert found.keys() == state.keys()
    changed = {key for key, value in state.items() if not torch.equal(value, found[key])}
    tables = {f"image_encoder.blocks.1.attn.rel_pos_{axis}" for axis in "hw"}
    assert changed == (set() if grid == 4 else {"image_encoder.pos_embed"} | tables)
    assert found["image_encoder.pos_embed"].shape == (1, grid, grid, 16)
    for key in tables:
        expected = get_rel_pos(grid, grid, state[key])
        assert_close((get_rel_pos(grid, grid, found[key]),), (expected,), 1e-6)
        assert len(found[key]) == 2 * grid - 1
    renamed = to_transformers(found)
    for key, value in resize_positions(to_transformers(state), grid).items():
        assert torch.equal(value, renamed[key])


def test_positions_that_cannot_be_resized_are_refused() -> None:
    state = BACKBONES["segment_anything"].fresh().state_dict()
    with pytest.raises(mm.errors.BackboneError, match="no positions of a SAM"):
        resize_positions({}, 4)
    alike = {k: v[:5] if "rel_pos" in k else v for k, v in state.items()}
    with pytest.raises(mm.errors.BackboneError, match=r"have \[5\] rows, expected some with 7"):
        resize_positions(alike, 8)


@pytest.mark.parametrize(
    "adapter", [mm.LoRA(2), mm.Bottleneck(4), mm.MedSA(), mm.Unlock(at="decoder.iou.*")], ids=str
)
def test_an_adapter_trained_in_one_library_acts_alike_in_the_other(
    adapter: Any, tmp_path: Any
) -> None:
    original, ours = twins()
    bare = outputs("segment_anything", original)
    randomise(mm.attach(original, adapter), 0.1)
    mm.save(original, tmp_path)
    mm.load_adapter(ours, tmp_path)
    adapted = outputs("segment_anything", original)
    assert differ(adapted, bare)
    assert_close(outputs("hf_sam", ours), adapted, 1e-3)


# -- sites whose output holds other positions than their input --------------------------------------


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("hf_sam", "vision.neck"),  # grid last in, grid first out
        ("hf_sam2", "vision.layers[1].attn"),  # pools its queries
        ("hf_sam2", "vision.layers[2]"),
    ],
)
def test_what_is_read_from_the_input_is_not_added_to_other_positions(name: str, at: str) -> None:
    for adapter in (
        mm.Bottleneck(4, placement="parallel"),
        mm.Convpass(4),
        mm.BiAdaptFormer(4),
        mm.AdapterBias(),
    ):
        with pytest.raises(mm.errors.AdapterError, match="other positions|last axis"):
            mm.attach(BACKBONES[name].fresh(), adapter, at=at)
    model = BACKBONES[name].fresh()
    bare = outputs(name, model)
    randomise(mm.attach(model, mm.Bottleneck(4), at=at))
    assert differ(outputs(name, model), bare)


# -- rows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_sam", "hf_sam2"])
@pytest.mark.parametrize(
    ("adapter", "at"),
    [
        (mm.Bottleneck(4), ("vision.layers[*].attn", "vision.layers[*].mlp")),
        (mm.LoRA(2), ("vision.layers[*].attn.q", "vision.layers[*].attn.o")),
        (mm.Bottleneck(4), ("decoder.layers[*].image_to_token", "decoder.layers[*].mlp")),
        (mm.LoRA(2), ("decoder.layers[*].token_to_image.k", "decoder.masks[*].linear2")),
    ],
    ids=["windows", "fused", "decoder", "keys"],
)
def test_a_row_keeps_its_adapter_in_its_windows_and_prompts(
    name: str, adapter: Any, at: Any
) -> None:
    model = BACKBONES[name].fresh()
    for place, word in enumerate("ab"):
        randomise(mm.attach(model, adapter, name=word, at=at), 0.3, place)
    batch = clicks(3, 64 if name == "hf_sam2" else 16)
    batch["input_points"] = batch["input_points"].repeat(1, 2, 1, 1)
    batch["input_points"][:, 1] *= 0.5  # two prompts an image
    batch["input_labels"] = batch["input_labels"].repeat(1, 2, 1)
    rows = ["b", None, "a"]
    with mm.context(model, rows=rows):
        together = outputs(name, model, batch)
    singly = []
    for place, row in enumerate(rows):
        mm.set_active(model, *([row] if row else []))
        alone = {key: value[place : place + 1] for key, value in batch.items()}
        singly.append(outputs(name, model, alone))
    expected = tuple(torch.cat(parts) for parts in zip(*singly, strict=True))
    mm.set_active(model)
    assert differ(expected, outputs(name, model, batch))
    assert_close(together, expected, 1e-4)


def test_rows_of_a_decoder_that_is_called_for_one_image_are_refused() -> None:
    model = BACKBONES["segment_anything"].fresh()
    mm.attach(model, mm.LoRA(1), name="a", at="decoder.layers[*].attn.q")
    refused = pytest.raises(mm.errors.AttachError, match="prompts of one image")
    with refused, mm.context(model, rows=["a", None]):
        pass


def test_rows_that_do_not_divide_the_windows_are_refused() -> None:
    model = BACKBONES["hf_sam"].fresh()
    mm.attach(model, mm.Bottleneck(2), name="a", at="vision.layers[0].attn")
    with (
        mm.context(model, rows=["a"] * 5),
        pytest.raises(mm.errors.CheckError, match="chosen for 5"),
    ):
        outputs("hf_sam", model)


# -- checkpointing by block --------------------------------------------------------------------------


def checkpoint_blocks(name: str, model: Any) -> Any:
    """Recompute block by block: as transformers does it, or as one does it to segment_anything."""
    if name == "hf_sam":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.vision_encoder.layers[0]
    encoder = model.image_encoder

    def forward(x: Tensor) -> Tensor:
        x = encoder.patch_embed(x) + encoder.pos_embed
        for block in encoder.blocks:
            x = checkpoint(block, x, use_reentrant=False)  # type: ignore[assignment]
        return encoder.neck(x.permute(0, 3, 1, 2))

    encoder.forward = forward
    return encoder.blocks[0]


@pytest.mark.parametrize("name", ["hf_sam", "segment_anything"])
@pytest.mark.parametrize(
    "adapter",
    [
        mm.Bottleneck(4),
        mm.LoRA(2),
        mm.MedSA(depth=True),
        mm.MedSA("released", relative_positions="zero"),
        mm.ConvDepth(4, second=True),
        mm.SAMMed2D(),
        mm.AdapterShadow(skip=True, rank=2),
    ],
    ids=str,
)
def test_checkpointed_blocks_have_the_same_gradients(name: str, adapter: Any) -> None:
    model: Any = BACKBONES[name].fresh()
    attachment = randomise(mm.attach(model, adapter), 0.2)
    volume = isinstance(adapter, mm.ConvDepth) or getattr(adapter, "depth", False)
    told = functools.partial(mm.context, model, **({"depth": 3} if volume else {}))

    def gradients() -> list[Tensor]:
        model.zero_grad()
        with told():
            found = BACKBONES[name].outputs(model)
        sum((o * o).sum() for o in found).backward()  # type: ignore[union-attr]
        return [p.grad.clone() for p in attachment.parameters() if p.grad is not None]

    model.train()
    plain = gradients()
    recomputed: list[nn.Module] = []
    first = checkpoint_blocks(name, model)
    handle = first.attn.qkv.register_forward_hook(
        lambda module, args, output: recomputed.append(module)
    )
    checkpointed = gradients()
    handle.remove()
    # once more in backward; the depth branch calls it a second time each
    assert len(recomputed) == (4 if getattr(adapter, "depth", False) else 2)
    assert len(plain) == len(checkpointed) > 0
    assert_close(tuple(checkpointed), tuple(plain), 1e-5)


def test_a_choice_of_masks_needs_no_other_anatomy() -> None:
    """One mask or three, with or without mask prompts and boxes: the sites are the same."""
    model: Any = BACKBONES["hf_sam"].fresh()
    bare = BACKBONES["hf_sam"].fresh().requires_grad_(False)
    mm.attach(model, mm.MedSA())
    batch = clicks(2)
    pixels = batch["pixel_values"]
    boxes = torch.tensor([[[1.0, 2.0, 9.0, 8.0]], [[0.0, 0.0, 5.0, 5.0]]])
    for call in (
        {"input_boxes": boxes},
        {"input_masks": batch["input_masks"]},
        {"input_boxes": boxes, "multimask_output": False},
        {},
    ):
        with torch.no_grad():
            one, other = model(pixels, **call), bare(pixels, **call)
        assert_equal((one.pred_masks, one.iou_scores), (other.pred_masks, other.iou_scores))
