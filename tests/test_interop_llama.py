"""LLaMA-Adapter's own files and PEFT's: read as their code computes, written as it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, tokens
from safetensors.torch import load_file, save_file
from snapshot import assert_close, assert_equal, differ, randomise, state
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import AdapterFileError

LLAMA = BACKBONES["hf_llama"]
PEERS = Path(__file__).parent / "peers"


def logits(model: Any) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return (model(input_ids=tokens(3)).logits,)


def official(path: Path, layers: int = 1, **more: Any) -> dict[str, Tensor]:
    """A file in the layout of the first release: K = 3 tokens in each of the top layers of two."""
    draw = torch.Generator().manual_seed(4)
    stored = {"adapter_query.weight": torch.randn(3 * layers, 16, generator=draw)}
    for i in range(2):
        gate = (
            torch.randn(1, 4, 1, 1, generator=draw) if i >= 2 - layers else torch.zeros(1, 4, 1, 1)
        )
        stored[f"layers.{i}.attention.gate"] = gate
    stored.update(more)
    torch.save(stored, path)
    return stored


def chat(path: Path) -> dict[str, Tensor]:
    """A file in the layout of V2's chat models, for two layers of width 16, inner width 24."""
    draw = torch.Generator().manual_seed(5)
    shapes = {"wq": (16, 16), "wk": (8, 16), "wv": (8, 16), "wo": (16, 16)}
    stored = {"norm.weight": 1 + 0.2 * torch.randn(16, generator=draw)}
    for i in range(2):
        for word, (rows, columns) in shapes.items():
            stored[f"layers.{i}.attention.{word}_bias"] = torch.randn(rows, generator=draw)
            stored[f"layers.{i}.attention.{word}_scale"] = torch.randn(columns, generator=draw)
        for word, (rows, columns) in {"w1": (24, 16), "w2": (16, 24), "w3": (24, 16)}.items():
            stored[f"layers.{i}.feed_forward.{word}_bias"] = torch.randn(rows, generator=draw)
            stored[f"layers.{i}.feed_forward.{word}_scale"] = torch.randn(columns, generator=draw)
        for word in ("attention_norm", "ffn_norm"):
            stored[f"layers.{i}.{word}.weight"] = 1 + 0.2 * torch.randn(16, generator=draw)
    torch.save({"model": stored}, path)
    return stored


# -- the first release --------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_an_official_file_is_read_and_written_back(
    tmp_path: Path, layers: int, activation: Any
) -> None:
    stored = official(tmp_path / "a.pth", layers)
    model = LLAMA.fresh()
    report = mm.interop.read_llama_adapter(model, tmp_path / "a.pth", "alpaca", activation)
    assert report.layout == "official"
    assert report.ignored == tuple(f"layers.{i}.attention.gate" for i in range(2 - layers))
    assert report.attachment is not None
    assert report.attachment.name == "alpaca"
    assert report.attachment.adapter == mm.LlamaAdapter(3, activation=activation, layers=layers)
    top = report.attachment.layers["0/text.layers[1].attn.heads:in"]
    assert torch.equal(top.prompt, stored["adapter_query.weight"][-3:])
    assert torch.equal(top.gate, stored["layers.1.attention.gate"].flatten())
    mm.interop.write_llama_adapter(model, tmp_path / "b.pth", "official", activation=activation)
    again = torch.load(tmp_path / "b.pth", weights_only=True)
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(again[key], value), key


def test_a_gate_is_converted_between_the_conventions(tmp_path: Path) -> None:
    model = LLAMA.fresh()
    randomise(mm.attach(model, mm.LlamaAdapter(3, layers=2)), 0.5)
    for activation in ("tanh", "identity"):
        mm.interop.write_llama_adapter(
            model, tmp_path / activation, "official", activation=activation
        )
        other = LLAMA.fresh()
        mm.interop.read_llama_adapter(other, tmp_path / activation, activation=activation)
        assert_close(logits(other), logits(model), 1e-6)
    wrong = LLAMA.fresh()
    mm.interop.read_llama_adapter(wrong, tmp_path / "tanh", activation="identity")
    assert differ(logits(wrong), logits(model))
    open_wide = LLAMA.fresh()
    attachment = mm.attach(open_wide, mm.LlamaAdapter(3, layers=1, activation="identity"))
    with torch.no_grad():
        next(iter(attachment.layers.values())).gate.fill_(1.5)
    with pytest.raises(AdapterFileError, match="a gate is 1 or more"):
        mm.interop.write_llama_adapter(open_wide, tmp_path / "x", "official", activation="tanh")
    assert not (tmp_path / "x").exists()


