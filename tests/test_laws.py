"""The laws: what holds for every method on every backbone that offers the sites it wants.

A method joins by being registered, a backbone by standing in `backbones.BACKBONES`; which pairs
there are is computed by `mmadapt.plan`. An exemption is data with a reason.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import pickle
import random
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from backbones import BACKBONES, CLOUDS, VOLUMES, Tiny, embeddings
from snapshot import (
    assert_close,
    assert_equal,
    assert_same_values,
    differ,
    flags,
    hook_tables,
    randomise,
    state,
    values,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import mmadapt as mm
from mmadapt.adapter import Adapter, adapters

#: variants of a method that take different paths; other methods run with their defaults
EXAMPLES: dict[str, dict[str, Adapter]] = {
    "bottleneck": {
        "sequential": mm.Bottleneck(4),
        "parallel": mm.Bottleneck(
            4, placement="parallel", activation="relu", scale=0.5, scale_kind="learned"
        ),
        "houlsby": mm.Bottleneck.houlsby(4),
        "pfeiffer": mm.Bottleneck.pfeiffer(4),
        "beside": mm.Bottleneck.parallel(4),
        "adaptformer": mm.Bottleneck.adaptformer(4),
        "adapterplus": mm.Bottleneck.adapterplus(4, scale=30.0),  # else too near the identity
        "norm-after": mm.Bottleneck(4, norm="after"),
        "reduction": mm.Bottleneck(reduction=4, drop_path=0.5),
        "audio": mm.Bottleneck.audio(4),
        "before": mm.Bottleneck(4, at="*.layers[*].mlp:in"),
    },
    "lora": {
        "scaled": mm.LoRA(2, alpha=4.0),
        "rank-stabilised": mm.LoRA(2, alpha=4.0, rank_stabilized=True, at="*.layers[*].mlp.up"),
    },
    "scale_shift": {
        "identity": mm.ScaleShift(),
        "published": mm.ScaleShift(start="published"),
    },
    "bias_scale": {
        "output": mm.BiasScale(),
        "input": mm.BiasScale(scale="input"),
        "none": mm.BiasScale(scale="none"),
    },
    "adapter_bias": {
        "own-gates": mm.AdapterBias(),
        "shared-gate": mm.AdapterBias(shared_gate=True),
    },
    "compacter": {
        "zero": mm.Compacter(width=4, division=2),
        "plus-plus": mm.Compacter.plus_plus(width=4, division=4),
        "own-rules": mm.Compacter.plus_plus(width=4, division=2, shared_rule=False),
    },
    "bi_adaptformer": {
        "one-bit": mm.BiAdaptFormer(4, scale=30.0),  # else its start is too near the identity
        "two-bit": mm.BiAdaptFormer(4, bits=2, scale=30.0),
    },
    "med_sa": {
        "paper": mm.MedSA(scale=3.0),
        "released": mm.MedSA("released", start="published", relative_positions="zero"),
        "volume": mm.MedSA(depth=True, scale=3.0),
        "grid": mm.MedSA("released", depth=True, depth_layout="grid", decoder="frozen", scale=3.0),
    },
    "conv_depth": {
        "volume": mm.ConvDepth(4),
        "behind": mm.ConvDepth(4, kernel=5, norm=False, at="vision.layers[*]:out"),
        "both": mm.ConvDepth(4, second=True),
    },
    "three_d_sam": {
        "general": mm.ThreeDSAM(zoom=2, window=2, planes=3, queries=3, heads=2),
        "released": mm.ThreeDSAM("released", zoom=2, window=3, planes=4, heads=4),
    },
    "any2point": {
        "classes": mm.Any2Point(5, tokens=8, neighbours=6, neck=4, dropout=0.0, head_width=12),
        "tokens": mm.Any2Point(tokens=4, neighbours=4, voxel=0.5, dropout=0.0, train_norm=False),
        "audio": mm.Any2Point(5, "audio", tokens=8, neighbours=6, neck=4, dropout=0.0, voxel=0.5),
        "text": mm.Any2Point(5, "text", tokens=8, neighbours=6, neck=4, dropout=0.0, voxel=0.5),
    },
    "adapter_shadow": {
        "plain": mm.AdapterShadow(scale=3.0),
        "branches": mm.AdapterShadow(branches=4, fraction=0.5, scale=3.0),
        "rank": mm.AdapterShadow(rank=2, skip=True, scale=3.0),
    },
    "sam_med2d": {
        "encoder": mm.SAMMed2D(),
        "whole": mm.SAMMed2D(decoder="trained", start="published"),
    },
    "conv_adapter": {
        "parallel": mm.ConvAdapter(4, kernel=5),
        "causal": mm.ConvAdapter(4, kernel=4, causal=True, placement="sequential"),
    },
    "conv_pass_1d": {"parallel": mm.ConvPass1d(4, dropout=0.0)},
    "dense_moa": {"three": mm.DenseMoA(3, width=2)},
    "soft_moa": {"three": mm.SoftMoA(3, slots=2, width=2)},
    "deep_prompts": {"two": mm.DeepPrompts(2)},
    "convpass": {
        "identity-kernel": mm.Convpass(4, scale=0.5, dropout=0.0),
        "xavier-kernel": mm.Convpass(4, kernel="xavier"),
    },
    "unlock": {
        "linear": mm.Unlock(at="*.layers[*].mlp.up:weight"),
        "norms": mm.Unlock(at=("*.layers[*].norm1", "*.layers[*].norm2")),
        "biases": mm.Unlock(at=("*.layers[*].attn.v.bias", "*.layers[*].*.bias")),
    },
    "zero_init_attention": {
        "head": mm.ZeroInitAttention(3),
        "layer": mm.ZeroInitAttention(3, gate="layer", activation="identity"),
        "some-heads": mm.ZeroInitAttention(3, heads=(0, 3)),
    },
    "llama_adapter": {"top-layer": mm.LlamaAdapter(3, layers=1)},
    "head": {
        "linear": mm.Head(7, names=("a", "b", "c", "d", "e", "f", "g")),
        "norm": mm.Head(7, norm=True),
    },
    "invertible": {
        "defaults": mm.Invertible(),
        "vision": mm.Invertible(
            reduction=1, activation="gelu", at=("vision.layers[0]:in", "vision.layers[-1]:out")
        ),
    },
    "clip_adapter": {
        "identity": mm.ClipAdapter(reduction=1, start="identity"),
        "published": mm.ClipAdapter(reduction=2),
    },
    "tip_adapter": {
        "trained-keys": mm.TipAdapter(entries=7, residual=5.0, sharpness=1.0, train_keys=True),
        "frozen-keys": mm.TipAdapter(entries=7, residual=5.0, sharpness=1.0),
    },
}

#: method/variant -> what its forward passes are told; a batch of three rows is one volume
FACTS: dict[str, dict[str, Any]] = {
    "med_sa/volume": {"depth": 3},
    "med_sa/grid": {"depth": 3},
    "conv_depth/volume": {"depth": 3},
    "conv_depth/behind": {"depth": 3},
    "conv_depth/both": {"depth": 3},
}

#: methods that take whole volumes, and so meet other batches
HOSTS: dict[str, dict[str, Tiny]] = {"any2point": CLOUDS, "three_d_sam": VOLUMES}

#: (method, part of a tensor's name) -> why its gradient may be zero
QUIET: dict[tuple[str, str], str] = {
    ("med_sa", "decoder.masks[0]"): "it makes the single mask, and three are asked for",
    ("med_sa", ".k.bias"): "it moves all of a query's logits alike, which softmax does not see",
    ("sam_med2d", "decoder.masks[0]"): "it makes the single mask, and three are asked for",
    ("sam_med2d", ".k.bias"): "it moves all of a query's logits alike, which softmax does not see",
    ("sam_med2d", "prompt.points[2]"): "it is the corner of a box, and the prompts are points",
    ("sam_med2d", "prompt.points[3]"): "it is the corner of a box, and the prompts are points",
    ("sam_med2d", "prompt.no_mask"): "it stands for a mask, and every image has one",
    ("sam_med2d", "prompt.no_point"): "it stands for a point that is not there",
}

#: (method, law) -> why it does not apply
EXEMPTIONS: dict[tuple[str, str], str] = {
    ("tip_adapter", "seeds"): "its keys start empty; nothing is drawn",
    ("scale_shift", "seeds"): "it starts at one and zero; nothing is drawn",
    ("bias_scale", "seeds"): "it starts at zero and one; nothing is drawn",
    ("unlock", "seeds"): "it starts at the backbone's values; nothing is drawn",
    ("head", "seeds"): "it starts at zero; nothing is drawn",
    ("head", "stacks"): "it reads the classifier's input, so the last of a stack decides alone",
}


#: (method, or method/variant, backbone) -> why it is refused there, although its sites are
MISFITS: dict[tuple[str, str], str] = {
    ("invertible", "timm_swin"): "its last block has more channels than its first",
    ("invertible/vision", "hf_sam2"): "its last block has more channels than its first",
    ("conv_depth/both", "hf_sam2"): "attention gives fewer positions where a stage begins",
    ("adapter_shadow/rank", "hf_sam2"): "a block gives fewer positions where a stage begins",
    ("deep_prompts", "hf_wavlm"): "its attention has positions of its own",
    ("deep_prompts", "hf_wav2vec2_bert"): "its blocks convolve along time",
    ("convpass", "hf_sam2"): "attention gives fewer positions than it takes where a stage begins",
    **{
        ("tip_adapter", name): "its logits are of tokens, and the cache votes for rows"
        for name in ("hf_llama", "hf_qwen2", "hf_gemma", "hf_wav2vec2_bert", "hf_whisper")
    },
    **{
        ("adapter_bias/shared-gate", name): "the decoder's MLPs are of another width"
        for name in ("hf_sam", "segment_anything", "hf_sam2")
    },
}


@dataclass(frozen=True)
class Case:
    """One adapter on one backbone."""

    adapter: Adapter
    tiny: Tiny
    facts: dict[str, Any] = field(default_factory=dict)

    def told(self, model: Any) -> Any:
        """A block whose forward passes are told the case's facts, where something is attached."""
        if not self.facts or not mm.attachments(getattr(model, "_orig_mod", model)):
            return contextlib.nullcontext()
        return mm.context(getattr(model, "_orig_mod", model), **self.facts)

    def attached(self, name: str = "default", seed: int | None = None) -> tuple[nn.Module, Any]:
        """A fresh backbone with the adapter at its own sites, as it starts."""
        model = self.tiny.fresh()
        return model, mm.attach(model, self.adapter, name=name, seed=seed)

    def acting(self, name: str = "default", seed: int = 5) -> tuple[nn.Module, Any]:
        """The same, with random tensors and a filled cache: it changes the outputs."""
        model, attachment = self.attached(name)
        return model, act(attachment, seed)

    def frozen(self) -> nn.Module:
        """The bare backbone in the flags it has while something is attached."""
        return self.tiny.fresh().requires_grad_(False)

    def without_grad(self, model: Any) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.tiny.outputs(model)


