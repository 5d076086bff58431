"""Tiny random backbones of the real libraries, each with a batch and a way to read its outputs.

Every `build` seeds its own draw, so two builds, in one process or in two, are bit-equal.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmadapt.core.anatomy import find_anatomy
from mmadapt.errors import MmadaptError

WIDTH, LAYERS, HEADS, DIM = 16, 2, 2, 8
IMAGE, PATCH, VOCABULARY, CONTEXT = 16, 8, 32, 6
CLASSES = 5


def _call(model: Any, batch: dict[str, Tensor]) -> Any:
    return model(**batch)


@dataclass(frozen=True)
class Tiny:
    """One backbone: how to build it, what it takes (as keywords) and what it gives."""

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    read: Callable[[Any], tuple[Tensor, ...]]
    #: how a batch goes through, where a plain call has no gradients
    call: Callable[[Any, dict[str, Tensor]], Any] = _call

    def fresh(self) -> nn.Module:
        """An own copy, in eval mode and with every tensor requiring a gradient.

        It shares the library's configurations, whose nested tables would take most of the time.
        """
        modules = self.prototype.modules()
        configurations = [m.__dict__["config"] for m in modules if "config" in m.__dict__]
        return copy.deepcopy(self.prototype, {id(each): each for each in configurations})

    @property
    def prototype(self) -> nn.Module:
        """The one that is copied; only to be looked at."""
        return _prototype(self.name)

    def outputs(self, model: Any, batch: dict[str, Tensor] | None = None) -> tuple[Tensor, ...]:
        """The main output tensors, rows first."""
        return self.read(self.call(model, self.batch(3) if batch is None else batch))

    @property
    def family(self) -> str:
        return find_anatomy(self.prototype).family


@functools.cache
def _prototype(name: str) -> nn.Module:
    return ALL[name].build()


def _seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    @functools.wraps(make)
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = make()
            for parameter in model.parameters():  # biases and norms off their round starts
                if parameter.ndim < 2:
                    parameter.data.add_(0.05 * torch.randn(parameter.shape))
                else:  # the libraries' 0.02 would hide errors
                    scale = parameter[0].numel() ** -0.5
                    parameter.data.copy_(scale * torch.randn(parameter.shape))
        return model.eval()

    return build


def pixels(rows: int) -> Tensor:
    """Pixels (rows, 3, IMAGE, IMAGE)."""
    return torch.randn(rows, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(11))


def tokens(rows: int) -> Tensor:
    """Token ids (rows, CONTEXT); the largest id, which ends a text, stands last."""
    draw = torch.Generator().manual_seed(12)
    ids = torch.randint(1, VOCABULARY - 2, (rows, CONTEXT), generator=draw)
    ids[:, -1] = VOCABULARY - 1
    return ids


# -- open_clip --------------------------------------------------------------------------------

_OPEN_CLIP_VISION = {
    "layers": LAYERS,
    "width": WIDTH,
    "head_width": WIDTH // HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_OPEN_CLIP_TEXT = {
    "context_length": CONTEXT,
    "vocab_size": VOCABULARY,
    "width": WIDTH,
    "heads": HEADS,
    "layers": LAYERS,
}


@_seeded
def open_clip() -> nn.Module:
    from open_clip.model import CLIP

    return CLIP(DIM, dict(_OPEN_CLIP_VISION), dict(_OPEN_CLIP_TEXT), quick_gelu=True)


@_seeded
def open_clip_custom_text() -> nn.Module:
    from open_clip.model import CustomTextCLIP

    return CustomTextCLIP(DIM, dict(_OPEN_CLIP_VISION), dict(_OPEN_CLIP_TEXT))


@_seeded
def open_clip_vision() -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return VisionTransformer(IMAGE, PATCH, WIDTH, LAYERS, HEADS, 4.0, output_dim=DIM)


# -- transformers -----------------------------------------------------------------------------

_HF_VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 4 * WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}


def _hf_clip_config() -> Any:
    from transformers import CLIPConfig

    text = {
        **{
            key: value
            for key, value in _HF_VISION.items()
            if key not in ("image_size", "patch_size")
        },
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": VOCABULARY - 1,
        "bos_token_id": 0,
        "pad_token_id": 0,
        "projection_dim": DIM,
    }
    vision = {**_HF_VISION, "projection_dim": DIM}
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)


@_seeded
def hf_clip() -> nn.Module:
    from transformers import CLIPModel

    return CLIPModel(_hf_clip_config())


@_seeded
def hf_clip_vision() -> nn.Module:
    from transformers import CLIPVisionModel

    return CLIPVisionModel(_hf_clip_config().vision_config)


@_seeded
def hf_clip_vision_projection() -> nn.Module:
    from transformers import CLIPVisionModelWithProjection

    return CLIPVisionModelWithProjection(_hf_clip_config().vision_config)


@_seeded
def hf_vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return ViTModel(ViTConfig(**_HF_VISION))


@_seeded
def hf_vit_classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_HF_VISION, num_labels=CLASSES))


@_seeded
def hf_siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    text = {
        key: value for key, value in _HF_VISION.items() if key not in ("image_size", "patch_size")
    }
    text.update(vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, projection_size=WIDTH)
    text.update(bos_token_id=0, eos_token_id=VOCABULARY - 1, pad_token_id=0)
    return SiglipModel(SiglipConfig(text_config=text, vision_config=dict(_HF_VISION)))


@_seeded
def hf_siglip_vision() -> nn.Module:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_HF_VISION))


@_seeded
def hf_dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    return Dinov2Model(Dinov2Config(**_HF_VISION, layerscale_value=0.5))


@_seeded
def hf_dinov2_registers() -> nn.Module:
    from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

    return Dinov2WithRegistersModel(
        # 4 registers: 9 tokens, which would be 3 × 3 patches if the table did not count them
        Dinov2WithRegistersConfig(**_HF_VISION, num_register_tokens=4, use_swiglu_ffn=True)
    )


def _bert_config(**more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=CONTEXT,
        hidden_dropout_prob=0.0,  # a law runs half of the modules in train mode
        attention_probs_dropout_prob=0.0,
        **more,
    )


@_seeded
def hf_bert() -> nn.Module:
    from transformers import BertModel

    return BertModel(_bert_config())


@_seeded
def hf_bert_classifier() -> nn.Module:
    from transformers import BertForSequenceClassification

    return BertForSequenceClassification(_bert_config(num_labels=CLASSES))


_HF_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * WIDTH,
    "max_position_embeddings": CONTEXT + 2,
    "pad_token_id": 0,
}


def _hf_text(family: str, suffix: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**{**_HF_TEXT, **more})
        return getattr(transformers, f"{family}{suffix}")(config)

    return _seeded(make)


def _hf_vision(family: str, suffix: str, **more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(**_HF_VISION, **more)
        return getattr(transformers, f"{family}{suffix}")(config)

    return _seeded(make)


def _hf_decoder(family: str, suffix: str, **more: Any) -> Callable[[], nn.Module]:
    """Four query heads of four channels, two key heads."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{family}Config")(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            use_cache=False,
            **more,
        )
        return getattr(transformers, f"{family}{suffix}")(config)

    return _seeded(make)


