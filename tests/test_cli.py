"""The `mmadapt` command."""

import json
import re
import subprocess
import sys

import pytest

from mmadapt.cli import DEMOS, main


def test_zoo_list_and_show(capsys):
    assert main(["zoo", "list"]) == 0
    assert "tiny/clip" in capsys.readouterr().out
    assert main(["zoo", "show", "tiny/clip"]) == 0
    assert "Apache-2.0" in capsys.readouterr().out


def test_an_error_is_one_message_and_has_an_exit_code(capsys):
    assert main(["zoo", "show", "tiny/clap"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert (
        "the zoo has no 'tiny/clap'" in captured.err and "did you mean 'tiny/clip'" in captured.err
    )


def test_wrong_usage_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "parrot"])
    assert stop.value.code == 2


def test_the_command_line_does_not_import_torch():
    code = "import sys; from mmadapt.cli import main; main(['zoo', 'list']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def demo(name, out, *options):
    """What a demo says, run as a user does; on one thread, since other tests run beside it."""
    command = [sys.executable, "-m", "mmadapt", "demo", name, "--out", str(out), "--threads", "1"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "loaded into a fresh backbone in a second process" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    said = demo("clip", out, "--shots", "4")
    results = json.loads((out / "results.json").read_text())
    accuracy = {row["method"]: row["accuracy"][0] for row in results["results"]}
    assert accuracy["Bottleneck"] > accuracy["zero-shot"] > accuracy["raw pixels + LR"]
    kept = float(re.search(r"adapter: .* accuracy ([\d.]+) %", said)[1])
    assert kept == pytest.approx(100 * accuracy["Bottleneck"], abs=0.01)  # the table's own row
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "Bottleneck" in page


@pytest.mark.slow
def test_the_demo_of_volumes_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    said = demo("sam", out, "--shots", "12")
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["results"]}
    dice = {method: sum(row["dice"]) / len(row["dice"]) for method, row in rows.items()}
    assert dice["MedSA, with depth"] > dice["best fixed ellipsoid"] + 0.1
    assert dice["MedSA, slice by slice"] > dice["frozen"] + 0.1
    for row in rows.values():  # taken away, an adapter leaves no trace
        assert row["source_off"] in ({}, rows["frozen"]["source_on"])
    kept = float(re.search(r"adapter: .* Dice ([\d.]+)", said)[1])
    assert kept == pytest.approx(dice["MedSA, with depth"], abs=1e-4)
    assert json.loads((out / "adapter" / "adapter.json").read_text())["metrics"]["volumes"] == 12
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "best fixed ellipsoid" in page


@pytest.mark.slow
def test_the_demo_of_speech_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    demo("asr", out, "--shots", "40")
    rows = {row["method"]: row for row in json.loads((out / "results.json").read_text())["results"]}
    cer = {method: row["cer"]["whispers"] for method, row in rows.items()}
    assert cer["ConvAdapter"] < 0.5 * cer["frozen"]
    for row in rows.values():  # taken away, an adapter leaves no trace
        assert row["wer_off"] == rows["frozen"]["wer"]
    page = (out / "report.html").read_text()
    assert page.count("data:audio/wav;base64,") == 5 and page.count("data:image/png;base64,") == 1
    assert json.loads((out / "adapter" / "adapter.json").read_text())["metrics"]["clips"] == 40


def test_too_few_or_too_many_whispers_are_refused_and_nothing_is_written(tmp_path, capsys):
    for shots in ("0", "301"):
        assert main(["demo", "asr", "--out", str(tmp_path / "out"), "--shots", shots]) == 1
        assert f"shots is {shots}, expected 1 to 300 clips" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_demo_of_sounds_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    said = demo("audio", out, "--shots", "6")
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["results"]}
    accuracy = {method: row["accuracy"] for method, row in rows.items()}
    assert accuracy["Bottleneck"] > accuracy["frozen"] + 0.05
    assert accuracy["frozen"] > 2 / 13
    for row in rows.values():  # taken away, an adapter leaves no trace
        assert row["source_off"] in (None, rows["frozen"]["source_on"])
    kept = float(re.search(r"adapter: .* accuracy ([\d.]+) %", said)[1])
    assert kept == pytest.approx(100 * accuracy["ConvAdapter"], abs=0.01)
    assert json.loads((out / "adapter" / "adapter.json").read_text())["metrics"]["shots"] == 6
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and "linear probe" in page
    assert page.count("<audio") == 12  # clean and noisy ones, and those that the adapter gained


