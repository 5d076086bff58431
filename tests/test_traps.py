"""What has hurt users of other libraries, and traps of torch and transformers: none of it happens here.

Where a trap is an error, its words are tested.
"""

from __future__ import annotations

import json
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES
from handmade import NormGate, hidden, small
from snapshot import assert_equal, flags, hook_tables, randomise
from test_context import Twice
from torch import nn

import mmadapt as mm
from mmadapt.errors import AdapterError, AttachError, SiteError

TINY = BACKBONES["hf_vit"]


# -- in a notebook --------------------------------------------------------------------------------


def test_a_cell_run_twice_says_what_to_do_and_stacks_nothing() -> None:
    model = TINY.fresh()
    mm.attach(model, mm.Bottleneck(2))
    expected = TINY.outputs(model)
    with pytest.raises(AttachError, match=r"(?s)'default' is already there.*replace=True"):
        mm.attach(model, mm.Bottleneck(2))
    assert len(mm.attachments(model)) == 1
    assert_equal(TINY.outputs(model), expected)


def test_hyper_parameters_may_come_from_a_numpy_array() -> None:
    for width, scale in zip(numpy.array([2, 4]), numpy.array([0.5, 2.0], "float32"), strict=True):
        adapter = mm.Bottleneck(width, scale=scale)
        assert type(adapter.width) is int and type(adapter.scale) is float
        json.dumps(adapter.to_json())
    with pytest.raises(AdapterError, match="width is array"):
        mm.Bottleneck(numpy.array([2, 4]))  # type: ignore[arg-type]


# -- patterns -------------------------------------------------------------------------------------


def test_one_pattern_that_matches_nothing_is_an_error_whatever_the_others_do() -> None:
    model = TINY.fresh()
    with pytest.raises(SiteError, match=r"(?s)'vision.layers\[\*\].mpl' matches nothing.*mlp"):
        mm.attach(model, mm.LoRA(2), at=["vision.layers[*].attn.q", "vision.layers[*].mpl"])
    assert mm.attachments(model) == {}


def test_the_plan_counts_what_each_site_gets_before_anything_is_built() -> None:
    model = TINY.fresh()
    table = mm.plan(model, mm.LoRA(2), at=["vision.layers[*].attn.q", "vision.layers[0].mlp.up"])
    assert "3 sites" in table.title
    assert not hook_tables(model)


# -- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["weight", "bias", "layers", "lora_A", "a-b", "0", "forward", "_x"]
)
def test_any_name_of_an_attachment_survives_saving(name: str, tmp_path: Path) -> None:
    model = TINY.fresh()
    randomise(mm.attach(model, mm.LoRA(2), name=name))
    expected = TINY.outputs(model)
    mm.save(model, tmp_path / "file")
    other = TINY.fresh()
    mm.load_adapter(other, tmp_path / "file", name=name)
    assert_equal(TINY.outputs(other), expected)
    other.load_state_dict(model.state_dict())


def test_methods_of_different_kinds_act_and_are_saved_together(tmp_path: Path) -> None:
    model = TINY.fresh()
    randomise(mm.attach(model, [mm.Bottleneck(2), mm.LoRA(2), mm.Unlock(at="vision.norm")]))
    expected = TINY.outputs(model)
    mm.save(model, tmp_path / "mixed")
    other = TINY.fresh()
    mm.load_adapter(other, tmp_path / "mixed")
    assert_equal(TINY.outputs(other), expected)


# -- the network ----------------------------------------------------------------------------------


def test_saving_and_loading_open_no_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = TINY.fresh()
    mm.attach(model, mm.LoRA(2))
    mm.save(model, tmp_path / "file")
    mm.load_adapter(TINY.fresh(), tmp_path / "file")


# -- hooks ----------------------------------------------------------------------------------------


def test_a_hook_added_after_unpickling_in_a_new_process_replaces_none_of_ours(
    tmp_path: Path,
) -> None:
    """Hook ids start at 0 in every process: a user's could take ours, silently."""
    backbone = small()
    randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp"))
    expected = backbone(hidden()).tolist()
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(backbone.model))
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    code = """
import json, pickle, sys
sys.path.insert(0, sys.argv[1])
import torch
from handmade import hidden
model = pickle.load(open("model.pickle", "rb"))
for module in model.modules():
    for _ in range(9):
        module.register_forward_hook(lambda *call: None)
        module.register_forward_pre_hook(lambda *call: None)
expected = torch.tensor(json.load(open("expected.json")))
assert torch.allclose(model(hidden()), expected, atol=1e-6)
"""
    folder = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-c", code, folder], check=True, cwd=tmp_path)