def test_one_gate_a_layer_of_the_earliest_files_is_read(tmp_path: Path) -> None:
    gates = {f"layers.{i}.attention.gate": torch.tensor([0.5]) for i in range(2)}
    official(tmp_path / "a.pth", 2, **gates)
    report = mm.interop.read_llama_adapter(LLAMA.fresh(), tmp_path / "a.pth", activation="tanh")
    assert report.attachment is not None
    assert report.attachment.adapter == mm.LlamaAdapter(3, gate="layer", layers=2)


@pytest.mark.parametrize(
    ("more", "activation", "said"),
    [
        ({}, None, "does not say what stands before its gates"),
        ({"layers.7.attention.gate": torch.ones(1, 4, 1, 1)}, "tanh", r"1 unexpected: layers\.7"),
        ({"layers.1.attention.gate": torch.ones(1, 9, 1, 1)}, "tanh", r"gate is \[?.*9"),
        ({"adapter_query.weight": torch.randn(3, 7)}, "tanh", "prompt"),
        ({"layers.0.attention.gate": torch.ones(1, 4, 1, 1)}, "tanh", "2 layers .* the 3 rows"),
    ],
)
def test_an_official_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, more: Any, activation: Any, said: str
) -> None:
    official(tmp_path / "a.pth", **more)
    model = LLAMA.fresh()
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_llama_adapter(model, tmp_path / "a.pth", activation=activation)
    assert state(model) == before


def test_closed_gates_are_told_apart_from_absent_layers_by_the_length(tmp_path: Path) -> None:
    closed = {f"layers.{i}.attention.gate": torch.zeros(1, 4, 1, 1) for i in range(1)}
    stored = official(tmp_path / "a.pth", 2, **closed)
    guessed = mm.interop.read_llama_adapter(LLAMA.fresh(), tmp_path / "a.pth", activation="tanh")
    assert guessed.notes == ("6 tokens in 1 layers, as their open gates say",)
    report = mm.interop.read_llama_adapter(
        LLAMA.fresh(), tmp_path / "a.pth", activation="tanh", length=3
    )
    assert report.attachment is not None
    assert report.notes == ()
    first = report.attachment.layers["0/text.layers[0].attn.heads:in"]
    assert torch.equal(first.prompt, stored["adapter_query.weight"][:3])
    with pytest.raises(AdapterFileError, match="length is 4, and .* has 6 rows"):
        mm.interop.read_llama_adapter(
            LLAMA.fresh(), tmp_path / "a.pth", activation="tanh", length=4
        )


# -- V2's chat models ---------------------------------------------------------------------------------


