"""Putting adapters in, switching them and taking them out."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backbones import BACKBONES, HEADS, WIDTH, pixels
from handmade import (
    CHANNELS,
    Attention,
    NormGate,
    Scale,
    Shift,
    Wrapped,
    hidden,
    small,
)
from snapshot import assert_close, assert_equal, differ, flags, hook_tables, randomise, state
from straight import at_mlp, delta, vision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

import mmadapt as mm
from mmadapt.adapter import _REGISTRY, adapters, register_adapter
from mmadapt.core.bank import bank_of
from mmadapt.core.passes import FirstForward
from mmadapt.methods.lowrank import LoRALayer

VISION = BACKBONES["open_clip_vision"]
MLP = "vision.layers[*].mlp"


@pytest.fixture
def model() -> nn.Module:
    return VISION.fresh()


@pytest.fixture
def third_party() -> Iterator[None]:
    """The hand-made methods, registered for the length of a test."""
    for cls in (NormGate, Shift, Scale):
        register_adapter(cls)
    yield
    for cls in (NormGate, Shift, Scale):
        del _REGISTRY[cls.method]


def run(model: Any, rows: int = 3) -> Tensor:
    with torch.no_grad():
        return model(pixels(rows))


def refused(model: nn.Module, kind: type[Exception], *args: Any, **kwargs: Any) -> str:
    """The text of the error that `attach` raises; nothing has changed by then."""
    output = run(model)
    before = state(model)
    with pytest.raises(kind) as caught:
        mm.attach(model, *args, **kwargs)
    assert state(model) == before
    assert torch.equal(run(model), output)
    return str(caught.value)


# -- what cannot be attached --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.b", "a b", "", "é", "a/b", None, 5, "a\n"])
def test_a_name_is_letters_digits_dashes_and_underscores(model: nn.Module, name: Any) -> None:
    text = refused(model, mm.errors.AttachError, mm.Bottleneck(4), name=name)
    assert f"{name!r} cannot name an attachment" in text
    assert "letters, digits, '_' and '-'" in text


@pytest.mark.parametrize("name", ["A-1_b", "0", "forward", "records"])
def test_any_such_name_works(model: nn.Module, name: str) -> None:
    before = state(model)
    randomise(mm.attach(model, mm.Bottleneck(4), name=name))
    run(model)
    model.train().eval()
    assert name in str(mm.inspect(model))
    mm.detach(model, name)
    assert state(model) == before


def test_the_name_of_a_modules_flag_is_refused(model: nn.Module) -> None:
    assert "'training' cannot name" in refused(
        model, mm.errors.AttachError, mm.Bottleneck(4), name="training"
    )


def test_a_class_instead_of_an_adapter_is_explained(model: nn.Module) -> None:
    text = refused(model, mm.errors.AdapterError, mm.Bottleneck)
    assert "got the class Bottleneck" in text
    assert "call the class to make one" in text


@pytest.mark.parametrize("adapter", [[], ()])
def test_at_least_one_adapter_is_needed(model: nn.Module, adapter: Any) -> None:
    assert "no adapter was given" in refused(model, mm.errors.AdapterError, adapter)


@pytest.mark.parametrize("adapter", [None, "bottleneck", [mm.Bottleneck(4), 3]])
def test_what_is_no_adapter_is_named(model: nn.Module, adapter: Any) -> None:
    text = refused(model, mm.errors.AdapterError, adapter)
    assert "expected an adapter such as mmadapt.Bottleneck(32), got" in text


def test_an_adapter_without_sites_asks_for_some(model: nn.Module) -> None:
    text = refused(model, mm.errors.SiteError, Scale())
    assert "Scale was given no site" in text
    assert "pass at=" in text
    assert "no site" in refused(model, mm.errors.SiteError, mm.Bottleneck(4), at=[])


def test_a_site_that_is_no_text_is_refused(model: nn.Module) -> None:
    refused(model, mm.errors.SiteError, mm.Bottleneck(4), at=5)


def test_something_that_is_no_model_is_refused() -> None:
    with pytest.raises(mm.errors.BackboneError, match=r"expected a Backbone or a .*, got str"):
        mm.attach("tiny/clip", mm.Bottleneck(4))


def test_a_model_without_an_anatomy_is_refused_with_the_way_on() -> None:
    with pytest.raises(mm.errors.BackboneError) as caught:
        mm.attach(nn.Linear(2, 2), mm.Bottleneck(4))
    assert "no anatomy is known for torch.nn.modules.linear.Linear" in str(caught.value)
    assert "mmadapt.Anatomy(" in caught.value.hint


def test_one_wrong_site_of_several_attaches_nothing(model: nn.Module) -> None:
    text = refused(
        model, mm.errors.SiteError, mm.Bottleneck(4), at=["vision.layers[0].mlp", "vision.mlp"]
    )
    assert "'vision.mlp' matches nothing" in text


def test_a_layer_that_cannot_be_built_attaches_nothing(model: nn.Module) -> None:
    text = refused(model, mm.errors.AdapterError, [mm.Bottleneck(4), mm.LoRA(WIDTH + 1)])
    assert f"LoRA rank {WIDTH + 1} exceeds the weight at vision.layers[0].attn.q:weight" in text
    assert f"at most {WIDTH}" in text


def test_a_tap_the_backbone_lacks_attaches_nothing(third_party: None) -> None:
    backbone = small()
    object.__setattr__(backbone.anatomy, "taps", {})
    before = state(backbone.model)
    with pytest.raises(mm.errors.SiteError, match=r"reads the tap 'norm1'.*does not offer"):
        mm.attach(backbone, NormGate())
    assert state(backbone.model) == before


def test_a_container_root_works_or_is_refused_with_the_reason() -> None:
    root = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    anatomy = mm.Anatomy(
        "chain", {"first": mm.Span("0", x="0|input", channels="0.weight")}, towers={"all": ""}
    )
    try:
        mm.attach(mm.Backbone(root, anatomy=anatomy), mm.Bottleneck(2), at="first")
    except mm.errors.AttachError as error:
        assert "Sequential" in str(error)  # noqa: PT017
    else:
        root(torch.randn(2, 4))


# -- names --------------------------------------------------------------------------------------


def test_a_taken_name_is_refused_and_replace_is_offered(model: nn.Module) -> None:
    mm.attach(model, mm.Bottleneck(4), name="sketch")
    text = refused(model, mm.errors.AttachError, mm.Bottleneck(4), name="sketch")
    assert "'sketch' is already there" in text
    assert "replace=True" in text


def test_replacing_again_and_again_leaves_one_set_of_hooks(model: nn.Module) -> None:
    mm.attach(model, mm.Bottleneck(4), name="sketch")
    run(model)
    once = {name: len(hooks) for name, hooks in hook_tables(model).items()}
    for _ in range(3):  # a notebook's cell, run again
        attachment = mm.attach(model, mm.Bottleneck(4), name="sketch", replace=True)
        run(model)
    assert {name: len(hooks) for name, hooks in hook_tables(model).items()} == once
    assert list(mm.attachments(model)) == ["sketch"]
    randomise(attachment)
    with_it = run(model)
    mm.detach(model)
    assert hook_tables(model) == {}
    assert differ((with_it,), (run(model),))


def test_replace_moves_the_sites_and_takes_the_old_hooks_away(model: nn.Module) -> None:
    mm.attach(model, mm.Bottleneck(4))
    attachment = mm.attach(model, mm.Bottleneck(8), at="vision.layers[0].mlp", replace=True)
    run(model)
    assert attachment.sites == ("vision.layers[0].mlp:out",)
    assert list(bank_of(model).hooks) == ["vision.layers[0].mlp:out"]  # type: ignore[union-attr]
    tables = {name for name in hook_tables(model) if not name.startswith(".")}  # the root's stay
    assert tables == {
        f"transformer.resblocks.0.mlp.{table}"
        for table in ("_forward_hooks", "_forward_hooks_with_kwargs")
    }


def test_a_replacement_that_fails_leaves_the_old_one_acting(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4)))
    text = refused(model, mm.errors.SiteError, mm.Bottleneck(8), at="vision.mpl", replace=True)
    assert "matches nothing" in text


def test_replace_with_a_name_that_is_free_just_attaches(model: nn.Module) -> None:
    assert mm.attach(model, mm.Bottleneck(4), replace=True).name == "default"


# -- the handle -----------------------------------------------------------------------------------


def test_the_handle_says_what_it_holds(model: nn.Module) -> None:
    attachment = mm.attach(model, mm.Bottleneck(4), name="sketch")
    assert attachment.name == "sketch"
    assert attachment.model is model
    assert attachment.adapter == mm.Bottleneck(4)
    assert attachment.sites == ("vision.layers[0].mlp:out", "vision.layers[1].mlp:out")
    assert attachment.num_parameters == 2 * (2 * WIDTH * 4 + 4 + WIDTH)
    names = [name for name, _ in attachment.named_parameters()]
    assert names[:2] == ["0/vision.layers[0].mlp:out.down", "0/vision.layers[0].mlp:out.down_bias"]
    assert len(names) == len(list(attachment.parameters())) == 8
    assert "sketch (active): 2 sites" in repr(attachment)
    assert "<table>" in attachment._repr_html_()


def test_the_handle_has_the_verbs(model: nn.Module, tmp_path: Any) -> None:
    first = mm.attach(model, mm.Bottleneck(4), name="first")
    mm.attach(model, mm.Bottleneck(4), name="second")
    first.set_active()
    assert mm.active(model) == mm.Sum("first")
    assert first.save(tmp_path / "first").is_dir()
    first.detach()
    assert list(mm.attachments(model)) == ["second"]
    with pytest.raises(mm.errors.AttachError, match="no attachment is named 'first'"):
        first.num_parameters  # noqa: B018


def test_a_backbone_and_its_bare_model_are_the_same_to_every_verb() -> None:
    backbone = small()
    mm.attach(backbone, mm.Bottleneck(2), name="one", at="layers[*].mlp")
    mm.attach(backbone.model, mm.Bottleneck(2), name="two", at="layers[0].mlp")
    assert list(mm.attachments(backbone)) == list(mm.attachments(backbone.model)) == ["one", "two"]
    mm.detach(backbone.model, "one")
    mm.detach(backbone)
    assert mm.attachments(backbone.model) == {}


@pytest.mark.parametrize("verb", [mm.detach, mm.set_active, mm.active, mm.inspect])
def test_verbs_say_when_nothing_is_attached(model: nn.Module, verb: Any) -> None:
    with pytest.raises(mm.errors.AttachError) as caught:
        verb(model)
    assert "nothing is attached to this VisionTransformer" in str(caught.value)
    assert "mmadapt.attach(model" in caught.value.hint
    assert mm.attachments(model) == {}


def test_saving_without_a_name_needs_exactly_one(model: nn.Module, tmp_path: Any) -> None:
    mm.attach(model, mm.Bottleneck(4), name="a")
    mm.attach(model, mm.Bottleneck(4), name="b")
    with pytest.raises(mm.errors.AttachError, match=r"save needs a name: 2 .* \(a, b\)"):
        mm.save(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(mm.errors.AttachError, match="no attachment is named 'sketsh'"):
        mm.detach(model, "sketsh")


# -- several, in one attachment and in many -------------------------------------------------------


def test_several_adapters_in_one_attachment_act_together(model: nn.Module) -> None:
    attachment = mm.attach(model, [mm.Bottleneck(4), mm.Bottleneck(3), mm.LoRA(2)])
    randomise(attachment)
    assert attachment.adapter == (mm.Bottleneck(4), mm.Bottleneck(3), mm.LoRA(2))
    assert len(attachment.layers) == 2 + 2 + 4

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        one, two = at_mlp(attachment, i, 0), at_mlp(attachment, i, 1)
        return y + delta(one, y) + delta(two, y)

    folded = VISION.fresh()
    with torch.no_grad():
        for i, block in enumerate(folded.transformer.resblocks):  # type: ignore[union-attr]
            for place, word in ((0, "q"), (2, "v")):
                layer = attachment.layers[f"2/vision.layers[{i}].attn.{word}:weight"]
                rows = slice(place * WIDTH, (place + 1) * WIDTH)
                block.attn.in_proj_weight[rows] += layer.b @ layer.a
        assert_close((run(model),), (vision(folded, pixels(3), branch),), 1e-5)


def _two(model: nn.Module) -> tuple[Any, Any]:
    a = randomise(mm.attach(model, mm.Bottleneck(4), name="a"), seed=1)
    b = randomise(mm.attach(model, mm.Bottleneck(3), name="b"), seed=2)
    return a, b


def test_names_add_up_on_the_backbones_own_output(model: nn.Module) -> None:
    a, b = _two(model)
    expected = vision(
        model, pixels(3), lambda i, y, x, n: y + delta(at_mlp(a, i), y) + delta(at_mlp(b, i), y)
    )
    for composition in (("a", "b"), ("b", "a"), (mm.Sum("a", "b"),)):
        mm.set_active(model, *composition)
        assert_close((run(model),), (expected,), 1e-5)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_a_stack_runs_in_its_order(model: nn.Module, order: tuple[str, str]) -> None:
    both = dict(zip("ab", _two(model), strict=True))

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        for name in order:
            y = y + delta(at_mlp(both[name], i), y)
        return y

    mm.set_active(model, mm.Stack(*order))
    assert mm.active(model) == mm.Stack(*order)
    stacked = run(model)
    assert_close((stacked,), (vision(model, pixels(3), branch),), 1e-5)
    mm.set_active(model, *order)
    assert differ((stacked,), (run(model),))


def test_a_parallel_layer_in_a_stack_still_reads_the_branchs_input(model: nn.Module) -> None:
    a = randomise(mm.attach(model, mm.Bottleneck(4), name="a"), seed=1)
    b = randomise(mm.attach(model, mm.Bottleneck(4, placement="parallel"), name="b"), seed=2)

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        return y + delta(at_mlp(a, i), y) + delta(at_mlp(b, i), x)

    mm.set_active(model, mm.Stack("a", "b"))
    assert_close((run(model),), (vision(model, pixels(3), branch),), 1e-5)


def test_a_sum_with_a_layer_that_does_not_add_is_refused(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4), name="a"))
    randomise(mm.attach(model, Scale(), name="scale", at=MLP))
    output = run(model)
    with pytest.raises(mm.errors.AttachError) as caught:
        mm.set_active(model, "a", "scale")
    assert "ScaleLayer at vision.layers[0].mlp:out" in str(caught.value)
    assert "a sum with another layer has no meaning" in str(caught.value)
    assert 'mmadapt.Stack("a", "b")' in caught.value.hint
    assert mm.active(model) == mm.Sum("scale")
    assert torch.equal(run(model), output)
    mm.set_active(model, mm.Stack("a", "scale"))
    assert differ((run(model),), (output,))


def test_a_sum_within_one_attachment_is_refused_too(model: nn.Module) -> None:
    refused(model, mm.errors.AttachError, [mm.Bottleneck(4), Scale()], at=MLP)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("a", "c"), "no attachment is named 'c'"),
        (("a", "a"), "names an attachment twice"),
        ((3,), "takes names of attachments, got 3"),
    ],
)
def test_a_composition_that_means_nothing_changes_nothing(
    model: nn.Module, names: tuple[Any, ...], text: str
) -> None:
    _two(model)
    before, output = flags(model), run(model)
    with pytest.raises(mm.errors.AttachError, match=text):
        mm.set_active(model, *names)
    assert mm.active(model) == mm.Sum("b")
    assert flags(model) == before
    assert torch.equal(run(model), output)


def test_names_and_compositions_do_not_mix(model: nn.Module) -> None:
    _two(model)
    with pytest.raises(mm.errors.AttachError, match="cannot mix names and compositions"):
        mm.set_active(model, "a", mm.Stack("b"))


def test_taking_one_of_two_active_out_leaves_the_other_acting(model: nn.Module) -> None:
    a, b = _two(model)
    mm.set_active(model, "a")
    alone = run(model)
    mm.set_active(model, mm.Stack("a", "b"))
    b.detach()
    assert mm.active(model) == mm.Stack("a")
    assert torch.equal(run(model), alone)
    assert all(p.requires_grad for p in a.parameters())


# -- disabled ---------------------------------------------------------------------------------------


def test_disabled_ends_even_when_the_block_fails(model: nn.Module) -> None:
    randomise(mm.attach(model, mm.Bottleneck(4)))
    adapted = run(model)
    with pytest.raises(KeyError), mm.disabled(model) as inside:  # noqa: PT012
        assert inside is model
        raise KeyError
    assert torch.equal(run(model), adapted)


def test_what_the_block_chose_itself_stays(model: nn.Module) -> None:
    _two(model)
    with mm.disabled(model):
        mm.set_active(model, "a")
    assert mm.active(model) == mm.Sum("a")


def test_disabled_blocks_nest(model: nn.Module) -> None:
    bare = run(model)
    randomise(mm.attach(model, mm.Bottleneck(4)))
    with mm.disabled(model):
        with mm.disabled(model):
            assert torch.equal(run(model), bare)
        assert torch.equal(run(model), bare)


# -- flags, dtype -----------------------------------------------------------------------------------


def test_only_what_is_active_requires_a_gradient(model: nn.Module) -> None:
    a, b = _two(model)
    assert [p.requires_grad for p in a.parameters()] == [False] * 8
    mm.set_active(model, "a", "b")
    assert all(p.requires_grad for one in (a, b) for p in one.parameters())
    mm.set_active(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_flags_from_before_the_first_attach_come_back(model: nn.Module) -> None:
    model.proj.requires_grad_(False)  # type: ignore[union-attr]
    model.train()
    model.ln_post.eval()  # type: ignore[union-attr]
    before = flags(model)
    mm.attach(model, mm.Bottleneck(4), name="a")
    mm.attach(model, mm.Bottleneck(4), name="b")
    model.eval()
    mm.detach(model, "a")
    assert flags(model) != before
    mm.detach(model, "b")
    assert flags(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layers_are_float32_beside_half_precision_and_outputs_keep_their_dtype(
    model: nn.Module, dtype: torch.dtype
) -> None:
    model.to(dtype).requires_grad_(False)
    with torch.no_grad():
        bare = model(pixels(3).to(dtype))
        attachment = mm.attach(
            model, [mm.Bottleneck(4), mm.LoRA(2), mm.ClipAdapter(start="identity")]
        )
        wide = dtype if dtype == torch.float64 else torch.float32
        assert {p.dtype for p in attachment.parameters()} == {wide}
        assert torch.equal(model(pixels(3).to(dtype)), bare)
        randomise(attachment, 0.1)
        adapted = model(pixels(3).to(dtype))
    assert adapted.dtype == dtype
    assert differ((adapted,), (bare,))


# -- taps and other ports, by a third party's method ------------------------------------------------


def test_a_registered_method_is_known_and_then_forgotten(third_party: None) -> None:
    assert adapters()["handmade_norm_gate"] is NormGate


def test_an_unregistered_method_is_unknown() -> None:
    assert "handmade_norm_gate" not in adapters()


def test_a_method_name_belongs_to_one_class() -> None:
    class Other(mm.Adapter):
        method = "bottleneck"

    with pytest.raises(
        mm.errors.AdapterError, match="'bottleneck' is already registered by Bottle"
    ):
        register_adapter(Other)
    with pytest.raises(mm.errors.AdapterError, match="Nameless has no method name"):
        register_adapter(type("Nameless", (mm.Adapter,), {}))


def test_a_layer_reads_the_tap_beside_its_site(model: nn.Module, third_party: None) -> None:
    attachment = randomise(mm.attach(model, NormGate()))

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        return y + at_mlp(attachment, i).gate * norm1

    adapted = run(model)
    assert_close((adapted,), (vision(model, pixels(3), branch),), 1e-5)
    assert bank_of(model).forwards.context._taps == {}  # type: ignore[union-attr]


def test_a_tap_serves_every_layer_that_reads_it(model: nn.Module, third_party: None) -> None:
    a = randomise(mm.attach(model, NormGate(), name="a"), seed=1)
    b = randomise(mm.attach(model, [NormGate(), mm.Bottleneck(4)], name="b"), seed=2)
    mm.set_active(model, "a", "b")

    def branch(i: int, y: Tensor, x: Tensor, norm1: Tensor) -> Tensor:
        gate = at_mlp(a, i).gate + at_mlp(b, i).gate
        return y + gate * norm1 + delta(at_mlp(b, i, 1), y)

    assert_close((run(model),), (vision(model, pixels(3), branch),), 1e-5)


def test_a_tap_without_a_reader_is_quiet_and_leaves_with_its_last_one(
    model: nn.Module, third_party: None
) -> None:
    before = state(model)
    mm.attach(model, NormGate(), name="gate")
    mm.attach(model, mm.Bottleneck(4), name="other")
    run(model)
    bank = bank_of(model)
    assert bank is not None
    assert bank.forwards.context._taps == {}
    assert {hook.readers for hook in bank.installed.taps.values()} == {0}
    mm.detach(model)
    assert state(model) == before


def test_a_tapped_model_is_saved_loaded_copied_and_checkpointed(
    third_party: None, tmp_path: Any
) -> None:
    from torch.utils.checkpoint import checkpoint

    backbone = small()
    attachment = randomise(mm.attach(backbone, NormGate(0.5)))
    plain = backbone(hidden())
    expected = torch.autograd.grad(plain.square().sum(), list(attachment.parameters()))
    again: Any = checkpoint(backbone.model, hidden(), use_reentrant=False)
    assert torch.equal(again, plain)
    found = torch.autograd.grad(again.square().sum(), list(attachment.parameters()))
    assert_equal(found, expected)
    assert torch.equal(pickle.loads(pickle.dumps(backbone.model))(hidden()), plain)
    attachment.save(tmp_path)
    other = small()
    assert mm.load_adapter(other, tmp_path).adapter == NormGate(0.5)
    assert torch.equal(other(hidden()), plain)


def test_an_input_layer_sees_arguments_and_keywords_alike(third_party: None) -> None:
    backbone = small()
    attachment = randomise(mm.attach(backbone, Shift(), at=["layers[0]", "layers[*].mlp"]))
    layers = attachment.layers
    first: Any = backbone.model.blocks[0]
    x = hidden()
    with torch.no_grad():
        shifted = x + layers["0/layers[0]:in"].shift
        inner = first.norm(shifted) + layers["0/layers[0].mlp:in"].shift
        expected = shifted + F.linear(inner, first.linear.weight, first.linear.bias)
        assert torch.equal(first(x), expected)
        assert torch.equal(first(hidden_states=x), expected)


def test_every_kind_of_output_keeps_its_type() -> None:
    places = {
        "tensor": 0,
        "tuple": 0,
        "list": 1,
        "namedtuple": 1,
        "dict": "value",
        "fields": "value",
    }
    for kind, place in places.items():
        torch.manual_seed(0)
        root = Wrapped(kind)
        span = mm.Span("inner", x="0|x", y=place, channels="inner.weight")
        backbone = mm.Backbone(root, anatomy=mm.Anatomy("wrapped", {"y": span}, {"all": ""}))
        before = root(hidden())
        layer = next(iter(randomise(mm.attach(backbone, mm.Bottleneck(2), at="y")).layers.values()))
        after = root(hidden())
        assert type(after) is type(before), kind
        y = before if kind == "tensor" else before[place]
        changed = after if kind == "tensor" else after[place]
        assert torch.allclose(changed, y + delta(layer, y), atol=1e-6), kind
        if kind in ("list", "namedtuple", "dict", "fields"):
            extra = "extra" if kind in ("dict", "fields") else 0
            assert torch.equal(after[extra], before[extra]), kind


def test_an_output_object_may_be_addressed_by_index() -> None:
    root = Wrapped("fields")  # its first field is None, so index 0 is `value`
    span = mm.Span("inner", x="0|x", y=0, channels="inner.weight")
    backbone = mm.Backbone(root, anatomy=mm.Anatomy("wrapped", {"y": span}, {"all": ""}))
    before = root(hidden())[0]
    randomise(mm.attach(backbone, mm.Bottleneck(2), at="y"))
    assert differ((root(hidden()).value,), (before,))


# -- sites that never fire ---------------------------------------------------------------------------


def _attention(**towers: str) -> mm.Backbone:
    torch.manual_seed(3)
    name = "attention.out_proj"
    anatomy = mm.Anatomy(
        "attention",
        {
            "silent": mm.Span(name, ("out",), "0|input", weight=f"{name}.weight"),
            "o": mm.Span("attention", ("weight",), weight=f"{name}.weight"),
        },
        towers=towers,
    )
    return mm.Backbone(Attention().eval(), anatomy=anatomy)


def test_a_site_whose_module_is_never_called_fails_the_first_forward() -> None:
    backbone = _attention(all="")
    before, output = state(backbone.model), backbone(hidden())
    mm.attach(backbone, mm.LoRA(2), at="silent")
    with pytest.raises(mm.errors.CheckError) as caught:
        backbone(hidden())
    assert "1 of 1 sites below 'all' never fired in its first forward pass: silent:out" in str(
        caught.value
    )
    assert "`weight` port" in caught.value.hint
    mm.detach(backbone)
    assert state(backbone.model) == before
    assert torch.equal(backbone(hidden()), output)


def test_the_same_weight_is_met_at_the_weight_port() -> None:
    backbone = _attention(all="")
    layer: Any = next(iter(randomise(mm.attach(backbone, mm.LoRA(2), at="o")).layers.values()))
    folded = _attention(all="").model
    with torch.no_grad():
        folded.attention.out_proj.weight += layer.b @ layer.a  # type: ignore[union-attr]
        assert_close((backbone(hidden()),), (folded(hidden()),), 1e-6)


def test_a_silent_site_is_found_where_the_anatomy_names_no_tower() -> None:
    backbone = _attention()
    mm.attach(backbone, mm.LoRA(2), at="silent")
    with pytest.raises(mm.errors.CheckError):
        backbone(hidden())


def test_the_check_leaves_after_the_first_forward_of_each_tower() -> None:
    tiny = BACKBONES["open_clip"]
    model: Any = tiny.fresh()
    mm.attach(model, mm.Bottleneck(4))

    def watched(tower: nn.Module) -> bool:
        return any(isinstance(hook, FirstForward) for hook in tower._forward_hooks.values())

    with torch.no_grad():
        model.encode_image(tiny.batch(2)["image"])  # the text tower has not been called: no error
        assert not watched(model.visual)
        assert watched(model.transformer)
        model.encode_text(tiny.batch(2)["text"])
    assert not watched(model.transformer)


def test_a_site_fires_in_a_later_attachments_first_forward_too() -> None:
    backbone = _attention(all="")
    mm.attach(backbone, mm.LoRA(2), at="o", name="works")
    backbone(hidden())
    mm.attach(backbone, mm.LoRA(2), at="silent", name="silent")
    with pytest.raises(mm.errors.CheckError, match="silent:out"):
        backbone(hidden())
    mm.set_active(backbone, "works")
    backbone(hidden())


# -- the weight port ----------------------------------------------------------------------------------


def _first_attention(model: Any) -> Any:
    return model.transformer.resblocks[0].attn


def test_the_frozen_parameter_is_back_after_every_call(model: nn.Module) -> None:
    parameter = _first_attention(model).in_proj_weight
    randomise(mm.attach(model, mm.LoRA(2)))
    model(pixels(2)).sum().backward()
    run(model)
    assert _first_attention(model).in_proj_weight is parameter
    assert isinstance(
        dict(model.named_parameters())["transformer.resblocks.0.attn.in_proj_weight"], nn.Parameter
    )


@pytest.mark.parametrize("where", ["in the module", "in a user's pre-hook", "in a user's hook"])
def test_an_exception_in_the_backbone_puts_the_parameter_back(model: nn.Module, where: str) -> None:
    attention = _first_attention(model)
    parameter, output = attention.in_proj_weight, run(model)
    randomise(mm.attach(model, mm.LoRA(2)))
    adapted = run(model)
    handle = None

    def fail(*args: Any) -> None:
        raise KeyError("the user's")

    if where == "in a user's pre-hook":
        handle = attention.register_forward_pre_hook(fail)
    elif where == "in a user's hook":
        handle = attention.register_forward_hook(fail)
    with pytest.raises((KeyError, AssertionError, RuntimeError)):
        run(model) if handle else attention(*[torch.randn(2, 3, WIDTH + 1)] * 3)
    if handle:
        handle.remove()
    assert attention.in_proj_weight is parameter
    assert torch.equal(run(model), adapted)
    mm.detach(model)
    assert torch.equal(run(model), output)


def test_the_effective_weight_is_kept_between_calls_in_eval_without_grad(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    original = LoRALayer.weight

    def counted(self: Any, *args: Any) -> Tensor:
        calls.append(self)
        return original(self, *args)

    monkeypatch.setattr(LoRALayer, "weight", counted)
    attachment = randomise(mm.attach(model, mm.LoRA(2)))
    run(model)
    run(model)
    assert len(calls) == len(attachment.layers)
    model(pixels(2))
    model(pixels(2))
    assert len(calls) == 3 * len(attachment.layers)


def _folded(model: Any, attachment: Any) -> Tensor:
    """The backbone with q and v changed by hand, in the model's present dtype and values."""
    twin: Any = VISION.fresh().to(next(model.parameters()).dtype)
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("_mmadapt.")}
    twin.load_state_dict(own)
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            _, _, rest = key.partition("[")
            index, word = int(rest[0]), rest.split(".")[-1][0]
            rows = slice("qkv".index(word) * WIDTH, ("qkv".index(word) + 1) * WIDTH)
            weight = twin.transformer.resblocks[index].attn.in_proj_weight
            weight[rows] += layer.scale * layer.b @ layer.a
        return twin(pixels(3).to(weight.dtype))