# -- timm ---------------------------------------------------------------------------------------


def _timm_vit(**more: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        return VisionTransformer(
            img_size=IMAGE,
            patch_size=PATCH,
            embed_dim=WIDTH,
            depth=LAYERS,
            num_heads=HEADS,
            num_classes=CLASSES,
            **more,
        )

    return _seeded(make)


@_seeded
def timm_vit() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=CLASSES,
        init_values=0.5,
    )


@_seeded
def open_clip_timm() -> nn.Module:
    """SigLIP as open_clip has it, its vision tower being timm's."""
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
    from timm.models.vision_transformer import VisionTransformer

    model = CustomTextCLIP(
        WIDTH,
        CLIPVisionCfg(
            timm_model_name="test_vit", timm_pool="map", timm_proj="none", image_size=IMAGE
        ),
        CLIPTextCfg(**_OPEN_CLIP_TEXT, no_causal_mask=True, proj_bias=True, pool_type="last"),
        init_logit_bias=-10,
    )
    model.visual.trunk = VisionTransformer(  # type: ignore[union-attr]
        img_size=IMAGE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        num_classes=0,
        class_token=False,
        global_pool="map",
    )
    return model


# -- SAM -------------------------------------------------------------------------------------------

#: width behind the encoder: upscaling norms a quarter of it, and norms of two channels are signs
INNER = 32
#: 4 × 4 patches in windows of 3 × 3, so that windows stick out
_SAM_VISION = {
    "hidden_size": WIDTH,
    "output_channels": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "image_size": IMAGE,
    "patch_size": 4,
    "mlp_dim": 2 * WIDTH,
    "window_size": 3,
    "global_attn_indexes": [1],
    "num_pos_feats": INNER // 2,
}
_SAM_PROMPTS = {
    "hidden_size": INNER,
    "image_size": IMAGE,
    "patch_size": 4,
    "mask_input_channels": INNER,
}
_SAM_DECODER = {
    "hidden_size": INNER,
    "mlp_dim": 3 * WIDTH,
    "num_attention_heads": HEADS,
    "iou_head_hidden_dim": INNER,
}


