"""Zero-initialised attention: its formula, its counts, features of images, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL, BACKBONES, tokens
from snapshot import assert_close, assert_equal, differ, randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.anatomy import Anatomy
from mmadapt.core.site import Attention, Derived, SiteView, Span
from mmadapt.errors import AdapterError, CheckError, SiteError
from mmadapt.ops.attention import gated_attention as fused
from mmadapt.ops.reference import gated_attention

LLAMA = BACKBONES["hf_llama"]
WITH_IMAGES = mm.ZeroInitAttention(4, visual="added", features=5)


def adapted(adapter: Any, name: str = "hf_llama") -> tuple[Any, Any]:
    model = ALL[name].fresh()
    return model, randomise(mm.attach(model, adapter), 0.5)


def logits(model: Any, rows: int = 3) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens(rows)).logits


def features(rows: int, *shape: int) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(2))


# -- the formula ----------------------------------------------------------------------------------


def straight(model: Any, attachment: Any, activation: Any) -> Tensor:
    """The whole decoder in plain matrix products, one head after the other."""
    decoder = getattr(model, "model", model)
    config, ids = model.config, tokens(3)
    width = config.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    positions = torch.arange(ids.shape[1]).float()
    angles = positions[:, None] * decoder.rotary_emb.inv_freq.repeat(2)
    past = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()

    def rotate(t: Tensor) -> Tensor:
        turned = torch.cat([-t[..., width // 2 :], t[..., : width // 2]], dim=-1)
        return t * angles.cos() + turned * angles.sin()

    h = decoder.embed_tokens(ids)
    for i, block in enumerate(decoder.layers):
        a, z = block.self_attn, block.input_layernorm(h)
        layer = attachment.layers[f"0/text.layers[{i}].attn.heads:in"]
        norms = (getattr(a, "q_norm", nn.Identity()), getattr(a, "k_norm", nn.Identity()))
        gate, heads = activation(layer.gate), []
        for head in range(config.num_attention_heads):
            own = slice(head * width, (head + 1) * width)
            shared = slice(head // group * width, (head // group + 1) * width)
            q = rotate(norms[0](z @ a.q_proj.weight[own].T))
            k = rotate(norms[1](z @ a.k_proj.weight[shared].T))
            scores = (q @ k.mT / width**0.5).masked_fill(~past, -torch.inf)
            out = scores.softmax(-1) @ (z @ a.v_proj.weight[shared].T)
            more = norms[1](layer.prompt @ a.k_proj.weight[shared].T)
            seen = (q @ more.mT / width**0.5).softmax(-1)
            out = out + gate[head if len(gate) > 1 else 0] * (
                seen @ (layer.prompt @ a.v_proj.weight[shared].T)
            )
            heads.append(out)
        h = h + torch.cat(heads, dim=-1) @ a.o_proj.weight.T
        h = h + block.mlp(block.post_attention_layernorm(h))
    h = decoder.norm(h)
    return model.lm_head(h) if hasattr(model, "lm_head") else h


@pytest.mark.parametrize("name", ["hf_llama", "hf_qwen3"])
@pytest.mark.parametrize("gate", ["head", "layer"])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_it_is_its_formula(name: str, gate: Any, activation: Any) -> None:
    model, attachment = adapted(mm.ZeroInitAttention(3, gate=gate, activation=activation), name)
    with torch.no_grad():
        expected = straight(model, attachment, torch.tanh if activation == "tanh" else lambda g: g)
        assert_close(ALL[name].outputs(model), (expected,), 1e-5)
        with mm.disabled(model):
            assert differ(ALL[name].outputs(model), (expected,))


def test_heads_that_are_not_named_are_left_alone() -> None:
    some, one = adapted(mm.ZeroInitAttention(3, heads=(2, 0)))
    every, other = adapted(mm.ZeroInitAttention(3))
    with torch.no_grad():
        for key, layer in other.layers.items():
            layer.prompt.copy_(one.layers[key].prompt)
            layer.gate.zero_()
            layer.gate[2], layer.gate[0] = one.layers[key].gate
    assert_close((logits(some),), (logits(every),), 1e-6)


def test_the_softmax_and_the_gate_are_wide_in_a_narrow_backbone() -> None:
    model = LLAMA.fresh().to(torch.bfloat16)
    attachment = randomise(mm.attach(model, mm.ZeroInitAttention(3)), 0.5)
    assert {p.dtype for p in attachment.parameters()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    wide, _ = adapted(mm.ZeroInitAttention(3))
    assert_close((logits(model).float(),), (logits(wide),), 0.1)
    q = torch.full((1, 1, 1, 2), 30.0, dtype=torch.float16)
    k = torch.tensor([[[[30.0, 30.0], [29.0, 29.0]]]], dtype=torch.float16)
    v = torch.ones(1, 1, 2, 2, dtype=torch.float16)
    found = gated_attention(q, k, v, torch.tensor([1e-6]), 1.0)  # a gate float16 would round away
    assert float(found.float().max()) > 0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("length", [6, 20])
def test_other_kernels_give_what_the_reference_gives(
    groups: int, rows: int, gates: int, length: int
) -> None:
    draw = torch.Generator().manual_seed(1)
    shapes = ((3, 4, length, 8), (rows, groups, 5, 8), (rows, groups, 5, 8), (gates,))
    given = [torch.randn(shape, generator=draw).requires_grad_() for shape in shapes]
    weights = torch.randn(3, length, 32, generator=draw)
    found, expected = (
        (out := each(*given, 0.4), *torch.autograd.grad((out * weights).sum(), given))
        for each in (fused, gated_attention)
    )
    for one, other in zip(found, expected, strict=True):
        assert_close((one,), (other,), 1e-5)
    wide = [t.detach().double() for t in given]
    assert torch.equal(fused(*wide, 0.4), gated_attention(*wide, 0.4))


# -- counts -----------------------------------------------------------------------------------------


def big(layers: int, width: int, inner: int, heads: int) -> Any:
    """A Llama without weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def planned(model: Any, adapter: Any) -> int:
    return sum(row[-1] for row in mm.plan(model, adapter).rows)


