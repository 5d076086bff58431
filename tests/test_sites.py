"""Site names and the patterns that select them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES
from hypothesis import given
from hypothesis import strategies as st
from snapshot import assert_equal, randomise

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.core.site import Span, match_roles, parse_role, select
from mmadapt.errors import SiteError

ROLES = [
    role
    for tower, layers in (("vision", 4), ("text", 2))
    for i in range(layers)
    for role in (
        f"{tower}.layers[{i}]",
        f"{tower}.layers[{i}].attn",
        f"{tower}.layers[{i}].attn.q",
        f"{tower}.layers[{i}].mlp",
    )
] + ["vision.pooled", "logits"]


def chosen(pattern: str) -> list[str]:
    return match_roles(pattern, ROLES)[0]


def mlps(*indices: int, tower: str = "vision") -> list[str]:
    return [f"{tower}.layers[{i}].mlp" for i in indices]


# -- the language -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "indices"),
    [
        ("0", (0,)),
        ("3", (3,)),
        ("-1", (3,)),
        ("-4", (0,)),
        ("*", (0, 1, 2, 3)),
        (":", (0, 1, 2, 3)),
        ("1:", (1, 2, 3)),
        (":2", (0, 1)),
        ("-2:", (2, 3)),
        ("-6:", (0, 1, 2, 3)),
        (":-1", (0, 1, 2)),
        ("1:3", (1, 2)),
        ("::2", (0, 2)),
        ("1::2", (1, 3)),
        ("::-1", (0, 1, 2, 3)),  # a set of sites, in the backbone's order
        ("0:100", (0, 1, 2, 3)),
        ("2:1", ()),
        ("4", ()),
        ("-5", ()),
    ],
)
def test_indices_and_slices_mean_what_they_mean_in_python(
    selector: str, indices: tuple[int, ...]
) -> None:
    assert chosen(f"vision.layers[{selector}].mlp") == mlps(*indices)


def test_a_star_stands_for_one_word() -> None:
    assert chosen("*.layers[0].mlp") == [*mlps(0), *mlps(0, tower="text")]
    assert chosen("vision.layers[0].*") == ["vision.layers[0].attn", "vision.layers[0].mlp"]
    assert chosen("*") == ["logits"]
    assert chosen("*.*") == ["vision.pooled"]


def test_a_bias_is_selected_by_its_word_alone() -> None:
    roles = ["layers[0].norm", "layers[0].norm.bias", "layers[0].mlp.up", "layers[0].mlp.up.bias"]
    assert match_roles("layers[*].*.*", roles)[0] == ["layers[0].mlp.up"]
    assert match_roles("layers[*].*.bias", roles)[0] == ["layers[0].norm.bias"]
    assert match_roles("layers[*].*.*.bias", roles)[0] == ["layers[0].mlp.up.bias"]


def test_a_negative_index_counts_from_the_end_of_each_tower() -> None:
    assert chosen("*.layers[-1].mlp") == ["vision.layers[3].mlp", "text.layers[1].mlp"]


def test_an_indexed_word_is_not_selected_without_an_index_nor_the_reverse() -> None:
    assert chosen("vision.layers.mlp") == []
    assert chosen("vision[0].pooled") == []
    assert chosen("vision.pooled[*]") == []


def test_a_pattern_may_name_the_port() -> None:
    assert match_roles("vision.pooled:out", ROLES) == (["vision.pooled"], "out")
    assert match_roles("vision.layers[0:2].mlp:in", ROLES) == (mlps(0, 1), "in")
    assert match_roles("vision.layers[0]:weight", ROLES) == (["vision.layers[0]"], "weight")
    assert match_roles("vision.layers[0:2].mlp", ROLES) == (mlps(0, 1), None)


@pytest.mark.parametrize(
    ("pattern", "culprit"),
    [
        ("vision..mlp", "''"),
        (".vision", "''"),
        ("vision.", "''"),
        ("vision.layers[0", "'layers[0'"),
        ("vision.layers]0[", "'layers]0['"),
        ("vision.layers[].mlp", "'layers[]'"),
        ("vision.layers[a].mlp", "'layers[a]'"),
        ("vision.layers[1,2].mlp", "'layers[1,2]'"),
        ("vision.layers[1.5].mlp", "'layers[1'"),
        ("vision.layers[::0].mlp", "'layers[::0]'"),
        ("vision.layers[0][1].mlp", "'layers[0][1]'"),
        ("vision.layers[0]mlp", "'layers[0]mlp'"),
        ("vision.lay*", "'lay*'"),
        ("vision .pooled", "'vision '"),
        ("vision.pooled\n", "'pooled\\n'"),
        ("0.mlp", "'0'"),
    ],
)
def test_a_malformed_pattern_is_refused_with_its_bad_part(pattern: str, culprit: str) -> None:
    with pytest.raises(SiteError) as caught:
        chosen(pattern)
    assert f"malformed site pattern {pattern!r}, at {culprit}" in caught.value.message
    assert '"vision.layers[0:4].mlp:out"' in caught.value.hint


@pytest.mark.parametrize("pattern", ["", None, 3, ["vision.pooled"]])
def test_a_pattern_is_a_non_empty_string(pattern: object) -> None:
    with pytest.raises(SiteError, match="a site pattern is a non-empty string, got"):
        match_roles(pattern, ROLES)  # type: ignore[arg-type]


def test_an_unknown_port_is_refused_with_those_there_are() -> None:
    with pytest.raises(SiteError, match="names the port 'output'") as caught:
        chosen("vision.pooled:output")
    assert caught.value.hint == "ports are in, out, weight, around"


def test_roles_are_parsed_into_words_and_indices() -> None:
    assert parse_role("vision.layers[3].mlp") == (("vision", None), ("layers", 3), ("mlp", None))
    with pytest.raises(SiteError, match="'vision.layers!' is not a role: 'layers!' is malformed"):
        parse_role("vision.layers!")


# -- properties -------------------------------------------------------------------------------

_words = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,6}", fullmatch=True)
_roles = st.lists(
    st.tuples(_words, st.none() | st.integers(0, 5)).map(
        lambda part: part[0] if part[1] is None else f"{part[0]}[{part[1]}]"
    ),
    min_size=1,
    max_size=4,
).map(".".join)


@given(st.lists(_roles, min_size=1, max_size=8, unique=True), st.data())
def test_every_role_selects_itself_and_nothing_else(roles: list[str], data: st.DataObject) -> None:
    role = data.draw(st.sampled_from(roles))
    assert match_roles(role, roles) == ([role], None)
    assert match_roles(f"{role}:out", roles) == ([role], "out")


@given(st.integers(1, 12), st.data())
def test_a_slice_selects_what_python_would(length: int, data: st.DataObject) -> None:
    ends = st.none() | st.integers(-15, 15)
    start, stop = data.draw(ends), data.draw(ends)
    step = data.draw(st.none() | st.integers(-3, 3).filter(bool))
    roles = [f"layers[{i}]" for i in range(length)]
    written = f"{'' if start is None else start}:{'' if stop is None else stop}"
    written += f":{step}" if step is not None else ""
    expected = sorted(range(length)[slice(start, stop, step)])
    assert match_roles(f"layers[{written}]", roles)[0] == [f"layers[{i}]" for i in expected]


@given(st.text(max_size=30))
def test_any_text_is_matched_or_refused_as_a_site_error(text: str) -> None:
    try:
        found, port = match_roles(text, ROLES)
    except SiteError as error:
        assert repr(text) in str(error)  # noqa: PT017
    else:
        assert set(found) <= set(ROLES)
        assert port in (None, "in", "out", "weight")


# -- selection with ports -----------------------------------------------------------------------

SPANS = {
    "layers[0].attn": Span("a", ("out", "in")),
    "layers[0].attn.q": Span("a", ("weight",), weight="a.w"),
    "layers[0].mlp": Span("m", ("out", "in")),
}


def test_without_a_port_the_adapters_first_usable_one_is_taken() -> None:
    both = ["layers[0].mlp", "layers[0].attn.q"]
    assert select(both, SPANS, ("out", "weight")) == [
        ("layers[0].attn.q", "weight"),
        ("layers[0].mlp", "out"),
    ]
    assert select(["layers[0].mlp"], SPANS, ("in", "out")) == [("layers[0].mlp", "in")]


def test_a_site_that_two_patterns_select_is_taken_once() -> None:
    assert select(["layers[*].mlp", "layers[0].mlp:out"], SPANS, ("out",)) == [
        ("layers[0].mlp", "out")
    ]


def test_a_port_that_is_not_offered_is_refused_with_both_sides() -> None:
    with pytest.raises(SiteError) as caught:
        select(["layers[*].attn.q:out"], SPANS, ("out", "weight"))
    assert "needs port 'out' at 'layers[0].attn.q', which offers weight" in caught.value.message
    assert "the adapter can use out, weight" in caught.value.message
    assert "mmadapt.sites" in caught.value.hint


def test_a_role_without_any_usable_port_is_refused() -> None:
    with pytest.raises(SiteError, match="needs a port among out at 'layers\\[0\\].attn.q'"):
        select(["layers[0].attn.q"], SPANS, ("out",))


def test_one_pattern_that_matches_nothing_refuses_the_whole_selection() -> None:
    with pytest.raises(SiteError, match="'layers\\[0\\].mpl' matches nothing") as caught:
        select(["layers[0].mlp", "layers[0].mpl"], SPANS, ("out",))
    assert "layers[*].mlp" in caught.value.hint


def test_an_index_beyond_the_end_says_how_many_there_are() -> None:
    with pytest.raises(SiteError, match=r"there are 1 of 'layers\[\*\].mlp'"):
        select(["layers[7].mlp"], SPANS, ("out",))


def test_a_forgotten_index_is_suggested() -> None:
    with pytest.raises(SiteError) as caught:
        select(["layers.mlp:out"], SPANS, ("out",))
    assert "layers[*].mlp" in caught.value.hint


# -- names that have changed ---------------------------------------------------------------------


def renamed(model: Any) -> mm.Backbone:
    """The model with an anatomy that once said `blocks` for layers, and `ff` for the mlp of text."""
    old = {"vision.blocks[i]": "vision.layers[i]", "text.layers[i].ff": "text.layers[i].mlp"}
    return mm.Backbone(model, anatomy=replace(find_anatomy(model), aliases=old))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vision.blocks[-1].mlp", ["vision.layers[1].mlp"]),
        ("vision.blocks[*].attn.q", ["vision.layers[0].attn.q", "vision.layers[1].attn.q"]),
        ("vision.blocks[0].norm1.bias", ["vision.layers[0].norm1.bias"]),
        ("text.layers[1].ff", ["text.layers[1].mlp"]),
        ("text.layers[1].ff.up", ["text.layers[1].mlp.up"]),
        ("vision.layers[0].mlp", ["vision.layers[0].mlp"]),
    ],
)
def test_an_old_name_selects_what_it_is_called_now(old: str, new: list[str]) -> None:
    model = renamed(BACKBONES["hf_clip"].fresh())
    assert [record["site"] for record in mm.sites(model, old).records()] == new
    with pytest.raises(SiteError, match="matches nothing"):
        mm.sites(model, "vision.block[0].mlp")


def test_a_star_does_not_select_a_site_twice_by_its_old_name() -> None:
    model = renamed(BACKBONES["hf_clip"].fresh())
    attachment = mm.attach(model, mm.Bottleneck(2), at=["*.layers[*].mlp", "text.layers[0].ff"])
    assert len(attachment.sites) == 4


def test_a_file_with_an_old_name_loads_where_the_name_has_changed(tmp_path: Path) -> None:
    tiny = BACKBONES["hf_clip"]
    before = tiny.fresh()
    present = find_anatomy(before)
    old = {role.replace("vision.layers", "vision.blocks"): s for role, s in present.spans.items()}
    taps = {tap.replace("vision.layers", "vision.blocks"): at for tap, at in present.taps.items()}
    anatomy = replace(present, spans=old, taps=taps)
    at = ("vision.blocks[*].mlp", "vision.blocks[0].attn")
    adapter = mm.Bottleneck(2, at=at)
    randomise(mm.attach(mm.Backbone(before, anatomy=anatomy), adapter), 0.3, 5).save(tmp_path)
    assert "vision.blocks[0].mlp:out" in (tmp_path / "adapter.json").read_text()
    with pytest.raises(mm.errors.WrongBackboneError, match=r"vision.blocks\[0\].attn:out"):
        mm.load_adapter(tiny.fresh(), tmp_path)
    after = renamed(tiny.fresh())
    assert mm.load_adapter(after, tmp_path).sites[0] == "vision.layers[0].attn:out"
    with torch.no_grad():
        assert_equal(tiny.outputs(after.model), tiny.outputs(before))
    mm.save(after, tmp_path / "again")
    mm.load_adapter(tiny.fresh(), tmp_path / "again")


# -- real backbones -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_role_of_a_backbone_selects_itself(name: str) -> None:
    model = BACKBONES[name].fresh()
    spans = find_anatomy(model).roles(model)
    for role, span in spans.items():
        for port in span.ports:
            assert select([f"{role}:{port}"], spans, (port,)) == [(role, port)]


@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_of_sites_counts_every_role_once(name: str) -> None:
    model = BACKBONES[name].fresh()
    spans = find_anatomy(model).roles(model)
    table = mm.sites(model)
    biases = [role for role in spans if role.endswith(".bias")]
    assert sum(record["sites"] for record in table.records()) == len(spans) - len(biases)
    assert f"{len(spans) - len(biases)} roles" in table.title
    assert [note.split()[0] for note in table.notes] == ([f"{len(biases)}"] if biases else [])


def test_the_table_of_sites_lists_what_a_pattern_selects() -> None:
    table = mm.sites(BACKBONES["hf_vit"].fresh(), "vision.layers[-1].attn.*")
    assert [row[0] for row in table] == [f"vision.layers[1].attn.{word}" for word in "qkvo"]


def test_the_table_of_sites_refuses_a_pattern_that_selects_nothing() -> None:
    with pytest.raises(SiteError, match="matches nothing"):
        mm.sites(BACKBONES["hf_vit"].fresh(), "vision.layers[*].mpl")


def test_clip_has_the_same_sites_in_both_libraries() -> None:
    def roles(name: str) -> set[str]:
        model = BACKBONES[name].fresh()
        return set(find_anatomy(model).roles(model))

    # open_clip's CLIP keeps its text projection as a bare tensor, which no hook can meet
    assert roles("hf_clip") - roles("open_clip") == {"text.pooled"}
    assert roles("open_clip") <= roles("hf_clip")
    assert roles("open_clip_custom_text") == roles("hf_clip")