def test_a_chat_file_computes_as_its_formula_in_rotated_pairs(tmp_path: Path) -> None:
    """W·(s·x) + b with the rows of q and k in pairs, as the released code has them."""
    stored = chat(tmp_path / "c.pth")
    model, straight = LLAMA.fresh(), LLAMA.fresh()
    report = mm.interop.read_llama_adapter(model, tmp_path / "c.pth")
    assert (report.layout, report.tensors) == ("official_v2", 1 + 2 * (14 + 2))
    with torch.no_grad():
        straight.model.norm.weight.copy_(stored["norm.weight"])  # type: ignore[union-attr]
        for i, block in enumerate(straight.model.layers):  # type: ignore[union-attr,arg-type]
            block.input_layernorm.weight.copy_(stored[f"layers.{i}.attention_norm.weight"])
            block.post_attention_layernorm.weight.copy_(stored[f"layers.{i}.ffn_norm.weight"])
            for module, names in (
                (block.self_attn, {"q_proj": "attention.wq", "k_proj": "attention.wk"}),
                (block.self_attn, {"v_proj": "attention.wv", "o_proj": "attention.wo"}),
                (block.mlp, {"gate_proj": "feed_forward.w1", "up_proj": "feed_forward.w3"}),
                (block.mlp, {"down_proj": "feed_forward.w2"}),
            ):
                for name, theirs in names.items():
                    linear, key = getattr(module, name), f"layers.{i}.{theirs}"
                    linear.weight.mul_(stored[f"{key}_scale"])
                    bias = stored[f"{key}_bias"].clone()
                    if name in ("q_proj", "k_proj"):  # rows 0 1 2 3 of a head are halves 0 2 | 1 3
                        bias = bias.view(-1, 4)[:, [0, 2, 1, 3]].flatten()
                    linear.bias = torch.nn.Parameter(bias)
    assert_close(logits(model), logits(straight), 1e-5)
    mm.interop.write_llama_adapter(model, tmp_path / "d.pth", "official_v2")
    again = torch.load(tmp_path / "d.pth", weights_only=True)["model"]
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.allclose(again[key], value, atol=1e-6), key


def test_a_chat_file_with_other_keys_or_sizes_changes_nothing(tmp_path: Path) -> None:
    stored = chat(tmp_path / "c.pth")
    model = LLAMA.fresh()
    before = state(model)
    without = {k: v for k, v in stored.items() if k != "layers.1.attention.wq_scale"}
    for wrong, said in (
        (without, r"1 missing: layers\.1\.attention\.wq_scale"),
        ({**stored, "layers.2.ffn_norm.weight": torch.ones(16)}, r"1 unexpected: layers\.2"),
        ({**stored, "norm.weight": torch.ones(8)}, r"norm\.weight has 8 numbers.* 16"),
        ({**stored, "layers.0.attention.wv_bias": torch.ones(9)}, "bias"),
    ):
        torch.save({"model": wrong}, tmp_path / "c.pth")
        with pytest.raises(AdapterFileError, match=said):
            mm.interop.read_llama_adapter(model, tmp_path / "c.pth")
        assert state(model) == before


# -- PEFT ---------------------------------------------------------------------------------------------


def peft_folder(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """As PEFT writes it: its own prompts and gates, from the fixture it computed."""
    saved = load_file(PEERS / "peft_prompt.safetensors")
    stored = {}
    for key, value in saved.items():
        if key.startswith("2 prompt.layers."):
            _, _, index, part = key.split(".")
            stored[f"base_model.model.model.layers.{index}.self_attn.{part}"] = value
    config = {"peft_type": "ADAPTION_PROMPT", "adapter_len": 5, "adapter_layers": 2, **changes}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(stored, folder / "adapter_model.safetensors")
    return stored


def peft_backbone() -> Any:
    from test_peers import LLAMA as CONFIG
    from transformers import LlamaConfig, LlamaForCausalLM

    saved = load_file(PEERS / "peft_prompt.safetensors")
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_key_value_heads=2)).eval()
    weights = {k.removeprefix("2 backbone."): v for k, v in saved.items() if "2 backbone." in k}
    model.load_state_dict(weights)
    return model


def test_a_folder_of_peft_computes_what_peft_did_and_is_written_back(tmp_path: Path) -> None:
    from test_peers import texts

    stored = peft_folder(tmp_path / "theirs")
    model = peft_backbone()
    report = mm.interop.read_llama_adapter(model, tmp_path / "theirs")
    assert (report.layout, report.tensors, report.notes) == ("peft", 4, ())
    expected = load_file(PEERS / "peft_prompt.safetensors")["2 32 none"]
    with torch.no_grad():
        found = model(**texts("none"), use_cache=False).logits
    assert float((found - expected).abs().max()) <= 2e-6
    mm.interop.write_llama_adapter(model, tmp_path / "ours", "peft")
    again = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        assert torch.equal(again[key], value)
    config = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert (config["adapter_len"], config["adapter_layers"]) == (5, 2)