def test_the_counts_are_the_published_ones() -> None:
    seven = big(32, 4096, 11008, 32)
    assert planned(seven, mm.LlamaAdapter()) == 1_229_760
    assert planned(seven, mm.LlamaAdapter.v2_chat()) == 2_764_800
    norms, _ = mm.LlamaAdapter.v2_chat()
    released = ("attn.q", "attn.o", "mlp.gate", "mlp.up", "mlp.down")
    biases = mm.BiasScale(scale="none", at=[f"text.layers[*].{word}:out" for word in released])
    assert planned(seven, [norms, biases]) == 1_363_968
    norms_biases_scales, tokens_and_gates = 2_985_984, 31 * (10 * 4096 + 32)
    assert planned(seven, mm.LlamaAdapter.v2()) == norms_biases_scales + tokens_and_gates
    early_fusion = 768 * 4096 + 4096 + 32
    seeing = mm.LlamaAdapter.v2(features=768)
    assert planned(seven, seeing) == norms_biases_scales + tokens_and_gates + early_fusion
    large = big(80, 8192, 22016, 64)
    assert planned(large, mm.LlamaAdapter.v2_chat()) == 13_811_712
    assert planned(large, mm.LlamaAdapter.v2_chat("output")) == 14_917_632


def test_low_rank_series_and_parallel_adapters_have_their_counts() -> None:
    seven = big(32, 4096, 11008, 32)
    assert planned(seven, mm.LoRA(8)) == 32 * 2 * 8 * (4096 + 4096)
    series = mm.Bottleneck(64, at="text.layers[*].mlp")
    assert planned(seven, series) == 32 * (2 * 4096 * 64 + 64 + 4096)


# -- keys and values are kept ------------------------------------------------------------------------


def calls(model: Any) -> list[tuple[int, ...]]:
    """Shapes that the first layer's key projection gives, from now on."""
    seen: list[tuple[int, ...]] = []
    projection = model.model.layers[0].self_attn.k_proj
    own = projection.forward
    projection.__dict__["forward"] = lambda x: (seen.append(tuple(x.shape)), own(x))[1]
    return seen