@_seeded
def hf_sam() -> nn.Module:
    from transformers import SamConfig, SamModel

    return SamModel(
        SamConfig(
            vision_config=dict(_SAM_VISION),
            prompt_encoder_config=dict(_SAM_PROMPTS),
            mask_decoder_config=dict(_SAM_DECODER),
        )
    )


@_seeded
def hf_sam_vision() -> nn.Module:
    from transformers import SamVisionConfig, SamVisionModel

    return SamVisionModel(SamVisionConfig(**_SAM_VISION))


@_seeded
def segment_anything() -> nn.Module:
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

    encoder = ImageEncoderViT(
        img_size=IMAGE,
        patch_size=4,
        embed_dim=WIDTH,
        depth=LAYERS,
        num_heads=HEADS,
        mlp_ratio=2.0,
        out_chans=INNER,
        norm_layer=functools.partial(nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=3,
        global_attn_indexes=(1,),
    )
    transformer = TwoWayTransformer(
        depth=2, embedding_dim=INNER, num_heads=HEADS, mlp_dim=3 * WIDTH
    )
    decoder = MaskDecoder(transformer_dim=INNER, transformer=transformer, iou_head_hidden_dim=INNER)
    return Sam(encoder, PromptEncoder(INNER, (4, 4), (IMAGE, IMAGE), INNER), decoder)


@_seeded
def hf_sam2() -> nn.Module:
    from transformers import Sam2Config, Sam2Model

    widths = [DIM, WIDTH, 2 * WIDTH, 4 * WIDTH]
    hiera = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": DIM,
        "image_size": [64, 64],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": widths,
        "num_attention_heads_per_stage": [1, 1, 2, 2],
        "window_size_per_stage": [4, 2, 2, 2],
        "global_attention_blocks": [3],
        "mlp_ratio": 2.0,
    }
    return Sam2Model(
        Sam2Config(
            vision_config={
                "backbone_config": hiera,
                "backbone_channel_list": widths[::-1],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": INNER,
            },
            prompt_encoder_config={**_SAM_PROMPTS, "image_size": 64, "patch_size": 16},
            mask_decoder_config=dict(_SAM_DECODER),
        )
    )


def clicks(rows: int, image: int = IMAGE) -> dict[str, Tensor]:
    """An image, two points (x, y) in it with a label each, and a mask, for every row."""
    draw = torch.Generator().manual_seed(15)
    return {
        "pixel_values": torch.randn(rows, 3, image, image, generator=draw),
        "input_points": image * torch.rand(rows, 1, 2, 2, generator=draw),
        "input_labels": torch.randint(0, 2, (rows, 1, 2), generator=draw),
        "input_masks": torch.randn(rows, 1, 16, 16, generator=draw),
    }


