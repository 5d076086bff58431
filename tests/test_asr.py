"""Speech recognition: what is written, how errors are counted, and what is refused."""

import json
import math
import sys
import warnings

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import (
    AttachError,
    BackboneError,
    CheckError,
    DataError,
    MissingDependencyError,
    ZooError,
)
from mmadapt.tasks import asr
from mmadapt.tasks.asr import clips as shipped_clips
from mmadapt.tasks.asr.score import percent, pooled
from mmadapt.tasks.audio import Audio

LETTERS = asr.Vocabulary(("<pad>", "|", *"abcdeghilnorstuwxz"))


class Ready:
    """A model that answers with the logits it is given."""

    def __init__(self, logits):
        self.logits = logits

    def __call__(self, **inputs):
        return self


def one_hot(ids, size=20, sure=8.0):
    return sure * F.one_hot(torch.tensor(ids), size).float()


# -- vocabulary ---------------------------------------------------------------------------------


def test_text_becomes_numbers_and_comes_back():
    ids = LETTERS.ids("one  two\n")
    assert [LETTERS.tokens[i] for i in ids] == list("one|two")
    assert LETTERS.text(ids) == "one two"


def test_characters_the_vocabulary_lacks_are_all_listed_or_dropped():
    with pytest.raises(DataError, match=r"'f' \(2×\), '4' \(1×\)") as error:
        LETTERS.ids("fife4")
    assert "drop" in str(error.value)
    assert LETTERS.text(LETTERS.ids("fi 4 fe4", unknown="drop")) == "i e"
    with pytest.raises(DataError, match="refuse"):
        LETTERS.ids("one", unknown="ignore")  # type: ignore[arg-type]


def test_text_takes_the_case_of_the_vocabulary():
    upper = asr.Vocabulary(("<pad>", "<s>", "</s>", "<unk>", "|", "A", "É", "'"))
    assert upper.spell("é a") == "É A"  # e and an accent become one character
    assert upper.text(upper.ids("a'é")) == "A'É"
    mixed = asr.Vocabulary(("_", "a", "A"))
    assert mixed.ids("aA") == [1, 2]


def test_vocabularies_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(DataError, match="twice"):
        asr.Vocabulary(("<pad>", "a", "a"))
    with pytest.raises(DataError, match="single character"):
        asr.Vocabulary(("<pad>", "ab", "cd"))
    with pytest.raises(DataError, match="no blank"):
        asr.Vocabulary.of({"a": 0, "b": 1})
    with pytest.raises(DataError, match="0 to 1"):
        asr.Vocabulary.of({"<pad>": 0, "b": 2})
    (tmp_path / "vocab.json").write_text('{"eng": {"<pad>": 0}}')
    with pytest.raises(DataError, match="language"):
        asr.Vocabulary.read(tmp_path / "vocab.json")
    with pytest.raises(DataError, match="no vocabulary"):
        asr.Vocabulary.of(nn.Linear(2, 2))


def test_normalised_text_keeps_marks_and_apostrophes_and_loses_punctuation():
    assert asr.normalise("Hello, WORLD — it's 3/4 «done».") == "hello world it's 3 4 done"
    assert asr.normalise("हिन्दी।") == "हिन्दी"
    assert asr.normalise("e\u0301t\u00e9") == "été"


# -- loss ---------------------------------------------------------------------------------------


def test_frames_needed_counts_a_blank_between_repeats():
    labels = torch.tensor([[1, 1, 2, 2], [3, 4, 3, -100], [-100] * 4])
    assert asr.frames_needed(labels).tolist() == [6, 3, 0]


def brute_force(chances, labels):
    """−log of the sum over all paths that read as the labels."""
    import itertools

    total = 0.0
    for path in itertools.product(range(chances.shape[1]), repeat=len(chances)):
        read = [n for n, _ in itertools.groupby(path) if n]
        if read == labels:
            total += math.prod(float(chances[t, n]) for t, n in enumerate(path))
    return -math.log(total)


def test_the_loss_is_that_of_all_paths_summed_over_the_length_and_the_mean_of_clips():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 3)
    chances = logits.softmax(-1)
    expected = (brute_force(chances[0], [1, 1]) / 2 + brute_force(chances[1][:4], [2]) / 1) / 2
    batch = {"labels": torch.tensor([[1, 1], [2, -100]]), "frames": torch.tensor([5, 4])}
    assert float(asr.CTCLoss()(Ready(logits), batch)) == pytest.approx(expected, rel=1e-5)


