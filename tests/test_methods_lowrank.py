"""LoRA's scales and kernels, and unlocked tensors, against changed weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, WIDTH
from snapshot import assert_close, differ, randomise
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterError

SIZES = {1: (7,), 2: (7, 6), 3: (5, 6, 4)}
KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class One(nn.Module):
    """A model of one child, which it calls."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


def one(child: nn.Module, layout: str = "BCHW") -> mm.Backbone:
    span = mm.Span("child", ("weight", "out"), x="0|input", weight="child.weight", layout=layout)
    norm = mm.Span("child", ("weight", "out"), x="0|input", weight="child.bias", layout=layout)
    anatomy = mm.Anatomy(family="one", spans={"it": span, "bias": norm})
    return mm.Backbone(model=One(child.requires_grad_(True)), anatomy=anatomy)


# -- scale ------------------------------------------------------------------------------------------


def test_rank_stabilised_scale_divides_by_the_root() -> None:
    assert mm.LoRA(16, alpha=8.0, rank_stabilized=True).scale == 2.0
    assert mm.LoRA(16, alpha=8.0).scale == 0.5
    with pytest.raises(AdapterError) as caught:
        mm.LoRA(16, rank_stabilized=True)
    assert "rank_stabilized divides alpha by √rank, and alpha is None" in str(caught.value)
    with pytest.raises(AdapterError, match="rank_stabilized is 1, expected True or False"):
        mm.LoRA(16, rank_stabilized=1)  # type: ignore[arg-type]


def test_a_rank_stabilised_lora_is_its_formula() -> None:
    backbone = one(nn.Linear(6, 5), "BTC")
    layer: Any
    (layer,) = randomise(
        mm.attach(backbone, mm.LoRA(4, alpha=3.0, rank_stabilized=True), at="it")
    ).layers.values()
    x = torch.randn(2, 3, 6)
    linear: Any = backbone.model.child
    with torch.no_grad():
        expected = x @ (linear.weight + 1.5 * layer.b @ layer.a).T + linear.bias
        assert_close((backbone.model(x),), (expected,), 1e-6)


# -- convolutions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("port", ["weight", "out"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
@pytest.mark.parametrize(
    "options", [{}, {"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}]
)
def test_lora_in_a_convolution_equals_a_changed_kernel(
    dimensions: int, port: str, options: dict[str, Any]
) -> None:
    torch.manual_seed(2)
    convolution = KINDS[dimensions](4, 6, 3, **options)
    backbone = one(convolution)
    x = torch.randn(2, 4, *SIZES[dimensions])
    bare = backbone.model(x).detach()
    attachment = randomise(mm.attach(backbone, mm.LoRA(2, alpha=3.0), at=f"it:{port}"))
    layer: Any
    (layer,) = attachment.layers.values()
    assert layer.a.shape == (2, 4, *[3] * dimensions)
    assert attachment.num_parameters == 2 * (4 * 3**dimensions + 6)
    twin = KINDS[dimensions](4, 6, 3, **options)
    twin.load_state_dict(convolution.state_dict())
    with torch.no_grad():
        for o in range(6):
            for r in range(2):
                twin.weight[o] += 1.5 * layer.b[o, r] * layer.a[r]
        assert_close((backbone.model(x),), (twin(x),), 2e-6)
        assert differ((backbone.model(x),), (bare,))
        assert_close((layer.fold(convolution.weight, None, None)[0],), (twin.weight,), 1e-6)


def test_a_patch_embedding_is_adapted_by_its_kernel() -> None:
    backbone = one(nn.Conv2d(3, 8, 4, 4, padding_mode="reflect"))
    with pytest.raises(AdapterError, match="pads in mode 'reflect'") as caught:
        mm.attach(backbone, mm.LoRA(2), at="it:out")
    assert "at='it:weight'" in caught.value.hint
    attachment = randomise(mm.attach(backbone, mm.LoRA(2), at="it:weight"))
    assert attachment.num_parameters == 2 * (3 * 4 * 4 + 8)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        adapted = backbone.model(x)
        with mm.disabled(backbone):
            assert differ((adapted,), (backbone.model(x),))


@pytest.mark.parametrize(
    ("child", "text"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "would mix the 2 groups of its convolution"),
        (nn.ConvTranspose2d(4, 4, 3), "no form for the transposed convolution at it:"),
    ],
)
def test_kernels_without_a_low_rank_form_are_refused(child: nn.Module, text: str) -> None:
    with pytest.raises(AdapterError, match=text):
        mm.attach(one(child), mm.LoRA(2), at="it")


def test_lora_is_refused_at_a_vector() -> None:
    with pytest.raises(AdapterError, match="a vector of 6") as caught:
        mm.attach(one(nn.LayerNorm(6), "BTC"), mm.LoRA(1), at="it")
    assert "Unlock" in caught.value.hint


# -- unlocked tensors -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["it", "bias"])
@pytest.mark.parametrize(
    ("child", "shape"),
    [(nn.LayerNorm(6), (2, 3, 6)), (nn.Linear(6, 4), (2, 6)), (nn.Conv2d(6, 4, 3), (2, 6, 5, 5))],
)
def test_an_unlocked_tensor_is_the_backbones_and_a_trained_change(
    child: Any, shape: tuple[int, ...], role: str
) -> None:
    torch.manual_seed(3)
    import copy

    backbone, twin = one(copy.deepcopy(child)), copy.deepcopy(child)
    name = {"it": "weight", "bias": "bias"}[role]
    attachment = mm.attach(backbone, mm.Unlock(), at=role)
    assert attachment.num_parameters == getattr(child, name).numel()
    layer: Any
    (layer,) = randomise(attachment).layers.values()
    x = torch.randn(shape)
    with torch.no_grad():
        getattr(twin, name).add_(layer.change)
        assert_close((backbone.model(x),), (twin(x),), 1e-6)
    backbone.model(x).square().sum().backward()
    twin(x).square().sum().backward()
    assert_close((layer.change.grad,), (getattr(twin, name).grad,), 1e-5)


def test_unlock_has_no_sites_of_its_own() -> None:
    with pytest.raises(mm.errors.SiteError, match="Unlock was given no site"):
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.Unlock())


def test_rows_of_a_packed_projection_unlock_alone() -> None:
    model: Any = BACKBONES["open_clip_vision"].fresh()
    attachment = mm.attach(model, mm.Unlock(), at="vision.layers[*].attn.v")
    assert attachment.num_parameters == LAYERS * WIDTH * WIDTH