def sam_parts(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """segment_anything as it is trained: its three parts, the decoder image by image."""
    embedded = model.image_encoder(batch["pixel_values"])
    masks, scores = [], []
    for place, image in enumerate(embedded):
        sparse, dense = model.prompt_encoder(
            points=(batch["input_points"][place], batch["input_labels"][place]),
            boxes=None,
            masks=batch["input_masks"][place, None],
        )
        decoded = model.mask_decoder(
            image_embeddings=image[None],
            image_pe=model.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=True,
        )
        masks.append(decoded[0][None])
        scores.append(decoded[1][None])
    return torch.cat(masks), torch.cat(scores)


def _masks_and_scores(output: Any) -> tuple[Tensor, ...]:
    return output.pred_masks, output.iou_scores


# -- sound ----------------------------------------------------------------------------------------

SPECTRUM = (24, 16)  # frames, mel bins
SAMPLES = 40


def _hf_ast(head: str) -> Callable[[], nn.Module]:
    @_seeded
    def build() -> nn.Module:
        import transformers

        config = transformers.ASTConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=2 * WIDTH,
            patch_size=8,
            frequency_stride=4,
            time_stride=4,
            max_length=SPECTRUM[0],
            num_mel_bins=SPECTRUM[1],
            num_labels=CLASSES,
        )
        return getattr(transformers, f"AST{head}")(config)

    return build


def _hf_speech(kind: str, head: str, **changes: Any) -> Callable[[], nn.Module]:
    """A model on raw samples: two convolutions with strides 3 and 2, then blocks."""

    @_seeded
    def build() -> nn.Module:
        import transformers

        options = {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": 2 * WIDTH,
            "conv_dim": [DIM, DIM],
            "conv_kernel": [4, 3],
            "conv_stride": [3, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "vocab_size": VOCABULARY,
            "num_labels": CLASSES,
        }
        words = ("hidden", "activation", "attention", "feat_proj", "final")
        options |= {f"{word}_dropout": 0.0 for word in words}
        options |= {"layerdrop": 0.0, "mask_time_prob": 0.0}
        config = getattr(transformers, f"{kind}Config")(**{**options, **changes})
        return getattr(transformers, f"{kind}{head}")(config)

    return build


LARGE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}


def spectra(rows: int) -> dict[str, Tensor]:
    """Spectrograms (rows, frames, mel bins)."""
    draw = torch.Generator().manual_seed(16)
    return {"input_values": torch.randn(rows, *SPECTRUM, generator=draw)}


def waves(rows: int) -> dict[str, Tensor]:
    """Waves (rows, SAMPLES), the later ones padded with zeros by a quarter and a half."""
    wave = torch.randn(rows, SAMPLES, generator=torch.Generator().manual_seed(17))
    mask = torch.ones(rows, SAMPLES, dtype=torch.long)
    for row in range(rows):
        mask[row, SAMPLES - row % 3 * SAMPLES // 4 :] = 0
    return {"input_values": wave * mask, "attention_mask": mask}


CONFORMER = {
    "conv_depthwise_kernel_size": 5,
    "conformer_conv_dropout": 0.0,
    "feature_projection_input_dim": SPECTRUM[1],
}


@_seeded
def hf_parakeet() -> nn.Module:
    """Two halvings of the frames, then blocks, and a CTC head."""
    import transformers

    encoder = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "intermediate_size": 2 * WIDTH,
        "conv_kernel_size": 5,
        "subsampling_factor": 4,
        "subsampling_conv_channels": DIM,
        "num_mel_bins": SPECTRUM[1],
        "max_position_embeddings": 64,
    }
    encoder |= {f"{w}dropout": 0.0 for w in ("", "attention_", "activation_")}
    encoder |= {"dropout_positions": 0.0, "layerdrop": 0.0}
    config = transformers.ParakeetCTCConfig(
        vocab_size=VOCABULARY, pad_token_id=0, encoder_config=encoder
    )
    return transformers.ParakeetForCTC(config)


def _hf_whisper(head: str, **changes: Any) -> Callable[[], nn.Module]:
    @_seeded
    def build() -> nn.Module:
        import transformers

        options = {
            "d_model": WIDTH,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 2 * WIDTH,
            "decoder_ffn_dim": 2 * WIDTH,
            "num_mel_bins": SPECTRUM[1],
            "max_source_positions": SPECTRUM[0] // 2,
            "max_target_positions": 16,
            "vocab_size": VOCABULARY,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": VOCABULARY - 1,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "num_labels": CLASSES,
            "classifier_proj_size": DIM,
            "use_cache": False,
        }
        config = transformers.WhisperConfig(**{**options, **changes})
        return getattr(transformers, f"Whisper{head}")(config)

    return build


