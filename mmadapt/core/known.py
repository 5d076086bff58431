"""Which table describes which class of model, by name, so that no backbone library is imported for it."""

from __future__ import annotations

from collections.abc import Iterable


def _transformers(table: str, family: str, prefix: str, heads: Iterable[str]) -> dict[str, str]:
    """transformers' classes of one family, all described by one table."""
    module = f"transformers.models.{family}.modeling_{family}"
    return {f"{module}.{prefix}{head}": f"mmadapt.backbones.{table}" for head in heads}


_IMAGES = ("Model", "ForImageClassification")
_TEXTS = (
    "Model",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMaskedLM",
)
_DECODERS = ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
_AUDIO = ("Model", "ForSequenceClassification")
_SPEECH = (*_AUDIO, "ForCTC", "ForAudioFrameClassification", "ForXVector")
_WAV2VEC2 = "wav2vec2:wav2vec2_anatomy"
_TEXT = ("TextModel", "TextModelWithProjection")
_CONFORMER = "conformer:conformer_anatomy"
_VISION = ("VisionModel", "VisionModelWithProjection")

#: fully qualified class name -> "module:function of the model" that returns its anatomy
KNOWN: dict[str, str] = {
    "open_clip.model.CLIP": "mmadapt.backbones.clip:open_clip_anatomy",
    "open_clip.model.CustomTextCLIP": "mmadapt.backbones.clip:open_clip_anatomy",
    "open_clip.transformer.VisionTransformer": "mmadapt.backbones.clip:open_clip_vision_anatomy",
    "timm.models.vision_transformer.VisionTransformer": "mmadapt.backbones.vit:timm_vit_anatomy",
    "segment_anything.modeling.sam.Sam": "mmadapt.backbones.sam:segment_anything_anatomy",
    "mmadapt.tasks.few_shot.classifier.ZeroShotClassifier": "mmadapt.backbones.clip:classifier_anatomy",
    "mmadapt.tasks.tagging.pooled.PooledEncoder": "mmadapt.backbones.pooled:pooled_anatomy",
    **_transformers("clip:hf_clip_anatomy", "clip", "CLIP", ["Model"]),
    **_transformers("clip:hf_clip_vision_anatomy", "clip", "CLIP", _VISION),
    **_transformers("clip_text:hf_clip_text_anatomy", "clip", "CLIP", _TEXT),
    **_transformers("siglip:siglip_anatomy", "siglip", "Siglip", ["Model"]),
    **_transformers(
        "siglip:siglip_vision_anatomy",
        "siglip",
        "Siglip",
        ["VisionModel", "ForImageClassification"],
    ),
    **_transformers("vit:vit_anatomy", "vit", "ViT", _IMAGES),
    **_transformers(
        "vit:vit_anatomy", "deit", "DeiT", [*_IMAGES, "ForImageClassificationWithTeacher"]
    ),
    **_transformers("vit:vit_anatomy", "beit", "Beit", _IMAGES),
    **_transformers("vit:vit_anatomy", "vit_mae", "ViTMAE", _IMAGES),
    **_transformers("vit:dinov2_anatomy", "dinov2", "Dinov2", _IMAGES),
    **_transformers("vit:dinov2_anatomy", "dinov2_with_registers", "Dinov2WithRegisters", _IMAGES),
    **_transformers("bert:bert_anatomy", "bert", "Bert", _TEXTS),
    **_transformers("bert:bert_anatomy", "roberta", "Roberta", _TEXTS),
    **_transformers("bert:bert_anatomy", "xlm_roberta", "XLMRoberta", _TEXTS),
    **_transformers("bert:bert_anatomy", "camembert", "Camembert", _TEXTS),
    **_transformers("bert:bert_anatomy", "electra", "Electra", _TEXTS),
    **_transformers("bert:deberta_anatomy", "deberta_v2", "DebertaV2", _TEXTS),
    **_transformers("bert:distilbert_anatomy", "distilbert", "DistilBert", _TEXTS),
    **_transformers("llama:llama_anatomy", "llama", "Llama", _DECODERS),
    **_transformers("llama:llama_anatomy", "mistral", "Mistral", _DECODERS),
    **_transformers("llama:llama_anatomy", "qwen2", "Qwen2", _DECODERS),
    **_transformers("llama:llama_anatomy", "qwen3", "Qwen3", _DECODERS),
    **_transformers("llama:llama_anatomy", "gemma", "Gemma", _DECODERS),
    **_transformers("sam:sam_anatomy", "sam", "Sam", ["Model"]),
    **_transformers("sam:sam_vision_anatomy", "sam", "Sam", ["VisionModel"]),
    **_transformers("sam2:sam2_anatomy", "sam2", "Sam2", ["Model"]),
    **_transformers(
        "audio:ast_anatomy",
        "audio_spectrogram_transformer",
        "AST",
        ["Model", "ForAudioClassification"],
    ),
    **_transformers(_WAV2VEC2, "wav2vec2", "Wav2Vec2", _SPEECH),
    **_transformers(_CONFORMER, "wav2vec2_conformer", "Wav2Vec2Conformer", _SPEECH),
    **_transformers(_CONFORMER, "wav2vec2_bert", "Wav2Vec2Bert", _SPEECH),
    **_transformers("conformer:parakeet_anatomy", "parakeet", "Parakeet", ("Encoder", "ForCTC")),
    **_transformers(
        "whisper:whisper_anatomy",
        "whisper",
        "Whisper",
        ("Model", "ForConditionalGeneration", "ForAudioClassification"),
    ),
    **_transformers(_WAV2VEC2, "hubert", "Hubert", (*_AUDIO, "ForCTC")),
    **_transformers(_WAV2VEC2, "unispeech", "UniSpeech", (*_AUDIO, "ForCTC")),
    **_transformers(_WAV2VEC2, "unispeech_sat", "UniSpeechSat", _SPEECH),
    **_transformers(_WAV2VEC2, "wavlm", "WavLM", _SPEECH),
    **{  # its module is named unlike its package
        f"transformers.models.data2vec.modeling_data2vec_audio.Data2VecAudio{head}": (
            f"mmadapt.backbones.{_WAV2VEC2}"
        )
        for head in _SPEECH
    },
}