def test_pairs_that_do_not_fit_are_left_out_counted_and_told_once():
    logits = torch.randn(3, 5, 4, requires_grad=True)
    labels = torch.tensor([[1, 1, 2, 2], [1, 2, 3, -100], [1, 2, -100, -100]])
    batch = {"labels": labels, "frames": torch.tensor([5, 5, 1])}
    loss = asr.CTCLoss()
    with pytest.warns(UserWarning, match="row 0 .* 5 frames and labels that need 6"):
        value = loss(Ready(logits), batch)
    alone = {"labels": labels[1:2], "frames": torch.tensor([5])}
    assert torch.equal(value, asr.CTCLoss()(Ready(logits[1:2]), alone))
    assert (loss.left_out, loss.pairs) == (2, 3)
    value.backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all()
    assert not logits.grad[0].any() and logits.grad[1].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        none = loss(Ready(logits), {"labels": labels[:1], "frames": torch.tensor([5])})
    assert none.requires_grad and float(none.detach()) == 0


def test_batches_that_are_not_meant_for_this_loss_are_refused():
    loss, logits = asr.CTCLoss(), torch.randn(1, 5, 4)
    with pytest.raises(DataError, match="is a tuple, expected a mapping"):
        loss(Ready(logits), ([], []))
    with pytest.raises(DataError, match="lacks 'frames'"):
        loss(Ready(logits), {"labels": torch.tensor([[1]])})
    with pytest.raises(CheckError, match="up to 800 frames"):
        loss(Ready(logits), {"labels": torch.tensor([[1]]), "frames": torch.tensor([800])})
    with pytest.raises(DataError, match="0 to 3"):
        loss(Ready(logits), {"labels": torch.tensor([[4]]), "frames": torch.tensor([5])})
    with pytest.raises(DataError, match="blank"):
        loss(Ready(logits), {"labels": torch.tensor([[0, 1]]), "frames": torch.tensor([5])})


# -- decoding -----------------------------------------------------------------------------------


def test_repeats_and_blanks_are_left_out_and_words_have_times():
    # a a - a | | b b -
    logits = one_hot([2, 2, 0, 2, 1, 1, 3, 3, 0])
    first, second = asr.greedy(logits, LETTERS, seconds=0.02)
    assert (first.text, second.text) == ("aa", "b")
    assert (first.start, first.end) == (0.0, 0.08)
    assert (second.start, second.end) == (pytest.approx(0.12), pytest.approx(0.16))
    sure = float(logits.softmax(-1).max())
    assert first.confidence == pytest.approx(sure)
    transcript = asr.Transcript((first, second), ("silence: −∞ dB",))
    assert transcript.text == "aa b"
    assert "silence" in repr(transcript) and "0.12" in transcript._repr_html_()


def test_what_is_read_does_not_depend_on_how_frames_are_cut():
    torch.manual_seed(1)
    logits = torch.randn(40, 20) * 3
    whole = asr.greedy(logits, LETTERS)
    for size in (1, 3, 7):
        pieces = asr.Greedy(LETTERS, 0.02)
        for part in logits.split(size):
            pieces.push(part)
        assert pieces.words() == whole


# -- error rates --------------------------------------------------------------------------------


