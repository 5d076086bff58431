"""The `mmadapt` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from mmadapt import __version__
from mmadapt.errors import MmadaptError
from mmadapt.zoo.commands import add as add_zoo
from mmadapt.zoo.commands import exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 at an error mmadapt explains, 2 at wrong usage.

    Errors of the zoo have codes of their own: `mmadapt.zoo.commands.exit_code`.
    """
    chosen = _parser().parse_args(arguments)
    try:
        return chosen.run(chosen)
    except MmadaptError as error:
        print(f"mmadapt: {error}", file=sys.stderr)
        return exit_code(error)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("mmadapt: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmadapt", description="Small trainable adapters for large frozen models."
    )
    parser.add_argument("--version", action="version", version=f"mmadapt {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo(commands)
    add_zoo(commands)
    return parser


#: what a demo shows, and what its shots are
DEMOS = {
    "clip": ("few-shot classification, which is what runs without a name", "images a class (16)"),
    "sam": ("stacks of slices from one click", "volumes to train on (24)"),
    "volume": ("clicks in three dimensions, a real scan from NIfTI to NIfTI", "volumes (24)"),
    "audio": ("sounds in a noisy hall", "clips a class (10)"),
    "asr": ("whispered speech", "clips to train on (all 300)"),
    "llama": ("a new wording for what a small decoder can do", "examples (200)"),
}


def _demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo", help="adapt a small backbone that comes with the package, and report"
    )
    demo.add_argument(
        "name",
        nargs="?",
        default="clip",
        choices=tuple(DEMOS),
        help="; ".join(f"{name}: {what}" for name, (what, _) in DEMOS.items()),
    )
    demo.add_argument(
        "--out", type=Path, default=Path("mmadapt-demo"), help="folder for report and adapter"
    )
    demo.add_argument(
        "--shots",
        type=int,
        help="; ".join(f"{name}: {shots}" for name, (_, shots) in DEMOS.items()),
    )
    demo.add_argument(
        "--seeds", type=int, nargs="+", default=[1], help="seeds of draws and training (1)"
    )
    demo.add_argument("--threads", type=int, default=0, help="CPU threads (as many as there are)")
    demo.add_argument(
        "--verify",
        type=Path,
        metavar="ADAPTER",
        help="only score a saved adapter, in a fresh backbone",
    )
    demo.set_defaults(run=_run_demo)


def _run_demo(chosen: argparse.Namespace) -> int:
    from importlib import import_module

    demo = import_module(f"mmadapt.demos.{chosen.name}")
    if chosen.threads:
        import torch

        torch.set_num_threads(chosen.threads)
    if chosen.verify:
        print(demo.verify(chosen.verify))
        return 0
    shots = {} if chosen.shots is None else {"shots": chosen.shots}
    demo.run(chosen.out, seeds=tuple(chosen.seeds), **shots)
    return 0
