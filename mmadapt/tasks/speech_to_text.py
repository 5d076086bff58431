"""Speech for a frozen language model: frames of a frozen CTC model become embeddings it reads.

Wang et al. 2023, SLM: Bridge the thin gap between speech and text foundation models,
arXiv:2310.00230. Both models stay as they are; what trains stands between them. Most frames of a CTC
model say "blank": they are dropped, the others go through a projection and a few blocks of attention.

    bridge = SpeechToText.between(ctc, llm)
    both = SpeechLanguageModel(ctc, bridge, llm)
    mm.fit(both, data)               # batches {"speech": {...}, "input_ids": ..., "labels": ...}
    bridge.save("bridge.safetensors")
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmadapt.core.backbone import unwrap, unwrap_model
from mmadapt.core.store import replace_file
from mmadapt.errors import AdapterFileError, BackboneError, DataError
from mmadapt.ops.ctc import gather_frames, heard_frames, stack_frames

REDUCTIONS = ("blanks", "stack", "stride")


@dataclass(frozen=True)
class Shape:
    """What a `SpeechToText` is made of."""

    #: of a frame, and of an embedding of the language model
    channels: int
    text_channels: int
    #: how frames become fewer: blanks dropped, `factor` frames side by side, or a convolution with
    #: `factor` as its stride
    reduce: Literal["blanks", "stack", "stride"] = "blanks"
    layers: int = 2
    heads: int = 8
    factor: int = 4
    blank: int = 0
    #: of "blanks": a frame whose likeliest symbol is the blank is kept where p(blank) is below it
    threshold: float = 0.95
    #: of "blanks": neighbouring frames of one symbol become their mean
    merge: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("channels", "text_channels", "heads", "factor"):
            _whole(name, getattr(self, name), 1)
        for name in ("layers", "blank"):
            _whole(name, getattr(self, name), 0)
        if self.reduce not in REDUCTIONS:
            raise DataError(f"reduce is {self.reduce!r}, expected one of {', '.join(REDUCTIONS)}")
        if not 0.0 < self.threshold <= 1.0 or not 0.0 <= self.dropout < 1.0:
            raise DataError(
                f"threshold is {self.threshold!r} and dropout is {self.dropout!r}, expected a number in "
                "(0, 1] and one in [0, 1)"
            )
        if self.text_channels % self.heads:
            raise DataError(
                f"heads is {self.heads}, and {self.text_channels} channels do not divide by it"
            )


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise DataError(f"{name} is {value!r}, expected a whole number of at least {least}")


@dataclass(frozen=True, eq=False)
class Spoken:
    """Embeddings (B, L, D) of what was said, and which of them there are, bool (B, L)."""

    embeddings: Tensor
    mask: Tensor

    @property
    def lengths(self) -> Tensor:
        """How many embeddings each clip has (B,); 1 at least."""
        return self.mask.sum(1)


class SpeechToText(nn.Module):
    """Frames of a speech encoder to embeddings of a language model.

    Called with frames (B, T, channels), the CTC logits (B, T, K) that "blanks" needs, and the mask
    of the frames, bool (B, T). No clip sees another or its own padding.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, text = shape.channels, shape.text_channels
        grown = width * (shape.factor if shape.reduce == "stack" else 1)
        self.norm = nn.LayerNorm(width)
        if shape.reduce == "stride":
            self.convolution = nn.Conv1d(width, width, shape.factor, shape.factor)
        self.projection = nn.Linear(grown, text)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                text,
                shape.heads,
                4 * text,
                shape.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
            )
            for _ in range(shape.layers)
        )
        self.out_norm = nn.LayerNorm(text)

    @classmethod
    def between(cls, speech: Any, text: Any, seed: int = 0, **options: Any) -> SpeechToText:
        """One for these two models: as wide as they are, with the CTC model's blank.

        Its embeddings begin as large as the language model's own, of which it takes the deviation.
        """
        model, anatomy, _ = unwrap(speech)
        view = _head(model, anatomy)
        table = _embeddings(unwrap_model(text)).weight
        chosen = {"blank": getattr(model.config, "pad_token_id", None) or 0, **options}
        if "heads" not in chosen:
            chosen["heads"] = next(n for n in (8, 4, 2, 1) if table.shape[1] % n == 0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = cls(Shape(view.width_in, table.shape[1], **chosen))
        nn.init.constant_(made.out_norm.weight, float(table.detach().float().std()))
        return made.to(table.device)

    def forward(
        self, frames: Tensor, logits: Tensor | None = None, mask: Tensor | None = None
    ) -> Spoken:
        if mask is None:
            mask = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device)
        frames = self.norm(frames.to(self.norm.weight.dtype))
        frames, mask = self._fewer(frames, logits, mask)
        x = self.projection(frames)
        for block in self.blocks:
            x = block(x, src_key_padding_mask=~mask)
        return Spoken(torch.where(mask[..., None], self.out_norm(x), 0.0), mask)

    def _fewer(self, frames: Tensor, logits: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        shape = self.shape
        if shape.reduce == "stack":
            return stack_frames(frames, mask, shape.factor)
        if shape.reduce == "stride":
            stacked, mask = stack_frames(frames, mask, shape.factor)
            return self.convolution(stacked.reshape(len(frames), -1, shape.channels).mT).mT, mask
        if logits is None:
            raise DataError(
                'reduce="blanks" drops frames by the logits of a CTC model, and none were given',
                'pass logits=, or make it with reduce="stack"',
            )
        if logits.shape[:2] != frames.shape[:2] or not shape.blank < logits.shape[-1]:
            raise DataError(
                f"the logits are {tuple(logits.shape)}, expected {tuple(frames.shape[:2])} frames and more "
                f"than {shape.blank} symbols, the blank's id"
            )
        kept = heard_frames(logits.detach(), shape.blank, shape.threshold, mask)
        symbols = logits.argmax(-1) if shape.merge else None
        return gather_frames(frames, kept, symbols)

    def save(self, path: str | Path) -> Path:
        """Write it to one safetensors file, whose header says its shape."""
        from safetensors.torch import save as to_bytes

        target = Path(path).expanduser()
        tensors = {
            key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()
        }
        target.parent.mkdir(parents=True, exist_ok=True)
        header = {"format": "pt", "speech_to_text": json.dumps(asdict(self.shape))}
        replace_file(target, to_bytes(tensors, header))
        return target

    @classmethod
    def load(cls, path: str | Path) -> SpeechToText:
        """What `save` wrote. Raises `AdapterFileError` for any other file."""
        from safetensors import SafetensorError, safe_open

        target = Path(path).expanduser()
        if not target.is_file():
            raise AdapterFileError(f"there is no file {target}")
        try:
            with safe_open(target, "pt") as file:
                header = (file.metadata() or {}).get("speech_to_text")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFileError(f"{target} is no safetensors file: {error}") from None
        if header is None:
            raise AdapterFileError(f"{target} was not written by SpeechToText.save")
        made = cls(Shape(**json.loads(header)))
        try:
            made.load_state_dict(tensors)
        except RuntimeError as error:
            raise AdapterFileError(
                f"{target} does not hold what its header says: {error}"
            ) from None
        return made


class SpeechLanguageModel(nn.Module):
    """A frozen CTC model, a `SpeechToText`, and a frozen language model that reads speech, then text.

    Speech stands before the text, padded on its left, so that every row is as it would be alone.
    """

    def __init__(self, speech: Any, bridge: SpeechToText, text: Any) -> None:
        super().__init__()
        self.speech, self.text = unwrap_model(speech), unwrap_model(text)
        self.bridge = bridge
        head = _head(self.speech, unwrap(speech)[1])
        wide = _embeddings(self.text).weight.shape[1]
        if (bridge.shape.channels, bridge.shape.text_channels) != (head.width_in, wide):
            raise BackboneError(
                f"the bridge is made for {bridge.shape.channels} channels of frames and "
                f"{bridge.shape.text_channels} of embeddings; these models have {head.width_in} and {wide}",
                "SpeechToText.between(speech, text) makes one that fits",
            )
        for frozen in (self.speech, self.text):
            frozen.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> SpeechLanguageModel:
        """The two models stay in eval mode."""
        super().train(mode)
        self.speech.eval()
        self.text.eval()
        return self

    def hear(self, speech: dict[str, Tensor]) -> Spoken:
        """Embeddings of what the CTC model makes of its inputs."""
        return self.bridge(*frames_of(self.speech, speech))

    def forward(
        self,
        speech: dict[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """What the language model gives for speech and text (B, N); the loss is over text alone."""
        inputs = self._inputs(speech, input_ids, attention_mask)
        mask = inputs["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if labels is not None:
            silent = labels.new_full((len(labels), mask.shape[1] - labels.shape[1]), -100)
            labels = torch.cat([silent, labels], 1)
        return self.text(**inputs, position_ids=positions, labels=labels)

    @torch.no_grad()
    def generate(
        self,
        speech: dict[str, Tensor],
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """What the language model says next, as its own `generate` gives it."""
        made: Any = self.text
        return made.generate(**self._inputs(speech, input_ids, attention_mask), **options)

    def _inputs(
        self, speech: dict[str, Tensor], input_ids: Tensor, attention_mask: Tensor | None
    ) -> dict[str, Tensor]:
        spoken = _left(self.hear(speech))
        written = _embeddings(self.text)(input_ids)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        return {
            "inputs_embeds": torch.cat([spoken.embeddings.to(written.dtype), written], 1),
            "attention_mask": torch.cat([spoken.mask.long(), attention_mask.long()], 1),
        }


def frames_of(speech: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the head of a CTC model reads (B, T, C), what it says (B, T, K), and the mask (B, T)."""
    model, anatomy, _ = unwrap(speech)
    seen: dict[str, Any] = {}
    path, fill = next(iter(anatomy.fills.items()))
    told = model.get_submodule(path).register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(fill(module, args, kwargs)), with_kwargs=True
    )
    read = _head(model, anatomy).module.register_forward_pre_hook(
        lambda module, args: seen.update(frames=args[0])
    )
    try:
        with torch.no_grad():
            logits = model(**inputs).logits
    finally:
        told.remove()
        read.remove()
    return seen["frames"], logits, seen["mask"]


def _head(model: Any, anatomy: Any) -> Any:
    """The site of a CTC model's head."""
    spans = anatomy.roles(model)
    span = spans.get("logits")
    if span is None or span.layout != "BTK" or "audio.layers[0]" not in spans:
        raise BackboneError(
            f"{type(model).__name__} is no speech encoder with a CTC head",
            "take a class such as transformers.Wav2Vec2ForCTC",
        )
    return anatomy.view(model, "logits", span.ports[0], span)


def _embeddings(text: Any) -> nn.Embedding:
    found = getattr(text, "get_input_embeddings", lambda: None)()
    if not isinstance(found, nn.Embedding):
        raise BackboneError(
            f"{type(text).__name__} has no embeddings of tokens",
            "take a language model of transformers, such as LlamaForCausalLM",
        )
    return found


def _left(spoken: Spoken) -> Spoken:
    """The same with the padding on the left."""
    order = spoken.mask.long().argsort(dim=1, stable=True)
    embeddings = spoken.embeddings.gather(1, order[..., None].expand_as(spoken.embeddings))
    return Spoken(embeddings, spoken.mask.gather(1, order))