def test_keys_and_values_of_the_tokens_are_computed_once_while_nothing_trains() -> None:
    model, _ = adapted(mm.ZeroInitAttention(3))
    seen = calls(model)
    first = logits(model)
    assert_equal((logits(model),), (first,))
    assert seen.count((1, 3, 16)) == 1
    model(input_ids=tokens(3))
    model(input_ids=tokens(3))
    assert seen.count((1, 3, 16)) == 3  # with gradients they belong to a graph


def test_what_is_kept_is_renewed_when_anything_behind_it_changes() -> None:
    model, attachment = adapted(mm.ZeroInitAttention(3))
    layer = attachment.layers["0/text.layers[0].attn.heads:in"]

    def fresh() -> Tensor:
        for one in attachment.layers.values():
            one._kept = None
        return logits(model)

    logits(model)
    with torch.no_grad():
        layer.prompt.add_(1.0)
    stale = logits(model)
    assert_equal((stale,), (fresh(),))
    with torch.no_grad():
        layer.gate.add_(1.0)
    assert differ((logits(model),), (stale,))
    assert_equal((logits(model),), (fresh(),))
    model.model.layers[0].self_attn.k_proj.weight.data = torch.randn(8, 16)
    assert_equal((logits(model),), (fresh(),))
    randomise(mm.attach(model, mm.LoRA(2, at="*.layers[*].attn.k"), name="lora"), 0.5)
    mm.set_active(model, "default", "lora")
    both = logits(model)
    mm.merge(model, "lora")
    mm.set_active(model, "default")
    assert_close((logits(model),), (both,), 1e-5)  # tokens go through the projections as adapted
    mm.unmerge(model, "lora")
    mm.set_active(model, "default")
    assert_equal((logits(model),), (fresh(),))
    assert differ((logits(model),), (both,))
    mm.merge(model, "lora", permanent=True)  # no hook is left at the projection to tell of it
    mm.set_active(model, "default")
    assert_close((logits(model),), (both,), 1e-5)


# -- features of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (1, 5), (4, 5)], ids=str)
def test_features_are_added_to_the_tokens_of_their_row(shape: tuple[int, ...]) -> None:
    model, attachment = adapted(WITH_IMAGES)
    given = features(3, *shape)
    with mm.context(model, visual=given):
        found = logits(model)
    alone, plain = adapted(mm.ZeroInitAttention(4))
    (shared,) = {id(layer.shared): layer.shared for layer in attachment.layers.values()}.values()
    with torch.no_grad():
        seen = given @ shared.matrix.T + shared.bias
        for row in range(3):
            for key, layer in attachment.layers.items():
                plain.layers[key].prompt.copy_(layer.prompt + seen[row])
                plain.layers[key].gate.copy_(layer.gate)
            assert_close((found[row],), (logits(alone)[row],), 1e-5)


def test_features_alone_are_the_tokens_of_early_fusion() -> None:
    fusion = mm.ZeroInitAttention(visual="tokens", features=5, at="text.layers[0].attn.heads")
    model, attachment = adapted(fusion)
    (layer,) = attachment.layers.values()
    assert attachment.num_parameters == 5 * 16 + 16 + 4
    given = features(3, 2, 5)
    with mm.context(model, visual=given):
        found = logits(model)
    alone, plain = adapted(mm.ZeroInitAttention(2, at="text.layers[0].attn.heads"))
    (other,) = plain.layers.values()
    with torch.no_grad():
        for row in range(3):
            other.prompt.copy_(given[row] @ layer.shared.matrix.T + layer.shared.bias)
            other.gate.copy_(layer.gate)
            assert_close((found[row],), (logits(alone)[row],), 1e-5)


def test_features_of_the_backbones_width_need_no_projection() -> None:
    own = mm.ZeroInitAttention(4, visual="added", features=16, projected=False)
    model, attachment = adapted(own)
    assert not [name for name, _ in attachment.named_parameters() if "shared" in name]
    seen = features(3, 16)
    with mm.context(model, visual=seen):
        found = logits(model)
    for row in range(3):
        other, plain = adapted(mm.ZeroInitAttention(4))
        with torch.no_grad():
            for key, layer in plain.layers.items():
                layer.prompt.copy_(attachment.layers[key].prompt + seen[row])
                layer.gate.copy_(attachment.layers[key].gate)
        assert_close((found[row],), (logits(other)[row],), 1e-5)
    before = state(fresh := LLAMA.fresh())
    with pytest.raises(AdapterError, match="features is 5, and without a projection .* needs 16"):
        mm.attach(fresh, replace(own, features=5))
    assert state(fresh) == before


