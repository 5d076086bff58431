"""Speech as embeddings of a language model: which frames are kept, and that nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import ALL, VOCABULARY, WIDTH, mels, tokens
from snapshot import assert_close, assert_equal, values
from torch import Tensor

import mmadapt as mm
from mmadapt.errors import AdapterFileError, BackboneError, DataError
from mmadapt.ops.ctc import gather_frames, heard_frames, stack_frames
from mmadapt.tasks.speech_to_text import (
    Shape,
    SpeechLanguageModel,
    SpeechToText,
    frames_of,
)

CTC, LLM = "hf_wav2vec2_bert", "hf_llama"


def said(symbols: str, sure: float = 0.99) -> Tensor:
    """Logits (1, T, 3) of a clip that says these symbols, "." the blank, each with p = `sure`."""
    likely = torch.full((1, len(symbols), 3), (1 - sure) / 2)
    for place, symbol in enumerate(symbols):
        likely[0, place, ".ab".index(symbol)] = sure
    return likely.log()


# -- which frames -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("symbols", "kept"),
    [(".aa..b.", "0110010"), ("aab", "111"), ("....a", "00001"), (".", "1"), ("....", "1000")],
)
def test_blanks_are_dropped_and_silence_is_one_frame(symbols: str, kept: str) -> None:
    found = heard_frames(said(symbols), blank=0)
    assert found.tolist() == [[one == "1" for one in kept]]


def test_a_blank_that_is_not_sure_is_kept() -> None:
    logits = torch.cat([said("..", 0.99), said(".", 0.94), said(".", 0.96)], 1)
    assert heard_frames(logits, 0).tolist() == [[False, False, True, False]]
    assert heard_frames(logits, 0, 0.9).tolist() == [[False, False, True, False]]  # the least blank
    assert heard_frames(logits, 0, 0.97).tolist() == [[False, False, True, True]]


def test_padding_is_never_kept_whatever_it_says() -> None:
    logits = torch.cat([said("a.b.aa"), said("....ab")])
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]]).bool()
    kept = heard_frames(logits, 0, mask=mask)
    assert kept.int().tolist() == [[1, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0]]
    logits[1, 2, 0] -= 1e-3  # of silence alone, the frame with the least blank
    assert heard_frames(logits, 0, mask=mask)[1].int().tolist() == [0, 0, 1, 0, 0, 0]


def test_kept_frames_stand_side_by_side_and_neighbours_of_one_symbol_merge() -> None:
    symbols = "aa.abb"
    frames = torch.arange(6.0).view(1, 6, 1).repeat(2, 1, 1)
    kept = heard_frames(said(symbols), 0).repeat(2, 1)
    kept[1] = torch.tensor([0, 0, 0, 1, 0, 0]).bool()
    single, mask = gather_frames(frames, kept)
    assert single[..., 0].tolist() == [[0, 1, 3, 4, 5], [3, 0, 0, 0, 0]]
    assert mask.sum(1).tolist() == [5, 1]
    merged, mask = gather_frames(frames, kept, said(symbols).argmax(-1).repeat(2, 1))
    assert merged[..., 0].tolist() == [[0.5, 3.0, 4.5], [3, 0, 0]]  # a blank parts the two a
    assert mask.sum(1).tolist() == [3, 1]


def test_frames_are_stacked_with_zeros_for_padding() -> None:
    frames = torch.arange(1.0, 11).view(1, 5, 2)
    stacked, mask = stack_frames(frames, torch.tensor([[1, 1, 1, 0, 0]]).bool(), 2)
    assert stacked.tolist() == [[[1, 2, 3, 4], [5, 6, 0, 0], [0, 0, 0, 0]]]
    assert mask.tolist() == [[True, True, False]]


# -- the bridge ---------------------------------------------------------------------------------------


def bridge(**options: Any) -> SpeechToText:
    made = SpeechToText.between(ALL[CTC].fresh(), ALL[LLM].fresh(), layers=1, **options)
    return made.eval()


@pytest.mark.parametrize("reduce", ["blanks", "stack", "stride"])
@pytest.mark.parametrize("merge", [False, True])
def test_a_clip_alone_is_what_it_is_in_a_padded_batch(reduce: str, merge: bool) -> None:
    made = bridge(reduce=reduce, merge=merge, factor=3)
    batch = mels(3)
    model = ALL[CTC].fresh()
    with torch.no_grad():
        whole = made(*frames_of(model, batch))
        for row in range(3):
            length = int(batch["attention_mask"][row].sum())
            one = {key: value[row : row + 1, :length] for key, value in batch.items()}
            own = made(*frames_of(model, one))
            count = int(own.lengths[0])
            assert count == int(whole.lengths[row]) >= 1
            assert_close((whole.embeddings[row, :count],), (own.embeddings[0, :count],), 1e-5)
    assert bool((whole.embeddings[~whole.mask] == 0).all())


def test_it_begins_as_large_as_the_embeddings_it_stands_beside() -> None:
    table = ALL[LLM].fresh().get_input_embeddings().weight  # type: ignore[operator]
    with torch.no_grad():
        spoken = bridge()(*frames_of(ALL[CTC].fresh(), mels(2)))
    made = spoken.embeddings[spoken.mask]
    assert 0.8 < float(made.std() / table.detach().std()) < 1.2
    assert bridge().shape.blank == 0
    assert_equal(
        tuple(bridge().state_dict().values()), tuple(bridge().state_dict().values())
    )  # drawn from a seed of its own


def test_a_saved_bridge_is_the_same_and_other_files_are_refused(tmp_path: Path) -> None:
    made = bridge(merge=True, threshold=0.9)
    made.save(tmp_path / "one" / "bridge.safetensors")
    again = SpeechToText.load(tmp_path / "one" / "bridge.safetensors").eval()
    assert again.shape == made.shape
    inputs = frames_of(ALL[CTC].fresh(), mels(2))
    with torch.no_grad():
        assert_equal((again(*inputs).embeddings,), (made(*inputs).embeddings,))
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(AdapterFileError, match="no safetensors file"):
        SpeechToText.load(tmp_path / "other")
    with pytest.raises(AdapterFileError, match="there is no file"):
        SpeechToText.load(tmp_path / "nowhere")
    model = ALL[CTC].fresh()
    mm.attach(model, mm.Bottleneck(2))
    folder = mm.save(model, tmp_path / "adapter")
    with pytest.raises(AdapterFileError, match="not written by"):
        SpeechToText.load(folder / "adapter.safetensors")


# -- both models ----------------------------------------------------------------------------------------


def both(**options: Any) -> SpeechLanguageModel:
    speech, text = ALL[CTC].fresh(), ALL[LLM].fresh()
    made = SpeechToText.between(speech, text, layers=1, dropout=0.0, **options)
    return SpeechLanguageModel(speech, made, text)


def test_a_row_of_speech_and_text_is_what_it_would_be_alone() -> None:
    model = both().eval()
    speech, ids = mels(3), tokens(3)
    with torch.no_grad():
        whole = model(speech, ids).logits[:, -ids.shape[1] :]
        assert len(set(model.hear(speech).lengths.tolist())) > 1
        for row in range(3):
            length = int(speech["attention_mask"][row].sum())
            one = {key: value[row : row + 1, :length] for key, value in speech.items()}
            own = model(one, ids[row : row + 1]).logits[:, -ids.shape[1] :]
            assert_close((whole[row],), (own[0],), 2e-5)


def test_training_reaches_the_bridge_alone_and_lowers_the_loss() -> None:
    model = both()
    before = {**values(model.speech), **values(model.text)}
    batch = {"speech": mels(2), "input_ids": tokens(2), "labels": tokens(2)}
    history = mm.fit(model, [batch], steps=25, lr=1e-2, progress=False)
    assert history.losses[-1] < 0.8 * history.losses[0]
    after = {**values(model.speech), **values(model.text)}
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.grad is None for p in (*model.speech.parameters(), *model.text.parameters()))
    assert not model.train().speech.training and model.bridge.training


def test_the_language_model_speaks_after_it_has_heard() -> None:
    model = both().eval()
    ids = tokens(2)[:, :3]
    made = model.generate(mels(2), ids, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        text = ids
        for _ in range(4):
            text = torch.cat([text, model(mels(2), text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, text[:, 3:])


@pytest.mark.parametrize("name", ["hf_conformer", "hf_parakeet", "hf_wav2vec2_large"])
def test_every_ctc_model_gives_frames_logits_and_mask(name: str) -> None:
    model: Any = ALL[name].fresh()
    batch = ALL[name].batch(3)
    frames, logits, mask = frames_of(model, batch)
    assert frames.shape == (*logits.shape[:2], WIDTH)
    assert logits.shape[-1] == VOCABULARY
    assert mask is not None and mask.shape == frames.shape[:2]
    assert mask.sum(1).tolist() == sorted(mask.sum(1).tolist(), reverse=True)
    assert not model._forward_pre_hooks


# -- what does not fit ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "pool"}, "one of blanks, stack, stride"),
        ({"layers": -1}, "layers is -1"),
        ({"channels": 0}, "channels is 0"),
        ({"factor": 1.5}, "factor is 1.5"),
        ({"threshold": 0.0}, "threshold is 0.0"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"heads": 3}, "do not divide"),
        ({"merge": False, "blank": True}, "blank is True"),
    ],
)
def test_shapes_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Shape(**{"channels": 8, "text_channels": 16, **options})


def test_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(BackboneError, match=r"(?s)Wav2Vec2Model is no speech encoder.*ForCTC"):
        SpeechToText.between(ALL["hf_wav2vec2"].fresh(), ALL[LLM].fresh())
    with pytest.raises(BackboneError, match="no embeddings of tokens"):
        SpeechToText.between(ALL[CTC].fresh(), torch.nn.Linear(2, 2))
    other = SpeechToText(Shape(8, 16, heads=4))
    with pytest.raises(BackboneError, match="8 channels of frames"):
        SpeechLanguageModel(ALL[CTC].fresh(), other, ALL[LLM].fresh())
    with pytest.raises(DataError, match=r"(?s)logits.*none were given"):
        other(torch.zeros(1, 4, 8))
    with pytest.raises(DataError, match="the blank's id"):
        SpeechToText(Shape(8, 16, blank=5))(torch.zeros(1, 4, 8), torch.zeros(1, 4, 3))
