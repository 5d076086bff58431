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
    names = {"01_five_minutes", "02_sam_slices", "03_volumes", "04_sounds", "05_speech"}
    assert {path.stem for path in NOTEBOOKS} >= names


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