def test_features_train_their_projection_and_whoever_made_them(tmp_path: Path) -> None:
    model, attachment = adapted(WITH_IMAGES)
    given = features(3, 5).requires_grad_(True)
    with mm.context(model, visual=given):
        model(input_ids=tokens(3)).logits.square().sum().backward()
        expected = logits(model)
    assert given.grad is not None and bool(given.grad.any())
    assert all(p.grad is not None and bool(p.grad.any()) for p in attachment.parameters())
    attachment.save(tmp_path)
    other = LLAMA.fresh()
    mm.load_adapter(other, tmp_path)
    with mm.context(other, visual=given.detach()):
        assert_equal((logits(other),), (expected,))


def test_beams_share_the_features_of_their_row() -> None:
    model, _ = adapted(WITH_IMAGES)
    model.generation_config.eos_token_id = None
    given = features(2, 5)
    with mm.context(model, visual=given), torch.no_grad():
        both = model.generate(input_ids=tokens(2), max_new_tokens=4, num_beams=3, use_cache=True)
    for row in range(2):
        with mm.context(model, visual=given[row : row + 1]), torch.no_grad():
            one = model.generate(
                input_ids=tokens(2)[row : row + 1], max_new_tokens=4, num_beams=3, use_cache=True
            )
        assert torch.equal(both[row], one[0])


def test_features_that_are_missing_or_do_not_fit_are_named() -> None:
    model, _ = adapted(WITH_IMAGES)
    before = state(model)
    with pytest.raises(CheckError, match=r"(?s)given no features.*visual=features.*\(B, 5\)"):
        model(input_ids=tokens(3))
    for wrong, said in (
        (features(3, 6), r"are \(3, 6\), expected \(B, 5\)"),
        (features(2, 5), "2 rows cannot be shared among the 3 rows"),
        (features(3, 3, 5), "3 visual features a row cannot be added to 4 tokens"),
    ):
        with mm.context(model, visual=wrong), pytest.raises(CheckError, match=said):
            model(input_ids=tokens(3))
    assert state(model) == before
    with mm.context(model, visual=features(3, 5)):
        model(input_ids=tokens(3))


# -- LLaMA-Adapter V2 ---------------------------------------------------------------------------------


def test_a_bias_and_scale_is_its_formula_on_either_side() -> None:
    z = torch.randn(2, 5, 16)
    for side in ("output", "input", "none"):
        ports = (":in", ":out") if side == "input" else (":out",)
        at = [f"text.layers[0].attn.q{port}" for port in ports]
        model, attachment = adapted(mm.BiasScale(scale=side, at=at))  # type: ignore[arg-type]
        linear = model.model.layers[0].self_attn.q_proj
        put = {key.rpartition(":")[2]: layer for key, layer in attachment.layers.items()}
        with torch.no_grad():
            found = linear(z)
            b = put["out"].bias
            s = put[ports[0][1:]].scale if side != "none" else torch.ones(16)
            bare = (z * s if side == "input" else z) @ linear.weight.T + b
            assert_close((found,), (bare * s if side == "output" else bare,), 1e-6)


@pytest.mark.parametrize("side", ["output", "input"])
def test_a_bias_and_scale_merges_into_linears_that_have_a_bias(side: Any) -> None:
    model = ALL["hf_llama_bare"].fresh()
    attachment = randomise(mm.attach(model, mm.BiasScale(scale=side)), 0.3)
    batch = ALL["hf_llama_bare"].batch(3)
    before = ALL["hf_llama_bare"].outputs(model, batch)
    mm.merge(model)
    assert_close(ALL["hf_llama_bare"].outputs(model, batch), before, 1e-5)
    mm.unmerge(model)
    assert_equal(ALL["hf_llama_bare"].outputs(model, batch), before)
    assert attachment.num_parameters > 0


