"""What an installation offers, and what the README promises."""

import re
import subprocess
import sys
from pathlib import Path

import mmadapt

ROOT = Path(__file__).parent.parent


def run_elsewhere(code, folder):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )


def test_kernels_and_zoo_data_live_inside_the_namespace_and_nowhere_else(tmp_path):
    code = (
        "import importlib.util as u, mmadapt.kernels, mmadapt._zoo_data\n"
        "print([n for n in ('kernels', 'zoo', 'tests', 'tutorials', 'benchmarks') if u.find_spec(n)])"
    )
    done = run_elsewhere(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_command_is_installed(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mmadapt", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"mmadapt {mmadapt.__version__}"


def test_the_readme_begins_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    block = readme.split("```bash\n")[1].split("```")[0]
    commands = [line.partition("#")[0].strip() for line in block.strip().splitlines()]
    assert commands == ["pip install -e . && mmadapt demo", "pip install -e '.[dev]' && pytest"]
    assert readme.index("```bash") < 300


def test_every_name_the_readme_uses_exists():
    readme = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"\bmm\.([A-Za-z_]+)", readme)):
        assert hasattr(mmadapt, name), name


def test_the_readmes_links_into_the_repository_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_the_readme_speaks_of_every_registered_adapter():
    from mmadapt.adapter import adapters

    readme = (ROOT / "README.md").read_text()
    for cls in adapters().values():
        if cls.__module__.startswith("mmadapt.adapter."):
            assert f"`{cls.__name__}`" in readme


def test_no_committed_file_names_a_machine_or_a_registry():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        return  # an unpacked archive has no list of committed files
    for name in done.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or path.suffix not in {".py", ".md", ".toml", ".ipynb", ".json", ".txt"}:
            continue
        text = path.read_text()
        for word in ("/" + "root/", "/" + "work/main", "pypi" + ".org", "files.python" + "hosted"):
            assert word not in text, (name, word)
