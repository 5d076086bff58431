"""PEFT itself, both ways: what it writes is read, what is written it loads, with the same outputs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL, Tiny
from snapshot import differ, randomise
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.interop import read_peft, write_peft

pytestmark = pytest.mark.slow
BOUND = 1e-6


def outputs(tiny: Tiny, model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return tiny.outputs(model)


def furthest(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """The largest difference, as a share of the largest value."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(one, other, strict=True))


def from_peft(tiny: Tiny, folder: Path) -> tuple[Tensor, ...]:
    """What PEFT computes with a folder; a warning of its own is an error."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="peft")
        model: Any = PeftModel.from_pretrained(tiny.fresh(), str(folder)).eval()
    return outputs(tiny, model.base_model.model)


QV = ["q_proj", "v_proj"]
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("hf_vit", {"target_modules": QV}),
    (
        "hf_vit_classifier",
        {
            "target_modules": [*QV, "fc1", "projection"],
            "rank_pattern": {"layers.0.mlp.fc1": 2},
            "alpha_pattern": {"v_proj": 10},
            "use_rslora": True,
            "modules_to_save": ["classifier"],
        },
    ),
    (
        "hf_vit_classifier",
        {
            "target_modules": ["q_proj", "o_proj"],
            "bias": "lora_only",
            "modules_to_save": ["layernorm"],
        },
    ),
    ("hf_vit_classifier", {"target_modules": "all-linear", "bias": "all", "lora_bias": True}),
    ("open_clip", {"target_modules": ["attn", "c_fc", "conv1"]}),
    ("open_clip", {"target_modules": r".*visual.*\.c_fc"}),
    ("open_clip_vision", {"target_modules": ["attn"], "alpha_pattern": {"0.attn": 2}}),
    ("timm_vit", {"target_modules": ["qkv", "fc1", "proj"], "modules_to_save": ["head"]}),
    ("hf_clip", {"target_modules": [*QV, "out_proj"]}),
    ("hf_siglip_vision", {"target_modules": QV}),
    ("hf_dinov2", {"target_modules": ["q_proj", "fc1"]}),
    ("hf_whisper", {"target_modules": [*QV, "fc1"]}),
    ("hf_llama", {"target_modules": [*QV, "down_proj"], "layers_to_transform": [1]}),
    ("hf_bert", {"target_modules": ["query", "value"]}),
    ("hf_sam", {"target_modules": ["qkv", "lin1"]}),
    ("segment_anything", {"target_modules": ["qkv", "lin1"]}),
    ("hf_ast", {"target_modules": QV, "modules_to_save": ["classifier"]}),
    ("hf_wav2vec2", {"target_modules": [*QV, "output_dense"]}),
    ("hf_parakeet", {"target_modules": ["q_proj"]}),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "settings"), THEIRS)
def test_what_peft_trained_is_read_and_written_back_for_it(
    name: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    from peft import LoraConfig, get_peft_model

    tiny = ALL[name]
    theirs: Any = get_peft_model(tiny.fresh(), LoraConfig(r=4, lora_alpha=6, **settings)).eval()  # type: ignore[arg-type]
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.2 * torch.randn(parameter.shape))
    expected = outputs(tiny, theirs.base_model.model)
    theirs.save_pretrained(tmp_path / "theirs")
    model = tiny.fresh()
    assert differ(outputs(tiny, model), expected)
    mm.load_adapter(model, tmp_path / "theirs")
    assert furthest(outputs(tiny, model), expected) <= BOUND
    write_peft(model, tmp_path / "ours")
    assert furthest(from_peft(tiny, tmp_path / "ours"), expected) <= BOUND


OURS: list[tuple[str, Any]] = [
    ("open_clip", mm.LoRA(2, alpha=3.0)),
    ("open_clip", [mm.LoRA(2, at="*.layers[*].attn.o"), mm.LoRA(4, at="text.layers[1].attn.k")]),
    ("open_clip", [mm.LoRA(2), mm.Unlock(at="*.layers[*].attn.o.bias")]),
    ("open_clip", mm.LoRA(2, at="text.layers[*].mlp.up")),  # its paths end those of the image tower
    ("open_clip_custom_text", mm.LoRA(2, alpha=3.0)),
    ("open_clip_timm", mm.LoRA(2, alpha=3.0)),
    ("timm_vit", [mm.LoRA(2), mm.LoRA(3, alpha=1.0, at="vision.layers[1].attn.k"), mm.Head(5)]),
    ("hf_clip", [mm.LoRA(2), mm.LoRA(4, at="*.layers[*].mlp.up"), mm.Unlock(at="text.norm")]),
    (
        "hf_vit_classifier",
        [mm.LoRA(4, alpha=2.0, rank_stabilized=True), mm.Unlock(at="*.layers[*].norm1.bias")],
    ),
    ("hf_whisper", mm.LoRA(2, at=["audio.layers[*].mlp.up", "text.layers[*].cross.*"])),
    ("hf_llama", [mm.LoRA(2), mm.Unlock(at="text.layers[*].norm1")]),
    ("hf_ast", [mm.LoRA(2), mm.Head(5)]),
    ("segment_anything", mm.LoRA(2, at=["vision.layers[*].attn.q", "decoder.layers[*].attn.v"])),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "adapters"), OURS)
def test_what_is_written_peft_loads_and_computes_the_same(
    name: str, adapters: Any, tmp_path: Path
) -> None:
    tiny = ALL[name]
    model = tiny.fresh()
    bare = outputs(tiny, model)
    randomise(mm.attach(model, adapters))
    expected = outputs(tiny, model)
    assert differ(expected, bare)
    write_peft(model, tmp_path)
    assert furthest(from_peft(tiny, tmp_path), expected) <= BOUND


class Volume(nn.Module):
    """Convolutions in one, two and three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv1d(3, 4, 3, padding=1), nn.Conv2d(4, 4, (1, 3), stride=(1, 2))
        self.three = nn.Conv3d(4, 5, 3, padding=1, dilation=1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.two(self.one(x).unsqueeze(2))
        return self.three(flat.unsqueeze(2))


@pytest.mark.filterwarnings("ignore")
def test_convolutions_in_all_dimensions_go_both_ways(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    names = {word: word for word in ("one", "two", "three")}
    bare = Volume().eval()

    def backbone() -> mm.Backbone:
        model = Volume().eval()
        model.load_state_dict(bare.state_dict())
        return mm.Backbone(model, anatomy=mm.Anatomy.from_paths(model, names))

    x = torch.randn(2, 3, 9)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=list(names))
    theirs: Any = get_peft_model(backbone().model, config).eval()  # type: ignore[arg-type]
    for key, parameter in theirs.named_parameters():
        if "lora_" in key:
            parameter.data.add_(0.3 * torch.randn(parameter.shape))
    with torch.no_grad():
        expected = theirs(x)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = backbone()
        read_peft(ours, tmp_path / "theirs")
        assert furthest((ours(x),), (expected,)) <= BOUND
        write_peft(ours, tmp_path / "ours")
        back: Any = PeftModel.from_pretrained(backbone().model, str(tmp_path / "ours")).eval()
        assert furthest((back(x),), (expected,)) <= BOUND
