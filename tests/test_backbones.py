"""Backbone families: what their tables say is what the real modules do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from backbones import BACKBONES, CLASSES, RELATIVES, WIDTH
from snapshot import assert_close, assert_equal, assert_same_values, hook_tables, randomise, values
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.core.layer import Layer, empty

ALL = {**BACKBONES, **RELATIVES}

FAMILIES = {
    "timm_vit": "timm-vit",
    "open_clip_timm": "clip",
    "hf_siglip": "siglip",
    "hf_siglip_vision": "siglip-vision",
    "hf_dinov2": "dinov2",
    "hf_dinov2_registers": "dinov2",
    "hf_bert": "bert",
    "hf_bert_classifier": "bert",
    "hf_sam": "sam",
    "segment_anything": "sam",
    "hf_sam2": "sam2",
    "hf_sam_vision": "sam-vision",
    "timm_swin": "generic",
    "own_transformer": "generic",
    "hf_roberta": "roberta",
    "hf_xlm_roberta": "xlm-roberta",
    "hf_camembert": "camembert",
    "hf_electra": "electra",
    "hf_deberta_v2": "deberta-v2",
    "hf_distilbert": "distilbert",
    "hf_deit": "deit",
    "hf_deit_teacher": "deit",
    "hf_beit": "beit",
    "hf_vit_mae": "vit_mae",
    "timm_registers": "timm-vit",
    "timm_averaged": "timm-vit",
    "hf_llama": "llama",
    "hf_mistral": "mistral",
    "hf_qwen2": "qwen2",
    "hf_qwen3": "qwen3",
    "hf_gemma": "gemma",
    "hf_llama_bare": "llama",
    "hf_granite": "granite",
    "hf_gemma2": "gemma2",
    "hf_ast": "audio-spectrogram-transformer",
    "hf_ast_bare": "audio-spectrogram-transformer",
    "hf_wav2vec2": "wav2vec2",
    "hf_wav2vec2_large": "wav2vec2",
    "hf_hubert": "hubert",
    "hf_hubert_large": "hubert",
    "hf_unispeech": "unispeech",
    "hf_unispeech_sat": "unispeech-sat",
    "hf_data2vec_audio": "data2vec-audio",
    "hf_wavlm": "wavlm",
    "hf_wavlm_base": "wavlm",
    "hf_wav2vec2_bert": "wav2vec2-bert",
    "hf_conformer": "wav2vec2-conformer",
    "hf_parakeet": "parakeet_encoder",
    "hf_whisper": "whisper",
    "hf_whisper_bare": "whisper",
    "hf_whisper_classifier": "whisper",
}

#: decoders, whose norms and linears have no biases
UNBIASED = (
    *("hf_llama", "hf_mistral", "hf_qwen2", "hf_qwen3", "hf_gemma"),
    *("hf_llama_bare", "hf_granite", "hf_gemma2"),
)

#: roles that every tower of transformer blocks has
BLOCK = (
    *("", ".attn", ".attn.q", ".attn.k", ".attn.v", ".attn.o", ".mlp", ".mlp.up", ".mlp.down"),
    *(".norm1", ".norm2", ".norm1.bias", ".attn.q.bias", ".attn.v.bias", ".mlp.up.bias"),
)


def outputs(name: str, model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return ALL[name].outputs(model)


def differences(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


# -- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_the_family_is_found_by_the_class(name: str) -> None:
    assert ALL[name].family == FAMILIES[name]


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        ("timm_vit", ("vision",)),
        ("open_clip_timm", ("vision", "text")),
        ("hf_siglip", ("vision", "text")),
        ("hf_siglip_vision", ("vision",)),
        ("hf_dinov2", ("vision",)),
        ("hf_dinov2_registers", ("vision",)),
        ("hf_bert", ("text",)),
        ("hf_bert_classifier", ("text",)),
        *(
            (name, ("vision",))
            for name in ("hf_sam", "segment_anything", "hf_sam2", "hf_sam_vision")
        ),
        *((name, ("text",)) for name in ("hf_roberta", "hf_xlm_roberta", "hf_camembert")),
        *((name, ("text",)) for name in ("hf_electra", "hf_deberta_v2", "hf_distilbert")),
        *((name, ("vision",)) for name in ("hf_deit", "hf_deit_teacher", "hf_beit", "hf_vit_mae")),
        *((name, ("vision",)) for name in ("timm_registers", "timm_averaged")),
        *((name, ("text",)) for name in UNBIASED),
    ],
)
def test_every_block_has_the_same_roles_in_every_family(name: str, towers: tuple[str, ...]) -> None:
    model = ALL[name].fresh()
    roles = set(find_anatomy(model).roles(model))
    block = [role for role in BLOCK if name not in UNBIASED or not role.endswith(".bias")]
    if name in UNBIASED:
        block += [".attn.heads", ".mlp.gate"]
    expected = {f"{t}.layers[{i}]{role}" for t in towers for i in range(2) for role in block}
    assert expected <= roles


@pytest.mark.parametrize("name", FAMILIES)
def test_every_site_and_tap_fires_with_the_widths_the_table_says(name: str) -> None:
    """A pre-hook and a hook on the role's own module see tensors as wide as the site claims."""
    model = ALL[name].fresh()
    anatomy = find_anatomy(model)
    roles = anatomy.roles(model)
    seen: dict[str, tuple[Any, Any, Any]] = {}
    for path in {span.module for span in roles.values()}:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, kwargs, output, path=path: seen.update(
                {path: (args, kwargs, output)}
            ),
            with_kwargs=True,
        )
    outputs(name, model)
    for role, span in roles.items():
        if span.ports == ("around",):  # a whole part, which has no one input and output
            continue
        assert span.module in seen, role
        args, kwargs, output = seen[span.module]
        view = anatomy.view(model, role, span.ports[0], span)
        if "out" not in span.ports:
            continue
        y = output if isinstance(output, Tensor) else output[span.y]
        axis = span.layout.index("C") if "C" in span.layout else -1
        assert y.ndim == len(span.layout), role
        assert y.shape[axis] == view.width * span.block[1], role
        position, bar, keyword = span.x.partition("|")
        ids = role == "text.embeddings"  # pooled features come from pixels or tokens too
        if bar and span.layout != "BD" and span.aligned and not ids:
            x = args[int(position)] if len(args) > int(position) else kwargs[keyword]
            assert x.shape[axis] == view.width_in, role