def _in_place(model: Any, attachment: Any) -> None:
    for parameter in attachment.parameters():
        parameter.mul_(1.5)


def _load_state_dict(model: Any, attachment: Any) -> None:
    model.load_state_dict({key: value * 1.1 for key, value in model.state_dict().items()})


def _optimiser_step(model: Any, attachment: Any) -> None:
    optimiser = torch.optim.AdamW(attachment.parameters(), lr=0.1)
    with torch.enable_grad():
        model(pixels(2)).sum().backward()
    optimiser.step()


def _frozen_weight(model: Any, attachment: Any) -> None:
    _first_attention(model).in_proj_weight.mul_(1.2)


def _replaced_weight(model: Any, attachment: Any) -> None:
    attention = _first_attention(model)
    attention.in_proj_weight = nn.Parameter(attention.in_proj_weight * 1.2, requires_grad=False)


def _to_double(model: Any, attachment: Any) -> None:
    model.double()


def _there_and_back(model: Any, attachment: Any) -> None:
    model.half().float()


@pytest.mark.parametrize(
    "change",
    [
        _in_place,
        _load_state_dict,
        _optimiser_step,
        _frozen_weight,
        _replaced_weight,
        _to_double,
        _there_and_back,
    ],
)
def test_the_kept_weight_follows_every_change(model: nn.Module, change: Any) -> None:
    attachment = randomise(mm.attach(model, mm.LoRA(2, alpha=3.0)))
    stale = run(model)
    with torch.no_grad():
        change(model, attachment)
        now = model(pixels(3).to(next(model.parameters()).dtype))
    if change not in (_to_double, _there_and_back):
        assert differ((now,), (stale,))
    assert_close((now,), (_folded(model, attachment),), 1e-5)


