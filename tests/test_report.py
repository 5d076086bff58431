"""Tables of what can be attached, would be, and is: rich, and in plain text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from snapshot import state

import mmadapt as mm
from mmadapt.core.table import Table, count, facts, shape_of, text
from mmadapt.errors import SiteError


def test_a_plan_lists_what_would_be_built_and_changes_nothing() -> None:
    model = BACKBONES["open_clip"].fresh()
    before = state(model)
    table = mm.plan(model, mm.Bottleneck(4), "vision.layers[-1].mlp")
    assert state(model) == before
    assert table.rows == [
        (
            "vision.layers[1].mlp:out",
            16,
            "down f32[4,16] down_bias f32[4] up f32[16,4] up_bias f32[16]",
            2 * 16 * 4 + 4 + 16,
        )
    ]
    assert "1 sites, 148 of " in table.title


def test_a_plan_refuses_what_attach_refuses() -> None:
    with pytest.raises(SiteError, match="matches nothing"):
        mm.plan(BACKBONES["open_clip"].fresh(), mm.Bottleneck(4), "vision.layers[*].mpl")


@pytest.mark.parametrize("adapter", [mm.Bottleneck, [mm.Bottleneck(4)], "bottleneck"])
def test_a_plan_of_what_is_no_adapter_is_explained_or_works(adapter: Any) -> None:
    try:
        mm.plan(BACKBONES["open_clip"].fresh(), adapter)
    except mm.errors.AdapterError as error:
        assert "expected an adapter" in str(error)  # noqa: PT017


def test_a_summary_has_one_row_for_alike_sites() -> None:
    attachment = mm.attach(BACKBONES["open_clip"].fresh(), [mm.Bottleneck(4), mm.LoRA(2)], name="x")
    records = attachment.summary().records()
    assert [(r["site"], r["adapter"], r["sites"]) for r in records] == [
        ("vision.layers[*].mlp:out", "Bottleneck", 2),
        ("text.layers[*].mlp:out", "Bottleneck", 2),
        ("vision.layers[*].attn.q:weight", "LoRA", 2),
        ("vision.layers[*].attn.v:weight", "LoRA", 2),
        ("text.layers[*].attn.q:weight", "LoRA", 2),
        ("text.layers[*].attn.v:weight", "LoRA", 2),
    ]
    assert sum(r["parameters"] for r in records) == attachment.num_parameters
    assert attachment.summary().title.startswith("x (active): 12 sites, ")
    mm.set_active(attachment.model)
    assert attachment.summary().title.startswith("x (not active)")


@pytest.mark.filterwarnings("ignore:Converting a tensor")  # see test_inspect_warns_of_nothing
def test_inspect_shows_norms_and_gates() -> None:
    model = BACKBONES["open_clip"].fresh()
    attachment = mm.attach(model, mm.ClipAdapter(start="identity"), name="clip")
    layer: Any = attachment.layers["0/vision.pooled:out"]
    with torch.no_grad():
        layer.ratio.fill_(0.25)
    (row,) = mm.inspect(model).records()
    assert (row["attachment"], row["site"], row["adapter"]) == (
        "clip",
        "vision.pooled:out",
        "ClipAdapter",
    )
    assert row["values"] == "ratio 0.25"
    expected = sum(float(p.detach().square().sum()) for p in attachment.parameters()) ** 0.5
    assert row["norm"] == pytest.approx(expected)
    assert "active: Sum('clip')" in mm.inspect(model).title


def test_inspect_warns_of_nothing() -> None:
    model = BACKBONES["open_clip"].fresh()
    mm.attach(model, mm.ClipAdapter(start="identity"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.set_warn_always(True)
        try:
            mm.inspect(model)
        finally:
            torch.set_warn_always(False)


def test_a_table_is_aligned_text_and_escaped_html() -> None:
    table = Table(
        ("name", "size"), [("a<b", 1234), ("c", None)], title="two & more", notes=["note"]
    )
    assert str(table) == repr(table)
    assert str(table).splitlines() == [
        "two & more",
        "name   size",
        "----  -----",
        "a<b   1,234",
        "c",
        "note",
    ]
    html = table._repr_html_()
    assert "a&lt;b" in html
    assert "two &amp; more" in html
    assert "<script" not in html
    assert table.records()[0] == {"name": "a<b", "size": 1234}
    assert len(table) == len(list(table)) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (0.5, "0.500"),
        (1e-5, "1e-05"),
    ],
)
def test_cells_read_well(value: Any, expected: str) -> None:
    assert text(value) == expected


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (12_345, "12.3 k"),
        (1_189_632, "1.19 M"),
        (7_200_000_000, "7.2 B"),
    ],
)
def test_counts_read_well(number: int, expected: str) -> None:
    assert count(number) == expected


def test_tensors_print_as_kind_and_shape() -> None:
    assert shape_of(torch.zeros(8, 16)) == "f32[8,16]"
    assert shape_of(torch.zeros((), dtype=torch.bfloat16)) == "bf16[]"
    assert shape_of(torch.zeros(2, dtype=torch.uint8)) == "uint8[2]"


# -- other values, rich and plain -----------------------------------------------------------------


def test_a_backbone_is_a_table_of_facts() -> None:
    clip = mm.load("tiny/clip")
    shown = clip._repr_html_()
    assert "Backbone(tiny/clip: clip" in shown
    assert "preprocess, tokenize" in shown
    assert "Apache-2.0" in shown
    assert "attached" not in shown
    mm.attach(clip, mm.Bottleneck(4), name="sketch")
    assert "sketch; active: Sum(&#x27;sketch&#x27;)" in clip._repr_html_()


def test_what_the_zoo_lists_is_rich_and_plain() -> None:
    entries, entry = mm.zoo.list(), mm.zoo.entry("tiny/clip")
    for shown in (repr(entries), entries._repr_html_(), repr(entry), entry._repr_html_()):
        assert "tiny/clip" in shown
        assert "Apache-2.0" in shown


def test_a_long_table_leaves_out_its_middle() -> None:
    table = Table(("site", "n"), [(f"layers[{i}]", i) for i in range(2000)])
    for shown in (str(table), table._repr_html_()):
        assert "layers[0]" in shown
        assert "layers[1999]" in shown
        assert "layers[1000]" not in shown
        assert "1,900 rows are not shown; records() holds all 2,000" in shown
    assert len(table.records()) == 2000
    assert "not shown" not in str(Table(("n",), [(i,) for i in range(100)]))


def test_facts_have_no_head_and_no_empty_rows() -> None:
    table = facts("a thing", {"size": "3", "licence": "", "device": None})
    assert str(table) == "a thing\nsize  3"
    assert "<thead>" not in table._repr_html_()
