"""Decoders with rotary positions: caches, padding, generation, and what their queries are."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from backbones import ALL, BACKBONES, _hf_decoder, tokens
from snapshot import assert_close, randomise, state
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.core.bank import bank_of
from mmadapt.core.layer import Layer, empty
from mmadapt.errors import CheckError, SiteError

WITH_HEADS = ("hf_llama", "hf_mistral", "hf_qwen2", "hf_qwen3", "hf_gemma", "hf_granite")
SPEAKING = ("hf_llama", "hf_gemma", "hf_granite")
ADAPTERS = {
    "prompts": mm.ZeroInitAttention(3),
    "lora": mm.LoRA(2),
    "series": mm.Bottleneck.houlsby(4),
    "parallel": mm.Bottleneck.parallel(4),
}


def texts(padding: str = "left") -> dict[str, Tensor]:
    """Three texts of 6 tokens, the first one of 3 and padded."""
    mask = torch.ones(3, 6, dtype=torch.long)
    if padding == "left":
        mask[0, :3] = 0
    if padding == "right":
        mask[0, 3:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens(3), "attention_mask": mask, "position_ids": positions}


def step_by_step(model: Any, batch: dict[str, Tensor], first: int) -> Tensor:
    """Logits (B, T, V) of `first` tokens at once and the others one by one, with a cache."""
    cache, found = None, []
    length = batch["input_ids"].shape[1]
    for start, stop in [(0, first), *((t, t + 1) for t in range(first, length))]:
        output = model(
            input_ids=batch["input_ids"][:, start:stop],
            attention_mask=batch["attention_mask"][:, :stop],
            position_ids=batch["position_ids"][:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, dim=1)


def adapted(name: str, adapter: mm.Adapter) -> Any:
    model = ALL[name].fresh()
    randomise(mm.attach(model, adapter), 0.5)
    return model


# -- caches, padding, generation ------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("name", SPEAKING)
def test_decoding_with_a_cache_equals_the_whole_text(name: str, adapter: mm.Adapter) -> None:
    model, batch = adapted(name, adapter), texts()
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        whole = model(**batch).logits[seen]
        assert_close((step_by_step(model, batch, 4)[seen],), (whole,), 1e-5)
        with mm.disabled(model):
            assert not torch.allclose(model(**batch).logits[seen], whole, atol=1e-2)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_reaches_no_token(padding: str, adapter: mm.Adapter) -> None:
    model, batch = adapted("hf_llama", adapter), texts(padding)
    seen = batch["attention_mask"][0].bool()
    with torch.no_grad():
        padded = model(**batch).logits[:1, seen]
        alone = model(input_ids=batch["input_ids"][:1, seen]).logits
    assert_close((padded,), (alone,), 1e-5)


@pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
def test_generation_is_greedy_search_by_whole_texts(adapter: mm.Adapter) -> None:
    model, batch = adapted("hf_llama", adapter), texts()
    model.generation_config.eos_token_id = None
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        made = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=True
        )
        for _ in range(5):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
    assert torch.equal(made, ids)


@pytest.mark.parametrize("family", ["Mistral", "Qwen2", "Qwen3"])
def test_other_families_speak_as_well(family: str) -> None:
    """Padded on the left, with a cache; Mistral with its window."""
    model: Any = _hf_decoder(family, "ForCausalLM", sliding_window=4)()
    randomise(mm.attach(model, mm.ZeroInitAttention(3)), 0.5)
    model.generation_config.eos_token_id = None
    batch = texts()
    ids, mask, seen = batch["input_ids"], batch["attention_mask"], batch["attention_mask"].bool()
    with torch.no_grad():
        whole = model(**batch).logits
        assert_close((step_by_step(model, batch, 4)[seen],), (whole[seen],), 1e-5)
        assert_close((whole[0, 3:],), (model(input_ids=ids[:1, 3:]).logits[0],), 1e-5)
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, use_cache=True)
        alone = model.generate(input_ids=ids[:1, 3:], max_new_tokens=3, use_cache=True)
    assert torch.equal(made[0, 3:], alone[0])


@pytest.mark.parametrize("name", WITH_HEADS)
def test_both_implementations_of_attention_adapt_alike(name: str) -> None:
    model: Any = copy.deepcopy(ALL[name].prototype)  # with a configuration of its own
    randomise(mm.attach(model, mm.ZeroInitAttention(3)), 0.5)
    with torch.no_grad():
        model.set_attn_implementation("sdpa")
        fused = ALL[name].outputs(model)
        model.set_attn_implementation("eager")
        assert_close(ALL[name].outputs(model), fused, 1e-5)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_checkpointing_block_by_block_equals_plain(name: str) -> None:
    model = adapted(name, mm.ZeroInitAttention(3))
    trained = list(mm.attachments(model)["default"].parameters())

    def gradients() -> tuple[Tensor, ...]:
        total = sum((y * y).sum() for y in ALL[name].outputs(model))
        return torch.autograd.grad(total, trained)

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert_close(gradients(), expected, 1e-6)
    assert bank_of(model).forwards.context._taps == {}  # type: ignore[union-attr]


def test_the_mask_that_layers_are_told_fits_the_tokens_of_the_call() -> None:
    from mmadapt.backbones.llama import causal_mask

    model = BACKBONES["hf_mistral"].fresh()
    mask = torch.tensor([[0, 0, 1, 1]])
    ids = torch.tensor([[5]])
    found = causal_mask(model, (), {"input_ids": ids, "attention_mask": mask})["mask"]
    assert found.tolist() == [[True]]
    found = causal_mask(model, (ids.repeat(1, 4), mask), {})["mask"]
    assert found.tolist() == [[False, False, True, True]]
    assert causal_mask(model, (ids,), {})["mask"] is None


# -- the output layer -----------------------------------------------------------------------------


def test_a_tied_head_is_met_by_its_call_only() -> None:
    tied, free = BACKBONES["hf_gemma"].fresh(), BACKBONES["hf_llama"].fresh()
    assert tied.lm_head.weight is tied.model.embed_tokens.weight  # type: ignore[union-attr]
    before = state(tied)
    for adapter in (mm.Unlock(), mm.LoRA(2)):
        with pytest.raises(mm.MmadaptError):
            mm.attach(tied, adapter, at="logits:weight")
        assert state(tied) == before
    with pytest.raises(mm.errors.AdapterError, match="logits:out stands for none"):
        mm.attach(tied, mm.LoRA(2), at="logits")  # a merge would write into the embeddings
    mm.attach(free, mm.Unlock(), at="logits")
    assert mm.attachments(free)["default"].num_parameters == free.lm_head.weight.numel()  # type: ignore[union-attr]


def test_gemmas_norms_are_unlocked_where_they_multiply_by_one_plus_the_weight() -> None:
    model, straight = BACKBONES["hf_gemma"].fresh(), BACKBONES["hf_gemma"].fresh()
    attachment = randomise(mm.attach(model, mm.Unlock(), at=("*.norm", "*.layers[*].norm1")))
    with torch.no_grad():
        for key, layer in attachment.layers.items():
            role = key.partition("/")[2].rpartition(":")[0]
            path = find_anatomy(straight).roles(straight)[role].module
            straight.get_submodule(path).weight += layer.change  # type: ignore[operator]
    batch = BACKBONES["hf_gemma"].batch(2)
    with torch.no_grad():
        assert_close((model(**batch).logits,), (straight(**batch).logits,), 1e-6)


# -- decoders of other classes ---------------------------------------------------------------------


def test_attention_that_does_more_to_its_queries_offers_no_heads() -> None:
    import transformers

    config = {
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 4, "pad_token_id": 0,
    }  # fmt: skip
    for family in ("Olmo2", "SmolLM3"):  # a norm over all heads; layers that do not rotate
        settings = getattr(transformers, f"{family}Config")(**config)
        model = getattr(transformers, f"{family}Model")(settings)
        roles = find_anatomy(model).roles(model)
        assert "text.layers[3].attn.q" in roles
        assert not any(role.endswith("heads") for role in roles)
        with pytest.raises(SiteError, match=r"no site .* it has .*attn\.q"):
            mm.attach(model, mm.ZeroInitAttention())


def test_a_decoder_inside_a_larger_model_is_found() -> None:
    from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 8,
    }  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config={**vision, "model_type": "clip_vision_model"})
    ).eval()
    attachment = mm.attach(model, mm.LlamaAdapter(3, layers=1))
    assert attachment.sites == ("text.layers[1].attn.heads:in",)
    mm.check(model, {"input_ids": tokens(2)})


# -- taps that are computed -------------------------------------------------------------------------


@dataclass(frozen=True)
class Queries(mm.Adapter):
    """heads + gain · queries, which have the same shape."""

    method: ClassVar[str] = "test_queries"
    layer: ClassVar[str] = f"{__name__}:QueriesLayer"
    ports: ClassVar[tuple[str, ...]] = ("in",)
    default_sites: ClassVar[tuple[str, ...]] = ("text.layers[*].attn.heads",)


class QueriesLayer(Layer):
    taps: ClassVar[tuple[str, ...]] = ("q",)

    def __init__(self, adapter: Queries, site: Any, generator: Any) -> None:
        super().__init__()
        self.gain = empty(site, 1)
        nn.init.constant_(self.gain, 0.5)

    def before(self, x: Tensor, context: Any, site: Any) -> Tensor:
        return x + self.gain * context.read(site.taps["q"]).transpose(1, 2).flatten(2)


def answering_with_queries(model: Any) -> Any:
    """The same with 0.5 · queries added to heads where the attention function is called with them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def with_queries(module: Any, q: Tensor, *rest: Any, **more: Any) -> Any:
        heads, weights = own(module, q, *rest, **more)
        return heads + 0.5 * q.transpose(1, 2), weights

    AttentionInterface.register("test_queries", with_queries)
    AttentionMaskInterface.register("test_queries", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("test_queries")
    return model


@pytest.mark.parametrize("name", WITH_HEADS)
def test_the_tap_gives_the_queries_that_meet_the_keys(name: str) -> None:
    model = ALL[name].fresh()
    straight = answering_with_queries(copy.deepcopy(ALL[name].prototype))  # own configuration
    mm.attach(model, Queries())
    with torch.no_grad():
        found, expected = ALL[name].outputs(model), ALL[name].outputs(straight)
        assert_close(found, expected, 1e-6)
        with mm.disabled(model):
            assert not torch.allclose(ALL[name].outputs(model)[0], expected[0], atol=1e-2)


@pytest.mark.parametrize("family", ["Cohere", "Glm", "Nemotron"])
def test_queries_are_turned_as_their_family_does_it(family: str) -> None:
    """Neighbours together, neighbours of a part of the channels, halves of a part of them."""
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, hidden_size=32, intermediate_size=24, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}Model")(config).eval()
    straight = copy.deepcopy(model)
    bare = model(input_ids=tokens(2)).last_hidden_state
    mm.attach(model, Queries())
    with torch.no_grad():
        found = model(input_ids=tokens(2)).last_hidden_state
        expected = answering_with_queries(straight)(input_ids=tokens(2)).last_hidden_state
    assert_close((found,), (expected,), 1e-6)
    assert not torch.allclose(found, bare, atol=1e-2)