def mels(rows: int) -> dict[str, Tensor]:
    """Spectrograms (rows, frames, mel bins), the later ones padded, and their mask."""
    draw = torch.Generator().manual_seed(18)
    spectrum = torch.randn(rows, *SPECTRUM, generator=draw)
    mask = torch.ones(rows, SPECTRUM[0], dtype=torch.long)
    for row in range(rows):
        mask[row, SPECTRUM[0] - row % 3 * SPECTRUM[0] // 4 :] = 0
    return {"input_features": spectrum * mask[..., None], "attention_mask": mask}


def spoken(rows: int) -> dict[str, Tensor]:
    """Spectrograms (rows, mel bins, frames) as Whisper takes them, and the tokens said."""
    draw = torch.Generator().manual_seed(19)
    return {
        "input_features": torch.randn(rows, SPECTRUM[1], SPECTRUM[0], generator=draw),
        "decoder_input_ids": tokens(rows),
    }


# -- models of no known family, for the generic anatomy ----------------------------------------


@_seeded
def timm_swin() -> nn.Module:
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=IMAGE,
        patch_size=2,
        num_classes=CLASSES,
        embed_dim=8,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=4,
        drop_path_rate=0.0,
    )


class Block(nn.Module):
    """A pre-norm block as people write it; its attention is torch's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Own(nn.Module):
    """A transformer over feature vectors (B, T, DIM), pooled to classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(DIM, WIDTH)
        self.body = nn.ModuleList(Block(WIDTH) for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, frames: Tensor) -> Tensor:
        x = self.embed(frames)
        for block in self.body:
            x = block(x)
        return self.head(x.mean(dim=1))


@_seeded
def own_transformer() -> nn.Module:
    return Own()


def frames(rows: int, width: int = DIM) -> Tensor:
    """Feature vectors (rows, 4, width)."""
    return torch.randn(rows, 4, width, generator=torch.Generator().manual_seed(14))


# -- a task's own model -------------------------------------------------------------------------


@_seeded
def zero_shot_classifier() -> nn.Module:
    from mmadapt.tasks.few_shot.classifier import CosineHead, ZeroShotClassifier

    head = CosineHead(torch.randn(CLASSES, DIM), scale=20.0, bias=0.1)
    return ZeroShotClassifier(None, head, tuple("abcde"))  # type: ignore[arg-type]


def embeddings(rows: int) -> Tensor:
    """Image embeddings (rows, DIM)."""
    return torch.randn(rows, DIM, generator=torch.Generator().manual_seed(13))


# -- the registry; an earlier one is more of a home ---------------------------------------------


def _pooled_and_tokens(output: Any) -> tuple[Tensor, ...]:
    return output.last_hidden_state, output.pooler_output