def act(attachment: Any, seed: int = 5) -> Any:
    """Take an attachment away from its start, so that an equality proves something."""
    fill(attachment, seed)
    return randomise(attachment, 0.3 if not _caches(attachment) else 0.05, seed)


def fill(attachment: Any, seed: int = 5) -> None:
    """Fill a method's cache of shots, where it has one."""
    if _caches(attachment):
        from mmadapt.tasks.few_shot import remember

        for layer in attachment.layers.values():
            draw = torch.Generator().manual_seed(seed)
            entries, width = layer.keys.shape
            shots = torch.randn(entries, width, generator=draw)
            labels = torch.randint(0, layer.classes, (entries,), generator=draw)
            remember(attachment, shots, labels)


def _caches(attachment: Any) -> bool:
    return any(hasattr(layer, "labels") for layer in attachment.layers.values())


#: methods on a SAM, or on one made for volumes, which takes a minute to compile
LONG_TO_COMPILE = ("adapter_shadow", "any2point", "sam_med2d", "three_d_sam")


def _cases(only_home: bool = False, first_variant: bool = False) -> list[Any]:
    """Every fitting pair of method and backbone; by default the home and one other.

    A method's first variant goes everywhere, the others to the home and to two backbones each.
    """
    found = []
    for method, cls in adapters().items():
        examples = EXAMPLES.get(method) or {"defaults": cls()}
        for place, (variant, adapter) in enumerate(examples.items()):
            known = {name for at, name in MISFITS if at in (method, f"{method}/{variant}")}
            hosts = HOSTS.get(method, BACKBONES).values()
            homes = [t for t in hosts if t.name not in known and _fits(adapter, t)]
            assert homes, f"no tiny backbone offers what {method} wants: {cls.default_sites}"
            for rank, tiny in enumerate(homes[:1] if only_home else homes):
                turn = (2 * place - 1) % len(homes), 2 * place % len(homes)
                if place and rank and rank not in turn:
                    continue
                every_run = rank == 0 or (rank == 1 and place == 0)
                if first_variant:
                    every_run = rank == 0 and place == 0
                marks = () if every_run else pytest.mark.slow
                name = f"{method}-{variant}-{tiny.name}"
                case = told(Case(adapter, tiny, FACTS.get(f"{method}/{variant}", {})))
                found.append(pytest.param(case, id=name, marks=marks))
    return found