def test_the_kept_weight_follows_switches(model: nn.Module) -> None:
    bare = run(model)
    one = randomise(mm.attach(model, mm.LoRA(2), name="one"), seed=1)
    first = run(model)
    assert_close((first,), (_folded(model, one),), 1e-5)
    two = randomise(mm.attach(model, mm.LoRA(2), name="two"), seed=2)
    assert_close((run(model),), (_folded(model, two),), 1e-5)
    mm.set_active(model, "one")
    assert torch.equal(run(model), first)
    mm.set_active(model)
    assert torch.equal(run(model), bare)


@pytest.mark.parametrize("at", ["*.layers[*].attn.o", "*.layers[*].attn.q"])
def test_the_weight_kept_under_autocast_is_not_used_outside_it(model: nn.Module, at: str) -> None:
    attachment = randomise(mm.attach(model, mm.LoRA(2), at=at))
    expected = run(model)
    with torch.no_grad():
        for parameter in attachment.parameters():
            parameter.add_(0.0)  # what was kept is stale now
    with torch.autocast("cpu", torch.bfloat16):
        run(model)
    assert torch.equal(run(model), expected)


# -- models in models ---------------------------------------------------------------------------------


def test_two_banks_do_not_meet_at_one_module() -> None:
    clip: Any = BACKBONES["open_clip"].fresh()
    mm.attach(clip.visual, mm.Bottleneck(4))
    before = state(clip)
    with pytest.raises(mm.errors.AttachError) as caught:
        mm.attach(clip, mm.Bottleneck(4))
    assert "visual.transformer.resblocks.0.mlp already carries an adapter" in str(caught.value)
    assert "attached to another module around or inside this CLIP" in str(caught.value)
    assert "detach there first" in caught.value.hint
    assert state(clip) == before