@pytest.mark.parametrize("name", FAMILIES)
def test_the_facts_are_plain_and_the_same_while_something_is_attached(name: str) -> None:
    import json

    model = ALL[name].fresh()
    facts = find_anatomy(model).facts
    assert facts is not None
    before = facts(model)
    assert json.loads(json.dumps(before)) == before
    mm.attach(model, mm.Bottleneck(2))
    assert facts(model) == before


# -- norms, biases, patches ----------------------------------------------------------------------


def timm_vit_b() -> Any:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        return VisionTransformer(num_classes=0)


def hf_vit_b() -> Any:
    from transformers import ViTConfig, ViTModel

    with torch.device("meta"):
        return ViTModel(ViTConfig(), add_pooling_layer=False)


@pytest.mark.parametrize("build", [timm_vit_b, hf_vit_b])
def test_scale_shift_in_vit_b_has_the_published_size(build: Any) -> None:
    """Lian et al. 2022: a scale and a shift behind every operation of ViT-B/16."""
    sizes = {r["site"]: r["parameters"] for r in mm.plan(build(), mm.ScaleShift()).records()}
    block = [size for site, size in sizes.items() if site.startswith("vision.layers[3].")]
    assert len(block) == 8
    assert sum(block) == 16_896
    assert sizes["vision.patches:out"] == sizes["vision.norm:out"] == 1_536
    assert sum(sizes.values()) == 12 * 16_896 + 3_072


@pytest.mark.parametrize("build", [timm_vit_b, hf_vit_b])
def test_every_bias_of_vit_b_can_be_unlocked(build: Any) -> None:
    model = build()
    at = ["*.layers[*].*.*.bias", "*.layers[*].*.bias", "*.*.bias"]
    unlocked = sum(record["parameters"] for record in mm.plan(model, mm.Unlock(), at).records())
    assert unlocked == sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))