def test_a_tanh_gate_is_written_for_peft_as_what_it_gives(tmp_path: Path) -> None:
    model = LLAMA.fresh()
    randomise(mm.attach(model, mm.LlamaAdapter(3, layers=2, gate="layer")), 0.5)
    mm.interop.write_llama_adapter(model, tmp_path, "peft")
    other = LLAMA.fresh()
    mm.interop.read_llama_adapter(other, tmp_path)
    assert_equal(logits(other), logits(model))


def test_what_peft_cannot_say_is_refused(tmp_path: Path) -> None:
    for adapter, at, said in (
        (mm.LlamaAdapter(3, layers=2), None, "gates of layer 0 differ between heads"),
        (mm.ZeroInitAttention(3, gate="layer"), "text.layers[0].attn.heads", "in the top layers"),
        (mm.ZeroInitAttention(visual="tokens", features=5), None, "without features"),
        (mm.LoRA(2), None, "tokens and gates alone, and this attachment has LoRA"),
    ):
        model = LLAMA.fresh()
        randomise(mm.attach(model, adapter, at=at), 0.5)
        with pytest.raises(AdapterFileError, match=said):
            mm.interop.write_llama_adapter(model, tmp_path / "x", "peft")
        assert not (tmp_path / "x").exists()
    with pytest.raises(AdapterFileError, match=r"unknown layout 'pfet'"):
        mm.interop.write_llama_adapter(LLAMA.fresh(), tmp_path, "pfet")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter_layers": 3}, r"2 missing: layers\.0\.self_attn\.adaption_gate"),
        ({"adapter_layers": 1}, r"2 unexpected: layers\.1"),
        ({"adapter_layers": 9}, "tokens for 9 layers, and this backbone has 3"),
        ({"peft_type": "LORA"}, "holds PEFT's 'LORA'"),
        ({"adapter_len": 4}, "prompt"),
    ],
)
def test_a_folder_of_peft_that_does_not_fit_changes_nothing(
    tmp_path: Path, changes: Any, said: str
) -> None:
    peft_folder(tmp_path, **changes)
    model = peft_backbone()
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_llama_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="PEFT's gates have none|holds PEFT's"):
        mm.interop.read_llama_adapter(model, tmp_path, activation="tanh")
    assert state(model) == before


def test_other_files_and_other_backbones_are_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    (tmp_path / "b.pth").write_bytes(b"not a pickle")
    official(tmp_path / "c.pth")
    model = LLAMA.fresh()
    for file, said in (
        ("a.pth", "is no LLaMA-Adapter file: it holds weight"),
        ("b.pth", "cannot be read as tensors"),
        ("none.pth", "there is no file"),
    ):
        with pytest.raises(AdapterFileError, match=said):
            mm.interop.read_llama_adapter(model, tmp_path / file)
    with pytest.raises(AdapterFileError, match=r"has no adapter_config\.json"):
        mm.interop.read_llama_adapter(model, tmp_path)
    with pytest.raises(AdapterFileError, match="which ViTModel does not have"):
        mm.interop.read_llama_adapter(
            BACKBONES["hf_vit"].fresh(), tmp_path / "c.pth", activation="tanh"
        )


def test_a_bias_that_peft_adds_twice_is_told(tmp_path: Path) -> None:
    from test_peers import LLAMA as CONFIG
    from transformers import LlamaConfig, LlamaForCausalLM

    peft_folder(tmp_path)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, num_key_value_heads=2, attention_bias=True))
    report = mm.interop.read_llama_adapter(model, tmp_path)
    assert "a second time" in report.notes[0]


# -- LitGPT -------------------------------------------------------------------------------------------


def litgpt(
    path: Path, layers: int = 1, shape: Any = (1, 1, 4, 1), **more: Any
) -> dict[str, Tensor]:
    """A file of LitGPT: K = 3 tokens and the gates of the top layers of two."""
    draw, stored = torch.Generator().manual_seed(6), {}
    for i in range(2 - layers, 2):
        key = f"transformer.h.{i}.attn"
        stored[f"{key}.adapter_wte.weight"] = torch.randn(3, 16, generator=draw)
        stored[f"{key}.gating_factor"] = torch.randn(shape, generator=draw)
    stored.update(more)
    torch.save({"model": stored}, path)
    return stored