def told(case: Case) -> Case:
    """The case with its facts told in every forward pass of an adapted model."""
    if not case.facts:
        return case

    def call(model: Any, batch: dict[str, Tensor]) -> Any:
        with case.told(model):
            return case.tiny.call(model, batch)

    return replace(case, tiny=replace(case.tiny, call=call))


@functools.cache
def _fits(adapter: Adapter, tiny: Tiny) -> bool:
    try:
        mm.plan(tiny.prototype, adapter)
    except mm.errors.SiteError:
        return False
    return True


def exempt(law: str, case: Case) -> bool:
    return (case.adapter.method, law) in EXEMPTIONS


every_case = pytest.mark.parametrize("case", _cases())
at_home = pytest.mark.parametrize("case", _cases(only_home=True))
first_at_home = pytest.mark.parametrize("case", _cases(only_home=True, first_variant=True))
compiled_at_home = pytest.mark.parametrize(
    "case",
    [
        pytest.param(*p.values, id=p.id, marks=pytest.mark.slow)
        if p.values[0].adapter.method in LONG_TO_COMPILE
        else p
        for p in _cases(only_home=True, first_variant=True)
    ],
)


def scalar(outputs: tuple[Tensor, ...]) -> Tensor:
    """A loss that no symmetry of the outputs can make flat."""
    draw = torch.Generator().manual_seed(3)
    return sum((o.float() * torch.randn(o.shape, generator=draw)).sum() for o in outputs)  # type: ignore[return-value]