LIBRARIES = ("open_clip", "hf_clip", "hf_vit", "timm_vit", "open_clip_timm", "hf_siglip", "hf_bert")


@pytest.mark.parametrize("name", LIBRARIES)
def test_unlocked_norms_and_biases_are_the_backbones_tensors_moved(name: str) -> None:
    tiny = BACKBONES[name]
    model, moved = tiny.fresh(), tiny.fresh()
    at = ["*.layers[*].norm1", "*.layers[*].norm2", "*.layers[*].*.bias"]
    at += ["*.layers[*].attn.*.bias", "*.layers[*].mlp.*.bias"]
    attachment = randomise(mm.attach(model, mm.Unlock(), at=at), 0.3, 5)
    anatomy = find_anatomy(moved)
    spans = anatomy.roles(moved)
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            role = key.partition("/")[2].partition(":")[0]
            view = anatomy.view(moved, role, "weight", spans[role])
            moved.get_parameter(spans[role].weight)[slice(*view.rows)] += layer.change
    expected = outputs(name, moved)
    assert differences(outputs(name, tiny.fresh()), expected) > 1e-2
    assert_close(outputs(name, model), expected, 1e-5)
    mm.merge(model)
    assert_close(outputs(name, model), expected, 1e-5)


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert"])
def test_scales_and_shifts_behind_every_operation_merge(name: str) -> None:
    model = BACKBONES[name].fresh()
    bare = outputs(name, BACKBONES[name].fresh())
    randomise(mm.attach(model, mm.ScaleShift()), 0.1, 5)
    adapted = outputs(name, model)
    assert differences(adapted, bare) > 1e-2
    mm.merge(model)
    assert_close(outputs(name, model), adapted, 1e-5)


def test_a_method_for_matrices_refuses_norms_and_biases() -> None:
    for role in ("norm1", "norm1.bias", "mlp.up.bias"):
        with pytest.raises(mm.errors.AdapterError, match="stands for a vector of"):
            mm.attach(BACKBONES["timm_vit"].fresh(), mm.LoRA(1), at=f"vision.layers[*].{role}")


# -- the raw residual stream ---------------------------------------------------------------------


@dataclass(frozen=True)
class Raw(mm.Adapter):
    """y + gate · the residual stream before the branch's norm."""

    method: ClassVar[str] = "handmade_raw"
    layer: ClassVar[str] = f"{__name__}:RawLayer"


