"""The generic anatomy: models of no known family."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import BACKBONES, CLASSES, WIDTH, Block, Own, pixels
from snapshot import assert_close, assert_equal, differ, flags, hook_tables, randomise, values
from torch import Tensor, nn

import mmadapt as mm
from mmadapt.backbones.repeated import find_blocks
from mmadapt.core.anatomy import Anatomy, find_anatomy

SIZE = 32


def _torchvision_resnet() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)


def _torchvision_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 2)], num_classes=CLASSES)


def _torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([2, 2], 8, [2, 2], [1, 2], [4, 4], num_classes=CLASSES)


def _timm_convnext() -> nn.Module:
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 2, 1), dims=(4, 8, 8, 8), num_classes=CLASSES)


def _timm_swin() -> nn.Module:
    return BACKBONES["timm_swin"].build()


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


IMAGE_MODELS = {
    "torchvision_resnet": _torchvision_resnet,
    "torchvision_convnext": _torchvision_convnext,
    "torchvision_swin": _torchvision_swin,
    "timm_convnext": _timm_convnext,
    "timm_swin": _timm_swin,
}


def build(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = IMAGE_MODELS[name]().eval()
    for key, parameter in model.named_parameters():
        if "gamma" in key or "layer_scale" in key:  # 1e-6 would hide every change
            nn.init.constant_(parameter, 0.5)
    return model


def batch(name: str) -> Tensor:
    return pixels(2) if name == "timm_swin" else torch.randn(2, 3, SIZE, SIZE)


def roles(model: nn.Module) -> dict[str, mm.Span]:
    return find_anatomy(model).roles(model)


# -- which blocks -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "block", "count"),
    [
        ("torchvision_resnet", "BasicBlock", 4),
        ("torchvision_convnext", "CNBlock", 4),
        ("torchvision_swin", "SwinTransformerBlock", 4),  # not its two stages
        ("timm_convnext", "ConvNeXtBlock", 5),
        ("timm_swin", "SwinTransformerBlock", 4),
    ],
)
def test_the_blocks_are_found_through_stages(name: str, block: str, count: int) -> None:
    model = build(name)
    found = find_blocks(model)
    assert [type(module).__name__ for _, module in found] == [block] * count
    assert all(model.get_submodule(path) is module for path, module in found)


def test_layers_are_preferred_to_the_experts_inside() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.router = nn.LayerNorm(8), nn.Linear(8, 4)
            self.experts = nn.ModuleList(Expert() for _ in range(4))

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer() for _ in range(2))

    assert [path for path, _ in find_blocks(Mixture())] == ["layers.0", "layers.1"]


def test_a_model_without_repeated_blocks_is_told_how_to_name_paths() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    with pytest.raises(mm.errors.BackboneError) as caught:
        find_anatomy(Plain())
    assert "Plain, and it has no repeated blocks" in str(caught.value)
    assert 'mmadapt.Anatomy.from_paths(model, {"my.role": "trunk"})' in caught.value.hint


# -- what they offer ----------------------------------------------------------------------------------


def test_a_block_is_named_by_its_place_and_its_parts_by_their_paths() -> None:
    found = roles(Own())
    assert [role for role in found if role.startswith("blocks[1]")] == [
        "blocks[1]",
        "blocks[1].attn",
        "blocks[1].mlp",
        "blocks[1].attn.out_proj",
        "blocks[1].mlp._0",
        "blocks[1].mlp._2",
        "blocks[1].attn.q",
        "blocks[1].attn.k",
        "blocks[1].attn.v",
        "blocks[1].norm1",
        "blocks[1].norm2",
        *(f"blocks[1].{name}.bias" for name in ("attn.out_proj", "mlp._0", "mlp._2")),
        *(f"blocks[1].{name}.bias" for name in ("attn.q", "attn.k", "attn.v", "norm1", "norm2")),
    ]
    assert found["blocks[1].attn.out_proj"].ports == (
        "weight",
    )  # torch's attention reads it itself
    assert found["blocks[1].mlp._0"].ports == ("out", "in", "weight")


def test_layouts_say_where_the_channels_are() -> None:
    def layouts(name: str) -> dict[str, str]:
        return {role[len("blocks[0]") :]: s.layout for role, s in roles(build(name)).items()}

    assert layouts("torchvision_resnet")[""] == "BCHW"
    assert layouts("torchvision_convnext")[""] == "BCHW"
    assert layouts("torchvision_convnext")[".block._3"] == "BHWC"
    assert layouts("timm_convnext")[".mlp"] == "BHWC"
    assert layouts("torchvision_swin")[""] == "BHWC"
    assert layouts("torchvision_swin")[".attn"] == "BHWC"
    assert layouts("timm_swin")[""] == "BHWC"
    assert layouts("timm_swin")[".attn"] == "BTC"  # windows


def test_convolutions_are_met_by_their_weight_only() -> None:
    found = roles(build("torchvision_resnet"))
    assert {role: span.ports for role, span in found.items() if ".conv" in role} == {
        f"blocks[{i}].conv{k}": ("weight",) for i in range(4) for k in (1, 2)
    }
    with pytest.raises(mm.errors.SiteError, match="offers weight"):
        mm.attach(build("torchvision_resnet"), mm.Bottleneck(2), at="blocks[*].conv1")


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_every_role_fires_with_the_widths_and_layout_it_claims(name: str) -> None:
    model = build(name)
    anatomy, found = find_anatomy(model), roles(model)
    seen: dict[str, tuple[Any, Any]] = {}
    for path in {span.module for span in found.values()}:
        model.get_submodule(path).register_forward_hook(
            lambda module, args, output, path=path: seen.update({path: (args[0], output)})
        )
    with torch.no_grad():
        model(batch(name))
    for role, span in found.items():
        x, y = seen[span.module]
        view = anatomy.view(model, role, span.ports[0], span)
        if "out" in span.ports:
            axis = span.layout.index("C")
            assert y.ndim == len(span.layout), role
            assert x.shape[axis] == view.width_in, role
            assert y.shape[axis] == view.width, role


# -- adapters on them -----------------------------------------------------------------------------

PLACES = [
    ("torchvision_resnet", "blocks[*]"),
    ("torchvision_convnext", "blocks[*]"),
    ("torchvision_swin", "blocks[*]"),
    ("torchvision_swin", "blocks[*].attn"),
    ("timm_convnext", "blocks[*].mlp"),
    ("timm_swin", "blocks[-2:].mlp"),
]


@pytest.mark.parametrize(("name", "at"), PLACES)
def test_a_bottleneck_starts_as_the_identity_trains_saves_and_leaves(
    name: str, at: str, tmp_path: Path
) -> None:
    model, x = build(name), batch(name)
    tables, open_flags, before = hook_tables(model), flags(model), values(model)
    with torch.no_grad():
        bare = model(x)
    attachment = mm.attach(model, mm.Bottleneck(2), at=at)
    with torch.no_grad():
        assert_equal((model(x),), (bare,))
    randomise(attachment, 0.3, 5)
    draw = torch.randn(bare.shape)
    (model(x) * draw).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in attachment.parameters())
    assert all(p.grad is None for n, p in model.named_parameters() if "_mmadapt" not in n)
    with torch.no_grad():
        adapted = model(x)
    assert differ((adapted,), (bare,))
    attachment.save(tmp_path)
    other = build(name)
    mm.load_adapter(other, tmp_path)
    with torch.no_grad():
        assert_equal((other(x),), (adapted,))
        assert_equal((copy.deepcopy(model)(x),), (adapted,))
        assert_equal((pickle.loads(pickle.dumps(model))(x),), (adapted,))
    mm.detach(model)
    assert hook_tables(model) == tables
    assert flags(model) == open_flags
    assert set(before) == set(values(model))


def test_a_bottleneck_on_channels_first_maps_equals_one_on_channels_last() -> None:
    model, x = build("torchvision_resnet"), batch("torchvision_resnet")
    attachment = randomise(mm.attach(model, mm.Bottleneck(2), at="blocks[0]"), 0.3, 5)
    (layer,) = attachment.layers.values()
    caught: list[Tensor] = []
    handle = model.get_submodule("layer1.0").register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    with torch.no_grad():
        model(x)
        mm.set_active(model)
        model(x)
        handle.remove()
        adapted, y = caught
        last = y.permute(0, 2, 3, 1)
        inner = nn.functional.gelu(last @ layer.down.T + layer.down_bias)
        expected = (last + inner @ layer.up.T + layer.up_bias).permute(0, 3, 1, 2)
    assert_close((adapted,), (expected,), 1e-6)


@pytest.mark.parametrize(
    ("name", "at", "weight"),
    [
        ("torchvision_resnet", "blocks[1].conv2", "layer2.0.conv2.weight"),
        ("torchvision_convnext", "blocks[1].block._3:out", "features.1.1.block.3.weight"),
        ("torchvision_swin", "blocks[2].attn.qkv", "features.3.0.attn.qkv.weight"),
        ("timm_swin", "blocks[2].attn.qkv:out", "layers.1.blocks.0.attn.qkv.weight"),
    ],
)
def test_lora_equals_the_folded_weight(name: str, at: str, weight: str) -> None:
    model, x = build(name), batch(name)
    attachment = randomise(mm.attach(model, mm.LoRA(2), at=at), 0.3, 5)
    (layer,) = attachment.layers.values()
    other = build(name)
    with torch.no_grad():
        bare = other(x)
        parameter = other.get_parameter(weight)
        parameter += (layer.scale * (layer.b @ layer.a.flatten(1))).view_as(parameter)
        expected = other(x)
        assert differ((expected,), (bare,))
        assert_close((model(x),), (expected,), 1e-5)


def test_torchs_own_encoder_adapts_through_the_weight_port() -> None:
    model = _torch_encoder().eval()
    x = torch.randn(2, 5, WIDTH)
    at = ["blocks[*].self_attn.q", "blocks[*].self_attn.v", "blocks[*].linear1"]
    attachment = mm.attach(model, mm.LoRA(2), at=at)
    with torch.no_grad():
        bare = _copy_without(model)(x)
        assert_close((model(x),), (bare,), 1e-5)  # hooks make torch leave its fused fast path
        randomise(attachment, 0.3, 5)
        assert differ((model(x),), (bare,))


def _copy_without(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    mm.detach(twin)
    return twin


# -- more libraries -------------------------------------------------------------------------------


def _hf(model: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{model}Config")(**more)
        return getattr(transformers, f"{model}Model")(config)

    return make


def _timm_swin_2() -> nn.Module:
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    sizes: Any = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    return SwinTransformerV2(img_size=SIZE, patch_size=2, num_classes=CLASSES, **sizes)


def _timm_eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(SIZE, 8, embed_dim=WIDTH, depth=2, num_heads=2, num_classes=CLASSES, qkv_fused=True)


def _timm_efficientnet() -> nn.Module:
    import timm

    return timm.create_model("efficientnet_lite0", num_classes=CLASSES)


def _torchvision_efficientnet() -> nn.Module:
    from torchvision.models import efficientnet_b0

    return efficientnet_b0(num_classes=CLASSES)


def _torch_transformer() -> nn.Module:
    return nn.Transformer(WIDTH, 2, 2, 2, 2 * WIDTH, batch_first=True)


def _image() -> tuple[Tensor, ...]:
    return (torch.randn(2, 3, SIZE, SIZE),)


def _ids() -> tuple[Tensor, ...]:
    return (torch.arange(12).view(2, 6),)


def _source_and_target() -> tuple[Tensor, ...]:
    return torch.randn(2, 5, WIDTH), torch.randn(2, 4, WIDTH)


_STAGES = {"hidden_sizes": [8, 16], "depths": [2, 2]}
_SWIN = {"embed_dim": 8, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
_GPT = {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "vocab_size": 32, "n_positions": 8}
_GPT.update(bos_token_id=0, eos_token_id=0)

#: name -> how to build it, what it takes, how many blocks it has, a role in the last and its weight
MORE: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple], int, str, str]] = {
    "hf_resnet": (
        _hf("ResNet", embedding_size=8, layer_type="basic", **_STAGES),
        _image,
        4,
        "layer._0.convolution",
        "encoder.stages.1.layers.1.layer.0.convolution.weight",
    ),
    "hf_convnext": (
        _hf("ConvNext", num_stages=2, layer_scale_init_value=0.5, **_STAGES),
        _image,
        4,
        "pwconv1",
        "encoder.stages.1.layers.1.pwconv1.weight",
    ),
    "hf_swin": (_hf("Swin", image_size=SIZE, patch_size=2, **_SWIN), _image, 4, "", ""),
    "hf_gpt2": (_hf("GPT2", **_GPT), _ids, 2, "", ""),
    "timm_swin_2": (_timm_swin_2, _image, 4, "attn.qkv", "layers.1.blocks.1.attn.qkv.weight"),
    "timm_eva": (_timm_eva, _image, 2, "attn.qkv", "blocks.1.attn.qkv.weight"),
    "timm_efficientnet": (_timm_efficientnet, _image, 15, "conv_pw", "blocks.6.0.conv_pw.weight"),
    "torchvision_efficientnet": (
        _torchvision_efficientnet,
        _image,
        16,
        "block._0._0",
        "features.7.0.block.0.0.weight",
    ),
    "torch_encoder": (
        _torch_encoder,
        lambda: (torch.randn(2, 5, WIDTH),),
        2,
        "linear1",
        "layers.1.linear1.weight",
    ),
    "torch_transformer": (
        _torch_transformer,
        _source_and_target,
        4,
        "multihead_attn.out_proj",
        "decoder.layers.1.multihead_attn.out_proj.weight",
    ),
}


def more(name: str) -> nn.Module:
    torch.manual_seed(7)
    model = MORE[name][0]().eval().requires_grad_(False)
    for parameter in model.parameters():  # off the round starts, which hide errors
        if parameter.ndim < 2:
            parameter.data.add_(0.05 * torch.randn(parameter.shape))
        elif parameter.ndim == 2:  # the libraries' 0.02 would hide every change
            parameter.data.copy_(torch.randn(parameter.shape) * parameter.shape[1] ** -0.5)
    return model


def run(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        output = model(*batch)
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.parametrize("name", MORE)
def test_blocks_of_more_libraries_are_found_and_every_site_acts(name: str, tmp_path: Path) -> None:
    _, batch, count, _, _ = MORE[name]
    model, x = more(name), batch()
    assert len(find_blocks(model)) == count
    bare, tables = run(model, x), hook_tables(model)
    vectors = tuple(
        f"{role}:weight"
        for role, span in roles(model).items()
        if span.weight and model.get_parameter(span.weight).ndim == 1
    )
    adapters = [mm.Bottleneck(2, at="blocks[*]"), mm.Unlock(at=vectors)]
    attachment = mm.attach(model, adapters)
    assert len(attachment.sites) == count + len(vectors)
    assert_close((run(model, x),), (bare,), 1e-5)  # hooks make torch leave its fused fast path
    mm.check(model, x)
    randomise(attachment, 0.3, 5)
    adapted = run(model, x)
    assert differ((adapted,), (bare,))
    attachment.save(tmp_path)
    other = more(name)
    mm.load_adapter(other, tmp_path)
    assert_equal((run(other, x),), (adapted,))
    mm.detach(model)
    assert hook_tables(model) == tables
    assert_equal((run(model, x),), (bare,))


@pytest.mark.parametrize("name", [name for name, row in MORE.items() if row[3]])
def test_lora_in_more_libraries_equals_the_folded_weight(name: str) -> None:
    _, batch, _, role, weight = MORE[name]
    model, other, x = more(name), more(name), batch()
    attachment = mm.attach(model, mm.LoRA(2), at=f"blocks[-1].{role}")
    (layer,) = randomise(attachment, 0.3, 5).layers.values()
    bare = run(other, x)
    parameter = other.get_parameter(weight)
    with torch.no_grad():
        parameter += (layer.scale * (layer.b @ layer.a.flatten(1))).view_as(parameter)
    assert differ((run(other, x),), (bare,))
    assert_close((run(model, x),), (run(other, x),), 1e-5)


def test_gpt_2s_transposed_linears_are_met_by_their_call_and_their_bias() -> None:
    model, x = more("hf_gpt2"), _ids()
    found = roles(model)
    assert found["blocks[1].attn.c_attn"].ports == ("out", "in")
    with pytest.raises(mm.errors.AdapterError, match=r"c_attn:out stands for none"):
        mm.attach(model, mm.LoRA(2), at="blocks[*].attn.c_attn")
    bare = run(model, x)
    (layer,) = randomise(
        mm.attach(model, mm.Bottleneck(2, placement="parallel"), at="blocks[0].mlp.c_fc"), 0.3, 5
    ).layers.values()
    assert layer.down.shape == (2, WIDTH)
    assert layer.up.shape == (4 * WIDTH, 2)
    assert differ((run(model, x),), (bare,))
    mm.attach(model, mm.Unlock(), at=["blocks[*].attn.*.bias", "blocks[*].mlp.*.bias"], name="bias")
    assert len(mm.attachments(model)["bias"].sites) == 8
    mm.check(model, x)


def test_a_container_is_refused_as_a_root_with_the_way_out() -> None:
    layers = nn.Sequential(*(Block(WIDTH) for _ in range(2)))
    with pytest.raises(
        mm.errors.AttachError, match="a Sequential calls or counts every module"
    ) as e:
        mm.attach(layers, mm.Bottleneck(2), at="blocks[*]")
    assert "wrap it in a module whose forward calls it" in e.value.hint


# -- files ----------------------------------------------------------------------------------------


class Wider(Own):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, CLASSES + 1)


def test_a_file_refuses_a_model_of_other_shapes(tmp_path: Path) -> None:
    mm.attach(Own(), mm.Bottleneck(2)).save(tmp_path)
    mm.load_adapter(Own(), tmp_path)
    with pytest.raises(mm.errors.WrongBackboneError, match="class is 'Wider' here and 'Own'"):
        mm.load_adapter(Wider(), tmp_path)


def test_a_file_refuses_a_model_whose_roles_lie_elsewhere(tmp_path: Path) -> None:
    def backbone(path: str) -> mm.Backbone:
        model = Own()
        return mm.Backbone(model, anatomy=Anatomy.from_paths(model, {"mlp": path}))

    mm.attach(backbone("body.0.mlp"), mm.Bottleneck(2), at="mlp").save(tmp_path)
    mm.load_adapter(backbone("body.0.mlp"), tmp_path)
    with pytest.raises(mm.errors.WrongBackboneError, match="sites is"):
        mm.load_adapter(backbone("body.1.mlp"), tmp_path)


# -- roles given by hand -----------------------------------------------------------------------------


def test_paths_given_by_hand_become_roles() -> None:
    model = Own().eval().requires_grad_(False)  # torch's attention chooses its kernel by these
    anatomy = Anatomy.from_paths(
        model,
        {
            "layers[i].ff": "body.{i}.mlp",
            "layers[i].norm": "body.{i}.norm1",
            "layers[0].attn.o": "body.0.attn.out_proj",
            "embed": "embed",
        },
    )
    found = anatomy.roles(model)
    assert list(found) == [
        "layers[0].ff",
        "layers[1].ff",
        "layers[0].norm",
        "layers[1].norm",
        "layers[0].attn.o",
        "embed",
        "layers[0].norm.bias",
        "layers[1].norm.bias",
        "layers[0].attn.o.bias",
        "embed.bias",
    ]
    assert found["layers[1].norm"].ports == ("out", "in", "weight")
    assert found["layers[0].attn.o"].ports == ("weight",)
    assert found["layers[0].attn.o"].module == "body.0.attn"
    backbone = mm.Backbone(model, anatomy=anatomy)
    frames = torch.randn(2, 4, 8)
    with torch.no_grad():
        bare = model(frames)
        mm.attach(backbone, mm.Bottleneck(2), at=["layers[*].*", "embed:out"])
        assert_equal((model(frames),), (bare,))
    assert "blocks" not in repr(mm.check(backbone, {"frames": frames}))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ({"layers[i].ff": "body.{i}.mpl"}, "no module at 'body.0.mpl'"),
        ({"ff": "bodies"}, "no module at 'bodies'"),
        ({"layers[i].ff": "body.0.mlp"}, "stands for 1 modules"),
        ({"ff": "body.{i}.mlp"}, "stands for 2 modules"),
        ({"act": "body.0.mlp.1"}, "a GELU without a weight"),
    ],
)
def test_wrong_paths_are_refused(paths: dict[str, str], message: str) -> None:
    with pytest.raises(mm.errors.BackboneError) as caught:
        Anatomy.from_paths(Own(), paths)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_malformed_role_is_refused() -> None:
    with pytest.raises(mm.errors.SiteError, match="'my role' is malformed"):
        Anatomy.from_paths(Own(), {"my role": "embed"})