def test_a_scale_of_the_input_without_its_bias_is_refused() -> None:
    model = LLAMA.fresh()
    before = state(model)
    with pytest.raises(AdapterError, match=r"needs text.layers\[0\].attn.q:in too"):
        mm.attach(model, mm.BiasScale(scale="input"), at="*.layers[*].attn.q")
    with pytest.raises(AdapterError, match=r"cannot stand at text.layers\[0\].attn.q:in"):
        mm.attach(model, mm.BiasScale(), at="*.layers[*].attn.q:in")
    with pytest.raises(AdapterError, match="has no use for"):
        mm.attach(model, mm.BiasScale(), at=["*.layers[0].attn.q:in", "*.layers[0].attn.q:out"])
    assert state(model) == before


@pytest.mark.parametrize("side", ["output", "input"])
def test_tokens_join_before_the_scale_of_the_output_projection(side: Any) -> None:
    """W_o·(s ⊙ (heads + branch)) + b, and s ⊙ (W_o·(heads + branch) + b)."""
    joined = (mm.BiasScale(scale=side, at=_output(side)), mm.ZeroInitAttention(3))
    model, attachment = adapted(joined)
    merged, plain = adapted(mm.ZeroInitAttention(3))
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            index = int(key.split("[")[1].split("]")[0])
            linear = merged.model.layers[index].self_attn.o_proj
            if "heads" in key:
                plain.layers[f"0/{key[2:]}"].prompt.copy_(layer.prompt)
                plain.layers[f"0/{key[2:]}"].gate.copy_(layer.gate)
            elif key.endswith(":in"):
                linear.weight.mul_(layer.scale)
            else:
                s = layer.scale if side == "output" else torch.ones(16)
                linear.weight.mul_(s[:, None])
                linear.bias = nn.Parameter(layer.bias * s)
    assert_close((logits(model),), (logits(merged),), 1e-5)


def _output(side: str) -> list[str]:
    ports = (":in", ":out") if side == "input" else (":out",)
    return [f"text.layers[*].attn.o{port}" for port in ports]


def test_disjoint_groups_train_jointly() -> None:
    """Images move the early fusion alone, instructions everything else."""
    torch.manual_seed(0)
    model = LLAMA.fresh()
    *language, fusion = mm.LlamaAdapter.v2(features=5, layers=1)
    instruct = mm.attach(model, language, name="instruct")
    images = mm.attach(model, fusion, name="images")
    groups = {
        "images": torch.optim.SGD(images.parameters(), lr=0.1),
        "instruct": torch.optim.SGD(instruct.parameters(), lr=0.1),
    }

    def values() -> dict[str, list[Tensor]]:
        found = {"images": images, "instruct": instruct}
        return {n: [p.detach().clone() for p in a.parameters()] for n, a in found.items()}

    for group in ("images", "instruct", "images", "instruct"):
        before = values()
        names = ("instruct", "images") if group == "images" else ("instruct",)
        mm.set_active(model, *names)
        with mm.context(model, visual=features(3, 2, 5)):
            model(input_ids=tokens(3)).logits.square().mean().backward()
        groups[group].step()
        for parameter in (*images.parameters(), *instruct.parameters()):
            parameter.grad = None
        for name, tensors in values().items():
            moved = [not torch.equal(a, b) for a, b in zip(tensors, before[name], strict=True)]
            assert any(moved) == (name == group)


# -- cross-attention: the same operator in an encoder–decoder -----------------------------------------


def cross_attention(module: Any) -> Attention:
    return Attention(
        k=module.k_proj,
        v=module.v_proj,
        heads=module.num_heads,
        key_heads=module.num_heads,
        head_width=module.head_dim,
        scale=module.scaling,
        width=module.k_proj.in_features,
    )


def cross_queries(site: SiteView, q: Tensor) -> Tensor:
    assert site.attention is not None
    return q.unflatten(-1, (site.attention.heads, site.attention.head_width)).transpose(1, 2)