class RawLayer(Layer):
    """Parameters: gate (C,)."""

    taps: ClassVar[tuple[str, ...]] = ("residual",)

    def __init__(self, adapter: Raw, site: Any, generator: torch.Generator) -> None:
        super().__init__()
        self.gate = empty(site, site.width)
        nn.init.zeros_(self.gate)

    def after(self, acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        return acc + self.gate * context.read(site.taps["residual"])


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("word", ["attn", "mlp"])
def test_a_branch_may_read_the_stream_its_norm_has_not_seen(name: str, word: str) -> None:
    """The straight way: keep the block's input, or what the block adds its second branch to."""
    tiny = BACKBONES[name]
    model, straight = tiny.fresh(), tiny.fresh()
    tower = "text" if name == "hf_bert" else "vision"
    at = f"{tower}.layers[1].{word}"
    (layer,) = randomise(mm.attach(model, Raw(), at=at), 0.3, 5).layers.values()
    roles = find_anatomy(straight).roles(straight)
    kept: dict[str, Tensor] = {}

    def keep_input(module: nn.Module, args: Any, kwargs: Any) -> None:
        kept["stream"] = args[0] if args else next(iter(kwargs.values()))

    def keep_output(module: nn.Module, args: Any, output: Tensor) -> None:
        kept["stream"] = output

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        whole = not isinstance(output, Tensor)
        changed = (output[0] if whole else output) + layer.gate * kept["stream"]
        return (changed, *output[1:]) if whole else changed

    block = straight.get_submodule(roles[f"{tower}.layers[1]"].module)
    middle = straight.get_submodule(
        roles[f"{tower}.layers[1].norm{1 if tower == 'text' else 2}"].module
    )
    if word == "attn":
        block.register_forward_pre_hook(keep_input, with_kwargs=True)
    elif tower == "text":
        middle.register_forward_hook(keep_output)
    else:
        middle.register_forward_pre_hook(keep_input, with_kwargs=True)
    straight.get_submodule(roles[at].module).register_forward_hook(add)
    expected = outputs(name, straight)
    assert differences(outputs(name, tiny.fresh()), expected) > 1e-2
    assert_close(outputs(name, model), expected, 1e-6)
    assert_close(outputs(name, copy.deepcopy(model)), expected, 1e-6)
    assert_equal(outputs(name, model), outputs(name, model))  # nothing is left for the next call


# -- relatives of a family --------------------------------------------------------------------------


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_adapts_trains_saves_and_leaves(name: str, tmp_path: Path) -> None:
    tiny = RELATIVES[name]
    model = tiny.fresh()
    outputs(name, model)  # some hang hooks of their own into their first forward pass
    tables, before = hook_tables(model), values(model)
    tower = next(iter(find_anatomy(model).towers))
    block = f"{tower}.layers[*]"
    branches = (f"{block}.attn", f"{block}.mlp")
    adapters = [
        mm.LoRA(2),
        mm.ScaleShift(at=(f"{block}.norm1", f"{block}.norm2", f"{block}.mlp.up")),
        mm.Bottleneck(2, placement="parallel", at=branches),
        mm.Unlock(at=f"{block}.norm1:weight" if name in UNBIASED else f"{block}.*.bias"),
    ]
    attachment = mm.attach(model, adapters)
    assert_close(outputs(name, model), outputs(name, tiny.fresh()), 1e-6)
    randomise(attachment, 0.1, 5)
    with torch.enable_grad():
        sum((y * y).sum() for y in tiny.outputs(model)).backward()
    assert all(p.grad is not None for p in attachment.parameters())
    adapted = outputs(name, model)
    assert differences(adapted, outputs(name, tiny.fresh())) > 1e-2
    attachment.save(tmp_path)
    other = tiny.fresh()
    mm.load_adapter(other, tmp_path)
    assert_equal(outputs(name, other), adapted)
    mm.detach(model)
    assert hook_tables(model) == tables
    assert_same_values(before, values(model))


# -- tokens before the patches -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("open_clip", 1),
        ("open_clip_vision", 1),
        ("open_clip_timm", 0),
        ("hf_clip", 1),
        ("hf_clip_vision", 1),
        ("hf_vit", 1),
        ("hf_deit", 2),
        ("hf_beit", 1),
        ("hf_siglip", 0),
        ("hf_siglip_vision", 0),
        ("hf_dinov2", 1),
        ("hf_dinov2_registers", 5),
        ("timm_vit", 1),
        ("timm_registers", 5),
        ("timm_averaged", 0),
    ],
)
def test_convpass_treats_class_and_register_tokens_apart(name: str, prefix: int) -> None:
    """Moving one patch moves its neighbours; tokens before the grid see none and none sees them."""
    model: Any = ALL[name].fresh()
    attachment = randomise(mm.attach(model, mm.Convpass(4, dropout=0.0), at="vision.layers[0].mlp"))
    (layer,) = attachment.layers.values()
    anatomy = find_anatomy(model)
    span = anatomy.roles(model)["vision.layers[0].mlp"]
    assert span.prefix == prefix
    site = anatomy.view(model, "vision.layers[0].mlp", "out", span)
    x = torch.randn(1, prefix + 4, WIDTH)

    def change(x: Tensor) -> Tensor:
        with torch.no_grad():
            return layer.after(torch.zeros_like(x), x, x, None, site)

    for token in range(prefix + 4):
        moved = x.clone()
        moved[:, token] += 1
        seen = set((change(moved) - change(x)).abs().amax(dim=(0, 2)).nonzero().flatten().tolist())
        assert seen == ({token} if token < prefix else set(range(prefix, prefix + 4)))
    outputs(name, model)