@pytest.mark.parametrize("name", WITH_HEADS)
def test_queries_are_turned_bit_for_bit(name: str) -> None:
    from mmadapt.backbones.llama import attention_of, rotated_by_family, rotated_by_halves

    model: Any = ALL[name].fresh()
    decoder = getattr(model, "model", model)
    rotate: Any = attention_of(decoder.layers[0].self_attn).rotate
    assert rotate.func is rotated_by_halves  # by fewer operations than the family's
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(2, 5, 4, decoder.layers[0].self_attn.head_dim, dtype=dtype)
        positions = decoder.rotary_emb(torch.zeros(2, 5, 1), torch.arange(5).expand(2, 5))
        assert torch.equal(rotate(q, *positions), rotated_by_family(*rotate.args, q, *positions))


def test_a_computed_tap_is_quiet_without_readers_and_serves_several() -> None:
    model = BACKBONES["hf_llama"].fresh()
    before = state(model)
    mm.attach(model, [Queries(), Queries()], name="two")
    mm.attach(model, mm.LoRA(2), name="other")
    bank = bank_of(model)
    assert bank is not None
    assert {hook.readers for hook in bank.installed.taps.values()} == {0}
    BACKBONES["hf_llama"].outputs(model)
    assert bank.forwards.context._taps == {}
    mm.set_active(model, "two")
    assert {hook.readers for hook in bank.installed.taps.values()} == {2}
    BACKBONES["hf_llama"].outputs(model)
    assert bank.forwards.context._taps == {}
    mm.detach(model, "two")
    assert bank.installed.taps == {}
    mm.detach(model)
    assert state(model) == before


