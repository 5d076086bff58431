"""Instructions: what is learned of a row, what packed rows see, answers, scores and gates."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from backbones import ALL
from snapshot import differ, randomise, state
from torch.nn import functional as F

import mmadapt as mm
from mmadapt.errors import AttachError, CheckError, DataError
from mmadapt.tasks import instruct
from mmadapt.tasks.instruct import Example, strings
from mmadapt.tasks.instruct.loss import token_losses
from mmadapt.tasks.instruct.streaming import Pieces

EXAMPLES = [Example("copy ab = ", "ab"), Example("double x = ", "xx"), Example("é ", "ü€")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    from mmadapt.zoo.manifest import data_folder

    return AutoTokenizer.from_pretrained(data_folder() / "tiny" / "llama", local_files_only=True)


@pytest.fixture
def backbone(tokenizer: Any) -> Any:
    """A small decoder with random weights for the bytes' vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return mm.Backbone(model, tokenize=tokenizer)


# -- rows ---------------------------------------------------------------------------------------------


def test_only_responses_and_their_ends_are_learned(tokenizer: Any) -> None:
    batch = instruct.encode(tokenizer, EXAMPLES).padded()
    for i, example in enumerate(EXAMPLES):
        kept = batch["labels"][i] != -100
        assert batch["input_ids"][i][kept].tolist() == [*example.response.encode(), 257]
        assert torch.equal(batch["labels"][i][kept], batch["input_ids"][i][kept])
        real = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        assert real == [256, *example.prompt.encode(), *example.response.encode(), 257]
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


@pytest.mark.parametrize("adapted", [False, True])
def test_the_loss_is_the_same_padded_on_either_side_and_packed(
    backbone: Any, tokenizer: Any, adapted: bool
) -> None:
    if adapted:
        randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 0.5)
    tokens, model = instruct.encode(tokenizer, EXAMPLES), backbone.model
    total, count = 0.0, 0
    with torch.no_grad():
        for row, prompt in zip(tokens.ids, tokens.prompts, strict=True):
            logits = model(input_ids=torch.tensor([row])).logits[0]
            wanted = torch.tensor(row[prompt:])
            total += float(F.cross_entropy(logits[prompt - 1 : -1], wanted, reduction="sum"))
            count += len(wanted)
        for batch in (tokens.padded(), tokens.padded("left"), tokens.packed(64)):
            found = float(instruct.response_loss(model, batch))
            assert found == pytest.approx(total / count, rel=1e-5)
    assert tokens.packed(64)["input_ids"].shape == (1, 64)
    assert instruct.perplexity(backbone, EXAMPLES) == pytest.approx(
        math.exp(total / count), rel=1e-5
    )


def test_examples_of_a_packed_row_do_not_see_one_another(backbone: Any, tokenizer: Any) -> None:
    randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 0.5)
    batch = instruct.encode(tokenizer, EXAMPLES).packed(48)
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert len(starts) >= 3
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 1 : starts[1]] = 65
    with torch.no_grad():
        one, other = (token_losses(backbone.model, own)[0] for own in (batch, changed))
        assert torch.equal(one[starts[1] :], other[starts[1] :])
        assert not torch.equal(one[: starts[1] - 1], other[: starts[1] - 1])
    instruct.check_packing(backbone, batch)


@pytest.mark.parametrize("name", ["hf_llama", "hf_mistral", "hf_qwen3", "hf_gemma"])
def test_packing_is_kept_apart_by_the_families_of_decoders(name: str) -> None:
    model = ALL[name].fresh()
    ids = torch.arange(1, 9)[None] % 7
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    other = ids.clone()
    other[0, :3] = 5

    def hidden(values: Any, **more: Any) -> Any:
        out = model(input_ids=values, position_ids=positions, use_cache=False, **more)
        return out.logits if "logits" in out else out.last_hidden_state

    with torch.no_grad():
        assert torch.equal(hidden(ids)[:, 3:], hidden(other)[:, 3:])
        assert differ((hidden(ids)[:, :3],), (hidden(other)[:, :3],))


def test_a_model_that_does_not_keep_packed_examples_apart_is_found(tokenizer: Any) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)

    class Bloom(BloomForCausalLM):
        """Its positions come from the mask alone."""

        def forward(self, position_ids: Any = None, **inputs: Any) -> Any:
            return super().forward(**inputs)

    bloom = Bloom(BloomConfig(vocab_size=259, hidden_size=16, n_layer=1, n_head=2)).eval()
    for parameter in bloom.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    batch = instruct.encode(tokenizer, EXAMPLES).packed(48)
    with pytest.raises(CheckError, match="lets examples of a packed row see one another"):
        instruct.check_packing(bloom, batch)
    one = instruct.encode(tokenizer, EXAMPLES[:1])
    with pytest.raises(DataError, match="no row of this batch holds two"):
        instruct.check_packing(bloom, one.packed(len(one.ids[0])))


