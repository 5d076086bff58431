"""Conformers and Whisper: their halves, padding, caches, generation and sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from backbones import ALL, CONFORMER, LARGE, _hf_speech, _hf_whisper, mels, spoken, tokens
from snapshot import assert_close, assert_equal, hook_tables, randomise, values
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.errors import AdapterError, BackboneError, SiteError
from mmadapt.tasks import audio

CONFORMERS = ("hf_wav2vec2_bert", "hf_conformer", "hf_parakeet")
#: one frame or token at a time, so that they may stand in a decoder with a cache
POINTWISE = {
    "series": mm.Bottleneck.houlsby(4),
    "beside": mm.Bottleneck(4, placement="parallel", at="*.layers[*].mlp"),
    "stream": mm.Bottleneck.adaptformer(4, scale=1.0),
    "cross": mm.Bottleneck(4, placement="residual", at="text.layers[*].cross"),
    "lora": mm.LoRA(2, at=("*.layers[*].*.q", "*.layers[*].*.v", "*.layers[*].mlp.up")),
    "block": mm.Bottleneck.pfeiffer(4),
}
#: those that see several frames
ACROSS = {
    "conv": mm.ConvAdapter(4, kernel=5),
    "causal": mm.ConvAdapter(4, kernel=4, causal=True),
    "conv-pass": mm.ConvPass1d(4, dropout=0.0),
    "soft": mm.SoftMoA(3, slots=2, width=2),
    "behind the convolution": mm.ConvAdapter(4, kernel=3, at="audio.layers[*].conv"),
}


def bare(kind: str, **changes: Any) -> Any:
    """A model of its real size, without memory."""
    import transformers

    family, _, head = kind.partition(" ")
    config = getattr(transformers, f"{family}Config")(**changes)
    with torch.device("meta"):
        return getattr(transformers, f"{family}{head or 'Model'}")(config)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def size(model: Any, *adapters: mm.Adapter) -> int:
    return sum(r["parameters"] for one in adapters for r in mm.plan(model, one).records())


def encoder_of(model: Any) -> Any:
    inner = getattr(model, model.base_model_prefix, model)
    return getattr(inner, "encoder", inner)


# -- sizes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "parameters", "adapter"),
    [
        ("Wav2Vec2Conformer", 179_730_304, 2 * 12 * (2 * 768 * 32 + 32 + 768)),
        ("Wav2Vec2Bert", 580_493_120, 2 * 24 * (2 * 1024 * 32 + 32 + 1024)),
    ],
)
def test_conformers_of_real_size_take_two_bottlenecks_a_block(
    kind: str, parameters: int, adapter: int
) -> None:
    model = bare(kind)
    assert count(model) == parameters
    halves = ("audio.layers[*].mlp1", "audio.layers[*].mlp")
    assert size(model, mm.Bottleneck(32, at=halves)) == adapter


def test_parakeet_has_its_published_size() -> None:
    model = bare_parakeet()
    assert count(model) == 608_799_745
    assert size(model, mm.Bottleneck(16)) == 24 * (2 * 1024 * 16 + 16 + 1024)


def bare_parakeet() -> Any:
    import transformers

    with torch.device("meta"):
        return transformers.ParakeetForCTC(transformers.ParakeetCTCConfig())


WHISPERS = {  # width, blocks of encoder and decoder each
    "tiny": (384, 4, 37_760_640, 396_800, 589_824),
    "base": (512, 6, 72_593_920, 793_344, 1_179_648),
    "small": (768, 12, 241_734_912, 2_379_264, 3_538_944),
    "medium": (1024, 24, 763_857_920, 6_343_680, 9_437_184),
    "large-v2": (1280, 32, 1_543_304_960, 10_571_776, 15_728_640),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name[0] in "ml" else ()) for name in WHISPERS],
)
def test_bottlenecks_and_lora_in_whisper_have_their_known_sizes(name: str) -> None:
    """LoRA of rank 32 on q and v of all three attentions; a bottleneck of 64 behind every MLP."""
    width, blocks, parameters, bottleneck, lora = WHISPERS[name]
    model = bare(
        "Whisper",
        d_model=width,
        encoder_layers=blocks,
        decoder_layers=blocks,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
    )
    assert count(model) == parameters
    assert size(model, mm.Bottleneck(64)) == bottleneck
    assert size(model, mm.LoRA(32, at=("*.layers[*].*.q", "*.layers[*].*.v"))) == lora


def test_the_transfer_of_speech_encoders_has_its_published_shares() -> None:
    """Thomas et al. 2022: 9.2 % of the parameters in all blocks, 4.85 % in the upper six."""
    speech = bare("Wav2Vec2 ForCTC", vocab_size=32)
    backbone, head = 94_396_320, 24_608
    assert count(speech) == backbone
    assert size(speech, mm.Bottleneck.speech()) == 9_498_624
    assert size(speech, mm.Bottleneck.speech(top=6)) == 9_498_624 // 2
    share = (9_498_624 + head) / (backbone + 9_498_624)
    assert round(100 * share, 1) == 9.2
    assert round(100 * (9_498_624 // 2 + head) / (backbone + 9_498_624 // 2), 1) == 4.8
    plan = mm.plan(speech, mm.Bottleneck.speech(64, top=2))
    sites = {record["site"] for record in plan.records()}
    assert sites == {f"audio.layers[{i}].{b}:out" for i in (10, 11) for b in ("attn", "mlp")}


def test_language_adapters_have_the_size_of_nemos_but_for_their_biases() -> None:
    """835,584 in 24 blocks of 1024 channels, as reported for NeMo's, whose linears have no bias."""
    model = bare("Wav2Vec2Bert")
    biases = 24 * (16 + 1024)
    assert size(model, mm.Bottleneck.language(16)) - biases == 835_584
    assert size(bare("Wav2Vec2Conformer"), mm.ConvAdapter()) == 12 * (
        2 * 768 + (2 * 768 * 32 + 64) + (32 * 15 + 32) + 64 + (32 * 768 + 768)
    )