def test_the_same_operator_serves_the_cross_attention_of_an_encoder_decoder() -> None:
    from transformers import BartConfig, BartModel

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
        max_position_embeddings=16,
    )  # fmt: skip
    model: Any = BartModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    path = "decoder.layers.{i}.encoder_attn"
    role = "text.layers[i].cross"
    heads = Span(
        f"{path}.out_proj",
        ("in",),
        x="0|input",
        channels=f"{path}.out_proj.weight@1",
        attention=cross_attention,
    )
    anatomy = Anatomy(
        family="bart",
        spans={f"{role}.heads": heads},
        towers={"text": "decoder"},
        taps={f"{role}.q": Derived((f"{path}.q_proj:out",), cross_queries)},
    )
    ids, sources = tokens(2), tokens(2).flip(1)
    batch = {"input_ids": sources, "decoder_input_ids": ids}
    with torch.no_grad():
        bare = model(**batch).last_hidden_state
    attachment = mm.attach(
        mm.Backbone(model, anatomy=anatomy),
        mm.ZeroInitAttention(3),
        at="text.layers[*].cross.heads",
    )
    with torch.no_grad():
        assert torch.equal(model(**batch).last_hidden_state, bare)
    (layer,) = randomise(attachment, 0.5).layers.values()
    cross = model.decoder.layers[0].encoder_attn
    kept: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Tensor) -> None:
        kept["q"] = output

    def straight_branch(module: Any, args: Any, output: Tensor) -> Tensor:
        q, k = (
            t.unflatten(-1, (4, 4)).transpose(1, 2) for t in (kept["q"], *_project(cross.k_proj))
        )
        (v,) = (t.unflatten(-1, (4, 4)).transpose(1, 2) for t in _project(cross.v_proj))
        seen = (q @ k.mT / 2.0).softmax(-1) @ v * torch.tanh(layer.gate).view(-1, 1, 1)
        return output + seen.transpose(1, 2).flatten(2) @ cross.out_proj.weight.T

    def _project(linear: Any) -> tuple[Tensor]:
        return (linear(layer.prompt[None]),)

    with torch.no_grad():
        found = model(**batch).last_hidden_state
        with mm.disabled(model):
            handles = [
                cross.q_proj.register_forward_hook(keep),
                cross.out_proj.register_forward_hook(straight_branch),
            ]
            expected = model(**batch).last_hidden_state
        for handle in handles:
            handle.remove()
    assert_close((found,), (expected,), 1e-6)
    assert differ((found,), (bare,))


class Picture(nn.Module):
    """One block of a text-to-image model: places of a picture (B, C, H, W) look at words (B, N, V)."""

    heads, width = 2, 8

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(12, 16, bias=False)
        self.to_k, self.to_v = nn.Linear(20, 16, bias=False), nn.Linear(20, 16, bias=False)
        self.to_out = nn.Linear(16, 12)

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        x = picture.flatten(2).mT
        q, k, v = (
            t.unflatten(-1, (self.heads, self.width)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(words), self.to_v(words))
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(seen.transpose(1, 2).flatten(2))
        return x.mT.unflatten(2, picture.shape[2:])


class Painter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Picture() for _ in range(2))

    def forward(self, picture: Tensor, words: Tensor) -> Tensor:
        for block in self.blocks:
            picture = block(picture, words)
        return picture


def words_attention(module: Any) -> Attention:
    """Of a block, found from its output projection's site."""
    return Attention(module.to_k, module.to_v, 2, 2, 8, 8**-0.5, width=20)