def test_a_computed_tap_sees_adapted_queries_in_copies_and_compiled_code() -> None:
    tiny = BACKBONES["hf_llama"]
    model = tiny.fresh()
    randomise(mm.attach(model, [mm.LoRA(2, at="*.layers[*].attn.q"), Queries()]), 0.5)
    merged = tiny.fresh()
    mm.attach(merged, Queries())
    with torch.no_grad():
        for key, layer in mm.attachments(model)["default"].layers.items():
            if "attn.q" in key:
                i = int(key.split("[")[1].split("]")[0])
                weight = merged.model.layers[i].self_attn.q_proj.weight  # type: ignore[union-attr]
                weight.add_(layer.b @ layer.a)
            else:
                mine = mm.attachments(merged)["default"].layers[key.replace("1/", "0/")]
                mine.gain.copy_(layer.gain)
        expected = tiny.outputs(merged)
        assert_close(tiny.outputs(model), expected, 1e-5)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_close(tiny.outputs(twin), expected, 1e-5)
        compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_close(tiny.outputs(compiled), expected, 1e-5)


def test_a_keyword_that_does_not_come_is_named() -> None:
    model: Any = BACKBONES["hf_llama"].fresh()
    mm.attach(model, Queries())
    with pytest.raises(CheckError, match="reads the keyword 'position_embeddings'.*hidden_states"):
        model.model.layers[0].self_attn(hidden_states=torch.zeros(1, 2, 16))
