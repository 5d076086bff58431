"""Every bottleneck of every modality goes through the one operation of `mmadapt.ops.bottleneck`."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, Tiny, pixels
from snapshot import randomise

import mmadapt as mm
from mmadapt import methods
from mmadapt.ops import choice
from mmadapt.ops.choice import Choice

METHODS = Path(methods.__file__).parent

#: modules of methods that call the operation
CALLING = {"bottleneck", "compacter", "invertible", "lowbit", "med_sa"}
#: modules whose layers go down and up in another way, and what stands between
OTHERWISE = {
    "adapter_shadow": "its projections have blocks, or factors, for groups of channels",
    "any2point_ends": "rounds of convolutions on points, not on hidden states",
    "conv": "a convolution between the projections",
    "conv_depth": "a convolution through the depth between the projections",
    "conv_time": "convolutions over time take the projections' place",
    "mixture": "gates of experts between the activation and the second projection",
    "three_d_sam": "a convolution of the volume between the projections",
    "three_d_sam_ends": "an attention's own MLP over a volume's queries",
}
#: the layer that several methods build, besides those of their own
BUILDS_BOTTLENECKS = {"adapter_shadow", "any2point", "med_sa"}


def names_in(tree: ast.AST) -> set[str]:
    """Attributes, arguments of `register_parameter` and strings: what a layer may call its tensors."""
    found = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return found


def goes_down_and_up(tree: ast.AST) -> bool:
    names = names_in(tree)
    down = any(
        name == "down" or name.endswith("_down") or name.startswith("down_") for name in names
    )
    up = any(name == "up" or name.endswith("_up") or name.startswith("up_") for name in names)
    return down and up


def imported_from(tree: ast.AST, module: str) -> set[str]:
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module
        for alias in node.names
    }


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.AST]:
    return {path.stem: ast.parse(path.read_text()) for path in sorted(METHODS.glob("*.py"))}


def test_who_goes_down_and_up_calls_the_operation_or_has_a_reason(
    trees: dict[str, ast.AST],
) -> None:
    seen = {name for name, tree in trees.items() if goes_down_and_up(tree)}
    assert seen == CALLING | set(OTHERWISE)


def test_who_is_listed_as_calling_calls(trees: dict[str, ast.AST]) -> None:
    for name, tree in trees.items():
        called = imported_from(tree, "mmadapt.ops.bottleneck")
        assert bool(called) == (name in CALLING), name
        built = "BottleneckLayer" in imported_from(tree, "mmadapt.methods.bottleneck")
        assert built == (name in BUILDS_BOTTLENECKS), name


def test_no_method_goes_round_to_the_reference(trees: dict[str, ast.AST]) -> None:
    for name, tree in trees.items():
        taken = imported_from(tree, "mmadapt.ops.reference")
        assert not taken & {"bottleneck", "mixed_bottleneck"}, name


# -- and in models of every modality -------------------------------------------------------------------

MODALITIES = {
    "images": ("hf_vit", mm.Bottleneck(4)),
    "images and text": ("open_clip", mm.Bottleneck.adaptformer(4)),
    "segmentation": ("hf_sam", mm.MedSA()),
    "audio": ("hf_ast", mm.Bottleneck.audio(4)),
    "speech": ("hf_wav2vec2", mm.Bottleneck(4)),
    "language": ("hf_llama", mm.Bottleneck.parallel(4)),
    "factors": ("hf_vit", mm.Compacter(width=4, division=2)),
    "few bits": ("hf_vit", mm.BiAdaptFormer(4)),
}


@pytest.mark.parametrize("modality", MODALITIES)
def test_a_model_of_each_modality_reaches_the_choice(
    modality: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, adapter = MODALITIES[modality]
    tiny: Tiny = BACKBONES[name]
    model: Any = tiny.fresh()
    attachment = randomise(mm.attach(model, adapter))
    asked: list[choice.Case] = []

    def chosen(case: choice.Case) -> Choice:
        asked.append(case)
        return Choice("reference", True, None)

    monkeypatch.setattr(choice, "FORCED", "reference")  # a CPU would not ask
    monkeypatch.setattr(choice, "choose", chosen)
    with torch.no_grad():
        tiny.outputs(model, tiny.batch(2))
    own = [key for key, layer in attachment.layers.items() if hasattr(layer, "activation")]
    assert len(asked) >= len(own) > 0


def test_rows_of_a_mixed_batch_ask_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = BACKBONES["hf_vit"].fresh()
    for name in "ab":
        randomise(mm.attach(model, mm.Bottleneck(4), name=name))
    asked: list[choice.Case] = []
    monkeypatch.setattr(choice, "FORCED", "reference")
    monkeypatch.setattr(
        choice, "choose", lambda case: asked.append(case) or Choice("reference", True, None)
    )
    with torch.no_grad(), mm.context(model, rows=("a", None, "b")):
        model(pixels(3))
    assert len(asked) == 2  # layers