BACKBONES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "open_clip",
            open_clip,
            lambda rows: {"image": pixels(rows), "text": tokens(rows)},
            lambda output: output[:2],
        ),
        Tiny("hf_vit", hf_vit, lambda rows: {"pixel_values": pixels(rows)}, _pooled_and_tokens),
        Tiny(
            "hf_clip",
            hf_clip,
            lambda rows: {"pixel_values": pixels(rows), "input_ids": tokens(rows)},
            lambda output: (output.image_embeds, output.text_embeds),
        ),
        Tiny(
            "zero_shot_classifier",
            zero_shot_classifier,
            lambda rows: {"features": embeddings(rows)},
            lambda output: (output,),
        ),
        Tiny(
            "open_clip_custom_text",
            open_clip_custom_text,
            lambda rows: {"image": pixels(rows), "text": tokens(rows)},
            lambda output: output[:2],
        ),
        Tiny(
            "open_clip_vision",
            open_clip_vision,
            lambda rows: {"x": pixels(rows)},
            lambda output: (output,),
        ),
        Tiny(
            "hf_clip_vision",
            hf_clip_vision,
            lambda rows: {"pixel_values": pixels(rows)},
            _pooled_and_tokens,
        ),
        Tiny(
            "hf_clip_vision_projection",
            hf_clip_vision_projection,
            lambda rows: {"pixel_values": pixels(rows)},
            lambda output: (output.image_embeds, output.last_hidden_state),
        ),
        Tiny(
            "hf_vit_classifier",
            hf_vit_classifier,
            lambda rows: {"pixel_values": pixels(rows)},
            lambda output: (output.logits,),
        ),
        Tiny("timm_vit", timm_vit, lambda rows: {"x": pixels(rows)}, lambda output: (output,)),
        Tiny(
            "open_clip_timm",
            open_clip_timm,
            lambda rows: {"image": pixels(rows), "text": tokens(rows)},
            lambda output: output[:2],
        ),
        Tiny(
            "hf_siglip",
            hf_siglip,
            lambda rows: {"pixel_values": pixels(rows), "input_ids": tokens(rows)},
            lambda output: (output.image_embeds, output.text_embeds),
        ),
        Tiny(
            "hf_siglip_vision",
            hf_siglip_vision,
            lambda rows: {"pixel_values": pixels(rows)},
            _pooled_and_tokens,
        ),
        Tiny(
            "hf_dinov2", hf_dinov2, lambda rows: {"pixel_values": pixels(rows)}, _pooled_and_tokens
        ),
        Tiny(
            "hf_dinov2_registers",
            hf_dinov2_registers,
            lambda rows: {"pixel_values": pixels(rows)},
            _pooled_and_tokens,
        ),
        Tiny("hf_bert", hf_bert, lambda rows: {"input_ids": tokens(rows)}, _pooled_and_tokens),
        Tiny(
            "hf_bert_classifier",
            hf_bert_classifier,
            lambda rows: {"inputs_embeds": frames(rows, WIDTH)},
            lambda output: (output.logits,),
        ),
        Tiny(
            "hf_llama",
            _hf_decoder("Llama", "ForCausalLM"),
            lambda rows: {"input_ids": tokens(rows)},
            lambda output: (output.logits,),
        ),
        Tiny(
            "hf_mistral",
            _hf_decoder("Mistral", "Model", sliding_window=4),
            lambda rows: {"input_ids": tokens(rows)},
            lambda output: (output.last_hidden_state,),
        ),
        Tiny(
            "hf_qwen2",
            _hf_decoder("Qwen2", "ForSequenceClassification", num_labels=CLASSES),
            lambda rows: {"input_ids": tokens(rows)},
            lambda output: (output.logits,),
        ),
        Tiny(
            "hf_qwen3",
            _hf_decoder("Qwen3", "Model"),
            lambda rows: {"input_ids": tokens(rows)},
            lambda output: (output.last_hidden_state,),
        ),
        Tiny(
            "hf_gemma",
            _hf_decoder("Gemma", "ForCausalLM", tie_word_embeddings=True),
            lambda rows: {"input_ids": tokens(rows)},
            lambda output: (output.logits,),
        ),
        Tiny("hf_sam", hf_sam, clicks, _masks_and_scores),
        Tiny("segment_anything", segment_anything, clicks, lambda output: output, sam_parts),
        Tiny(
            "hf_sam2",
            hf_sam2,
            lambda rows: clicks(rows, 64),
            lambda output: (*_masks_and_scores(output), output.object_score_logits),
        ),
        Tiny(
            "hf_sam_vision",
            hf_sam_vision,
            lambda rows: {"pixel_values": pixels(rows)},
            lambda output: (output.last_hidden_state,),
        ),
        Tiny("hf_ast", _hf_ast("ForAudioClassification"), spectra, lambda y: (y.logits,)),
        Tiny(
            "hf_wav2vec2",
            _hf_speech("Wav2Vec2", "Model"),
            waves,
            lambda output: (output.last_hidden_state,),
        ),
        Tiny(
            "hf_wavlm",
            _hf_speech("WavLM", "Model", **LARGE),
            waves,
            lambda output: (output.last_hidden_state,),
        ),
        Tiny(
            "hf_wav2vec2_bert",
            _hf_speech("Wav2Vec2Bert", "ForCTC", **CONFORMER),
            mels,
            lambda output: (output.logits,),
        ),
        Tiny(
            "hf_whisper",
            _hf_whisper("ForConditionalGeneration"),
            spoken,
            lambda output: (output.logits,),
        ),
        Tiny("timm_swin", timm_swin, lambda rows: {"x": pixels(rows)}, lambda output: (output,)),
        Tiny(
            "own_transformer",
            own_transformer,
            lambda rows: {"frames": frames(rows)},
            lambda output: (output,),
        ),
    )
}