def test_a_grid_that_leaves_other_tokens_over_is_refused() -> None:
    model = BACKBONES["hf_dinov2_registers"].fresh()
    mm.attach(model, mm.Convpass(4, grid=(3, 3)))
    with pytest.raises(
        mm.errors.AdapterError, match="3 × 3 does not fit the 9 tokens at .* behind 5"
    ):
        outputs("hf_dinov2_registers", model)
    mm.attach(model, mm.Convpass(4, grid=(2, 2)), replace=True)
    outputs("hf_dinov2_registers", model)


def test_images_that_are_not_square_need_their_grid_said() -> None:
    model: Any = BACKBONES["hf_dinov2"].fresh()
    wide = torch.randn(1, 3, 16, 32)
    mm.attach(model, mm.Convpass(4))
    with pytest.raises(
        mm.errors.AdapterError, match="9 tokens .* no square .* behind 1 others"
    ) as e:
        model(pixel_values=wide)
    assert "not square" in e.value.hint
    mm.attach(model, mm.Convpass(4, grid=(2, 4)), replace=True)
    model(pixel_values=wide)


def test_shuffled_patches_are_no_image_to_convolve() -> None:
    with pytest.raises(mm.errors.AdapterError, match="convolves over image patches"):
        mm.attach(RELATIVES["hf_vit_mae"].fresh(), mm.Convpass(4))


# -- fused rows -----------------------------------------------------------------------------------


def folded(model: nn.Module, attachment: Any) -> nn.Module:
    """A bare copy's weights plus B·A of every LoRA, row block by row block."""
    with torch.no_grad():
        for (role, word), layer in _loras(attachment).items():
            index = int(role.partition("[")[2].rstrip("]"))
            start = "qkv".index(word) * WIDTH
            weight = model.get_submodule(f"blocks.{index}.attn.qkv").weight
            weight[start : start + WIDTH] += layer.scale * (layer.b @ layer.a)
    return model


def _loras(attachment: Any) -> dict[tuple[str, str], Any]:
    found = {}
    for key, layer in attachment.layers.items():
        role = key.partition("/")[2].partition(":")[0]
        block, _, word = role.rpartition(".attn.")
        found[block, word] = layer
    return found


@pytest.mark.parametrize("port", ["out", "weight"])
def test_lora_on_q_and_v_of_a_fused_linear_equals_folded_weights(port: str) -> None:
    tiny = BACKBONES["timm_vit"]
    model = tiny.fresh()
    at = [f"vision.layers[*].attn.{word}:{port}" for word in "qv"]
    attachment = randomise(mm.attach(model, mm.LoRA(3, alpha=6.0), at=at), 0.3, 5)
    assert len(attachment.sites) == 4
    expected = outputs("timm_vit", folded(tiny.fresh(), attachment))
    assert differences(outputs("timm_vit", tiny.fresh()), expected) > 1e-2
    assert_close(outputs("timm_vit", model), expected, 1e-6)


def test_sites_that_share_a_fused_linear_start_as_the_identity_together() -> None:
    tiny = BACKBONES["timm_vit"]
    model = tiny.fresh()
    bare = outputs("timm_vit", tiny.fresh().requires_grad_(False))
    mm.attach(model, mm.LoRA(3), at="vision.layers[*].attn.*:out", name="lora")
    assert_equal(outputs("timm_vit", model), bare)
    mm.attach(model, mm.Bottleneck(3), at="vision.layers[*].attn.k", name="k")
    mm.set_active(model, "lora", "k")
    assert_equal(outputs("timm_vit", model), bare)


def test_a_layer_at_a_share_sees_and_changes_only_its_columns() -> None:
    tiny = BACKBONES["timm_vit"]
    model = tiny.fresh()
    randomise(mm.attach(model, mm.Bottleneck(3), at="vision.layers[0].attn.k"), 0.3, 5)
    linear: Any = model.get_submodule("blocks.0.attn.qkv")
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        adapted = linear(x)
        mm.set_active(model)
        bare = linear(x)
    changed = (adapted != bare).flatten(0, 1).any(dim=0)
    assert changed[WIDTH : 2 * WIDTH].all()
    assert not changed[:WIDTH].any()
    assert not changed[2 * WIDTH :].any()