# -- the start ----------------------------------------------------------------------------------


@every_case
def test_starts_as_the_identity_or_says_why_not(case: Case) -> None:
    model, _ = case.attached()
    bare = case.frozen()
    if not case.adapter.starts_as_identity():
        assert case.adapter.not_identity.strip()
        assert differ(case.without_grad(model), case.without_grad(bare))
        return
    assert_equal(case.without_grad(model), case.without_grad(bare))
    assert_close(case.tiny.outputs(model), case.tiny.outputs(bare), 1e-5)


@every_case
def test_attach_draws_from_no_global_generator_and_runs_no_forward(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = case.tiny.fresh()
    called: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: called.append(module)
    )
    before = (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy())
    mm.attach(model, case.adapter)
    handle.remove()
    assert called == []
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()


@every_case
def test_a_seed_means_the_same_layers_and_another_seed_others(case: Case) -> None:
    def drawn(seed: int | None) -> list[Tensor]:
        return [p.detach() for p in case.attached(seed=seed)[1].parameters()]

    assert all(map(torch.equal, drawn(1), drawn(1)))
    assert all(map(torch.equal, drawn(None), drawn(None)))
    if not exempt("seeds", case):
        assert not all(map(torch.equal, drawn(1), drawn(2)))


# -- the backbone is left alone -----------------------------------------------------------------


def _train(case: Case, model: nn.Module, attachment: Any, steps: int = 2) -> list[set[str]]:
    """Names of the tensors that got a gradient other than zero, step by step."""
    reached: list[set[str]] = []
    trained = list(attachment.parameters())
    optimiser = torch.optim.SGD(trained, lr=0.01) if trained else None
    for _ in range(steps):
        loss = scalar(case.tiny.outputs(model))
        if optimiser is None:
            assert not loss.requires_grad
            break
        optimiser.zero_grad()
        loss.backward()
        named = attachment.named_parameters()
        reached.append({n for n, p in named if p.grad is not None and p.grad.abs().max() > 0})
        optimiser.step()
    return reached


@every_case
def test_the_backbone_is_untouched_while_attached_and_trained(case: Case) -> None:
    model = case.tiny.fresh()
    keys, before = list(model.state_dict()), values(model)
    attachment = mm.attach(model, case.adapter)
    fill(attachment)
    _train(case, model, attachment)
    assert_same_values(before, values(model))
    extra = [key for key in model.state_dict() if key not in keys]
    assert [key for key in model.state_dict() if key in keys] == keys
    assert extra
    assert all(key.startswith("_mmadapt.") for key in extra)
    assert model.load_state_dict(copy.deepcopy(model.state_dict()), strict=True)


@every_case
def test_a_checkpoint_of_the_bare_backbone_still_loads_strictly(case: Case) -> None:
    model, attachment = case.acting()
    drawn: dict[int, Tensor] = {}  # tied weights are equal in a checkpoint too
    checkpoint_of_the_backbone = {
        key: drawn.setdefault(value.data_ptr(), torch.randn_like(value))
        if value.is_floating_point()
        else value
        for key, value in case.tiny.fresh().state_dict().items()
    }
    kept = [p.detach().clone() for p in attachment.parameters()]
    result = model.load_state_dict(checkpoint_of_the_backbone, strict=True)
    assert not result.missing_keys
    for key, value in checkpoint_of_the_backbone.items():
        assert torch.equal(model.state_dict()[key], value)
    assert all(map(torch.equal, kept, attachment.parameters()))


