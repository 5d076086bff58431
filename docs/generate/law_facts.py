"""What the suite of laws says of methods and backbones: its data, and the sentences its tests are."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markup as md

import mmadapt as mm
from mmadapt.adapter import Adapter, adapters

ROOT = Path(__file__).parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))

suite: Any = importlib.import_module("test_laws")
tiny: Any = importlib.import_module("backbones")


@dataclass(frozen=True)
class Law:
    """One test that runs over methods and backbones."""

    #: what holds, as its test's name says it: "starts as the identity or says why not"
    says: str
    #: the words under which methods are exempt from it, or from a part of it
    exempt: tuple[str, ...]


@functools.cache
def laws() -> tuple[Law, ...]:
    """Every law, in the order of the suite."""
    found = []
    for node in ast.parse(inspect.getsource(suite)).body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            if "case" in [argument.arg for argument in node.args.args]:
                words = re.findall(r"exempt\('(\w+)'", ast.unparse(node))
                says = node.name.removeprefix("test_").replace("_", " ")
                found.append(Law(says, tuple(words)))
    return tuple(found)


def exemptions(method: str) -> dict[str, str]:
    """The laws, as sentences, that leave this method out, with the reasons."""
    return {
        law.says: suite.EXEMPTIONS[method, word]
        for law in laws()
        for word in law.exempt
        if (method, word) in suite.EXEMPTIONS
    }


def quiet(method: str) -> dict[str, str]:
    """Parts of tensors' names whose gradient may be zero in the laws, with the reasons."""
    return {part: reason for (name, part), reason in suite.QUIET.items() if name == method}


def misfits(method: str) -> list[tuple[str, str, str]]:
    """(variant or "", tiny backbone, reason) where the method's sites are and it is refused."""
    found = []
    for (name, backbone), reason in suite.MISFITS.items():
        of, _, variant = name.partition("/")
        if of == method:
            found.append((variant, backbone, reason))
    return found


def variants(method: str) -> dict[str, Adapter]:
    """The hyper-parameters that the laws try."""
    return suite.EXAMPLES.get(method) or {"defaults": adapters()[method]()}


def hosts(method: str) -> list[str]:
    """The tiny backbones that the method's laws run on, home first."""
    adapter = next(iter(variants(method).values()))
    known = {backbone for variant, backbone, _ in misfits(method) if not variant}
    return [
        host.name
        for host in suite.HOSTS.get(method, tiny.BACKBONES).values()
        if host.name not in known and suite._fits(adapter, host)
    ]


def merges(method: str) -> str:
    """ "" where the method's first variant merges on its home backbone, else the reason why not."""
    home = hosts(method)[0]
    model = tiny.ALL[home].fresh()
    mm.attach(model, next(iter(variants(method).values())))
    try:
        mm.merge(model)
    except mm.errors.MergeError as refused:
        return str(refused).partition("\n")[0].rpartition("cannot be merged: ")[2]
    return ""


def page() -> str:
    """All laws as a list, and every exemption."""
    rows = [
        (f"[{adapters()[method].__name__}](methods/{method}.md)", says, why)
        for method in adapters()
        for says, why in exemptions(method).items()
    ]
    return "\n\n".join(
        (
            "# The laws",
            "One suite of tests runs every registered method on every small backbone that offers the "
            "sites it wants. These hold for all of them:",
            "\n".join(f"- {law.says}" for law in laws()),
            "For a method of your own [`mm.check_laws`][mmadapt.check_laws] runs the core of them. "
            "An exemption is data with a reason:",
            md.table(("method", "law", "why it does not apply"), rows),
            "The suite is [`tests/test_laws.py`](../tests/test_laws.py). A method joins by being "
            "registered, a backbone by standing in [`tests/backbones.py`](../tests/backbones.py).",
        )
    )