def test_shares_stack_and_sum_as_whole_outputs_do() -> None:
    tiny = BACKBONES["timm_vit"]
    alone = []
    for seed, word in ((1, "q"), (2, "v")):
        model = tiny.fresh()
        at = f"vision.layers[0].attn.{word}"
        randomise(mm.attach(model, mm.LoRA(2), at=at, name=word), 0.3, seed)
        alone.append(model)
    both = tiny.fresh()
    for seed, word in ((1, "q"), (2, "v")):
        at = f"vision.layers[0].attn.{word}"
        randomise(mm.attach(both, mm.LoRA(2), at=at, name=word), 0.3, seed)
    x = torch.randn(2, 4, WIDTH)
    with torch.no_grad():
        q, v = (m.get_submodule("blocks.0.attn.qkv")(x) for m in alone)
        for composition in (("q", "v"), (mm.Stack("v", "q"),)):
            mm.set_active(both, *composition)
            found: Any = both.get_submodule("blocks.0.attn.qkv")(x)
            assert torch.equal(found[..., :WIDTH], q[..., :WIDTH])
            assert torch.equal(found[..., 2 * WIDTH :], v[..., 2 * WIDTH :])


# -- post-norm blocks -------------------------------------------------------------------------------


class _Houlsby(nn.Module):
    """Houlsby et al. 2019 by hand: an adapter before the sum of a post-norm block."""

    def __init__(self, output: nn.Module, layer: Any) -> None:
        super().__init__()
        self.output: Any = output
        self.layer = layer

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        y = self.output.dense(hidden_states)
        inner = nn.functional.gelu(y @ self.layer.down.T + self.layer.down_bias)
        y = y + inner @ self.layer.up.T + self.layer.up_bias
        return self.output.LayerNorm(y + input_tensor)


def test_berts_branches_are_met_where_houlsby_puts_adapters() -> None:
    tiny = BACKBONES["hf_bert"]
    model = tiny.fresh()
    at = ["text.layers[*].attn", "text.layers[*].mlp"]
    attachment = randomise(mm.attach(model, mm.Bottleneck(4), at=at), 0.3, 5)
    straight: Any = tiny.fresh()
    for key, layer in attachment.layers.items():
        index = int(key.partition("[")[2].partition("]")[0])
        block = straight.encoder.layer[index]
        holder = block.attention if key.endswith(".attn:out") else block
        holder.output = _Houlsby(holder.output, layer)
    expected = outputs("hf_bert", straight)
    assert differences(outputs("hf_bert", tiny.fresh()), expected) > 1e-2
    assert_close(outputs("hf_bert", model), expected, 1e-6)


@pytest.mark.parametrize("word", ["attn", "mlp"])
def test_a_parallel_adapter_in_bert_reads_what_its_branch_reads(word: str) -> None:
    tiny = BACKBONES["hf_bert"]
    model: Any = tiny.fresh()
    adapter = mm.Bottleneck(4, placement="parallel")
    attachment = randomise(mm.attach(model, adapter, at=f"text.layers[0].{word}"), 0.3, 5)
    layer: Any = next(iter(attachment.layers.values()))
    assert layer.down.shape == (4, WIDTH)
    caught: dict[str, Tensor] = {}
    block = model.encoder.layer[0]
    reads = block.intermediate if word == "mlp" else block.attention.self.key
    dense = block.output.dense if word == "mlp" else block.attention.output.dense
    reads.register_forward_pre_hook(lambda m, args: caught.update(x=args[0]))
    dense.register_forward_hook(lambda m, args, y: caught.update(h=args[0], y=y))
    outputs("hf_bert", model)
    with torch.no_grad():
        inner = nn.functional.gelu(caught["x"] @ layer.down.T + layer.down_bias)
        expected = caught["h"] @ dense.weight.T + dense.bias
        expected = expected + inner @ layer.up.T + layer.up_bias
    assert_close((caught["y"],), (expected,), 1e-6)


