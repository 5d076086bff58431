"""Fetch entries on a machine with network, for machines without: a cluster's login node, a shared disk.

    python zoo/get.py --to /shared/models clip/vit-b-16/openai sam/vit-b
    python zoo/get.py --to /shared/models --list names.txt

Needs Python only, neither an installed mmadapt nor torch. Names may be hub ids, hf:org/repo@revision.
Elsewhere MMADAPT_ZOO_PATH=/shared/models makes mmadapt read them from there.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mmadapt.cli import main as mmadapt


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--to", required=True, metavar="ROOT")
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="one name a line; # begins a comment"
    )
    chosen = parser.parse_args(arguments)
    names = list(chosen.names)
    if chosen.list:
        lines = (line.partition("#")[0].strip() for line in chosen.list.read_text().splitlines())
        names += [line for line in lines if line]
    if not names:
        parser.error("no name was given")
    code = mmadapt(["zoo", "get", *names, "--to", chosen.to])
    print(f"export MMADAPT_ZOO_PATH={Path(chosen.to).expanduser().resolve()}")
    return code


if __name__ == "__main__":
    sys.exit(main())