@pytest.mark.parametrize("shape", [(1, 1, 4, 1), (1, 4, 1, 1), (1,)], ids=str)
def test_a_file_of_litgpt_is_read_and_written_back(tmp_path: Path, shape: Any) -> None:
    stored = litgpt(tmp_path / "a.pth", 2, shape)
    model = LLAMA.fresh()
    report = mm.interop.read_llama_adapter(model, tmp_path / "a.pth", "alpaca")
    assert report.layout == "litgpt"
    assert report.tensors == 4
    assert "other rows" in report.notes[0]
    assert report.attachment is not None
    gate: Any = "layer" if shape == (1,) else "head"
    assert report.attachment.adapter == mm.LlamaAdapter(
        3, gate=gate, activation="identity", layers=2
    )
    same = LLAMA.fresh()
    by_hand = mm.attach(same, mm.LlamaAdapter(3, activation="identity", layers=2))
    with torch.no_grad():
        for i in range(2):
            layer = by_hand.layers[f"0/text.layers[{i}].attn.heads:in"]
            layer.prompt.copy_(stored[f"transformer.h.{i}.attn.adapter_wte.weight"])
            layer.gate.copy_(stored[f"transformer.h.{i}.attn.gating_factor"].flatten())
    assert_close(logits(model), logits(same), 1e-6)
    with mm.disabled(model):
        assert differ(logits(model), logits(same))
    mm.interop.write_llama_adapter(model, tmp_path / "b.pth", "litgpt")
    again = torch.load(tmp_path / "b.pth", weights_only=True)["model"]
    assert again.keys() == stored.keys()
    for key, value in stored.items():
        flat = value.flatten()
        wanted = value if key.endswith("weight") else flat.expand(4).view(1, 1, 4, 1)
        assert torch.equal(again[key], wanted), key


def test_a_tanh_gate_is_written_for_litgpt_as_what_it_gives(tmp_path: Path) -> None:
    model, other = LLAMA.fresh(), LLAMA.fresh()
    randomise(mm.attach(model, mm.LlamaAdapter(3, layers=2)), 0.5)
    mm.interop.write_llama_adapter(model, tmp_path / "a.pth", "litgpt")
    mm.interop.read_llama_adapter(other, tmp_path / "a.pth")
    assert_close(logits(other), logits(model), 1e-6)


_QUERY, _GATE = "attn.adapter_wte.weight", "attn.gating_factor"


@pytest.mark.parametrize(
    ("more", "activation", "said"),
    [
        ({}, "tanh", "LitGPT's gates have none"),
        ({f"transformer.h.0.{_QUERY}": torch.ones(3, 16)}, None, r"1 missing: .*0\.attn\.gating"),
        ({f"transformer.h.7.{_GATE}": torch.ones(1, 1, 4, 1)}, None, r"1 unexpected: .*h\.7"),
        ({f"transformer.h.1.{_GATE}": torch.ones(1, 1, 9, 1)}, None, "has 9 gates, .* 4 heads"),
        ({f"transformer.h.1.{_QUERY}": torch.ones(3, 9)}, None, "prompt"),
        ({"transformer.h.1.attn.qkv.adapter_scale": torch.ones(4)}, None, "LitGPT's adapter V2"),
        ({"lm_head.weight": torch.ones(4)}, None, "1 unexpected: lm_head"),
    ],
)
def test_a_file_of_litgpt_that_does_not_fit_changes_nothing(
    tmp_path: Path, more: Any, activation: Any, said: str
) -> None:
    litgpt(tmp_path / "a.pth", **more)
    model = LLAMA.fresh()
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_llama_adapter(model, tmp_path / "a.pth", activation=activation)
    assert state(model) == before


# -- V2's models for images ------------------------------------------------------------------------------