def distance(first, second):
    """Levenshtein's, row by row."""
    row = list(range(len(second) + 1))
    for i, one in enumerate(first, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(second, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (one != other))
    return row[-1]


@pytest.mark.parametrize("unit", ["word", "character"])
def test_alignments_have_the_fewest_changes(unit):
    generator = numpy.random.default_rng(3)
    for _ in range(60):
        first, second = (
            " ".join(generator.choice(["a", "bc", "d"], generator.integers(0, 6))) for _ in "12"
        )
        aligned = asr.align(first, second, unit)
        units = (first.split(), second.split()) if unit == "word" else (first, second)
        assert aligned.errors.wrong == distance(*units)
        assert [p[1] for p in aligned.pairs if p[1]] == list(units[0])
        assert [p[2] for p in aligned.pairs if p[2]] == list(units[1])
        assert all((p[0] == "") == (p[1] == p[2]) for p in aligned.pairs)


def test_rates_are_pooled_and_nothing_said_is_no_number():
    score = asr.Score(("a b c d e f g h i", "x"), ("a b c d e f g h i", "y"))
    assert score.wer == 0.1  # the mean over clips would be a half
    assert asr.Score(("Hello, world",), ("hello world",)).wer == 0
    assert asr.Score(("Hello, world",), ("hello world",)).wer_raw == 0.5
    assert math.isnan(asr.align("", "a b").errors.rate)
    assert asr.align("", "a b").errors.insertions == 2
    both = asr.Score(("a", ""), ("a", "b"))
    assert both.wer == 1.0  # the word that was added counts
    assert percent(math.nan) == "–"
    with pytest.raises(DataError, match="2 texts were said and 1 heard"):
        asr.Score(("a", "b"), ("a",))


def test_intervals_hold_the_rate_and_do_not_change():
    generator = numpy.random.default_rng(0)
    heard = tuple("a b" if right else "a c" for right in generator.random(80) < 0.7)
    score = asr.Score(("a b",) * 80, heard)
    low, high = score.interval()
    assert (low, high) == score.interval()
    assert low < score.wer < high
    wide = score.interval(0.999)
    assert wide[0] < low and high < wide[1]
    change, least, most = asr.difference(score, asr.Score(score.said, score.said))
    assert change == -score.wer
    assert least <= change <= most < 0
    with pytest.raises(DataError, match="different texts"):
        asr.difference(score, asr.Score(("a",), ("a",)))
    with pytest.raises(DataError, match="level"):
        score.interval(95)


def test_an_alignment_is_seen_as_text_and_as_a_table():
    aligned = asr.align("one two three", "one too four three")
    assert str(aligned).splitlines() == [
        "said  one *** two  three",
        "heard one too four three",
        "          I   S",
    ]
    words = [
        asr.Word(w, i / 10, i / 10 + 0.05, 1.0)
        for i, w in enumerate(["one", "too", "four", "three"])
    ]
    page = aligned.timed(words)._repr_html_()
    assert page.count(">I<") == 1 and page.count(">S<") == 1 and "0.10–0.15" in page
    assert "<b>" not in asr.align("<b>", "<b>")._repr_html_()
    assert "␣" in str(asr.align("a b", "ab", "character"))
    with pytest.raises(DataError, match="words for an alignment"):
        aligned.timed(words[:1])
    confused = asr.Score(("one two",) * 2, ("one too",) * 2).confusions()
    assert confused.rows == [("S", "two", "too", 2)]


# -- a model that is known, and one that hears nearby frames only ----------------------------------


@pytest.fixture(scope="module")
def ctc():
    return mm.load("tiny/ctc")


@pytest.fixture(scope="module")
def listen(ctc):
    return asr.Recogniser(ctc)


@pytest.fixture(scope="module")
def sets():
    return asr.shipped("tiny/ctc")


def test_the_backbone_comes_with_its_head_vocabulary_and_front_end(ctc, listen):
    assert type(ctc.model).__name__ == "Wav2Vec2ForCTC"
    assert listen.vocabulary.text(listen.vocabulary.ids("zero nine")) == "zero nine"
    assert (listen.features.rate, listen.features.least, listen.hop) == (8000, 200, 160)
    assert not ctc.model.training


def test_the_front_end_tells_frequencies_and_levels_apart(ctc, listen):
    front = ctc.model.wav2vec2.feature_extractor
    times = torch.arange(8000) / 8000
    low, high = (front(torch.sin(2 * math.pi * hertz * times)[None])[0] for hertz in (300, 2500))
    assert low.shape == (64, listen.features.frames(8000)) == (64, 49)
    assert 5 < int(low.mean(1).argmax()) < 20 < 45 < int(high.mean(1).argmax()) < 64
    assert 0.5 < float(high.exp().amax()) < 4
    half = front(0.5 * torch.sin(2 * math.pi * 2500 * times)[None])[0]
    assert float((high - half).amax(0).median()) == pytest.approx(2 * math.log(2), abs=0.05)
    silence = front(torch.zeros(1, 400))
    assert torch.allclose(silence, torch.full_like(silence, math.log(1e-6)))


def test_a_folder_with_a_ctc_model_is_loaded_with_its_head_and_vocabulary(tmp_path):
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    torch.manual_seed(0)
    config = Wav2Vec2Config(
        vocab_size=len(LETTERS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, conv_dim=(8, 8), conv_kernel=(10, 3), conv_stride=(5, 2),
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text(
        json.dumps({token: place for place, token in enumerate(LETTERS.tokens)})
    )
    found = mm.load(tmp_path)
    assert torch.equal(found.model.lm_head.weight, model.lm_head.weight)
    listen = asr.Recogniser(found)
    assert listen.vocabulary == LETTERS == asr.Vocabulary.read(tmp_path / "vocab.json")
    assert (listen.features.rate, listen.hop, listen.features.normalise) == (16000, 10, True)
    clip = noise(0.1, 16000)
    assert listen.logits([clip])[0].shape == (listen.features.frames(len(clip)), len(LETTERS))


def test_known_voices_are_understood_and_whispers_are_not(listen, sets):
    clips, texts = sets["source test"]
    assert listen.score(clips, texts).wer < 0.05
    clips, texts = sets["whisper test"]
    assert listen.score(clips, texts).wer > 0.7


def test_a_clip_is_heard_alike_beside_others(listen, sets):
    clips = sets["source test"][0][:4]
    together = listen.logits(clips, batch_size=4)
    for clip, among in zip(clips, together, strict=True):
        alone = listen.logits([clip])[0]
        assert alone.shape == among.shape
        assert torch.allclose(alone, among, atol=1e-4)


def test_no_sentence_is_tested_that_was_trained_on(sets):
    trained = set(sets["whisper train"][1])
    assert not trained & (set(sets["whisper test"][1]) | set(sets["source test"][1]))


def nearby(frames=3):
    """Logits of a wave, from so many frames of 20 samples every 10; no padding is masked."""
    torch.manual_seed(0)

    class Nearby(nn.Module):
        def __init__(self):
            super().__init__()
            self.front = nn.Conv1d(1, 8, 20, 10)
            self.beside = nn.Conv1d(8, 8, 2 * frames + 1, padding=frames)
            self.lm_head = nn.Linear(8, len(LETTERS), bias=False)
            nn.init.normal_(self.front.weight, std=0.3)
            nn.init.normal_(self.lm_head.weight[1], std=2.0)  # words end often
            self.config = type("Config", (), {})()

        def forward(self, input_values):
            hidden = self.beside(self.front(input_values[:, None]).tanh()).transpose(1, 2)
            return type("Output", (), {"logits": 4 * self.lm_head(hidden)})()

    return Nearby().eval()


@pytest.fixture(params=[True, False], ids=["normed", "as it is"])
def near(request):
    from mmadapt.tasks.audio import WaveFeatures

    features = WaveFeatures((20,), (10,), masked=False, normalise=request.param, rate=1000)
    return asr.Recogniser(nearby(), features, LETTERS)


def noise(seconds, rate=1000, seed=0):
    samples = 0.7 * numpy.random.default_rng(seed).standard_normal(round(seconds * rate))
    return Audio(samples.astype(numpy.float32), rate)


def test_chunks_that_hear_enough_beside_them_change_nothing(near):
    clip = noise(3.0)
    whole = near.logits([clip])[0]
    cut = asr.chunked_logits(near, clip, asr.Chunks(0.5, before=0.03, after=0.03))
    assert cut.shape == whole.shape
    assert torch.allclose(cut, whole, atol=1e-5)
    short = asr.chunked_logits(near, clip, asr.Chunks(0.5, before=0.02, after=0.03))
    far = (short - whole).abs().amax(1) > 1e-4
    assert far.any() and not far[:50].any()  # only behind the first cut
    assert (
        asr.transcribe_long(near, clip, asr.Chunks(0.5, 0.03, 0.03)).text
        == near.transcribe(clip)[0].text
    )


def test_a_stream_hears_what_chunks_hear_however_it_is_cut(near):
    clip, chunks = noise(2.0, seed=1), asr.Chunks(0.3, before=0.1, after=0.05)
    if not near.features.normalise:
        expected = asr.transcribe_long(near, clip, chunks).words
    results = []
    for size in (1, 37, 400, 5000):
        stream = asr.Stream(near, chunks)
        told = []
        for start in range(0, len(clip), size):
            told += stream.push(clip.samples[start : start + size])
            assert len(stream.waiting) <= (0.3 + 0.1 + 0.05) * 1000 + 20 + size
        told += stream.end()
        assert tuple(told) == stream.transcript.words
        results.append(stream.transcript.words)
    assert all(words == results[0] for words in results)
    assert len(results[0]) > 5
    if not near.features.normalise:
        assert results[0] == expected
    with pytest.raises(DataError, match="has ended"):
        stream.push(clip)


def test_words_of_a_stream_are_told_before_it_ends(listen, sets):
    clips, texts = sets["source test"]
    stream = asr.Stream(listen, asr.Chunks(0.4, before=3.0, after=0.4))
    early = [
        word
        for start in range(0, len(clips[0]), 800)
        for word in stream.push(clips[0].samples[start : start + 800])
    ]
    assert early
    words = [word.text for word in [*early, *stream.end()]]
    assert distance(words, texts[0].split()) <= 2


def test_what_a_stream_refuses_leaves_it_as_it_was(near):
    clip, chunks = noise(1.0, seed=2), asr.Chunks(0.3, before=0.1, after=0.05)
    plain, tried = asr.Stream(near, chunks), asr.Stream(near, chunks)
    refused = {
        "not finite": numpy.array([0.1, math.nan]),
        "no samples": numpy.zeros(0),
        "int16": numpy.ones(9, numpy.int16),
        "one channel": numpy.zeros((100, 2)),
        "8000 samples a second": noise(0.1, 8000),
    }
    for start in range(0, len(clip), 250):
        piece = clip.samples[start : start + 250]
        for words, wrong in refused.items():
            with pytest.raises(DataError, match=words):
                tried.push(wrong)
        assert tried.push(piece) == plain.push(piece)
    assert tried.end() == plain.end()
    assert tried.transcript == plain.transcript and tried.transcript.words


def test_a_long_recording_is_understood_in_chunks(listen, sets):
    clips, texts = sets["source test"]
    joined = Audio(numpy.concatenate([clip.samples for clip in clips[:12]]), 8000)
    heard = asr.transcribe_long(listen, joined, asr.Chunks(4.0, 1.0, 1.0))
    assert asr.Score((" ".join(texts[:12]),), (heard.text,)).wer < 0.1
    starts = [word.start for word in heard.words]
    assert starts == sorted(starts) and starts[-1] > joined.seconds - 2


def test_a_stream_with_a_causal_adapter_hears_what_chunks_hear(sets):
    ctc = mm.load("tiny/ctc")
    listen = asr.Recogniser(ctc)
    attachment = mm.attach(ctc, mm.ConvAdapter(4, kernel=6, causal=True), name="live", seed=0)
    with torch.no_grad():
        for name, parameter in attachment.named_parameters():
            if name.endswith(".up"):
                parameter.normal_(generator=torch.Generator().manual_seed(1), std=0.2)
    clip, chunks = sets["source test"][0][0], asr.Chunks(0.4, before=0.6, after=0.0)
    stream = asr.Stream(listen, chunks)
    words = [
        w
        for start in range(0, len(clip), 999)
        for w in stream.push(clip.samples[start : start + 999])
    ]
    words += stream.end()
    assert tuple(words) == asr.transcribe_long(listen, clip, chunks).words
    with mm.disabled(ctc):
        assert tuple(words) != asr.transcribe_long(listen, clip, chunks).words


# -- training -----------------------------------------------------------------------------------


def test_batches_hold_every_clip_once_and_depend_on_seed_and_epoch_only(listen, sets):
    clips, texts = sets["whisper train"]
    batches = listen.batches(clips, texts, size=8, seed=1)
    first = [b["labels"] for b in batches]
    assert sum(len(labels) for labels in first) == len(clips)
    assert all(torch.equal(a, b["labels"]) for a, b in zip(first, batches, strict=True))
    batches.set_epoch(1)
    second = [b["labels"] for b in batches]
    assert not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, second, strict=True)
    )
    lengths = torch.cat([b["frames"] - b["frames"].min() for b in batches])
    assert float(lengths.float().mean()) < 25  # clips of like length stand together


def test_an_adapter_learns_from_few_clips_and_can_be_turned_off(sets):
    ctc = mm.load("tiny/ctc")
    listen = asr.Recogniser(ctc)
    clips, texts = (part[:8] for part in sets["whisper train"])
    before = listen.logits(clips)
    mm.attach(ctc, mm.ConvAdapter(16), name="whisper", seed=0)
    batches, loss = listen.batches(clips, texts), asr.CTCLoss(listen.vocabulary.blank)
    history = mm.fit(ctc, batches, loss=loss, steps=15, lr=5e-3, progress=False)
    assert history.losses[-1] < 0.6 * history.losses[0]
    assert (loss.pairs, loss.left_out) == (15 * 8, 0)
    found = asr.compare(listen, {"whisper": (clips, texts), "known": sets["source test"]})
    whisper = found["whisper"]
    assert whisper.after.cer < whisper.before.cer
    with mm.disabled(ctc):
        assert all(torch.equal(a, b) for a, b in zip(before, listen.logits(clips), strict=True))
    assert "whisper" in str(found) and "change of WER" in found._repr_html_()
    assert found["whisper"].alignment(0).errors.said == len(texts[0].split())
    with pytest.raises(DataError, match="did you mean 'whisper'"):
        found["whispr"]
    with pytest.raises(AttachError):
        mm.attach(ctc, mm.ConvAdapter(16), name="whisper")


def test_texts_that_clips_cannot_carry_are_left_out_and_silence_is_refused(listen, sets):
    clips, texts = (part[:2] for part in sets["whisper train"])
    short = clips[0].cut(0, 0.2)
    with pytest.warns(UserWarning, match="1 of 3 clips .* 9 frames"):
        batches = listen.batches([*clips, short], [*texts, texts[0]])
    assert batches.left_out == [2] and sum(len(b["frames"]) for b in batches) == 2
    with pytest.raises(DataError, match="are the texts those of these clips"):
        listen.batches([short], [texts[0]])
    silent = Audio.of(numpy.zeros(8000), 8000)
    with pytest.raises(DataError, match="silent"):
        listen.batches([silent], ["one"])
    empty = next(iter(listen.batches([silent], [""])))
    assert float(asr.CTCLoss()(listen.model, empty).detach()) > 0
    with pytest.raises(DataError, match="one text a clip"):
        listen.batches(clips, ["one"])


def test_texts_that_cannot_be_written_are_refused_and_told_where_nothing_is_left(listen, sets):
    clips, texts = (part[:2] for part in sets["whisper train"])
    with pytest.raises(DataError, match="no 'a'"):
        listen.batches(clips, ["a", "one"])
    for bad in (None, math.nan):  # an empty cell of a table
        with pytest.raises(DataError, match=f"text 1 is {bad}, expected a string"):
            listen.batches(clips, [texts[0], bad])
        with pytest.raises(DataError, match=f"text 1 is {bad}, expected a string"):
            listen.score(clips, [texts[0], bad])
    with pytest.raises(DataError, match="one string"):
        listen.batches(clips, "ab")
    with pytest.warns(
        UserWarning, match="nothing is left of 1 of 2 texts, the first text 1: '123'"
    ):
        batches = listen.batches(clips, [texts[0], "123"], unknown="drop")
    assert batches.left_out == [] and batches.labels[1] == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        listen.batches(clips, [f"{texts[0]} 2", ""], unknown="drop")


# -- what is refused ------------------------------------------------------------------------------


def test_sound_that_makes_no_sense_is_refused_and_silence_is_noted(listen):
    with pytest.raises(DataError, match="no samples"):
        listen.transcribe([Audio.of(numpy.zeros(0, numpy.float32), 8000)])
    with pytest.raises(DataError, match="not finite, the first at 3"):
        listen.transcribe([Audio.of(numpy.array([0, 0, 0, math.nan] * 100), 8000)])
    with pytest.raises(DataError, match="16000 samples a second, and the model expects 8000"):
        listen.transcribe([Audio.of(numpy.zeros(16000), 16000)])
    with pytest.raises(DataError, match="needs 200"):
        listen.transcribe([noise(0.02, 8000)])
    for unknown in ([numpy.zeros(8000)], numpy.zeros(8000), torch.zeros(8000), "one.wav"):
        with pytest.raises(DataError, match=r"clip 0 is a \w+, whose sampling rate is not known"):
            listen.transcribe(unknown)
    for clip, words in (
        (noise(1.0, 16000), "16000 samples a second, and the model expects 8000"),
        (numpy.zeros(8000), "sampling rate is not known"),
        (noise(0.02, 8000), "needs 200"),
    ):
        with pytest.raises(DataError, match=words):
            asr.transcribe_long(listen, clip)
    stereo = Audio.of(0.1 * numpy.ones((8000, 2)) * numpy.sin(numpy.arange(8000))[:, None], 8000)
    assert len(listen.transcribe(stereo)) == 1  # mixed down, not a batch
    (silent,) = listen.transcribe([Audio.of(numpy.zeros(8000), 8000)])
    assert "silence" in silent.notes[0] and not silent.words
    with pytest.raises(DataError, match="seconds above 0"):
        asr.Chunks(0)


def test_models_without_a_fitting_head_are_refused(ctc):
    with pytest.raises(BackboneError, match="no CTC head"):
        asr.Recogniser(ctc.model.wav2vec2)
    with pytest.raises(DataError, match="writes 17 tokens"):
        asr.Recogniser(ctc, vocabulary=LETTERS)


def test_a_library_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch):
    for name, use in (("jiwer", lambda: asr.align("a", "b")), ("soundfile", asr.shipped)):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(MissingDependencyError, match=rf"{name}[\s\S]*mmadapt\[audio\]"):
            use()


