"""Couplings and their inverses: exactness, places, sizes, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import BACKBONES, LAYERS, WIDTH
from snapshot import assert_close, assert_equal, differ, randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.errors import AdapterError, SiteError

BERT = BACKBONES["hf_bert"]
VISION = ("vision.layers[0]:in", "vision.layers[-1]:out")


def coupling_of(attachment: Any) -> Any:
    first, second = attachment.layers.values()
    assert first.shared is second.shared
    return first.shared


def half(z: Tensor, c: Any, word: str) -> Tensor:
    down, up = getattr(c, f"{word}_down"), getattr(c, f"{word}_up")
    hidden = torch.relu(z @ down.T + getattr(c, f"{word}_down_bias"))
    return hidden @ up.T + getattr(c, f"{word}_up_bias")


def forth(z: Tensor, c: Any, half_of: int) -> Tensor:
    x1, x2 = z[..., :half_of], z[..., half_of:]
    y1 = x1 + half(x2, c, "f")
    return torch.cat((y1, x2 + half(y1, c, "g")), -1)


def back(z: Tensor, c: Any, half_of: int) -> Tensor:
    y1, y2 = z[..., :half_of], z[..., half_of:]
    x2 = y2 - half(y1, c, "g")
    return torch.cat((y1 - half(x2, c, "f"), x2), -1)


@pytest.mark.parametrize(("name", "at"), [("hf_bert", None), ("hf_vit", VISION)])
def test_states_enter_through_the_coupling_and_leave_through_its_inverse(
    name: str, at: Any
) -> None:
    tiny = BACKBONES[name]
    bare: Any = tiny.fresh()
    model: Any = tiny.fresh()
    attachment = randomise(mm.attach(model, mm.Invertible(), at=at))
    coupling = coupling_of(attachment)
    tower = "encoder.layer" if name == "hf_bert" else "layers"
    first, last = bare.get_submodule(f"{tower}.0"), bare.get_submodule(f"{tower}.{LAYERS - 1}")
    first.register_forward_pre_hook(lambda m, args: (forth(args[0], coupling, 8), *args[1:]))
    last.register_forward_hook(lambda m, args, y: back(y, coupling, 8))
    with torch.no_grad():
        expected = tiny.outputs(bare)
        assert_close(tiny.outputs(model), expected, 1e-5)
        assert differ(expected, tiny.outputs(tiny.fresh()))


class Nothing(nn.Module):
    """Two modules one after another that change nothing: what enters must leave."""

    def __init__(self, channels: int, leading: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if leading else nn.LayerNorm
        self.entry, self.exit = norm(channels), norm(channels)  # only their widths are read
        self.leading = leading

    def forward(self, x: Tensor) -> Tensor:
        return self.exit(self.entry(x))


@pytest.mark.parametrize("leading", [False, True], ids=["BTC", "BCHW"])
@pytest.mark.parametrize("channels", [2, 7, 16, 33])
@pytest.mark.parametrize("reduction", [1, 2, 100])
def test_the_inverse_undoes_the_coupling(channels: int, reduction: int, leading: bool) -> None:
    model: Any = Nothing(channels, leading).eval()
    layout = "BCHW" if leading else "BTC"
    spans = {
        name: mm.Span(name, x="0|input", channels=f"{name}.weight", layout=layout)
        for name in ("entry", "exit")
    }
    model.entry.forward = model.exit.forward = lambda x: x
    backbone = mm.Backbone(model, anatomy=mm.Anatomy(family="nothing", spans=spans))
    attachment = randomise(
        mm.attach(backbone, mm.Invertible(reduction), at=("entry:out", "exit:out"))
    )
    shape = (3, channels, 4, 5) if leading else (3, 4, channels)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model(x)
        assert torch.allclose(found, x, atol=1e-5)
        z = x.movedim(1, -1) if leading else x
        inner = coupling_of(attachment).run(z, inverse=False)
        assert differ((inner,), (z,))
        assert_close((inner,), (forth(z, coupling_of(attachment), channels // 2),), 1e-5)


def test_bfloat16_states_keep_their_dtype() -> None:
    model = BERT.fresh().to(torch.bfloat16)
    attachment = randomise(mm.attach(model, mm.Invertible()))
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    assert model(**BERT.batch(2)).last_hidden_state.dtype == torch.bfloat16


def test_the_start_is_bit_exact_and_both_functions_learn() -> None:
    model = BERT.fresh()
    with torch.no_grad():
        bare = BERT.outputs(model)
        attachment = mm.attach(model, mm.Invertible())
        assert_equal(BERT.outputs(model), bare)
    coupling = coupling_of(attachment)
    assert coupling.f_down.any()
    assert coupling.g_down.any()
    for name in ("f_up", "g_up", "f_down_bias", "f_up_bias", "g_down_bias", "g_up_bias"):
        assert not getattr(coupling, name).any()


def test_it_stands_at_two_sites_with_one_set_of_tensors() -> None:
    model = BERT.fresh()
    attachment = mm.attach(model, mm.Invertible())
    assert attachment.sites == ("text.layers[0]:in", f"text.layers[{LAYERS - 1}]:out")
    h = WIDTH // 2
    assert attachment.num_parameters == 2 * (2 * h * (h // 2) + h // 2 + h)
    assert {name.partition(".")[0] for name, _ in attachment.named_parameters()} == {"0/shared"}


def test_the_size_for_any_number_of_channels_is_that_of_the_docstring() -> None:
    for channels, reduction in ((768, 2), (7, 3), (33, 1)):
        spans = {
            n: mm.Span(n, x="0|input", channels=f"{n}.weight", layout="BTC")
            for n in ("entry", "exit")
        }
        backbone = mm.Backbone(
            Nothing(channels, False), anatomy=mm.Anatomy(family="nothing", spans=spans)
        )
        table = mm.plan(backbone, mm.Invertible(reduction), ("entry:out", "exit:out"))
        c1 = channels // 2
        c2 = channels - c1
        f, g = c2 // reduction, c1 // reduction
        expected = (c1 + c2) * (f + g) + f + g + c1 + c2
        assert [record["parameters"] for record in table.records()] == [0, 0, expected]


def test_generic_backbones_offer_their_first_and_last_block() -> None:
    model = BACKBONES["own_transformer"].fresh()
    assert mm.attach(model, mm.Invertible()).sites == (
        "blocks[0]:in",
        f"blocks[{LAYERS - 1}]:out",
    )


def test_other_than_two_sites_are_refused() -> None:
    model = BACKBONES["open_clip"].fresh()
    before = state(model)
    with pytest.raises(AdapterError, match="stands at two sites, and 4 were chosen: vision.layers"):
        mm.attach(model, mm.Invertible(), at=("*.layers[0]:in", "*.layers[-1]:out"))
    with pytest.raises(AdapterError, match="and 1 were chosen"):
        mm.attach(model, mm.Invertible(), at="text.layers[0]:in")
    with pytest.raises(SiteError, match="has no site 'text.layers.0.:in' or") as caught:
        mm.attach(BACKBONES["hf_vit"].fresh(), mm.Invertible())
    assert 'at=("vision.layers[0]:in"' in caught.value.hint
    assert state(model) == before


def test_two_of_them_stack_and_do_not_sum() -> None:
    model = BERT.fresh()
    for seed, name in enumerate("ab"):
        randomise(mm.attach(model, mm.Invertible(), name), seed=seed)
    with pytest.raises(mm.errors.AttachError, match="does not add a change"):
        mm.set_active(model, "a", "b")
    mm.set_active(model, mm.Stack("a", "b"))
    with (
        pytest.raises(mm.errors.AttachError, match="does not add a change"),
        mm.context(model, rows=["a", "b"]),
    ):
        pass
