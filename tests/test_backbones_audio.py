"""Audio encoders: masks over frames, front ends, the order of norms, recomputation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backbones import ALL, LARGE, SAMPLES, _hf_speech
from snapshot import assert_close, assert_equal, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mmadapt as mm
from mmadapt.core.anatomy import find_anatomy
from mmadapt.core.bank import bank_of
from mmadapt.errors import AdapterError, CheckError

SPEECH = (
    *("hf_wav2vec2", "hf_wav2vec2_large", "hf_hubert", "hf_hubert_large", "hf_unispeech"),
    *("hf_unispeech_sat", "hf_data2vec_audio", "hf_wavlm", "hf_wavlm_base"),
)
BLOCK = (
    *("", ".attn", ".attn.q", ".attn.k", ".attn.v", ".attn.o", ".mlp", ".mlp.up", ".mlp.down"),
    *(".norm1", ".norm2", ".norm1.bias", ".attn.q.bias", ".attn.o.bias", ".mlp.up.bias"),
)
#: whatever sees more than one frame at once
ACROSS = {
    "conv": mm.ConvAdapter(4, kernel=5),
    "causal": mm.ConvAdapter(4, kernel=4, causal=True),
    "conv-pass": mm.ConvPass1d(4, dropout=0.0),
    "soft": mm.SoftMoA(3, slots=2, width=2),
    "prompts": mm.DeepPrompts(2),
}


def bare(model: Any) -> Any:
    """The encoder inside a model with a head."""
    return getattr(model, model.base_model_prefix, model)


def states(model: Any, wave: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return model(wave, attention_mask=mask, output_hidden_states=True).hidden_states[-1]


# -- tables ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SPEECH, "hf_ast", "hf_ast_bare"])
def test_every_audio_block_has_the_roles_of_every_block(name: str) -> None:
    model = ALL[name].fresh()
    roles = set(find_anatomy(model).roles(model))
    assert {f"audio.layers[{i}]{role}" for i in range(2) for role in BLOCK} <= roles
    assert ("logits" in roles) == (bare(model) is not model)
    front = "audio.patches" if "ast" in name else "audio.frontend[1]"
    assert front in roles


def test_speaker_embeddings_have_logits_a_row() -> None:
    model: Any = _hf_speech("WavLM", "ForXVector")()
    attachment = mm.attach(model, [mm.Head(3), mm.LoRA(2)])
    assert model(torch.randn(2, 400)).logits.shape == (2, 3)
    assert len(attachment.sites) == 5


def _base(kind: str, **changes: Any) -> Any:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, f"{kind}Model")(
            getattr(transformers, f"{kind}Config")(**changes)
        )


def size(model: Any, *adapters: mm.Adapter) -> int:
    return sum(r["parameters"] for one in adapters for r in mm.plan(model, one).records())


def test_methods_in_ast_have_their_published_sizes() -> None:
    ast = _base("AST")
    assert sum(p.numel() for p in ast.parameters()) == 86_187_264
    norms = mm.Unlock(at=("audio.layers[*].norm2", "audio.layers[*].norm2.bias"))
    houlsby = ("audio.layers[*].attn", "audio.layers[*].mlp")
    assert size(ast, mm.Bottleneck.audio()) == 230_544
    assert size(ast, mm.Bottleneck.audio(), norms) == 248_976
    assert size(ast, mm.Bottleneck.audio(at=houlsby)) == 461_088
    assert size(ast, mm.Bottleneck.audio(8)) == 156_768
    assert size(ast, mm.Bottleneck.audio(6)) == 119_880
    assert size(ast, mm.ConvAdapter(8, kernel=31)) == 252_288
    assert size(ast, mm.ConvAdapter(8, kernel=31), norms) == 270_720
    assert size(ast, mm.ConvAdapter(8, kernel=31, at=houlsby)) == 504_576
    assert size(ast, mm.LoRA(6)) == 221_184
    assert size(ast, mm.DeepPrompts(25)) == 230_400
    assert size(ast, mm.SoftMoA()) == 903_672
    assert size(ast, mm.SoftMoA(14)) == 1_807_344
    assert size(ast, mm.DenseMoA()) == 903_756
    biases = ("audio.layers[*].*.bias", "audio.layers[*].*.*.bias", "audio.norm.bias")
    assert size(ast, mm.Unlock(at=biases)) == 102_144


def test_methods_in_speech_encoders_have_their_published_sizes() -> None:
    speech = _base("Wav2Vec2")
    assert sum(p.numel() for p in speech.parameters()) == 94_371_712
    thomas = mm.Bottleneck.houlsby(256, norm="before")
    assert size(speech, thomas) == 9_498_624
    top = ("audio.layers[-6:].attn", "audio.layers[-6:].mlp")
    assert size(speech, mm.Bottleneck.houlsby(256, norm="before", at=top)) == 9_498_624 // 2
    assert size(speech, mm.ConvPass1d(32, at="audio.layers[0].mlp")) == 54_592 - 2 * 768
    assert size(_base("WavLM"), mm.LoRA(6)) == 221_184


# -- padding ----------------------------------------------------------------------------------------


def padded(extra: int = 60) -> tuple[Tensor, Tensor]:
    """Two clips of 100 and 100 − `extra` samples, and the mask over samples."""
    draw = torch.Generator().manual_seed(4)
    wave, mask = torch.randn(2, 100, generator=draw), torch.ones(2, 100, dtype=torch.long)
    mask[1, 100 - extra :] = 0
    return wave * mask, mask


#: front ends whose frames depend on padding, as the table's docs say
LEAKING = {
    "group norm": _hf_speech("Wav2Vec2", "Model"),
    "data2vec": _hf_speech("Data2VecAudio", "Model", num_conv_pos_embeddings=2),
}
LAYERED = {  # front ends that norm each frame by itself
    "wav2vec2": _hf_speech("Wav2Vec2", "Model", **LARGE),
    "wav2vec2 behind": _hf_speech("Wav2Vec2", "Model", feat_extract_norm="layer"),
    "wavlm": _hf_speech("WavLM", "Model", **LARGE),
}


@pytest.mark.parametrize("method", ACROSS)
@pytest.mark.parametrize("kind", LAYERED)
def test_a_clip_alone_is_what_it_is_in_a_padded_batch(kind: str, method: str) -> None:
    model: Any = LAYERED[kind]()
    if (kind, method) == ("wavlm", "prompts"):
        with pytest.raises(AdapterError, match="cannot be given more"):
            mm.attach(model, ACROSS[method])
        return
    wave, mask = padded()
    plain = states(model, wave, mask)
    randomise(mm.attach(model, ACROSS[method]), 0.3)
    together, alone = states(model, wave, mask), states(model, wave[1:, :40])
    frames = alone.shape[1]
    assert not torch.allclose(together, plain, atol=1e-2)
    assert_close((together[1, :frames],), (alone[0],), 2e-5)
    longer = nn.functional.pad(wave, (0, 24)), nn.functional.pad(mask, (0, 24))
    assert_close((states(model, *longer)[1, :frames],), (alone[0],), 2e-5)


def test_without_a_mask_a_convolution_sees_the_padding() -> None:
    """So that the test above would fail if layers did not ask for it."""
    model: Any = LAYERED["wav2vec2"]()
    wave, mask = padded()
    randomise(mm.attach(model, ACROSS["conv"]), 0.3)
    frames = states(model, wave[1:, :40]).shape[1]
    expected = states(model, wave, mask)[1, :frames]
    with mm.context(model, mask=torch.ones(2, states(model, wave).shape[1], dtype=torch.bool)):
        blind = states(model, wave, mask)[1, :frames]
    assert not torch.allclose(blind, expected, atol=1e-3)


@pytest.mark.parametrize("why", LEAKING)
def test_where_the_backbone_itself_lets_padding_through_the_docs_say_so(why: str) -> None:
    import mmadapt.backbones.wav2vec2 as table

    model: Any = LEAKING[why]()
    wave, mask = padded()
    alone = states(model, wave[1:, :40])
    together = states(model, wave, mask)[1:, : alone.shape[1]]
    assert not torch.allclose(together, alone, atol=1e-3)
    assert why in (table.__doc__ or "")


def test_the_fact_is_the_encoders_own_mask_over_frames() -> None:
    model: Any = ALL["hf_wav2vec2_large"].fresh()
    mm.attach(model, mm.ConvAdapter(2))
    seen: list[Any] = []
    bank = bank_of(model)
    assert bank is not None
    model.wav2vec2.encoder.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(bank.forwards.context.get("mask"))
    )
    wave, mask = padded()
    states(model, wave, mask)
    own = model.wav2vec2._get_feature_vector_attention_mask(seen[0].shape[1], mask)
    assert torch.equal(seen[0], own)
    assert own.sum(1).tolist() == [16, 6]
    states(model, wave)
    assert seen[1] is None


def test_a_mask_over_samples_given_by_hand_is_refused() -> None:
    model: Any = ALL["hf_wav2vec2"].fresh()
    mm.attach(model, mm.SoftMoA(2))
    wave, mask = padded()
    with mm.context(model, mask=mask), pytest.raises(CheckError, match="not samples"):
        states(model, wave)


def test_ast_keeps_to_a_mask_over_tokens() -> None:
    """Patches of padding change nothing for the others, whatever they hold."""
    model: Any = ALL["hf_ast_bare"].fresh()
    randomise(mm.attach(model, [ACROSS["conv"], ACROSS["soft"]]), 0.3)
    spectrum = torch.randn(1, 24, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(1, 17, dtype=torch.long)
    mask[0, 2:].view(3, 5)[:, 3:] = 0  # each of three bands: the last two of five patches
    other = spectrum.clone()
    other[:, 20:] += 5.0
    with torch.no_grad():
        one, two = (model(s, attention_mask=mask).last_hidden_state for s in (spectrum, other))
        blind = model(other).last_hidden_state
    kept = mask[0].bool()
    assert_close((one[:, kept],), (two[:, kept],), 1e-5)
    assert not torch.allclose(blind[:, kept], one[:, kept], atol=1e-2)


# -- the front end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPEECH)
def test_a_frozen_front_end_keeps_no_graph_even_in_train_mode(name: str) -> None:
    model: Any = ALL[name].fresh()
    model.requires_grad_(False)
    front = bare(model).feature_extractor
    wave = torch.randn(2, SAMPLES)
    model.train()
    assert front(wave).requires_grad  # the trap
    attachment = mm.attach(model, mm.Bottleneck(2))
    model.train()
    assert not front(wave).requires_grad
    attachment.detach()
    assert front._requires_grad


def test_lora_trains_the_convolutions_of_the_front_end_all_the_same() -> None:
    model: Any = ALL["hf_hubert"].fresh()
    attachment = mm.attach(model, mm.LoRA(1, at="audio.frontend[*]"))
    model(torch.randn(2, SAMPLES)).logits.sum().backward()
    layers = list(attachment.layers.values())
    assert all(bool(layer.b.grad.any()) for layer in layers)


# -- recomputation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_wav2vec2", "hf_wavlm", "hf_ast"])
@pytest.mark.parametrize("adapter", [mm.Bottleneck(2), mm.LoRA(2), mm.ConvAdapter(2)], ids=repr)
def test_reentrant_checkpointing_is_refused_where_it_would_train_nothing(
    name: str, adapter: mm.Adapter
) -> None:
    model: Any = ALL[name].fresh()
    attachment = mm.attach(model, adapter)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.train()
    with (
        pytest.raises(CheckError, match=r"(?s)reentrant.*silently.*use_reentrant=False"),
        pytest.warns(UserWarning, match="None of the inputs have requires_grad=True"),
    ):
        ALL[name].outputs(model)
    with torch.no_grad():
        ALL[name].outputs(model)  # nothing is trained here
    with mm.disabled(model):
        ALL[name].outputs(model)  # nor here
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ALL[name].outputs(model)[0].square().sum().backward()
    assert all(p.grad is not None for p in attachment.parameters())


@pytest.mark.parametrize("method", ACROSS)
@pytest.mark.parametrize("name", ["hf_ast", "hf_wav2vec2_large"])
def test_recomputed_blocks_give_the_same_gradients(name: str, method: str) -> None:
    model: Any = ALL[name].fresh()
    attachment = randomise(mm.attach(model, ACROSS[method]), 0.3)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0

    def gradients() -> list[Tensor]:
        loss = ALL[name].outputs(model)[0].square().sum()
        return list(torch.autograd.grad(loss, list(attachment.parameters())))

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_close(tuple(gradients()), tuple(plain), 1e-5)


def test_while_training_the_frozen_encoder_drops_and_masks_nothing() -> None:
    """Its own defaults would drop blocks and mask half of a short clip."""
    model: Any = _hf_speech("Wav2Vec2", "Model", layerdrop=0.5, mask_time_prob=0.5)()
    attachment = randomise(mm.attach(model, ACROSS["conv"]), 0.3)
    wave = torch.randn(2, 200)
    expected = states(model, wave)
    with mm.train_mode(model):
        assert all(layer.training for layer in attachment.layers.values())
        for _ in range(3):
            assert_equal((states(model, wave),), (expected,))
    model.train()
    assert not torch.equal(states(model, wave), expected)


@pytest.mark.parametrize("name", ["hf_ast", "hf_wav2vec2", "hf_wavlm"])
def test_a_cached_prefix_still_tells_the_mask_and_wavlms_is_refused(name: str) -> None:
    """Every block of WavLM is handed the position biases that the first one made."""
    model: Any = ALL[name].fresh()
    above = mm.ConvAdapter(2, kernel=3, at="audio.layers[1].mlp")
    randomise(mm.attach(model, above), 0.3)
    expected = ALL[name].outputs(model)
    with mm.cached_prefix(model) as cache:
        if name == "hf_wavlm":
            with pytest.raises(CheckError, match=r"(?s)later layers.*without cached_prefix"):
                ALL[name].outputs(model)
            return
        for _ in range(2):
            assert_equal(ALL[name].outputs(model), expected)
        assert [tower.found for tower in cache.towers] == [3]


def test_a_part_without_gradients_is_no_checkpointing() -> None:
    model: Any = ALL["hf_ast"].fresh()
    mm.attach(model, mm.Bottleneck(2))
    block = model.audio_spectrogram_transformer.layers[0]
    own = block.forward
    block.forward = torch.no_grad()(own)
    ALL["hf_ast"].outputs(model)[0].sum().backward()
    again: Any = checkpoint(model, **ALL["hf_ast"].batch(2), use_reentrant=False)
    again.logits.sum().backward()


# -- branches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hf_wav2vec2", "hf_wav2vec2_large", "hf_wavlm", "hf_ast_bare"])
@pytest.mark.parametrize("word", ["attn", "mlp"])
def test_the_branches_residual_is_the_stream_they_are_added_to(name: str, word: str) -> None:
    """r + branch(·) is what comes next: the second norm's input, or the first's where norms follow."""
    model: Any = ALL[name].fresh()
    adapter = mm.Bottleneck(2, placement="residual", at=f"audio.layers[0].{word}")
    layer = next(iter(mm.attach(model, adapter).layers.values()))
    seen: dict[str, Tensor] = {}
    own = layer.after

    def spy(acc: Tensor, y: Tensor, x: Tensor, context: Any, site: Any) -> Tensor:
        tap = site.taps["residual"]
        seen["residual"] = context._taps[tap][0]
        seen["y"] = y
        return own(acc, y, x, context, site)

    layer.after = spy  # type: ignore[method-assign]
    block = bare(model).layers[0] if "ast" in name else bare(model).encoder.layers[0]
    behind = name == "hf_wav2vec2"
    if word == "attn":
        next_ = block.layernorm_after if "ast" in name else block.final_layer_norm
        next_ = block.layer_norm if behind else next_
        next_.register_forward_pre_hook(lambda _, args: seen.update(next=args[0]))
    elif behind:
        block.final_layer_norm.register_forward_pre_hook(lambda _, a: seen.update(next=a[0]))
    else:
        block.register_forward_hook(
            lambda _, args, out: seen.update(next=out if isinstance(out, Tensor) else out[0])
        )
    ALL[name].outputs(model)
    assert_close((seen["residual"] + seen["y"],), (seen["next"],), 1e-6)


def test_lora_in_wavlm_acts_through_weights_that_are_only_read() -> None:
    model: Any = ALL["hf_wavlm"].fresh()
    attachment = randomise(mm.attach(model, mm.LoRA(2)), 0.3)
    assert {site.rpartition(":")[2] for site in attachment.sites} == {"weight"}
    adapted = ALL["hf_wavlm"].outputs(model)
    adapted[0].sum().backward()
    assert all(bool(p.grad.any()) for p in attachment.parameters())  # type: ignore[union-attr]
    folded: Any = ALL["hf_wavlm"].fresh()
    with torch.no_grad():
        for site, layer in attachment.layers.items():
            place, word = int(site.split("[")[1][0]), site.split(".")[-1][0]
            weight = getattr(folded.encoder.layers[place].attention, f"{word}_proj").weight
            weight += layer.b @ layer.a
    assert_close(ALL["hf_wavlm"].outputs(folded), adapted, 1e-5)


def test_what_a_layer_adds_is_in_the_hidden_states_whenever_it_came() -> None:
    model: Any = ALL["hf_wav2vec2"].fresh()
    wave = torch.randn(1, SAMPLES)
    before = states(model, wave)  # transformers installs its own hooks now
    randomise(mm.attach(model, mm.Bottleneck.pfeiffer(2)), 0.5)
    with torch.no_grad():
        output = model(wave, output_hidden_states=True)
    assert_equal((output.hidden_states[-1],), (output.last_hidden_state,))
    assert not torch.allclose(output.hidden_states[-1], before, atol=1e-2)