def test_what_is_cut_and_dropped_is_told(tokenizer: Any) -> None:
    examples = [Example("ab", "cd"), Example("ab", "cdefgh"), Example("abcdefgh", "i")]
    tokens = instruct.encode(tokenizer, examples, longest=6)
    assert (tokens.cut, tokens.dropped, len(tokens)) == ((1,), (2,), 2)
    assert tokens.ids[1] == [256, *b"abcde"[:2], *b"cde"]
    assert repr(tokens) == (
        "Tokens(2 rows of 6 to 6 tokens; 1 responses cut short, first at 1; 1 examples dropped, "
        "first at 2)"
    )
    with pytest.raises(DataError, match="the shortest prompt alone has 3 tokens"):
        instruct.encode(tokenizer, examples, longest=2)
    with pytest.raises(DataError, match="an example has 11 tokens, and a row 9"):
        instruct.encode(tokenizer, examples).packed(9)
    with pytest.raises(DataError, match="longest is 1"):
        instruct.encode(tokenizer, examples, longest=1)
    with pytest.raises(DataError, match="no examples"):
        instruct.encode(tokenizer, [])
    with pytest.raises(DataError, match="side is 'both'"):
        tokens.padded("both")


def test_a_tokenizer_without_padding_asks_for_a_choice(tokenizer: Any, backbone: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.pad_token = None
    before = state(backbone.model)
    tokens = instruct.encode(bare, EXAMPLES)
    for call in (
        tokens.padded,
        lambda: tokens.packed(64),
        lambda: instruct.answers(backbone, ["a"], tokenizer=bare),
    ):
        with pytest.raises(DataError, match="has no padding token") as caught:
            call()
        assert "pass pad=257, its end token '</s>'" in caught.value.hint
    chosen, own = tokens.padded(pad=257), instruct.encode(tokenizer, EXAMPLES).padded()
    for key in ("attention_mask", "labels", "position_ids"):
        assert torch.equal(chosen[key], own[key])
    assert instruct.answers(backbone, ["a", "bcd"], tokenizer=bare, pad=257, longest=4) == (
        instruct.answers(backbone, ["a", "bcd"], longest=4)
    )
    assert state(backbone.model) == before


def test_templates_stand_around_prompts(tokenizer: Any) -> None:
    plain = instruct.encode(tokenizer, EXAMPLES[:1])
    assert instruct.encode(tokenizer, EXAMPLES[:1], template="chat").ids == plain.ids
    asked = instruct.encode(tokenizer, EXAMPLES[:1], template="Q: {prompt}\nA: ")
    assert tokenizer.decode(asked.ids[0]) == "<s>Q: copy ab = \nA: ab</s>"
    assert asked.prompts[0] == 1 + len("Q: copy ab = \nA: ")
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        instruct.encode(bare, EXAMPLES, template="chat")
    with pytest.raises(DataError, match='a text that holds "{prompt}" once'):
        instruct.encode(tokenizer, EXAMPLES, template="Answer: ")


# -- the generated world --------------------------------------------------------------------------------


def test_strings_of_the_splits_never_meet() -> None:
    drawn = {
        split: {strings.split_of(s) for s in strings.draw_strings(300, torch.Generator(), split)}
        for split in strings.SPLITS
    }
    assert drawn == {split: {split} for split in strings.SPLITS}
    every = [Example("a", "b"), *strings.instructions(200, seed=3)]
    assert strings.instructions(200, seed=3) == every[1:]
    asked = {one.prompt.split()[0] for one in every[1:]}
    assert asked == set(strings.OPERATIONS)
    (one,) = strings.instructions(1, seed=0, wordings={"shout {} = ": "upper"})
    assert one.response == one.prompt[len("shout ") : -len(" = ")].upper()
    with pytest.raises(DataError, match="split is 'tests'"):
        strings.draw_strings(1, torch.Generator(), "tests")


def test_captions_are_read_back() -> None:
    from mmadapt.tasks.scenes import draw_attributes

    drawn = draw_attributes(200, torch.Generator().manual_seed(0), split="any").tolist()
    assert [strings.read_caption(strings.caption(row)) for row in drawn] == drawn
    assert strings.read_caption("a red blob on a plain") == [None, 0, 0, None]
    assert strings.read_caption("") == [None] * 4


# -- answers ----------------------------------------------------------------------------------------------


def test_answers_do_not_depend_on_batch_mates(backbone: Any) -> None:
    randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 0.5)
    prompts = ["a", "some longer prompt", "é"]
    together = instruct.answers(backbone, prompts, longest=6)
    assert together == [instruct.answers(backbone, [p], longest=6)[0] for p in prompts]
    assert not backbone.model.training