def test_two_banks_do_not_meet_at_one_weight() -> None:
    clip: Any = BACKBONES["open_clip"].fresh()
    mm.attach(clip.visual, mm.LoRA(2))
    with pytest.raises(mm.errors.AttachError, match="already carries an adapter"):
        mm.attach(clip, mm.LoRA(2))


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_model_and_a_part_of_it_do_not_both_carry_adapters(inner_first: bool) -> None:
    clip: Any = BACKBONES["open_clip"].fresh()
    first, second = (clip.visual, clip) if inner_first else (clip, clip.visual)
    mm.attach(first, mm.Bottleneck(4), at="vision.layers[0].mlp")
    before = state(clip)
    with pytest.raises(mm.errors.AttachError, match="already carries an adapter"):
        mm.attach(second, mm.Bottleneck(4), at="*.layers[1].mlp")
    assert state(clip) == before


# -- copies in another process --------------------------------------------------------------------


def test_a_users_hook_does_not_replace_ours_after_unpickling(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # as in a new process
    backbone = small()
    randomise(mm.attach(backbone, [mm.Bottleneck(2), mm.LoRA(2)], at="layers[*].mlp"))
    expected = backbone(hidden())
    data = pickle.dumps(backbone.model)
    monkeypatch.setattr(RemovableHandle, "next_id", 0)  # and in the one that unpickles
    twin: Any = pickle.loads(data)
    seen: list[Tensor] = []
    for block in twin.blocks:
        for _ in range(4):
            block.linear.register_forward_hook(lambda m, args, y: seen.append(y))
    assert torch.equal(twin(hidden()), expected)
    assert len(seen) == 12
    mm.detach(twin)
    twin(hidden())
    assert len(seen) == 24


def test_ours_see_the_output_before_a_users_hook_and_leave_it_when_detached(
    model: nn.Module,
) -> None:
    attachment = randomise(mm.attach(model, mm.Bottleneck(4)))
    mlp: Any = model.transformer.resblocks[1].mlp  # type: ignore[union-attr]
    seen: list[Tensor] = []
    handle = mlp.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    x = torch.randn(2, 5, WIDTH)
    with torch.no_grad():
        y = mlp.forward(x)
        mlp(x)
        assert_close((seen[0],), (y + delta(at_mlp(attachment, 1), y),), 1e-6)
        attachment.detach()
        mlp(x)
    assert torch.equal(seen[1], y)
    assert hook_tables(model)["transformer.resblocks.1.mlp._forward_hooks"] == [
        (handle.id, id(mlp._forward_hooks[handle.id]))
    ]


def test_the_tiny_numbers_are_what_the_straight_code_assumes(model: nn.Module) -> None:
    assert _first_attention(model).num_heads == HEADS
    assert hidden().shape[-1] == CHANNELS
    assert_close((run(model),), (vision(model, pixels(3)).detach(),), 1e-5)


# -- what torch and the libraries do around a model -----------------------------------------------


def test_replacing_before_the_first_forward_forgets_the_old_sites() -> None:
    tiny = BACKBONES["open_clip"]
    model = tiny.fresh()
    mm.attach(model, mm.Bottleneck(4))
    mm.attach(model, mm.Bottleneck(4), at="text.layers[*].mlp", replace=True)
    tiny.outputs(model)


def test_the_default_device_does_not_matter_to_attach(model: nn.Module) -> None:
    expected = [p.detach() for p in mm.attach(VISION.fresh(), mm.Bottleneck(4)).parameters()]
    with torch.device("meta"):
        attachment = mm.attach(model, mm.Bottleneck(4))
    assert_equal(tuple(attachment.parameters()), tuple(expected))


def test_a_second_concurrent_forward_raises_and_the_first_is_right() -> None:
    import threading

    backbone = small()
    randomise(mm.attach(backbone, mm.LoRA(2), at="layers[*].mlp:weight"))
    expected = backbone(hidden())
    errors: list[BaseException] = []

    def second() -> None:
        try:
            backbone(hidden())
        except mm.errors.CheckError as error:
            errors.append(error)

    def meanwhile(*args: Any) -> None:
        handle.remove()
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    linear = backbone.model.get_submodule("blocks.1.linear")
    parameter = linear.weight
    handle = linear.register_forward_pre_hook(meanwhile)  # runs inside the first forward
    found = backbone(hidden())
    assert linear.weight is parameter
    assert torch.equal(found, expected)
    assert len(errors) == 1


def _trained(model: Any, tiny: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    outputs = tiny.outputs(model)
    loss = sum((output[:, 0] * 1.5).sum() + output.square().sum() for output in outputs)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return outputs, torch.autograd.grad(loss, wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "switch"),
    [
        ("open_clip", "set_grad_checkpointing"),
        ("open_clip_custom_text", "set_grad_checkpointing"),
        ("hf_vit", "gradient_checkpointing_enable"),
        ("hf_clip", "gradient_checkpointing_enable"),
    ],
)
def test_a_librarys_own_checkpointing_changes_neither_values_nor_gradients(
    name: str, switch: str
) -> None:
    tiny = BACKBONES[name]
    model: Any = tiny.fresh()
    adapters = [mm.Bottleneck(2, placement="parallel"), mm.LoRA(2)]
    randomise(mm.attach(model, adapters, name="branches"))
    randomise(mm.attach(model, mm.Bottleneck(2), at="*.layers[*]", name="blocks"))
    mm.set_active(model, "branches", "blocks")
    model.train()
    outputs, gradients = _trained(model, tiny)
    getattr(model, switch)()
    again, recomputed = _trained(model, tiny)
    assert_equal(again, outputs)
    assert_equal(recomputed, gradients)


def test_a_saved_model_is_loaded_whole(tmp_path: Any) -> None:
    tiny = BACKBONES["hf_vit"]
    model = tiny.fresh()
    randomise(mm.attach(model, [mm.Bottleneck(2), mm.LoRA(2)]))
    torch.save(model, tmp_path / "model.pt")
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_equal(tiny.outputs(twin), tiny.outputs(model))
    assert list(mm.attachments(twin)) == ["default"]


@pytest.mark.slow
def test_a_model_compiled_in_place_sees_attach_and_detach(model: nn.Module) -> None:
    model.compile(backend="aot_eager")
    bare = run(model)
    twin = VISION.fresh()
    for one in (model, twin):
        randomise(mm.attach(one, mm.Bottleneck(4)))
    assert_close((run(model),), (run(twin),), 1e-5)
    assert differ((run(model),), (bare,))
    mm.detach(model)
    assert_close((run(model),), (bare,), 1e-6)