def test_a_tap_sees_what_an_adapter_made_of_the_module_it_stands_on() -> None:
    span = mm.Span("blocks.{i}.norm", x="0|input", channels="blocks.{i}.norm.weight")
    backbone = small()
    anatomy: Any = backbone.anatomy
    backbone.anatomy = mm.Anatomy(
        "small", {**anatomy.spans, "layers[i].norm1": span}, anatomy.towers, anatomy.taps
    )
    randomise(mm.attach(backbone, NormGate(), name="gate"))
    randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].norm1", name="norm"))
    seen: list[torch.Tensor] = []
    gate: Any = mm.attachments(backbone)["gate"].layers
    layer = next(iter(gate.values()))
    after = type(layer).after

    def spy(self: Any, acc: Any, y: Any, x: Any, context: Any, site: Any) -> Any:
        tap = next(iter(site.taps.values()))
        seen.append(context._taps[tap][0])
        return after(self, acc, y, x, context, site)

    mm.set_active(backbone, "gate", "norm")
    type(layer).after = spy
    try:
        with torch.no_grad():
            backbone(hidden())
            with mm.disabled(backbone):
                bare = backbone.model.blocks[0].norm(hidden())  # type: ignore[index,operator]
            mm.set_active(backbone, "norm")
            adapted = backbone.model.blocks[0].norm(hidden())  # type: ignore[index,operator]
    finally:
        type(layer).after = after
    assert torch.equal(seen[0], adapted)
    assert not torch.allclose(seen[0], bare)


def test_two_around_one_call_are_stacked_or_refused() -> None:
    backbone = small()
    mm.attach(backbone, Twice(), at="layers[*].mlp", name="a")
    mm.attach(backbone, Twice(), at="layers[*].mlp", name="b")
    with pytest.raises(
        AttachError, match=r"(?s)TwiceLayer at layers\[0\].mlp:around.*mmadapt.Stack"
    ):
        mm.set_active(backbone, "a", "b")
    mm.set_active(backbone, mm.Stack("a", "b"))
    backbone(hidden())


# -- flags ----------------------------------------------------------------------------------------


def test_what_was_frozen_before_stays_frozen_and_what_was_not_trains_again() -> None:
    model = TINY.fresh()
    model.embeddings.requires_grad_(False)  # type: ignore[union-attr]
    model.layers[0].train()  # type: ignore[index,union-attr]
    before = flags(model)
    mm.attach(model, mm.LoRA(2))
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if "_mmadapt" not in n.split(".")
    )
    mm.detach(model)
    assert flags(model) == before


def test_a_parametrised_backbone_is_adapted_though_torch_cannot_pickle_it() -> None:
    backbone = small()
    torch.nn.utils.parametrizations.weight_norm(backbone.model.head)  # type: ignore[arg-type]
    bare = backbone(hidden())
    randomise(mm.attach(backbone, mm.Bottleneck(2), at="layers[*].mlp"))
    assert not torch.allclose(backbone(hidden()), bare)
    with pytest.raises(RuntimeError, match="Serialization of parametrized modules"):
        pickle.dumps(backbone.model)
    mm.detach(backbone)
    assert torch.equal(backbone(hidden()), bare)


class Shared(nn.Module):
    """Its head is its embedding: one tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def test_a_tied_head_is_neither_saved_nor_untied(tmp_path: Path) -> None:
    net = Shared()
    paths = {"blocks[i]": "blocks.{i}", "logits": "head"}
    model = mm.Backbone(net, anatomy=mm.Anatomy.from_paths(net, paths))
    randomise(mm.attach(model, [mm.Bottleneck(2, at="blocks[*]"), mm.LoRA(1, at="logits")]))
    mm.save(model, tmp_path / "file")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "file" / "adapter.safetensors")
    assert not any(tensor.shape == (7, 4) for tensor in saved.values())
    assert net.head.weight is net.embedding.weight
    mm.detach(model)
    assert net.head.weight is net.embedding.weight