def test_a_demo_of_too_few_clips_is_explained(tmp_path, capsys):
    assert main(["demo", "audio", "--out", str(tmp_path / "out"), "--shots", "1"]) == 1
    assert "shots is 1, expected at least 2 clips of every class" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_of_clicked_volumes_from_end_to_end(tmp_path, monkeypatch):
    """Few steps, since what is learned is shown elsewhere: every part, and a scan that comes back."""
    import nibabel
    import numpy

    from mmadapt.demos import sam, volume
    from mmadapt.tasks.volume import read_mask, read_nifti

    monkeypatch.setattr(sam, "STEPS", 12)
    monkeypatch.setattr(volume, "CLICKED", 3)
    said = []
    results = volume.run(tmp_path / "out", shots=4, show=said.append)
    text = "\n".join(said)
    dice = {result.method: result.mean for result in results}
    assert list(dice) == [
        "frozen", "best fixed ellipsoid", "full fine-tuning", "Bottleneck", "MedSA, with depth"
    ]  # fmt: skip
    assert dice["full fine-tuning"] > dice["frozen"]
    assert "every Dice equal" in text and "voxels and affine equal" in text
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {name: numpy.shape(rows) for name, rows in found["clicks"].items()} == {
        name: (3, 3) for name in ("frozen", "Bottleneck", "MedSA, with depth")
    }
    manifest = json.loads((tmp_path / "out" / "adapter" / "adapter.json").read_text())
    assert manifest["input"] == {"depth": 12}
    scan = read_nifti(volume.scan_file(), t=0)
    path = tmp_path / "out" / "prediction.nii.gz"
    mask = read_mask(path, like=scan)
    assert mask[:6].sum() == 0  # the part that was not looked at
    assert numpy.array_equal(nibabel.load(path).affine, scan.affine)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and "has no labels" in page


def test_the_demo_of_volumes_needs_nibabel_and_says_so_first(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nibabel", None)
    assert main(["demo", "volume", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'mmadapt[medical]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", DEMOS)
def test_verifying_something_else_is_explained(tmp_path, capsys, name):
    assert main(["demo", name, "--verify", str(tmp_path / "nothing")]) == 1
    assert "there is no adapter at" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_of_a_decoder_from_end_to_end(tmp_path):
    out = tmp_path / "out"
    said = demo("llama", out)
    results = json.loads((out / "results.json").read_text())
    rows = {row["method"]: row for row in results["results"]}
    assert rows["backbone"]["new"] < 0.05 and rows["backbone"]["old_on"] > 0.9
    for method in ("LLaMA-Adapter", "LoRA (q, v)"):
        assert rows[method]["new"] > 0.3
        assert rows[method]["old_off"] == rows["backbone"]["old_on"]  # taken away, no trace
        assert rows[method]["old_on"] < rows[method]["old_off"]
    kept = float(re.search(r"adapter: .* ([\d.]+) % right", said)[1])
    assert kept == pytest.approx(100 * rows["LLaMA-Adapter"]["new"], abs=0.1)
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3 and "LLaMA-Adapter" in page


def test_a_demo_without_examples_is_explained(tmp_path, capsys):
    assert main(["demo", "llama", "--out", str(tmp_path / "out"), "--shots", "0"]) == 1
    assert "shots is 0, expected at least 1 example" in capsys.readouterr().err


def test_a_demo_without_volumes_is_explained(tmp_path, capsys):
    assert main(["demo", "sam", "--out", str(tmp_path / "out"), "--shots", "0"]) == 1
    assert "shots is 0, expected at least 1 volume" in capsys.readouterr().err


@pytest.mark.slow
def test_a_kept_adapter_is_verified_in_another_process(tmp_path):
    """Equal scores pass; one that differs in a single volume is an error with both numbers."""
    import mmadapt as mm
    from mmadapt.demos import kept, sam
    from mmadapt.errors import CheckError
    from mmadapt.tasks.segment.compare import predictions, score_dice

    model = mm.load(sam.BACKBONE)
    mm.attach(model, mm.Bottleneck(2), at="vision.layers[0].mlp", name="untrained")
    mm.save(model, tmp_path / "adapter")
    _, test = sam.task(1)
    verdict = sam.verdict(score_dice(predictions(model, test), test), test)
    kept.confirm("sam", tmp_path / "adapter", verdict)
    verdict["dice"][3] += 1e-9
    with pytest.raises(CheckError, match="in a second process"):
        kept.confirm("sam", tmp_path / "adapter", verdict)
    assert kept.size(tmp_path / "adapter").endswith(" kB")
