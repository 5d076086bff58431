"""The documentation site: what its generator makes from the code, and links that hold.

`mkdocs build`, with all pages and strict links, is a step of `.ci/run`.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmadapt.adapter import Adapter, adapters
from mmadapt.core.known import KNOWN

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
METHODS = {name: cls for name, cls in adapters().items() if cls.__module__.startswith("mmadapt.")}
every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of `docs/generate` by its name."""
    monkeypatch.syspath_prepend(str(DOCS / "generate"))
    return importlib.import_module


# -- methods --------------------------------------------------------------------------------------


@every_method
def test_a_method_names_its_paper_and_has_a_formula(cls: type[Adapter], generator: Any) -> None:
    markup, pages = generator("markup"), generator("method_pages")
    assert markup.papers(cls.source)
    formula = "\n".join(pages.formula(cls))
    assert "```text" in formula, "the docstring of the module of its layer has no indented formula"
    assert markup.papers(cls.source) & markup.papers(formula)


@every_method
def test_a_methods_example_runs(
    cls: type[Adapter], generator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = generator("method_pages").example(cls)
    assert f"mm.{cls.__name__}" in code, "the docstring ends in no example"
    assert len(code.splitlines()) <= 7
    monkeypatch.chdir(tmp_path)
    exec(generator("markup").runnable(code), {})


def test_a_module_of_several_methods_shows_each_its_own_formula(generator: Any) -> None:
    formula = generator("method_pages").formula
    shift, bias = ("\n".join(formula(METHODS[name])) for name in ("scale_shift", "adapter_bias"))
    assert "γ ⊙ y + β" in shift and "(w·z + b)·v" not in shift
    assert "(w·z + b)·v" in bias and "γ ⊙ y + β" not in bias


def test_a_methods_page_says_costs_presets_misfits_and_exemptions(
    generator: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, pages = generator("named_models"), generator("method_pages")
    one = "AST base, 527 classes (`ASTForAudioClassification`)"
    monkeypatch.setattr(models, "MODELS", {one: models.MODELS[one]})
    assert f"| {one} | 1 | 1,538 | 0.0018 % |" in pages.page(METHODS["head"])  # 2·(768 + 1)
    assert "it starts at zero; nothing is drawn" in pages.page(METHODS["head"])
    prompts = pages.page(METHODS["deep_prompts"])
    assert "Refused on hf_wavlm: its attention has positions of its own." in prompts
    assert "does not merge" in prompts and "hf_ast" in prompts
    bottleneck = pages.page(METHODS["bottleneck"])
    assert "`Bottleneck.houlsby(width=None, **changes)`" in bottleneck


# -- backbones and laws -----------------------------------------------------------------------------


def test_every_known_class_is_on_a_page_and_every_tiny_backbone_has_one(generator: Any) -> None:
    pages, laws = generator("backbone_pages"), generator("law_facts")
    listed = [cls for classes in pages.tables().values() for cls in classes]
    assert sorted(listed) == sorted(KNOWN)
    shown = {pages.table_of(name) for name in laws.tiny.ALL}
    assert shown <= set(pages.tables())
    assert pages.table_of("timm_swin") == "generic"
    assert pages.table_of("hf_granite") == "llama"  # probed, not listed


def test_a_backbones_page_shows_sites_with_shapes_and_what_is_never_called(generator: Any) -> None:
    pages = generator("backbone_pages")
    page = pages.page("wav2vec2", pages.tables()["wav2vec2"])
    row = next(line for line in page.splitlines() if line.startswith("| `audio.layers[*].mlp` "))
    assert "BTC" in row and re.search(r"2.×.\d+.×.16", row)
    assert "`transformers.WavLMModel`" in page
    assert "Read as weights without being called" in page
    assert "[DeepPrompts](../methods/deep_prompts.md) is refused on `hf_wavlm`" in page


def test_every_exemption_is_shown_beside_the_law_that_asks_for_it(generator: Any) -> None:
    laws = generator("law_facts")
    asked = {word for law in laws.laws() for word in law.exempt}
    assert asked == {law for _, law in laws.suite.EXEMPTIONS}
    page = laws.page()
    assert "- starts as the identity or says why not" in page
    assert all(reason in page for reason in laws.suite.EXEMPTIONS.values())


# -- names ------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference(generator: Any) -> None:
    import inspect

    import mmadapt as mm

    pages = generator("reference_pages").pages()
    text = "\n".join(pages.values())
    for name in mm.__all__:
        if name != "__version__" and not inspect.ismodule(getattr(mm, name)):
            assert f"::: mmadapt.{name}\n" in f"{text}\n", name
    assert "::: mmadapt.tasks.few_shot.zero_shot" in pages["reference/tasks.few_shot.md"]


# -- links and navigation ---------------------------------------------------------------------------


def test_every_page_written_by_hand_stands_in_the_navigation() -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = set(re.findall(r"[\w.]+\.md", str(navigation)))
    assert {path.name for path in DOCS.glob("*.md")} <= named


@pytest.mark.parametrize("path", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_links_between_files_of_the_repository_lead_somewhere(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for target, heading in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", text):
        there = path if not target else path.parent / target
        assert there.exists(), target
        if heading and there.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", there.read_text(), re.MULTILINE)
            assert heading in [_slug(title) for title in titles], f"{target}#{heading}"


def _slug(title: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower())


def test_links_lead_to_pages_and_to_files_that_are_put_into_the_site(generator: Any) -> None:
    kept: list[str] = []

    def keep(target: str) -> str:
        kept.append(target)
        return f"source/{target}"

    text = "\n".join(
        (
            "[a](../README.md#size) [b](training.md) [c](../tutorials/01_five_minutes.ipynb)",
            "[d](../benchmarks/cost.json) [e](https://arxiv.org/abs/1) [f](nowhere.md)",
            "```python\nlayers[3](README.md)\n```",
        )
    )
    pages = {
        "README.md": "index.md",
        "docs/training.md": "training.md",
        "tutorials/01_five_minutes.ipynb": "tutorials/01_five_minutes.md",
    }
    found = generator("links").rewritten(text, "docs/cost.md", "sub/cost.md", pages, keep)
    assert found.splitlines()[:2] == [
        "[a](../index.md#size) [b](../training.md) [c](../tutorials/01_five_minutes.md)",
        "[d](../source/benchmarks/cost.json) [e](https://arxiv.org/abs/1) [f](nowhere.md)",
    ]
    assert "layers[3](README.md)" in found
    assert kept == ["benchmarks/cost.json"]