def _tokens(rows: int) -> dict[str, Tensor]:
    return {"input_ids": tokens(rows)}


def _images(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(rows)}


def _logits(output: Any) -> tuple[Tensor, ...]:
    return (output.logits,)


def _hidden(output: Any) -> tuple[Tensor, ...]:
    return (output.last_hidden_state,)


#: models that share a table with one above; the laws are not run over them
RELATIVES: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        Tiny(
            "hf_roberta",
            _hf_text("Roberta", "ForSequenceClassification", num_labels=CLASSES),
            _tokens,
            _logits,
        ),
        Tiny(
            "hf_llama_bare",
            _hf_decoder("Llama", "Model", attention_bias=True, mlp_bias=True),
            _tokens,
            _hidden,
        ),
        Tiny("hf_granite", _hf_decoder("Granite", "ForCausalLM"), _tokens, _logits),
        Tiny("hf_gemma2", _hf_decoder("Gemma2", "ForCausalLM"), _tokens, _logits),
        Tiny("hf_xlm_roberta", _hf_text("XLMRoberta", "Model"), _tokens, _pooled_and_tokens),
        Tiny("hf_camembert", _hf_text("Camembert", "ForMaskedLM"), _tokens, _logits),
        Tiny("hf_electra", _hf_text("Electra", "Model", embedding_size=8), _tokens, _hidden),
        Tiny(
            "hf_deberta_v2",
            _hf_text(
                "DebertaV2",
                "ForSequenceClassification",
                num_labels=CLASSES,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,
                position_buckets=4,
            ),
            _tokens,
            _logits,
        ),
        Tiny(
            "hf_distilbert",
            _hf_text(
                "DistilBert",
                "ForTokenClassification",
                num_labels=CLASSES,
                dim=WIDTH,
                hidden_dim=4 * WIDTH,
            ),
            _tokens,
            _logits,
        ),
        Tiny(
            "hf_deit",
            _hf_vision("DeiT", "ForImageClassification", num_labels=CLASSES),
            _images,
            _logits,
        ),
        Tiny(
            "hf_deit_teacher",
            _hf_vision("DeiT", "ForImageClassificationWithTeacher"),
            _images,
            _logits,
        ),
        Tiny(
            "hf_beit",
            _hf_vision(
                "Beit",
                "ForImageClassification",
                num_labels=CLASSES,
                layer_scale_init_value=0.5,
                use_relative_position_bias=True,
            ),
            _images,
            _logits,
        ),
        Tiny(
            "hf_vit_mae",
            _hf_vision("ViTMAE", "Model", mask_ratio=0.5),
            lambda rows: {**_images(rows), "noise": torch.arange(4.0).flip(0).repeat(rows, 1)},
            _hidden,
        ),
        Tiny("hf_ast_bare", _hf_ast("Model"), spectra, _pooled_and_tokens),
        Tiny("hf_wav2vec2_large", _hf_speech("Wav2Vec2", "ForCTC", **LARGE), waves, _logits),
        Tiny("hf_hubert", _hf_speech("Hubert", "ForCTC"), waves, _logits),
        Tiny(
            "hf_hubert_large",
            _hf_speech("Hubert", "ForSequenceClassification", **LARGE),
            waves,
            _logits,
        ),
        Tiny("hf_unispeech", _hf_speech("UniSpeech", "Model", **LARGE), waves, _hidden),
        Tiny(
            "hf_unispeech_sat",
            _hf_speech("UniSpeechSat", "ForAudioFrameClassification"),
            waves,
            _logits,
        ),
        Tiny(
            "hf_data2vec_audio",
            _hf_speech("Data2VecAudio", "ForCTC", num_conv_pos_embeddings=2),
            waves,
            _logits,
        ),
        Tiny("hf_wavlm_base", _hf_speech("WavLM", "ForCTC"), waves, _logits),
        Tiny(
            "hf_conformer", _hf_speech("Wav2Vec2Conformer", "ForCTC", **CONFORMER), waves, _logits
        ),
        Tiny("hf_parakeet", hf_parakeet, mels, _logits),
        Tiny("hf_whisper_bare", _hf_whisper("Model"), spoken, _hidden),
        Tiny(
            "hf_whisper_classifier",
            _hf_whisper("ForAudioClassification"),
            lambda rows: {"input_features": spoken(rows)["input_features"]},
            _logits,
        ),
        Tiny("timm_registers", _timm_vit(reg_tokens=4), lambda n: {"x": pixels(n)}, lambda y: (y,)),
        Tiny(
            "timm_averaged",
            _timm_vit(class_token=False, global_pool="avg", fc_norm=True),
            lambda n: {"x": pixels(n)},
            lambda y: (y,),
        ),
    )
}