@every_case
def test_gradients_reach_every_adapter_tensor_and_no_backbone_tensor(case: Case) -> None:
    model, attachment = case.attached()
    fill(attachment)
    reached = _train(case, model, attachment)
    quiet = [part for method, part in QUIET if method == case.adapter.method]
    named = {name for name, _ in attachment.named_parameters()}
    loud = {name for name in named if not any(part in name for part in quiet)}
    assert loud <= set().union(*reached) <= named
    assert bool(loud) == bool(named)
    ours = {id(parameter) for parameter in attachment.parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (id(parameter) in ours), name
        assert id(parameter) in ours or parameter.grad is None, name


@every_case
def test_detach_leaves_nothing_behind(case: Case) -> None:
    model = case.tiny.fresh()
    for place, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(place % 3 != 0)  # some are frozen from birth
    for place, module in enumerate(model.modules()):
        module.training = place % 2 == 0
    seen, outputs = state(model), case.without_grad(model)
    before = values(model)
    attachment = act(mm.attach(model, case.adapter))
    case.without_grad(model)
    model.train()
    model.eval()
    mm.attach(model, case.adapter, name="second")
    attachment.detach()
    mm.detach(model)
    assert state(model) == seen
    assert_same_values(before, values(model))
    assert_equal(case.without_grad(model), outputs)
    assert mm.attachments(model) == {}


@every_case
def test_disabled_is_exactly_the_backbone_and_then_is_not(case: Case) -> None:
    model, _ = case.acting()
    adapted, bare = case.without_grad(model), case.without_grad(case.frozen())
    assert differ(adapted, bare)
    tables = hook_tables(model)
    with mm.disabled(model):
        assert hook_tables(model) == tables
        assert_equal(case.without_grad(model), bare)
    assert_equal(case.without_grad(model), adapted)
    assert hook_tables(model) == tables


# -- files --------------------------------------------------------------------------------------


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@every_case
def test_what_is_loaded_computes_and_saves_the_same(case: Case, tmp_path: Path) -> None:
    model, attachment = case.acting("sketch")
    attachment.save(tmp_path / "one", licence="CC0-1.0", metrics={"accuracy": 0.5})
    fresh = case.tiny.fresh()
    loaded = mm.load_adapter(fresh, tmp_path / "one")
    assert loaded.name == "sketch"
    assert loaded.adapter == case.adapter
    assert_equal(case.without_grad(fresh), case.without_grad(model))
    mm.save(fresh, tmp_path / "two")
    names = ["README.md", "adapter.json", "adapter.safetensors"]
    assert sorted(_bytes(tmp_path / "one")) == names
    assert _bytes(tmp_path / "one") == _bytes(tmp_path / "two")


_FRESH_PROCESS = """
import contextlib
import json
import sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
import mmadapt as mm
from backbones import ALL
tiny = ALL[sys.argv[2]]
model = tiny.build()
mm.load_adapter(model, sys.argv[3])
facts = json.loads(sys.argv[5])
with torch.no_grad(), mm.context(model, **facts) if facts else contextlib.nullcontext():
    torch.save(tiny.outputs(model), sys.argv[4])
"""


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(param.values[0], id=param.id, marks=() if place == 0 else pytest.mark.slow)
        for place, param in enumerate(_cases(only_home=True))
    ],
)
def test_what_is_loaded_computes_the_same_in_a_fresh_process(case: Case, tmp_path: Path) -> None:
    model, attachment = case.acting()
    attachment.save(tmp_path / "adapter")
    out = tmp_path / "outputs.pt"
    here = Path(__file__).parent
    command = [
        sys.executable,
        "-c",
        _FRESH_PROCESS,
        here,
        case.tiny.name,
        tmp_path / "adapter",
        out,
        json.dumps(case.facts),
    ]
    subprocess.run([str(word) for word in command], check=True, cwd=tmp_path)
    assert_close(torch.load(out), case.without_grad(model), 1e-5)


