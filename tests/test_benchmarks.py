"""What is committed of the cost benchmark agrees with itself, and the measuring still runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmadapt.train.kept import kept_for_backward

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
RESULTS = json.loads((BENCHMARKS / "cost.json").read_text())


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cost_cases
    import cost_clock
    import cost_tables

    yield cost_cases, cost_clock, cost_tables
    for name in ("cost_cases", "cost_clock", "cost_tables"):
        del sys.modules[name]


def test_the_tables_are_those_of_the_committed_numbers(benchmarks):
    tables = benchmarks[2]
    document = (ROOT / "docs" / "performance.md").read_text()
    assert all(f"<!-- {name} table -->" in document for name in tables.TABLES)
    assert tables.write(document, RESULTS) == document


def test_a_changed_number_changes_the_document(benchmarks):
    tables = benchmarks[2]
    document = (ROOT / "docs" / "performance.md").read_text()
    changed = json.loads(json.dumps(RESULTS))
    tables.find(changed["launch"], "mmadapt", "LoRA on q, v")["forward"]["ratio"] = [7, 8, 9]
    assert "**8.00** (7.00–9.00)" in tables.write(document, changed)


def test_every_part_says_what_it_was_measured_with():
    assert set(RESULTS) == {"launch", "vit_b", "life", "import"}
    for part in RESULTS.values():
        assert part["machine"] and part["threads"] == 1 and part["date"]
    for name in ("launch", "vit_b"):
        versions = RESULTS[name]["versions"]
        assert versions["peft"]["transformers"].startswith("5.")
        assert versions["adapterhub"]["transformers"].startswith("4.")
        libraries = {row["library"] for row in RESULTS[name]["rows"]}
        assert {"bare", "mmadapt", "PEFT", "AdapterHub"} <= libraries


def test_quartiles_are_in_order():
    for name in ("launch", "vit_b"):
        for row in RESULTS[name]["rows"]:
            for kind in ("forward", "step"):
                for low, middle, high in row.get(kind, {}).values():
                    assert 0 < low <= middle <= high


def test_verdicts_need_quartiles_apart(benchmarks):
    verdict = benchmarks[2].verdict
    assert verdict([1.0, 1.1, 1.2], [1.3, 1.4, 1.5]) == "faster"
    assert verdict([1.3, 1.4, 1.5], [1.0, 1.1, 1.2]) == "**slower**"
    assert verdict([1.0, 1.1, 1.4], [1.0, 1.2, 1.5]) == "within the spread, median lower"
    assert verdict([1.0, 1.3, 1.4], [1.0, 1.2, 1.5]) == "within the spread, median higher"


def test_bytes_kept_are_those_of_the_graph():
    linear = torch.nn.Linear(8, 4)
    x = torch.randn(3, 8)
    kept = 4 * (x.numel() + 3 * 4)  # x for the weight's gradient, and the output of relu
    assert kept_for_backward(linear, lambda: linear(x).relu()) == kept
    linear.requires_grad_(False)
    assert kept_for_backward(linear, lambda: linear(x).relu()) == 0


def test_copies_share_weights_but_no_modules(benchmarks):
    cases = benchmarks[0]
    bench = cases.Bench(cases.TINY)
    twin, apart = bench.twin(), bench.apart()
    for one, shared, own in zip(
        bench.bare.parameters(), twin.parameters(), apart.parameters(), strict=True
    ):
        assert shared is one and own is not one
    assert not {id(m) for m in bench.bare.modules()} & {id(m) for m in twin.modules()}


def test_by_hand_computes_what_our_layers_compute(benchmarks):
    import mmadapt as mm

    cases = benchmarks[0]
    bench = cases.Bench(cases.TINY)
    by_hand = {case.name: case for case in cases.by_hand_cases(bench)}
    for case in cases.mmadapt_cases(bench):
        if case.name not in ("bottleneck behind each MLP", "LoRA on q, v"):
            continue
        ours = [p for p in case.model.parameters() if p.requires_grad]
        theirs = list(by_hand[case.name].model.by_hand)
        assert sorted(p.shape for p in ours) == sorted(p.shape for p in theirs)
        with torch.no_grad():
            value = {p.shape: p.clone() for p in theirs}  # sites come in different orders
            for parameter in (*ours, *theirs):
                parameter.copy_(value[parameter.shape])
            expected = by_hand[case.name].call().last_hidden_state
            assert (case.call().last_hidden_state - expected).abs().max() < 1e-6
            mm.set_active(case.model)
            assert (case.call().last_hidden_state - expected).abs().max() > 1e-2


@pytest.mark.slow
def test_the_worker_measures_us_without_any_peer():
    command = [sys.executable, str(BENCHMARKS / "cost_worker.py"), "launch", "mmadapt"]
    done = subprocess.run(
        [*command, "--quick", "--only", "LoRA on q, v"], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["library"], row["case"]) for row in rows] == [
        ("bare", "forward"),
        ("bare", "full fine-tuning"),
        ("mmadapt", "LoRA on q, v"),
    ]
    assert rows[2]["sites"] == 4 and rows[2]["forward"]["ms"][1] > 0 and rows[2]["step"]
    assert 0 < rows[2]["saved_bytes"] < rows[1]["saved_bytes"]


def test_the_table_of_the_cached_prefix_is_that_of_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cached_prefix

    result = json.loads((BENCHMARKS / "cached_prefix.json").read_text())
    assert cached_prefix.table(result) in (ROOT / "docs" / "performance.md").read_text()
    del sys.modules["cached_prefix"]


def test_the_tables_of_the_segmentation_study_are_those_of_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import segment_shift

    known = json.loads(segment_shift.RESULTS.read_text())
    page = segment_shift.PAGE.read_text()
    assert segment_shift.write(page, known) == page
    assert segment_shift.finished(known, "volumes")  # with these seeds every method was run
    known["rows"][0]["dice"] = [0.5]
    assert segment_shift.write(page, known) != page
    del sys.modules["segment_shift"]


def test_the_table_of_the_demo_of_volumes_is_that_of_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import volume_demo

    known = json.loads(volume_demo.RESULTS.read_text())
    page = volume_demo.PAGE.read_text()
    assert volume_demo.write(page, known) == page
    known["clicks"]["frozen"][0][1] += 0.5
    assert volume_demo.write(page, known) != page
    del sys.modules["volume_demo"]


def test_the_study_was_run_on_the_weights_that_are_shipped():
    import mmadapt as mm

    known = json.loads((BENCHMARKS / "segment_shift.json").read_text())
    assert known["weights"] == mm.zoo.entry(known["backbone"]).sha256
    for row in known["rows"]:  # an adapter that is off leaves no trace on the source task
        frozen = next(
            r for r in known["rows"] if (r["part"], r["method"]) == (row["part"], "frozen")
        )
        assert row["source_off"] in ({}, frozen["source_on"])


# -- decoders ---------------------------------------------------------------------------------------


def test_the_tables_of_the_study_of_wordings_are_those_of_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import instruct_shift as study

    import mmadapt as mm
    from mmadapt.tasks.instruct import compare

    known = json.loads(study.RESULTS.read_text())
    page = study.PAGE.read_text()
    assert study.write(page, known) == page
    assert known["weights"] == mm.zoo.entry(known["backbone"]).sha256
    rates, (backbone, *rows) = study.chosen(known), known["wording"]
    assert study.finished(known)  # with these seeds every method was run
    assert set(rates) == {*study.SETTINGS["rates"], study.IMAGES}
    assert not {row["seed"] for row in rows} & set(study.CHOOSING)
    for name, method in compare.METHODS.items():  # what the demo and the notebook use
        assert method.rate == rates[name]
    for row in rows:
        assert row["rate"] == rates[row["method"]]
        assert row["start"] == 0.0
        assert row["old_off"] in (
            None,
            backbone["old_on"],
        )  # taken away, an adapter leaves no trace
    rows[0]["new"] = 0.123
    assert study.write(page, known) != page
    del sys.modules["instruct_shift"]


@pytest.mark.slow
def test_the_cost_of_zero_initialised_attention_can_be_measured_and_written(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import zero_init_cost as cost

    page = cost.DOCUMENT.read_text()
    assert cost.write(page, cost.known()) == page
    rows = cost.measure(quick=True)
    found = {"rows": rows, "machine": "one", "date": "today", "load_of_others": [0.0, 2.5]}
    table = cost.table(found)
    for name in ("bare", "mmadapt, a gate per head", "mmadapt, a gate per layer"):
        assert rows["one token"][name]["ratio"][1] > 0
        assert f"| {name} | " in table
    assert "Other processes kept up to 2.5 cores busy" in table
    assert "kept up to" not in cost.table({**found, "load_of_others": [0.0, 0.1]})
    for name in ("zero_init_cost", "cost_clock", "machine"):
        sys.modules.pop(name, None)


# -- sounds ---------------------------------------------------------------------------------------


def test_the_tables_of_the_study_of_sounds_are_those_of_its_numbers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sound_shift

    known = json.loads(sound_shift.RESULTS.read_text())
    page = sound_shift.PAGE.read_text()
    assert sound_shift.write(page, known) == page
    assert not sound_shift.missing(known)
    known["rows"][0]["accuracy"] = 0.123
    assert sound_shift.write(page, known) != page
    for name in ("sound_shift", "machine"):
        sys.modules.pop(name, None)


def test_the_study_of_sounds_was_run_on_what_is_shipped_at_the_rates_that_were_chosen():
    import mmadapt as mm
    from mmadapt.tasks.tagging import compare

    known = json.loads((BENCHMARKS / "sound_shift.json").read_text())
    assert known["weights"] == mm.zoo.entry(known["backbone"]).sha256
    assert known["rates"] == {name: method.rate for name, method in compare.METHODS.items()}
    for name, tried in known["choice"]["validation_accuracy"].items():
        assert f"{known['rates'][name]:g}" == max(tried, key=tried.__getitem__)
    frozen = next(row for row in known["rows"] if row["method"] == "frozen")
    for row in known["rows"]:  # an adapter that is off leaves no trace on the source task
        assert row["source_off"] in (None, frozen["source_on"])


# -- SAM ------------------------------------------------------------------------------------------

SAM = json.loads((BENCHMARKS / "sam_cost.json").read_text())


@pytest.fixture
def sam_cost(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import sam_cost

    yield sam_cost
    names = ("sam_cost", "sam_cost_cases", "sam_cost_tables", "cost", "cost_clock", "cost_tables")
    for name in (*names, "machine"):
        sys.modules.pop(name, None)


def test_the_tables_of_sams_cost_are_those_of_the_committed_numbers(sam_cost):
    document = (ROOT / "docs" / "sam_cost.md").read_text()
    assert set(SAM) == {"memory", "check", "times", "epochs"}
    assert all(f"<!-- {name} -->\n|" in document for name in ("parts", "check", "times", "epochs"))
    assert sam_cost.write(document, SAM) == document
    changed = json.loads(json.dumps(SAM))
    changed["memory"]["rows"][0]["kept"] *= 2
    assert sam_cost.write(document, changed) != document


def test_what_sams_encoder_keeps_follows_from_its_shapes(sam_cost):
    parts = sam_cost.parts("vit_b")
    assert parts == SAM["memory"]["parts"]["vit_b"]
    assert (parts["windowed"], parts["global"]) == (181_973_760, 933_298_176)
    assert parts["input"] == 64 * 64 * 768 * 4
    assert parts["matrix"] == 12 * 4096**2 * 4
    assert parts["matrix"] < parts["global"] < 1.2 * parts["matrix"]  # one, beside smaller things
    blocks = 8 * parts["windowed"] + 4 * parts["global"]
    assert blocks < parts["encoder"] < 1.02 * blocks


def test_real_passes_keep_what_was_counted():
    for row in SAM["check"]["rows"]:
        assert row["real"] == row["shapes"]
        assert row["shapes"] < row["resident"] < 1.1 * row["shapes"] < 3 * row["peak"]


def test_cached_embeddings_change_no_loss():
    for row in SAM["epochs"]["rows"]:
        assert row["loss difference"] <= 1e-6
        assert row["later"] < row["epoch"]


def test_a_checkpointed_region_counts_with_its_inputs_and_shared_storage_once():
    from torch.utils.checkpoint import checkpoint

    linear = torch.nn.Linear(8, 8)
    x = torch.randn(3, 8, requires_grad=True)
    assert kept_for_backward(linear, lambda: linear(linear(x).exp().exp())) == 3 * x.nbytes
    assert kept_for_backward(linear, lambda: linear(x) + linear(x.view(3, 8))) == x.nbytes
    region = lambda: checkpoint(lambda z: linear(z).exp().exp(), x, use_reentrant=False)  # noqa: E731
    assert kept_for_backward(linear, region) == x.nbytes
