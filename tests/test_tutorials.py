"""Notebooks as they are committed: executed, static and small. `.ci/run` executes them again."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_static_outputs(path):
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs and not [o for o in outputs if o["output_type"] == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    assert "widgets" not in notebook["metadata"]
    assert not [
        o for o in outputs if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
    ]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 1_000_000


def printed(name: str) -> str:
    """All that a notebook's cells print."""
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


def test_there_are_tutorials():
    assert {
        "01_five_minutes",
        "02_sam_slices",
        "03_volumes",
        "04_sounds",
        "05_speech",
        "06_llama_adapter",
        "07_few_shot_clip",
        "08_zoo_and_sharing",
        "09_your_adapter",
        "10_your_backbone",
        "11_training_at_scale",
        "12_kernels_and_cost",
    } <= {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_listed_in_the_readme_and_links_to_what_is_there(path):
    assert f"tutorials/{path.name})" in (FOLDER.parent / "README.md").read_text()
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", "".join(cell["source"])):
                assert "://" in target or (FOLDER / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_that_trains_is_shorter_when_asked(path):
    cells = json.loads(path.read_text())["cells"]
    code = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert code.count("MMADAPT_FAST") == 1
    assert code.count(" if FAST else ") >= min(1, code.count("mm.fit("))


def test_slices_are_found_better_with_the_adapter_and_scenes_worse():
    """What the text around these numbers says."""
    text = printed("02_sam_slices")
    frozen, adapted = (
        [float(found) for found in re.findall(rf"^{name} +([\d.]+)", text, re.M)]
        for name in ("frozen", "adapted")
    )
    assert len(adapted) == 1
    assert len(frozen) == 2
    assert len(set(frozen)) == 1
    assert adapted[0] > frozen[0] + 0.2
    on, off = (
        float(re.search(rf"adapter {word}: +Dice ([\d.]+)", text)[1]) for word in ("on", "off")
    )  # type: ignore[index]
    assert on < off
    assert "equal: True" in text


def test_a_new_wording_is_learned_and_the_old_ones_come_back():
    """What the text around these numbers says."""
    text = printed("06_llama_adapter")
    rows = {
        name: [float(found) for found in re.findall(r"\d\.\d+", line)]
        for name, line in re.findall(r"^(new wording|old wordings) +100 +(.*)$", text, re.M)
    }
    new_on, new_off = rows["new wording"][:2]
    old_on, old_off = rows["old wordings"][:2]
    assert new_off == 0 and new_on > 0.9
    assert old_off > 0.95 and old_on < 0.5
    assert text.count("equal: True") == 2


def test_sounds_are_found_better_in_the_hall_and_the_studio_is_kept():
    """What the text around these numbers says."""
    text = printed("04_sounds")
    hall, studio = (
        {
            state: float(re.search(rf"^{place}, {state} +390 +([\d.]+)", text, re.M)[1])  # type: ignore[index]
            for state in ("frozen", "adapted")
        }
        for place in ("hall", "studio")
    )
    assert hall["adapted"] > hall["frozen"] + 8
    off = float(re.search(r"studio, adapter off: ([\d.]+) %", text)[1])  # type: ignore[index]
    assert off == studio["frozen"]
    assert studio["adapted"] < studio["frozen"]
    assert "taken for" in text and "equal: True" in text
    notebook = (FOLDER / "04_sounds.ipynb").read_text()
    assert notebook.count("<audio") >= 9


def test_whispers_are_learned_from_other_sentences_and_known_voices_come_back():
    text = printed("05_speech")
    assert "sentences trained and tested on: 0" in text
    known, whispers = (
        float(n) for n in re.findall(r"^words +\d+ .* ([\d.]+)  [\d.]+–", text, re.M)
    )
    off = float(re.search(r"adapter off: ([\d.]+) %", text)[1])  # type: ignore[index]
    assert off == known < 5 and whispers > 90
    assert float(re.search(r"in chunks: ([\d.]+) %", text)[1]) < 0.5 * whispers  # type: ignore[index]
    assert "equal: True" in text


def test_volumes_are_found_better_along_the_depth_and_saved_where_they_lie():
    """What the text around these numbers says."""
    text = printed("03_volumes")
    dice = dict(re.findall(r"^(frozen|slice-wise|depth-aware) +Dice ([\d.]+)", text, re.M))
    assert float(dice["depth-aware"]) > float(dice["slice-wise"]) + 0.03
    assert float(dice["slice-wise"]) > float(dice["frozen"]) + 0.2
    assert "on the scan's grid: True" in text and "equal: True" in text
    assert len(re.findall(r"^\* ", text, re.M)) == 10  # refusals


def number(pattern: str, text: str) -> float:
    """The one number that a pattern finds."""
    (found,) = re.findall(pattern, text, re.M)
    return float(found)


def test_few_shots_are_chosen_on_validation_and_differences_have_bounds():
    """What the text around these numbers says."""
    text = printed("07_few_shot_clip")
    zero_shot, chosen = (
        number(pattern, text)
        for pattern in (r"^zero-shot ([\d.]+) %,", r"on validation ([\d.]+) %$")
    )
    peeked = number(r"best point of the right map ([\d.]+) %", text)
    assert zero_shot < chosen < peeked - 2
    by_shots = {
        int(shots): [float(mean) for mean in re.findall(r"([\d.]+) ±", rest)]
        for shots, rest in re.findall(r"^ +(\d+) +([\d.]+ ± .*)$", text, re.M)
    }
    assert list(by_shots) == [1, 2, 4, 8, 16]
    assert by_shots[1][0] < zero_shot < min(by_shots[1][1:])  # the linear probe, and the others
    assert by_shots[8][0] == max(by_shots[8]) and by_shots[16][0] == max(by_shots[16])
    ratios = re.findall(r"^ +0\.\d +[\d.]+ %  ([\d.]+) % \[([\d.]+), ([\d.]+)\]", text, re.M)
    means = [float(mean) for mean, _, _ in ratios]
    assert len(means) == 4
    assert max(means) - min(means) < float(ratios[0][2]) - float(ratios[0][1])
    differences = re.findall(r"difference ([+-][\d.]+) ± ([\d.]+) points", text)
    first, second = ((float(gain), float(half)) for gain, half in differences)
    assert first[0] > 3 * first[1]
    assert abs(second[0]) <= second[1]
    untouched = number(r"^untouched backbone +([\d.]+) %", text)
    pairs = re.findall(r"^\S+ +on: ([\d.]+) % .* off: ([\d.]+) %", text, re.M)
    assert len(pairs) == 3
    assert all(float(on) < untouched == float(off) for on, off in pairs)
    assert "equal: True" in text


def test_what_is_fetched_and_shared_is_what_was_published_or_refused():
    """What the text around these outputs says."""
    text = printed("08_zoo_and_sharing")
    assert "are kept in cache/zoo/lab--scenes/" in text
    assert len(set(re.findall(r"weights sent: (\d+) of (\d+)", text)[0])) == 1
    assert "requests for the second load: 0" in text
    assert "what came was deleted" in text and "kept: []" in text
    assert "CLIP is loaded" in text and "said within three seconds: True" in text
    assert "as before -> yesterday's" in text and "{'refresh': True} -> the new one" in text
    assert text.count("this ran on your machine") == 1  # by torch, and not by mmadapt
    assert "names builtins.print, which could run code; nothing was read" in text
    before, after = (number(rf"^{state} +([\d.]+) %", text) for state in ("zero-shot", "adapted"))
    assert after > before + 15
    assert "(family 'clip'); this is a ASTFor" in text and "was trained on weights" in text
    assert "was made for lab/scenes, this is tiny/clip" in text
    assert len(re.findall(r"equal: +True", text)) == 5
    assert "PEFT computes what we do: True" in text and "we compute what PEFT does: True" in text
    assert "the same features: True" in text and "attached: []" in text
    assert "went through" not in text and ": False" not in text


def test_the_laws_find_what_is_wrong_with_the_draft_and_the_method_keeps_them():
    text = printed("09_your_adapter")
    assert "3 of 14 laws do not hold for Draft(rank=4)" in text
    for law in ("starts as the identity", "draws from its own generator", "two of them switch"):
        assert f"\n  {law}" in text
    assert text.count("14 of 14 laws hold") == 2
    low, high = {}, {}
    for name, left, right in re.findall(r"^(\S+) +[\d.]+ % \[([\d.]+), ([\d.]+)\]", text, re.M):
        low[name], high[name] = float(left), float(right)
    assert low["dora"] < high["lora"] and low["lora"] < high["dora"]
    assert min(low["lora"], low["dora"]) > high["zero-shot"] + 10
    assert text.count(": True") == 4 and "False" not in text
    assert "unknown adapter method 'dora'" in text


def test_a_backbone_of_ones_own_learns_the_mirror_and_what_learns_best_forgets_most():
    text = printed("10_your_backbone")
    rows = {
        name.strip(): [float(n) for n in re.findall(r"([\d.]+) %", rest)]
        for name, rest in re.findall(r"^(\S.{21}) +[\d,]+ (.* %)$", text, re.M)
    }
    frozen, upright = rows.pop("frozen")
    assert len(rows) == 4
    assert all(mirrored > frozen + 20 and off == upright for mirrored, _, off in rows.values())
    by_gain = sorted(rows, key=lambda name: rows[name][0])
    assert by_gain == ["scale and shift", "LoRA, gate", "bottleneck", "LoRA, value and gate"]
    kept = [rows[name][1] for name in by_gain]
    assert kept == sorted(kept, reverse=True)
    assert "value: 0 of 64 rows moved; gate: 64 of 64" in text
    assert "the same losses: True" in text and "equal: True" in text
    assert "stages is 3 here and 4 in the file" in text


def test_a_killed_run_goes_on_to_the_same_bytes_and_two_processes_to_the_same_numbers():
    text = printed("11_training_at_scale")
    memory = {
        name.strip(): float(size)
        for name, size in re.findall(r"^(\S.{28}) +([\d.]+) MiB", text, re.M)
    }
    whole, every = memory["full fine-tuning"], memory["bottleneck, all layers"]
    assert 0.6 < every / whole < 0.72  # about a third less
    assert memory["…, recomputed"] < 0.15 * every
    assert 0.5 < memory["…, bfloat16"] / every < 1
    assert memory["bottleneck, last layer"] < 0.1 * memory["bottleneck, last four layers"]
    assert number(r"takes 1/([\d.]+) of the time", text) > 1.5
    assert "3 of 4 layers passed over" in text and "the same losses: True" in text
    assert number(r"apart by at most ([\d.]+),", text) < 0.05
    assert "the adapter is torch.float32" in text
    assert "exit status -9: no word" in text and text.count("exit status 0") == 4
    assert "resumed night.pt at step" in text and "resumed three.pt at step 60" in text
    assert "byte for byte: True" in text and "1 in 10,000: True" in text


def test_costs_are_what_the_text_says_of_them():
    text = printed("12_kernels_and_cost")
    assert number(r"the roof bends at ([\d.]+) operations", text) < 16
    steps = re.findall(r"^(bottleneck|LoRA).* ([\d.]+) +\d+ MiB$", text, re.M)
    assert len(steps) == 2
    assert all(0.55 < float(step) < 0.75 for _, step in steps)
    times = {
        name.strip(): float(ratio)
        for name, ratio in re.findall(r"^(\S.{8,12}) .*× bare ([\d.]+)", text, re.M)
    }
    assert abs(times["none active"] - 1) < 0.1 and abs(times["LoRA, merged"] - 1) < 0.1
    assert 1 < times["bottleneck"] < times["LoRA, MLP"] < 1.4
    assert times["together"] < 0.75 * times["in turns"]
    assert text.count("1e-5: True") == 2
    switches = [float(n) for n in re.findall(r"switch.*?: (\d+) µs", text)]
    assert len(switches) == 4 and max(switches) < 200