def test_the_default_for_sound_is_a_convolution_beside_the_mlp() -> None:
    adapter = mm.ConvAdapter()
    assert (adapter.width, adapter.kernel, adapter.placement) == (32, 15, "parallel")
    for name in (*CONFORMERS, "hf_whisper", "hf_wav2vec2"):
        sites = [record["site"] for record in mm.plan(ALL[name].fresh(), adapter).records()]
        assert sites == [f"audio.layers[{i}].mlp:out" for i in range(2)]


def test_a_conv_adapter_has_the_size_of_the_study() -> None:
    config = {"hidden_size": 144, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = bare("Wav2Vec2", intermediate_size=576, num_conv_pos_embedding_groups=8, **config)
    assert size(model, mm.ConvAdapter(16)) == 30_656


@pytest.mark.parametrize("top", [0, -2, True, 2.5, "6"])
def test_how_many_blocks_on_top_is_a_whole_number(top: Any) -> None:
    with pytest.raises(AdapterError, match="top is"):
        mm.Bottleneck.speech(top=top)


def test_where_and_how_high_are_not_both_given() -> None:
    with pytest.raises(AdapterError, match=r"(?s)top is 2.*at="):
        mm.Bottleneck.speech(top=2, at="audio.layers[*].mlp")


# -- macaron blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFORMERS)
def test_a_conformers_block_has_both_halves_attention_and_convolution(name: str) -> None:
    model = ALL[name].fresh()
    roles = set(find_anatomy(model).roles(model))
    words = ("mlp1", "mlp1.up", "attn", "attn.q", "attn.o", "conv", "mlp", "mlp.down")
    norms = ("norm_mlp1", "norm1", "norm_conv", "norm2", "norm_out", "norm_out.bias")
    assert {f"audio.layers[1].{word}" for word in (*words, *norms)} <= roles
    assert {"logits", "audio.embeddings"} <= roles
    second = mm.plan(model, mm.Bottleneck(2, at="audio.layers[*].mlp2")).records()
    assert [record["site"] for record in second] == [f"audio.layers[{i}].mlp:out" for i in (0, 1)]


@pytest.mark.parametrize("word", ["mlp1", "mlp", "attn", "conv"])
@pytest.mark.parametrize("name", CONFORMERS)
def test_what_is_added_to_a_half_counts_half(name: str, word: str) -> None:
    """A constant change at a branch moves the stream by it, or by half of it at the halves."""
    model: Any = ALL[name].fresh()
    adapter = mm.Bottleneck(2, placement="residual", at=f"audio.layers[0].{word}")
    attachment = mm.attach(model, adapter)
    (layer,) = attachment.layers.values()
    streams: list[Tensor] = []
    block = encoder_of(model).layers[0]
    after = {  # the norm that reads the stream behind the branch
        "mlp1": ("self_attn_layer_norm", "norm_self_att"),
        "attn": ("conv_module.layer_norm", "norm_conv"),
        "conv": ("ffn2_layer_norm", "norm_feed_forward2"),
        "mlp": ("final_layer_norm", "norm_out"),
    }[word][name == "hf_parakeet"]
    block.get_submodule(after).register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        ALL[name].outputs(model)
        layer.up_bias.fill_(1.0)  # up is zero still, so the change is 1 everywhere
        ALL[name].outputs(model)
    moved = (streams[1] - streams[0]).flatten()
    expected = 0.5 if word.startswith("mlp") else 1.0
    assert_close((moved,), (torch.full_like(moved, expected),), 1e-5)


# -- padding ----------------------------------------------------------------------------------------


def frames(name: str, model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def alone(batch: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One clip of the batch, cut to its own length."""
    length = int(batch["attention_mask"][row].sum())
    return {key: value[row : row + 1, :length] for key, value in batch.items()}


@pytest.mark.parametrize("method", ACROSS)
@pytest.mark.parametrize("name", ["hf_wav2vec2_bert", "hf_parakeet"])
def test_a_clip_alone_is_what_it_is_in_a_padded_batch(name: str, method: str) -> None:
    model: Any = ALL[name].fresh()
    batch = mels(3)
    plain = frames(name, model, batch)
    randomise(mm.attach(model, ACROSS[method]), 0.3)
    together = frames(name, model, batch)
    assert not torch.allclose(together, plain, atol=1e-2)
    for row in range(3):
        own = frames(name, model, alone(batch, row))[0]
        assert_close((together[row, : len(own)],), (own,), 2e-5)


def test_parakeets_mask_is_over_what_its_subsampling_leaves() -> None:
    from mmadapt.backbones.conformer import _parakeet_told

    model: Any = ALL["hf_parakeet"].fresh()
    batch = mels(3)
    told = _parakeet_told(model.encoder, (batch["input_features"],), batch)
    output = model.encoder(**batch)
    assert torch.equal(told["mask"], output.attention_mask.bool())
    assert told["tokens"] == output.last_hidden_state.shape[1] == 6
    unmasked = _parakeet_told(model.encoder, (), {"input_features": batch["input_features"]})
    assert unmasked == {"mask": None, "tokens": 6}


def layered() -> Any:
    """A Wav2Vec2-Conformer whose front end norms each frame by itself."""
    return _hf_speech("Wav2Vec2Conformer", "ForCTC", **{**CONFORMER, **LARGE})()


def waves_alone() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    wave = torch.randn(2, 100, generator=torch.Generator().manual_seed(4))
    mask = torch.ones(2, 100, dtype=torch.long)
    mask[1, 40:] = 0
    batch = {"input_values": wave * mask, "attention_mask": mask}
    return batch, alone(batch, 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_is_kept_out_of_a_conformers_convolutions_on_request(attention: str) -> None:
    model = layered()
    model.set_attn_implementation(attention)
    batch, one = waves_alone()
    before, tables = frames("", model, batch), hook_tables(model)
    own = frames("", model, one)[0]
    assert not torch.allclose(before[1, : len(own)], own, atol=1e-2)  # the backbone's own leak
    fix = audio.fix_conformer_padding(model)
    assert_equal((frames("", model, one)[0],), (own,))  # nobody is padded: nothing changes
    assert_close((frames("", model, batch)[1, : len(own)],), (own,), 1e-5)
    twin = copy.deepcopy(model)
    assert_equal((frames("", twin, batch),), (frames("", model, batch),))
    fix.remove()
    assert_equal((frames("", model, batch),), (before,))
    assert hook_tables(model) == tables


@pytest.mark.parametrize("method", ACROSS)
def test_adapters_in_a_fixed_conformer_see_no_padding_either(method: str) -> None:
    model = layered()
    batch, one = waves_alone()
    randomise(mm.attach(model, ACROSS[method]), 0.3)
    with audio.fix_conformer_padding(model):
        together, own = frames("", model, batch)[1], frames("", model, one)[0]
    assert_close((together[: len(own)],), (own,), 2e-5)


def test_a_fixed_conformer_recomputes_with_the_mask_each_block_had() -> None:
    """Two forward passes with other padding, then one backward through both."""
    model = layered()
    attachment = randomise(mm.attach(model, mm.Bottleneck(2)), 0.3)
    batch, one = waves_alone()
    layers = encoder_of(model).layers

    def gradients() -> list[Tensor]:
        loss = model(**batch).logits.square().sum() + model(**one).logits.square().sum()
        return list(torch.autograd.grad(loss, list(attachment.parameters())))

    with audio.fix_conformer_padding(model), mm.train_mode(model):
        plain = gradients()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for block in layers:
            block.training = True  # transformers recomputes in train mode alone
        assert_close(tuple(gradients()), tuple(plain), 1e-5)


def test_the_fix_is_for_one_family_and_asked_for_once() -> None:
    for name in ("hf_wav2vec2_bert", "hf_wav2vec2", "own_transformer"):
        with pytest.raises(BackboneError, match=r"no Wav2Vec2-Conformer"):
            audio.fix_conformer_padding(ALL[name].fresh())
    model = layered()
    audio.fix_conformer_padding(model)
    with pytest.raises(BackboneError, match="already"):
        audio.fix_conformer_padding(model)


# -- Whisper: caches and generation -----------------------------------------------------------------


def whisper(adapter: mm.Adapter | None = None, **changes: Any) -> Any:
    model: Any = _hf_whisper("ForConditionalGeneration", **changes)()
    model.generation_config.max_length = None
    if adapter is not None:
        randomise(mm.attach(model, adapter), 0.3)
    return model


def step_by_step(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the text token by token, with a cache."""
    encoded = model.model.encoder(batch["input_features"])
    cache, found = None, []
    for place in range(batch["decoder_input_ids"].shape[1]):
        output = model(
            encoder_outputs=encoded,
            decoder_input_ids=batch["decoder_input_ids"][:, place : place + 1],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        found.append(output.logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("method", POINTWISE)
def test_decoding_with_a_cache_equals_the_whole_text(method: str) -> None:
    model, batch = whisper(POINTWISE[method]), spoken(3)
    with torch.no_grad():
        whole, steps = model(**batch).logits, step_by_step(model, batch)
        with mm.disabled(model):
            base = model(**batch).logits
    assert not torch.allclose(whole, base, atol=1e-2)
    assert_close((steps,), (whole,), 1e-5)


@pytest.mark.parametrize("method", POINTWISE)
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_says_what_the_adapted_model_would(method: str, beams: int) -> None:
    model = whisper(POINTWISE[method])
    features = spoken(2)["input_features"]
    options: dict[str, Any] = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    cached = model.generate(features, use_cache=True, **options)
    assert torch.equal(cached, model.generate(features, use_cache=False, **options))
    with mm.disabled(model):
        base = model.generate(features, **options)
    assert torch.equal(base, whisper().generate(features, **options))
    if beams > 1:
        return
    ids = torch.full((2, 1), 1)
    for _ in range(cached.shape[1]):
        logits = model(features, decoder_input_ids=ids).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    ended = (ids == model.config.eos_token_id).cumsum(1) > 0
    assert bool(((cached == ids[:, 1:]) | ended[:, 1:]).all())


@pytest.mark.parametrize(
    "adapter",
    [mm.ConvAdapter(4), mm.ConvAdapter(4, causal=True), mm.ConvPass1d(4), mm.SoftMoA(2)],
    ids=repr,
)
@pytest.mark.parametrize("site", ["text.layers[*].mlp", "text.layers[0].attn", "text.layers[0]"])
def test_what_reads_several_tokens_is_refused_in_a_decoder_with_a_cache(
    site: str, adapter: mm.Adapter
) -> None:
    model = whisper()
    with pytest.raises(AdapterError, match=r"(?s)already cached.*mmadapt\.Bottleneck"):
        mm.attach(model, adapter, at=site)
    assert not mm.attachments(model)


def test_prompts_do_not_fit_where_a_block_convolves_or_keeps_a_cache() -> None:
    with pytest.raises(SiteError, match="audio"):
        mm.attach(ALL["hf_bert"].fresh(), mm.DeepPrompts(2))
    for name in CONFORMERS:
        with pytest.raises(AdapterError, match="cannot be given more"):
            mm.attach(ALL[name].fresh(), mm.DeepPrompts(2))
    with pytest.raises(AdapterError, match="cannot be given more"):
        mm.attach(whisper(), mm.DeepPrompts(2), at="text.layers[*]")


def test_a_convolution_in_whispers_encoder_sees_its_frames_and_no_other_clip() -> None:
    model, batch = whisper(mm.ConvAdapter(4, kernel=5)), spoken(3)
    with torch.no_grad():
        whole = model(**batch).logits
        one = model(**{key: value[1:2] for key, value in batch.items()}).logits
    assert_close((whole[1:2],), (one,), 1e-5)


def test_keys_flags_and_values_of_whisper_come_back() -> None:
    """One of its parameters is frozen from birth."""
    model = whisper()
    before, state, hooks = values(model), list(model.state_dict()), hook_tables(model)
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not all(trained.values())
    attachment = mm.attach(model, [mm.Bottleneck(2), mm.ConvAdapter(2), mm.LoRA(2)])
    ours = [key for key in model.state_dict() if key not in state]
    assert all(key.startswith("_mmadapt.") for key in ours)
    assert [key for key in model.state_dict() if key in state] == state
    attachment.detach()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
    assert list(model.state_dict()) == state
    assert hook_tables(model) == hooks
    assert_same(before, values(model))


def assert_same(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_untied_output_layer_is_met_by_its_weight_and_a_tied_one_is_not() -> None:
    tied, untied = whisper(), whisper(tie_word_embeddings=False)
    assert mm.plan(untied, mm.Unlock(at="logits")).records()
    with pytest.raises(SiteError, match="'weight'|a port among weight"):
        mm.plan(tied, mm.Unlock(at="logits"))
    assert mm.plan(tied, mm.ScaleShift(at="logits")).records()


def test_a_cached_prefix_of_both_towers_gives_the_same_outputs() -> None:
    model, batch = whisper(), spoken(2)
    attachment = mm.attach(
        model, mm.Bottleneck(2, at=("audio.layers[1].mlp", "text.layers[1].mlp"))
    )
    randomise(attachment, 0.3)
    with torch.no_grad():
        expected = ALL["hf_whisper"].outputs(model, batch)
        with mm.cached_prefix(model) as cache:
            for _ in range(2):
                assert_close(ALL["hf_whisper"].outputs(model, batch), expected, 1e-6)
            assert [tower.found for tower in cache.towers] == [2, 2]


def test_one_batch_mixes_languages() -> None:
    """Every row as if its language's adapter acted alone; a row without one as the backbone."""
    model: Any = ALL["hf_wav2vec2_bert"].fresh()
    batch = mels(3)
    for place, name in enumerate(("deu", "fra")):
        randomise(mm.attach(model, mm.Bottleneck.language(4), name=name), 0.3, seed=place)
    with mm.context(model, rows=["fra", None, "deu"]):
        mixed = frames("", model, batch)
    for row, name in enumerate(("fra", None, "deu")):
        if name is None:
            with mm.disabled(model):
                expected = frames("", model, batch)[row]
        else:
            mm.set_active(model, name)
            expected = frames("", model, batch)[row]
        assert_close((mixed[row],), (expected,), 1e-5)


def test_tokens_are_shared_by_the_tests() -> None:
    assert spoken(2)["decoder_input_ids"].equal(tokens(2))