def test_nothing_is_compared_without_an_adapter_or_without_speech(listen, sets):
    with pytest.raises(DataError, match="nothing to compare"):
        asr.compare(listen, {})
    clips, texts = sets["source test"]
    for wrong in ((clips,), (clips, texts[1:])):
        with pytest.raises(DataError, match="the set 'known' is no pair of as many clips as texts"):
            asr.compare(listen, {"known": wrong})
    with pytest.raises(AttachError, match="nothing is attached"):
        asr.compare(listen, {"known": sets["source test"]})


def test_clips_come_with_some_backbones(tmp_path):
    with pytest.raises(ZooError, match="no clips"):
        asr.shipped("tiny/clip")
    times = numpy.arange(4000) / 8000
    clips = [Audio(0.3 * numpy.sin(2 * math.pi * hertz * times), 8000) for hertz in (300, 500, 900)]
    shipped_clips.write(
        tmp_path, {"a": (clips[:1], ["x"]), "b": (clips[1:], ["y", "z"])}, licence="CC0-1.0"
    )
    found = shipped_clips.read(tmp_path)
    assert found["b"][1] == ["y", "z"]
    for one, other in zip(clips, found["a"][0] + found["b"][0], strict=True):
        assert numpy.corrcoef(one.samples, other.samples)[0, 1] > 0.95  # in step
    assert pooled([asr.align("x", "x")]).hits == 1