def test_the_same_operator_serves_the_blocks_of_a_text_to_image_model() -> None:
    """Trained words beside the caption's, behind a gate, for whatever place of the picture."""
    torch.manual_seed(0)
    model = Painter()
    role = "picture.layers[i].words"
    anatomy = Anatomy(
        family="painter",
        spans={
            f"{role}.heads": Span(
                "blocks.{i}.to_out",
                ("in",),
                x="0|input",
                channels="blocks.{i}.to_out.weight@1",
                attention=words_attention,
            )
        },
        towers={"picture": ""},
        taps={f"{role}.q": Derived(("blocks.{i}.to_q:out",), cross_queries)},
    )
    picture, words = torch.randn(2, 12, 3, 5), torch.randn(2, 4, 20)
    with torch.no_grad():
        bare = model(picture, words)
    attachment = mm.attach(
        mm.Backbone(model, anatomy=anatomy),
        mm.ZeroInitAttention(3),
        at="picture.layers[*].words.heads",
    )
    with torch.no_grad():
        assert torch.equal(model(picture, words), bare)
        randomise(attachment, 0.5)
        found, x = model(picture, words), picture
        for block, layer in zip(model.blocks, attachment.layers.values(), strict=True):
            q = block.to_q(x.flatten(2).mT).unflatten(-1, (2, 8)).transpose(1, 2)  # type: ignore[operator]
            with mm.disabled(model):
                x = block(x, words)
            k, v = (
                to(layer.prompt[None]).unflatten(-1, (2, 8)).transpose(1, 2)
                for to in (block.to_k, block.to_v)  # type: ignore[union-attr]
            )
            seen = (q @ k.mT / 8**0.5).softmax(-1) @ v * torch.tanh(layer.gate).view(-1, 1, 1)
            seen = seen.transpose(1, 2).flatten(2) @ block.to_out.weight.T  # type: ignore[union-attr]
            x = x + seen.mT.unflatten(2, (3, 5))
    assert_close((found,), (x,), 1e-5)
    assert differ((found,), (bare,))


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mm.ZeroInitAttention(0), "length is 0, expected a whole number of at least 1"),
        (lambda: mm.LlamaAdapter(layers=0), "layers is 0, expected a whole number of at least 1"),
        (
            lambda: mm.ZeroInitAttention(gate="heads"),
            "gate is 'heads', expected one of head, layer",
        ),
        (lambda: mm.ZeroInitAttention(activation="relu"), "activation is 'relu'"),
        (lambda: mm.ZeroInitAttention(visual="added"), "features is None"),
        (lambda: mm.ZeroInitAttention(features=4), "visual is 'none' and features is 4"),
        (lambda: mm.ZeroInitAttention(projected=False), "projected is False, and there are no"),
        (lambda: mm.ZeroInitAttention(visual="tokens", features=0), "features is 0"),
        (lambda: mm.ZeroInitAttention(heads=()), "expected whole numbers from 0"),
        (lambda: mm.ZeroInitAttention(heads=(-1,)), "expected whole numbers from 0"),
        (lambda: mm.ZeroInitAttention(heads=(1, 1)), "name each head once"),
        (lambda: mm.ZeroInitAttention(heads=(1,), gate="layer"), "name each head once"),
    ],
)
def test_settings_without_meaning_are_refused(make: Any, said: str) -> None:
    with pytest.raises(AdapterError, match=said):
        make()


def test_layers_and_heads_that_are_not_there_are_named() -> None:
    model = LLAMA.fresh()
    before = state(model)
    with pytest.raises(SiteError, match=r"layers\[-30\].attn.heads' matches nothing: there are 2"):
        mm.attach(model, mm.LlamaAdapter())
    with pytest.raises(AdapterError, match="heads names head 7, and .* has 4 heads, 0 to 3"):
        mm.attach(model, mm.ZeroInitAttention(heads=(0, 7)))
    assert state(model) == before


@pytest.mark.parametrize("adapter", [mm.LlamaAdapter(layers=1), mm.ZeroInitAttention()], ids=str)
def test_a_backbone_without_the_projections_is_refused_with_what_it_has(adapter: Any) -> None:
    import transformers

    config = {"vocab_size": 32, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 24}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    fused = transformers.Phi3Model(transformers.Phi3Config(**config))
    for model, found in ((fused, "self_attn.qkv_proj"), (BACKBONES["open_clip"].fresh(), "attn.q")):
        before = state(model)
        with pytest.raises(
            SiteError, match=f"has no site .*attn.heads'.* it has .*{found}"
        ) as caught:
            mm.attach(model, adapter)
        assert "linears of their own" in caught.value.hint
        assert state(model) == before
    with pytest.raises(AdapterError, match="the anatomy says of text.layers"):
        mm.attach(LLAMA.fresh(), mm.ZeroInitAttention(), at="text.layers[*].attn.o")


def test_a_file_for_more_tokens_or_another_gate_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, attachment = adapted(mm.ZeroInitAttention(3))
    attachment.save(tmp_path)
    path = tmp_path / "adapter.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if key.endswith("gate"))
    save_file({**tensors, key: torch.zeros(9)}, path)
    other = LLAMA.fresh()
    before = state(other)
    with pytest.raises(mm.errors.AdapterFileError):
        mm.load_adapter(other, tmp_path)
    assert state(other) == before