def test_padding_of_bert_reaches_no_other_row() -> None:
    tiny = BACKBONES["hf_bert"]
    model: Any = tiny.fresh()
    randomise(mm.attach(model, mm.Bottleneck(4)), 0.3, 5)
    ids = tiny.batch(2)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0
    with torch.no_grad():
        whole = model(input_ids=ids, attention_mask=mask).last_hidden_state
        alone = model(input_ids=ids[1:, :3]).last_hidden_state
    assert_close((whole[1:, :3],), (alone,), 1e-5)


# -- logits and pooled features ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm_vit", "hf_bert_classifier"])
def test_a_classifier_offers_its_logits(name: str) -> None:
    model = BACKBONES[name].fresh()
    (site,) = mm.attach(model, mm.TipAdapter(3), at="logits").layers.values()
    assert site.keys.shape == (3, WIDTH)
    assert site.classes == CLASSES
    unlocked = mm.attach(model, mm.Unlock(), at=["logits", "logits.bias"], name="head")
    assert sorted(tuple(p.shape) for p in unlocked.parameters()) == [(CLASSES,), (CLASSES, WIDTH)]


def test_a_timm_backbone_without_a_head_has_no_logits() -> None:
    model: Any = BACKBONES["timm_vit"].fresh()
    model.reset_classifier(0)
    roles = find_anatomy(model).roles(model)
    assert "logits" not in roles
    assert "vision.pooled" in roles


@pytest.mark.parametrize("name", ["hf_siglip", "open_clip_timm"])
def test_siglip_embeds_images_and_texts_through_its_pooled_sites(name: str) -> None:
    tiny = BACKBONES[name]
    model = tiny.fresh()
    encode = find_anatomy(model).encode
    image, text = tiny.batch(2).values()
    with torch.no_grad():
        before = encode["image"](model, image), encode["text"](model, text)
        randomise(mm.attach(model, mm.Bottleneck(2), at="*.pooled"), 0.3, 5)
        after = encode["image"](model, image), encode["text"](model, text)
    assert before[0].shape == before[1].shape == (2, WIDTH)
    assert float((after[0] - before[0]).abs().max()) > 1e-3
    if name == "hf_siglip":
        assert float((after[1] - before[1]).abs().max()) > 1e-3


# -- what torch and the libraries do around them ------------------------------------------------------


@pytest.mark.slow
def test_shares_of_a_fused_linear_and_raw_taps_compile_and_export() -> None:
    tiny = BACKBONES["timm_vit"]
    model: Any = tiny.fresh()
    compiled = torch.compile(model, backend="aot_eager")
    bare = outputs("timm_vit", compiled)
    randomise(mm.attach(model, (mm.LoRA(2), Raw(at="vision.layers[*].mlp"))), 0.3, 5)
    adapted = outputs("timm_vit", model)
    assert_close(outputs("timm_vit", compiled), adapted, 1e-6)
    mm.set_active(model)
    assert_close(outputs("timm_vit", compiled), bare, 1e-6)
    mm.set_active(model, "default")
    program = torch.export.export(model, (), tiny.batch(3))
    with torch.no_grad():
        assert_close(tiny.read(program.module()(**tiny.batch(3))), adapted, 1e-6)


@pytest.mark.parametrize("name", ["hf_bert", "hf_siglip_vision"])
def test_a_librarys_own_recomputation_gives_the_same_gradients(name: str) -> None:
    tiny = BACKBONES[name]

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        model: Any = tiny.fresh()
        adapter = mm.Bottleneck(4, placement="parallel")
        attachment = randomise(mm.attach(model, adapter), 0.3, 5)
        if recompute:
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)()
        with mm.train_mode(model):
            for module in model.modules():  # libraries recompute in train mode only
                module.training = True
            hidden = tiny.outputs(model)[0]
            draw = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
            (hidden * draw).sum().backward()
        return tuple(p.grad for p in attachment.parameters())  # type: ignore[misc]

    assert_equal(gradients(True), gradients(False))