def volumes(rows: int) -> dict[str, Tensor]:
    """A volume of 8 × 8 × 8, two clicks (z, y, x) in it with a label each, for every row."""
    draw = torch.Generator().manual_seed(16)
    return {
        "pixel_values": torch.randn(rows, 1, 8, 8, 8, generator=draw),
        "input_points": 7 * torch.rand(rows, 2, 3, generator=draw),
        "input_labels": torch.randint(0, 2, (rows, 2), generator=draw),
    }


def _whole_or_sliced(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of the volumes, or the embeddings of their first slices where no adapter takes volumes."""
    try:
        return model(**batch)
    except (TypeError, ValueError) as refused:  # as SAM's own forward does
        if isinstance(refused, MmadaptError):
            raise
    bare = getattr(model, "_orig_mod", model)
    encoder = bare.vision_encoder if hasattr(bare, "vision_encoder") else bare.image_encoder
    slices = batch["pixel_values"][:, :, 0].repeat(1, 3, 2, 2)
    found = encoder(slices)
    return found if isinstance(found, Tensor) else found.last_hidden_state


#: SAM as methods for whole volumes meet it
VOLUMES: dict[str, Tiny] = {
    f"{name}_volume": Tiny(
        f"{name}_volume", BACKBONES[name].build, volumes, lambda output: (output,), _whole_or_sliced
    )
    for name in ("hf_sam", "segment_anything")
}


@_seeded
def hf_clip_text() -> nn.Module:
    from transformers import CLIPTextModel

    return CLIPTextModel(_hf_clip_config().text_config)


def cloud(rows: int) -> Tensor:
    """Clouds of 40 points in the unit ball."""
    draw = torch.Generator().manual_seed(17)
    points = torch.randn(rows, 40, 3, generator=draw)
    return points / points.norm(dim=-1, keepdim=True).clamp(min=1)


def _classes_or_tokens(output: Any) -> tuple[Tensor, ...]:
    return (output if isinstance(output, Tensor) else output.last_hidden_state,)


def _cloud_host(name: str, build: Callable, word: str, own: Callable[[int], Tensor]) -> Tiny:
    """A backbone that is given clouds, and its own input, moved by them, where it refuses them."""

    def call(model: Any, batch: dict[str, Tensor]) -> Any:
        try:
            return model(**batch)
        except (ValueError, RuntimeError) as refused:  # as the embeddings' own forward does
            if isinstance(refused, MmadaptError):
                raise
        rows = batch[word]
        given = own(len(rows)).to(rows.device)
        if given.is_floating_point():
            given = given.to(rows.dtype) * (1 + rows.mean((1, 2)).view(-1, *[1] * (given.ndim - 1)))
        return getattr(model, "_orig_mod", model)(**{word: given})

    return Tiny(f"{name}_points", build, lambda rows: {word: cloud(rows)}, _classes_or_tokens, call)


#: transformers of images, sound and text as methods for clouds of points meet them
CLOUDS: dict[str, Tiny] = {
    tiny.name: tiny
    for tiny in (
        *(
            _cloud_host(name, BACKBONES[name].build, "pixel_values", pixels)
            for name in ("hf_vit", "hf_dinov2")
        ),
        _cloud_host(
            "hf_ast", _hf_ast("Model"), "input_values", lambda rows: spectra(rows)["input_values"]
        ),
        _cloud_host("hf_clip_text", hf_clip_text, "input_ids", tokens),
        _cloud_host("hf_bert", hf_bert, "input_ids", tokens),
    )
}

ALL: dict[str, Tiny] = {**BACKBONES, **RELATIVES, **VOLUMES, **CLOUDS}