@every_case
def test_another_backbone_refuses_the_file_by_name(case: Case, tmp_path: Path) -> None:
    """Every method meets every family: a case takes two, others than the case before it."""
    case.acting()[1].save(tmp_path)
    others = [tiny for tiny in BACKBONES.values() if tiny.family != case.tiny.family]
    turn = sum(map(ord, case.adapter.method + case.tiny.name))
    for place in (turn, turn + len(others) // 2):
        other = others[place % len(others)].fresh()
        before = state(other)
        with pytest.raises(mm.errors.WrongBackboneError) as caught:
            mm.load_adapter(other, tmp_path)
        assert type(other).__name__ in str(caught.value)
        assert repr(case.tiny.family) in str(caught.value)
        assert type(case.tiny.fresh()).__name__ in str(caught.value)
        assert state(other) == before


# -- sites --------------------------------------------------------------------------------------


@every_case
def test_an_unknown_site_is_refused_with_suggestions(case: Case) -> None:
    model = case.tiny.fresh()
    before = state(model)
    role = mm.plan(model, case.adapter).rows[0][0].rpartition(":")[0]
    word, bracket, index = role.rpartition("[") if role.endswith("]") else (role, "", "")
    unknown = f"{word}x{bracket}{index}"
    with pytest.raises(mm.errors.SiteError) as caught:
        mm.attach(model, case.adapter, at=unknown)
    assert repr(unknown) in str(caught.value)
    assert "matches nothing" in str(caught.value)
    assert re.sub(r"\[\d+\]", "[*]", role) in caught.value.hint
    assert state(model) == before


# -- several ------------------------------------------------------------------------------------


@every_case
def test_two_attachments_coexist_and_switch_without_a_trace(case: Case) -> None:
    alone = [case.without_grad(case.acting(name, seed)[0]) for name, seed in (("a", 1), ("b", 2))]
    bare = case.without_grad(case.frozen())
    assert differ(*alone)
    model, _ = case.acting("a", 1)
    second = mm.attach(model, case.adapter, name="b")
    act(second, 2)
    assert_equal(case.without_grad(model), alone[1])
    tables = hook_tables(model)  # after the first forward, whose own check has left by now
    for name, expected in (("a", alone[0]), ("b", alone[1]), ("a", alone[0])):
        mm.set_active(model, name)
        assert_equal(case.without_grad(model), expected)
    mm.set_active(model)
    assert_equal(case.without_grad(model), bare)
    additive = all(layer.additive for layer in second.layers.values())
    if not additive:
        with pytest.raises(mm.errors.AttachError, match="does not add a change"):
            mm.set_active(model, "a", "b")
    mm.set_active(model, mm.Sum("a", "b") if additive else mm.Stack("a", "b"))
    both = case.without_grad(model)
    assert differ(both, alone[0])
    if exempt("stacks", case):
        assert_equal(both, alone[1])
    else:
        assert differ(both, alone[1])
    assert hook_tables(model) == tables
    mm.set_active(model, "a")
    assert all(not p.requires_grad for p in second.parameters())
    assert all(p.requires_grad for p in mm.attachments(model)["a"].parameters())
    second.detach()
    assert_equal(case.without_grad(model), alone[0])


@first_at_home
def test_a_weight_makes_a_part_of_the_change_or_is_refused(case: Case) -> None:
    model, attachment = case.acting()
    whole, bare = case.without_grad(model), case.without_grad(case.frozen())
    for weight, expected in ((0.0, bare), (1.0, whole)):
        mm.set_active(model, mm.Sum("default", weights=(weight,)))
        assert_equal(case.without_grad(model), expected)
    half = mm.Sum("default", weights=(0.5,))
    around = any(site.endswith(":around") for site in attachment.sites)
    if around or not all(layer.additive for layer in attachment.layers.values()):
        with pytest.raises(mm.errors.AttachError, match=r"cannot have the weight 0\.5"):
            mm.set_active(model, half)
        assert mm.active(model) == mm.Sum("default")
        return
    mm.set_active(model, half)
    part = case.without_grad(model)
    assert differ(part, whole)
    assert differ(part, bare)


# -- copies -------------------------------------------------------------------------------------


def _places(model: nn.Module) -> dict[str, list[int]]:
    """Where hooks stand, a library's own among them, whose objects are copied with the model."""
    return {table: [key for key, _ in hooks] for table, hooks in hook_tables(model).items()}


def _copies(model: nn.Module) -> dict[str, nn.Module]:
    copies = {"deepcopy": copy.deepcopy(model)}
    if not any(parametrize.is_parametrized(module) for module in model.modules()):
        copies["pickle"] = pickle.loads(pickle.dumps(model))  # torch refuses to pickle those
    return copies


@every_case
def test_copies_are_equal_and_independent(case: Case) -> None:
    model, attachment = case.acting()
    expected = case.without_grad(model)
    scalar(case.tiny.outputs(model))  # a forward with a graph leaves nothing that cannot be copied
    for how, twin in _copies(model).items():
        assert_equal(case.without_grad(twin), expected)
        copied = mm.attachments(twin)["default"]
        ours = {id(p) for p in attachment.parameters()}
        assert not ours & {id(p) for p in copied.parameters()}, how
        with torch.no_grad():
            buffers = [b for layer in copied.layers.values() for b in layer.buffers()]
            for tensor in [*copied.parameters(), *buffers]:
                if tensor.is_floating_point():
                    # not by one number, which a norm behind it would take away again
                    tensor.add_(torch.linspace(0.25, 0.75, tensor.numel()).view_as(tensor))
        assert differ(case.without_grad(twin), expected), how
        assert_equal(case.without_grad(model), expected)
        mm.set_active(twin)
        assert_equal(case.without_grad(twin), case.without_grad(case.frozen()))
        assert_equal(case.without_grad(model), expected)
        mm.detach(twin)
        assert _places(twin) == _places(case.tiny.fresh())
        assert_equal(case.without_grad(model), expected)


# -- what torch does around a model ---------------------------------------------------------------


def _leaves(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key: value.clone().requires_grad_(True) if value.is_floating_point() else value
        for key, value in batch.items()
    }


def _gradients(
    outputs: tuple[Tensor, ...], batch: dict[str, Tensor], attachment: Any
) -> list[Tensor]:
    wanted = [*attachment.parameters(), *(t for t in batch.values() if t.requires_grad)]
    return list(torch.autograd.grad(scalar(outputs), wanted, materialize_grads=True))


@every_case
def test_checkpointing_equals_plain_in_values_and_gradients(case: Case) -> None:
    model, attachment = case.acting()
    batch = _leaves(case.tiny.batch(3))
    plain = case.tiny.outputs(model, batch)
    expected = _gradients(plain, batch, attachment)
    names = list(batch)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.tiny.outputs(model, dict(zip(names, tensors, strict=True)))

    recomputed: Any = checkpoint(run, *batch.values(), use_reentrant=False)
    assert_equal(recomputed, plain)
    assert_equal(tuple(_gradients(recomputed, batch, attachment)), tuple(expected))
    assert_equal(case.tiny.outputs(model, batch), plain)  # and nothing was left swapped in
    copy.deepcopy(model)


@every_case
def test_two_adapters_then_one_backward_equal_each_alone(case: Case) -> None:
    """Also where backward recomputes the forward of an adapter that has been switched off since."""
    model, first = case.acting("first")
    second = act(mm.attach(model, case.adapter, name="second"), seed=6)
    batch = case.tiny.batch(3)
    for tensor in batch.values():
        if tensor.is_floating_point():
            tensor.requires_grad_(True)
    names = list(batch)
    tensors = [*first.parameters(), *second.parameters()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return case.tiny.outputs(model, dict(zip(names, inputs, strict=True)))

    def total(name: str, checkpointed: bool) -> Tensor:
        mm.set_active(model, name)
        inputs = batch.values()
        return scalar(
            checkpoint(run, *inputs, use_reentrant=False) if checkpointed else run(*inputs)
        )

    def gradients() -> list[Tensor]:
        found = [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors]
        for tensor in (*tensors, *batch.values()):
            tensor.grad = None
        return found

    for name in ("first", "second"):
        total(name, False).backward()
    expected = gradients()
    for checkpointed in (False, True):
        (total("first", checkpointed) + total("second", checkpointed)).backward()
        assert_close(tuple(gradients()), tuple(expected), 1e-5)
        with mm.disabled(model):
            bare = scalar(checkpoint(run, *batch.values(), use_reentrant=False))
        if bare.requires_grad:
            bare.backward()
            assert not any(bool(gradient.any()) for gradient in gradients())


@every_case
def test_bfloat16_autocast_is_finite_and_leaves_no_trace(case: Case) -> None:
    model, attachment = case.acting()
    expected = case.tiny.outputs(model)
    batch = _leaves(case.tiny.batch(3))
    with torch.autocast("cpu", torch.bfloat16):
        outputs = case.tiny.outputs(model, batch)
    assert all(bool(torch.isfinite(output).all()) for output in outputs)
    assert_close(tuple(o.float() for o in outputs), expected, 0.2)
    for gradient in _gradients(outputs, batch, attachment):
        assert bool(torch.isfinite(gradient).all())
    assert_equal(case.tiny.outputs(model), expected)


@every_case
def test_no_row_sees_its_batch_mates(case: Case) -> None:
    """Slices of one volume do, those of another do not."""
    model, _ = case.acting()
    depth = case.facts.get("depth", 1)
    batch = case.tiny.batch(3 * depth)
    with torch.no_grad():
        whole = case.tiny.outputs(model, batch)
    for row in range(3):
        own = slice(row * depth, (row + 1) * depth)
        with torch.no_grad():
            outputs = case.tiny.outputs(model, {key: value[own] for key, value in batch.items()})
        assert_close(outputs, tuple(output[own] for output in whole), 5e-5)


@compiled_at_home
def test_compiled_code_equals_eager_and_sees_attach_and_switch(case: Case) -> None:
    compiles(case, "aot_eager", 3e-6)


#: one method for each port, on the library whose modules make it hardest
INDUCTOR = [
    ("hf_vit", mm.Bottleneck(4, placement="parallel")),
    ("open_clip", mm.LoRA(2)),
    ("timm_vit", mm.LoRA(2)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "adapter"), INDUCTOR, ids=str)
def test_inductors_code_equals_eager_and_sees_attach_and_switch(
    backbone: str, adapter: Adapter
) -> None:
    compiles(Case(adapter, BACKBONES[backbone]), "inductor", 1e-4)


def compiles(case: Case, backend: str, tolerance: float) -> None:
    """Compiled code follows attach, training, switching and detach."""
    model = case.tiny.fresh()
    compiled = torch.compile(model, backend=backend)
    case.without_grad(compiled)  # compiled bare, before anything is attached
    attachment = act(mm.attach(model, case.adapter))
    adapted = case.without_grad(model)
    assert_close(case.without_grad(compiled), adapted, tolerance)
    batch = _leaves(case.tiny.batch(3))
    if attachment.num_parameters:
        expected = _gradients(case.tiny.outputs(model, batch), batch, attachment)
        found = _gradients(case.tiny.outputs(compiled, batch), batch, attachment)
        for one, other in zip(found, expected, strict=True):
            assert_close((one,), (other,), 10 * tolerance)
    mm.set_active(model)
    assert_close(case.without_grad(compiled), case.without_grad(model), tolerance)
    assert differ(case.without_grad(compiled), adapted)
    mm.set_active(model, "default")
    assert_close(case.without_grad(compiled), adapted, tolerance)
    mm.detach(model)
    assert_close(case.without_grad(compiled), case.without_grad(case.tiny.fresh()), tolerance)


@first_at_home
def test_the_exported_program_equals_the_adapted_model(case: Case) -> None:
    model, _ = case.acting()
    expected = case.without_grad(model)
    with case.told(model):
        program = torch.export.export(model, (), case.tiny.batch(3))
    with torch.no_grad():
        # a program cannot hold the fused attention that torch picks without gradients
        assert_close(case.tiny.read(program.module()(**case.tiny.batch(3))), expected, 1e-5)
    assert_equal(case.without_grad(model), expected)


# -- the suite itself -----------------------------------------------------------------------------


@every_case
def test_a_merge_equals_and_leaves_without_a_trace_or_says_why_not(case: Case) -> None:
    model, _ = case.acting()
    kept, before = values(model), case.without_grad(model)
    try:
        mm.merge(model)
    except mm.errors.MergeError as refused:
        reason = str(refused)
        assert "cannot be merged" in reason
    else:
        assert_close(case.without_grad(model), before, 1e-4)
        mm.unmerge(model)
    assert_same_values(kept, values(model))
    assert_equal(case.without_grad(model), before)


def test_every_exemption_names_a_registered_method_and_a_reason() -> None:
    for (method, law), reason in (*EXEMPTIONS.items(), *QUIET.items()):
        assert method in adapters()
        assert law
        assert reason.strip()


@pytest.mark.parametrize(("method", "backbone"), MISFITS)
def test_a_misfit_is_refused_with_a_reason(method: str, backbone: str) -> None:
    model = BACKBONES[backbone].fresh()
    before = state(model)
    method, _, variant = method.partition("/")
    adapter = EXAMPLES[method][variant] if variant else adapters()[method]()
    with pytest.raises(mm.errors.AdapterError) as caught:
        mm.attach(model, adapter)
    assert caught.value.hint
    assert state(model) == before


def test_every_backbone_hosts_at_least_one_method() -> None:
    hosted = {param.values[0].tiny.name for param in _cases()}
    assert hosted - {*VOLUMES, *CLOUDS} == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_a_rebuilt_backbone_is_bit_equal_and_its_flags_are_open(name: str) -> None:
    tiny = BACKBONES[name]
    one, two = tiny.build(), tiny.fresh()
    assert_same_values(values(one), values(two))
    assert_equal(tiny.outputs(one), tiny.outputs(two))
    assert flags(one) == flags(two)
    assert embeddings(2).shape[0] == 2