def test_the_tables_of_the_study_are_those_of_its_numbers(monkeypatch):
    from pathlib import Path

    folder = Path(__file__).parent.parent / "benchmarks"
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    import speech_shift

    known = json.loads(speech_shift.RESULTS.read_text())
    page = speech_shift.PAGE.read_text()
    assert known["weights"] == mm.zoo.entry("tiny/ctc").sha256
    assert speech_shift.write(page, known) == page
    assert all(speech_shift.finished(known, shift) for shift in speech_shift.SHIFTS)
    known["rows"][0]["target"]["wer"] += 0.1
    assert speech_shift.write(page, known) != page
    import speech_rates

    known = json.loads(speech_rates.RESULTS.read_text())
    assert known["weights"] == mm.zoo.entry("tiny/ctc").sha256
    assert speech_rates.write(page, known) == page
    for name, method in speech_shift.METHODS.items():
        assert method.rate == speech_rates.best(known, name)
        assert not speech_rates.to_try(known, name)  # neither the least nor the largest tried
    import speech_stream

    known, page = json.loads(speech_stream.RESULTS.read_text()), speech_stream.PAGE.read_text()
    assert known["weights"] == mm.zoo.entry("tiny/ctc").sha256
    assert speech_stream.write(page, known) == page
    for name in ("speech_shift", "speech_rates", "speech_stream", "spoken_digits", "machine"):
        sys.modules.pop(name)


def test_adapters_of_the_study_have_as_many_parameters():
    from mmadapt.tasks.asr.methods import METHODS

    ctc, counts = mm.load("tiny/ctc"), []
    for name in ("LoRA", "LoRA everywhere", "Bottleneck", "ConvAdapter"):
        counts.append(mm.attach(ctc, METHODS[name].adapter, name=name.split()[-1]).num_parameters)
    assert max(counts) < 1.05 * min(counts)