def images(path: Path, **more: Any) -> dict[str, Tensor]:
    """A file of V2 for images: K = 2 queries of 96 channels in two blocks, CLIP tokens of 5 channels."""
    draw = torch.Generator().manual_seed(7)
    shapes = {"clip_proj": (96, 5), "visual_proj": (16, 96)}
    for i in range(2):
        block = f"visual_blocks.{i}"
        shapes |= {f"{block}.attn.qkv": (288, 96), f"{block}.attn.proj": (96, 96)}
        shapes |= {f"{block}.mlp.fc1": (384, 96), f"{block}.mlp.fc2": (96, 384)}
    stored = {"visual_query.weight": torch.randn(2, 96, generator=draw)}
    for name, (rows, columns) in shapes.items():
        stored[f"{name}.weight"] = torch.randn(rows, columns, generator=draw) / columns**0.5
        stored[f"{name}.bias"] = torch.randn(rows, generator=draw)
    norms = {"clip_proj_norm": 96, "visual_proj_norm": 16}
    norms |= {f"visual_blocks.{i}.{n}": 96 for i in range(2) for n in ("norm1", "norm2")}
    for name, width in norms.items():
        stored[f"{name}.weight"] = 1 + 0.2 * torch.randn(width, generator=draw)
        stored[f"{name}.bias"] = torch.randn(width, generator=draw)
    stored["adapter_query.weight"] = torch.randn(2, 16, generator=draw)
    stored["llama.norm.weight"] = 1 + 0.2 * torch.randn(16, generator=draw)
    rows = {"attention.wq": 16, "attention.wo": 16}
    rows |= {"feed_forward.w1": 24, "feed_forward.w2": 16, "feed_forward.w3": 24}
    for i in range(2):
        layer = f"llama.layers.{i}"
        stored[f"{layer}.attention.gate"] = torch.randn(1, 4, 1, 1, generator=draw)
        for name, size in rows.items():
            stored[f"{layer}.{name}.bias"] = torch.randn(size, generator=draw)
        for name in ("attention_norm", "ffn_norm"):
            stored[f"{layer}.{name}.weight"] = 1 + 0.2 * torch.randn(16, generator=draw)
    stored.update(more)
    torch.save({"model": stored, "config": {"w_bias": True, "w_lora": False}}, path)
    return stored


def clip_tokens(rows: int) -> Tensor:
    return torch.randn(rows, 4, 5, generator=torch.Generator().manual_seed(8))


def test_a_file_for_images_sees_as_timms_blocks_do(tmp_path: Path) -> None:
    from timm.models.vision_transformer import Block

    stored = images(tmp_path / "a.pth")
    report = mm.interop.read_llama_adapter(LLAMA.fresh(), tmp_path / "a.pth")

    def part(name: str) -> dict[str, Tensor]:
        return {
            k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")
        }

    def through(module: Any, name: str, x: Tensor) -> Tensor:
        module.load_state_dict(part(name))
        return module(x)

    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    with torch.no_grad():
        seen = through(linear(5, 96), "clip_proj", clip_tokens(3))
        seen = through(norm(96), "clip_proj_norm", seen)
        x = torch.cat([stored["visual_query.weight"].expand(3, -1, -1), seen], 1)
        for i in range(2):
            x = through(Block(96, 2, qkv_bias=True).eval(), f"visual_blocks.{i}", x)
        x = through(linear(96, 16), "visual_proj", x[:, :2])
        expected = through(norm(16), "visual_proj_norm", x)
        assert_close((report.encoder(clip_tokens(3)),), (expected,), 1e-5)