def test_streaming_shows_the_answer_letter_by_letter(backbone: Any, tokenizer: Any) -> None:
    shown: list[str] = []
    said = instruct.stream(backbone, "abc", longest=8, show=shown.append)
    assert said == instruct.answers(backbone, ["abc"], longest=8)[0]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    pieces: list[str] = []
    euro = Pieces(tokenizer, pieces.append)
    euro.put(torch.tensor([[256, 97]]))
    for byte in "x€y".encode():
        euro.put(torch.tensor([byte]))
    euro.end()
    assert pieces == ["x", "x€", "x€y"]


def test_a_terminal_is_written_to_and_both_answers_come(backbone: Any, capsys: Any) -> None:
    randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 2.0)
    off, on = instruct.stream_both(backbone, "abc", longest=5)
    assert on == instruct.answers(backbone, ["abc"], longest=5)[0]
    with mm.disabled(backbone):
        assert off == instruct.answers(backbone, ["abc"], longest=5)[0]
    assert capsys.readouterr().out == f"adapter off: {off}\nadapter on: {on}\n"
    assert instruct.stream(backbone, "abc", longest=5) == on
    assert capsys.readouterr().out == f"{on}\n"


def test_a_notebook_updates_one_output(backbone: Any, monkeypatch: Any) -> None:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.utils.capture import capture_output

    from mmadapt.tasks.instruct import streaming

    randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 2.0)
    monkeypatch.setattr(streaming, "in_notebook", lambda: True)
    InteractiveShell.instance()
    try:
        with capture_output() as kept:
            off, on = instruct.stream_both(backbone, "abc", longest=5)
    finally:
        InteractiveShell.clear_instance()
    outputs = [out for out in kept.outputs if "text/plain" in out.data]
    assert len({repr(out.metadata) for out in outputs}) == 1
    assert outputs[-1].data["text/plain"].splitlines()[0].startswith("adapter off: abc")
    assert "<code>" in outputs[-1].data["text/html"]
    assert off != on


def test_tables_stand_side_by_side(backbone: Any) -> None:
    with pytest.raises(AttachError, match="nothing is attached"):
        instruct.on_and_off(backbone, {"copy": EXAMPLES})
    randomise(mm.attach(backbone, mm.LlamaAdapter(3, layers=2)), 2.0)
    (row,) = instruct.on_and_off(backbone, {"copy": EXAMPLES}).records()
    assert row["perplexity, on"] == instruct.perplexity(backbone, EXAMPLES)
    with mm.disabled(backbone):
        assert row["perplexity, off"] == instruct.perplexity(backbone, EXAMPLES)
    assert row["perplexity, on"] != row["perplexity, off"]
    table = instruct.side_by_side(backbone, [*EXAMPLES, "<b>"], longest=3)
    assert [r["wanted"] for r in table.records()] == ["ab", "xx", "ü€", None]
    assert "adapter off" in str(table) and "&lt;b&gt;" in table._repr_html_()
    with pytest.raises(DataError, match="there is no tokenizer with LlamaForCausalLM"):
        instruct.answers(backbone.model, ["a"])


# -- gates ------------------------------------------------------------------------------------------------


def test_gates_are_recorded_while_training(backbone: Any, tokenizer: Any) -> None:
    attachment = mm.attach(backbone, mm.LlamaAdapter(3, layers=2))
    record = instruct.GateRecord(attachment, every=2)
    history = mm.fit(
        backbone,
        instruct.encode(tokenizer, EXAMPLES).padded(),
        loss=instruct.response_loss,
        steps=4,
        lr=0.1,
        evaluation=mm.Evaluation(record, every=2),
        progress=False,
    )
    assert [len(values) for values in record.values.values()] == [3, 3]
    for site, values in record.values.items():
        assert not values[0].any()
        assert torch.equal(values[-1], instruct.gates(attachment)[site])
        assert 0 < float(values[-1].abs().max()) < 1
    assert history.evaluations[-1][1]["open"] > 0
    panels = [axis for axis in record.plot().axes if axis.lines]
    assert [len(axis.lines) for axis in panels] == [5, 5]  # four heads and the zero
    assert list(panels[0].lines[0].get_xdata()) == [0, 2, 4]
    (grid, _) = instruct.gate_figure(attachment).axes
    assert grid.images[0].get_array().shape == (2, 4)
    mm.detach(backbone)
    with pytest.raises(AttachError, match="has no zero-initialised attention"):
        instruct.gates(mm.attach(backbone, mm.LoRA(2)))
