"""What importing costs, and that imports run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mmadapt

PACKAGE = Path(mmadapt.__file__).parent
HEAVY = ("torch", "numpy", "transformers", "ipywidgets", "open_clip", "safetensors", "matplotlib")

#: a module may import its own layer and those before it
LAYERS = (
    ("errors", "adapter", "folders"),
    ("ops",),
    ("core",),
    ("methods", "backbones", "train"),
    ("zoo", "interop"),
    ("tasks",),
    ("ui",),
    ("demos", "cli", "__main__"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
#: neighbours in a layer that must not know of each other
STRANGERS = {("methods", "backbones"), ("backbones", "methods"), ("errors", "adapter")}


# -- cost ---------------------------------------------------------------------------------------


def _loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = (
        f"{code}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import mmadapt", id="import"),
        pytest.param(
            "import mmadapt as mm\nfor name in mm.__all__: getattr(mm, name)", id="every-name"
        ),
        pytest.param(
            "import mmadapt as mm\nmm.Bottleneck(32), mm.LoRA(4), mm.ClipAdapter(), mm.TipAdapter()\n"
            "from mmadapt.adapter import adapters, from_json\n"
            "[from_json(cls().to_json()) for cls in adapters().values()]",
            id="adapters",
        ),
        pytest.param("import mmadapt as mm\nmm.zoo.list()", id="zoo-list"),
        pytest.param(
            "import mmadapt as mm\nfor name in mm.ui.__all__: getattr(mm.ui, name)", id="widgets"
        ),
        pytest.param(
            "import mmadapt as mm\nimport rlcompleter\n"
            "completer = rlcompleter.Completer({'mm': mm})\n"
            "assert 'mm.attach(' in [completer.complete('mm.', i) for i in range(60)]",
            id="tab-completion",
        ),
        pytest.param(
            "import mmadapt as mm\ntry: mm.attache\nexcept AttributeError: pass", id="wrong-name"
        ),
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert not _loaded_after(code) & set(HEAVY)


# -- the facade -----------------------------------------------------------------------------------


def test_every_public_name_is_there_and_listed() -> None:
    assert dir(mmadapt) == sorted(mmadapt.__all__)
    assert len(set(mmadapt.__all__)) == len(mmadapt.__all__)
    for name in mmadapt.__all__:
        assert getattr(mmadapt, name) is not None


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'attache'; did you mean 'attach'"):
        mmadapt.attache  # noqa: B018


def test_an_unknown_private_name_gets_none() -> None:
    with pytest.raises(AttributeError, match=r"no attribute '_repr_html_'\Z"):
        mmadapt._repr_html_  # noqa: B018


def _type_checking_block(path: Path) -> dict[str, str]:
    """Name -> module of what a facade shows to type checkers."""
    tree = ast.parse(path.read_text())
    found = {}
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for statement in node.body:
                assert isinstance(statement, ast.ImportFrom)
                for alias in statement.names:
                    found[alias.asname or alias.name] = statement.module
    return found


def test_the_lazy_table_agrees_with_what_type_checkers_see() -> None:
    lazy = {**mmadapt._HOME, **dict.fromkeys(mmadapt._MODULES, "mmadapt")}
    assert lazy == _type_checking_block(PACKAGE / "__init__.py")
    assert _type_checking_block(PACKAGE / "ui" / "__init__.py") == mmadapt.ui._HOME


def test_every_task_is_there_by_its_name() -> None:
    tasks = PACKAGE / "tasks"
    public = {path.stem for path in tasks.iterdir() if not path.name.startswith(("_", "scene"))}
    assert set(dir(mmadapt.tasks)) == public
    assert mmadapt.tasks.few_shot.__name__ == "mmadapt.tasks.few_shot"
    with pytest.raises(AttributeError, match="did you mean 'few_shot'"):
        mmadapt.tasks.few_shoot  # noqa: B018


def test_no_module_of_widgets_hides_a_function() -> None:
    assert dir(mmadapt.ui) == sorted(mmadapt.ui.__all__)
    assert not {path.stem for path in (PACKAGE / "ui").iterdir()} & set(mmadapt.ui.__all__)
    with pytest.raises(AttributeError, match=r"'mmadapt.ui' has no .* mean 'segment'"):
        mmadapt.ui.segmant  # noqa: B018


# -- layers -----------------------------------------------------------------------------------


def _sources() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


class _Imports(ast.NodeVisitor):
    """Imports that can run, those inside functions too; not those for type checkers only."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.facade: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute here"
        assert node.module is not None
        self.found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == "mmadapt":
            self.facade.append((node.lineno, node.attr))
        self.generic_visit(node)


def _layer(dotted: str) -> str:
    return dotted.split(".")[1] if "." in dotted else ""


@pytest.mark.parametrize("path", _sources(), ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts[0]
    assert own in RANK, f"{own} has no place among the layers"
    visitor = _Imports()
    visitor.visit(ast.parse(path.read_text()))
    wrong = []
    for line, name in visitor.found:
        if name.partition(".")[0] != "mmadapt" or name == "mmadapt":
            continue
        other = _layer(name)
        if other == "__version__":
            continue
        if other == "kernels":  # installed beside the package; reached through ops only
            wrong += [(line, name)] if own != "ops" else []
        elif RANK.get(other, 99) > RANK[own] or (own, other) in STRANGERS:
            wrong.append((line, name))
    # the facade itself reaches everything, so below the top only its version may be read
    if RANK[own] < RANK["ui"]:
        wrong += [
            (line, f"mmadapt.{name}") for line, name in visitor.facade if name != "__version__"
        ]
    assert wrong == []


def test_strings_that_name_modules_name_real_ones() -> None:
    import importlib

    from mmadapt.adapter import adapters
    from mmadapt.core.known import KNOWN

    references = [*KNOWN.values(), *(cls.layer for cls in adapters().values())]
    for reference in references:
        module, _, name = reference.partition(":")
        assert callable(getattr(importlib.import_module(module), name))