def test_a_file_for_images_computes_as_its_formula(tmp_path: Path) -> None:
    stored = images(tmp_path / "a.pth")
    model, straight = LLAMA.fresh(), LLAMA.fresh()
    report = mm.interop.read_llama_adapter(model, tmp_path / "a.pth", "seeing")
    assert report.layout == "official_v2_images"
    assert report.ignored == ("llama.layers.0.attention.gate",)
    assert report.tensors == len(stored) - 1
    features = report.encoder(clip_tokens(3))
    with torch.no_grad():
        straight.model.norm.weight.copy_(stored["llama.norm.weight"])  # type: ignore[union-attr]
        for i, block in enumerate(straight.model.layers):  # type: ignore[union-attr,arg-type]
            key = f"llama.layers.{i}"
            block.input_layernorm.weight.copy_(stored[f"{key}.attention_norm.weight"])
            block.post_attention_layernorm.weight.copy_(stored[f"{key}.ffn_norm.weight"])
            for linear, name in (
                (block.self_attn.q_proj, "attention.wq"),
                (block.self_attn.o_proj, "attention.wo"),
                (block.mlp.gate_proj, "feed_forward.w1"),
                (block.mlp.up_proj, "feed_forward.w3"),
                (block.mlp.down_proj, "feed_forward.w2"),
            ):
                bias = stored[f"{key}.{name}.bias"].clone()
                if name == "attention.wq":  # rows 0 1 2 3 of a head are halves 0 2 | 1 3
                    bias = bias.view(-1, 4)[:, [0, 2, 1, 3]].flatten()
                linear.bias = torch.nn.Parameter(bias)
        tokens_of_rows = stored["adapter_query.weight"] + features  # (3, 2, 16)
        for row in range(3):
            prompts = mm.attach(straight, mm.ZeroInitAttention(2), at="text.layers[1].attn.heads")
            (layer,) = prompts.layers.values()
            layer.prompt.copy_(tokens_of_rows[row])
            layer.gate.copy_(stored["llama.layers.1.attention.gate"].flatten())
            expected = straight(input_ids=tokens(3)[row, None]).logits
            prompts.detach()
            with mm.context(model, visual=features):
                found = model(input_ids=tokens(3)).logits[row, None]
            assert_close((found,), (expected,), 1e-5)
            assert differ((found,), (straight(input_ids=tokens(3)[row, None]).logits,))


def test_a_file_for_images_may_be_without_norms_and_biases(tmp_path: Path) -> None:
    stored = images(tmp_path / "a.pth")
    bare = {k: v for k, v in stored.items() if "gate" in k or not k.startswith("llama.")}
    torch.save({"model": bare}, tmp_path / "a.pth")
    report = mm.interop.read_llama_adapter(LLAMA.fresh(), tmp_path / "a.pth")
    assert report.attachment is not None
    adapter = mm.LlamaAdapter(2, layers=1, visual="added", features=16, projected=False)
    assert report.attachment.adapter == adapter
    assert report.attachment.num_parameters == 2 * 16 + 4


@pytest.mark.parametrize(
    ("more", "activation", "said"),
    [
        ({}, "identity", "gates of V2 have a tanh"),
        ({"llama.layers.0.attention.lora_wq_l1.weight": torch.ones(1)}, None, "tensors of LoRA"),
        ({"llama.layers.0.attention.wk.bias": torch.ones(8)}, None, r"1 unexpected: .*wk\.bias"),
        ({"visual_blocks.2.norm1.weight": torch.ones(96)}, None, r"11 missing: visual_blocks\.2"),
        ({"adapter_query.weight": torch.ones(3, 16)}, None, "3 rows, expected a multiple of the 2"),
        ({"adapter_query.weight": torch.ones(6, 16)}, None, "tokens for 3 layers, .* has 2"),
        ({"llama.norm.weight": torch.ones(9)}, None, r"llama\.norm\.weight has 9 numbers"),
        (
            {"visual_query.weight": torch.ones(2, 90)},
            None,
            "90 channels, expected .* multiple of 48",
        ),
        (
            {"visual_proj.weight": torch.ones(9, 96), "visual_proj.bias": torch.ones(9)},
            None,
            "gives 9 channels, and this backbone has 16",
        ),
    ],
)
def test_a_file_for_images_that_does_not_fit_changes_nothing(
    tmp_path: Path, more: Any, activation: Any, said: str
) -> None:
    images(tmp_path / "a.pth", **more)
    model = LLAMA.fresh()
    before = state(model)
    with pytest.raises(AdapterFileError, match=said):
        mm.interop.read_llama_adapter(model, tmp_path / "a.pth", activation=activation)
    assert state(model) == before
