"""The wheel holds what it should and nothing else at top level."""

import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names}
allowed = {"mmadapt", next(name for name in top if name.endswith(".dist-info"))}
if top != allowed:
    sys.exit(f"unexpected at top level: {sorted(top - allowed)}")
wanted = (
    "mmadapt/py.typed",
    "mmadapt/kernels/__init__.py",
    "mmadapt/kernels/launch.py",
    "mmadapt/kernels/forward.py",
    "mmadapt/ui/click.css",
    "mmadapt/ui/click.js",
    "mmadapt/kernels/cuda/launch.py",
    "mmadapt/kernels/cuda/primitives.cuh",
    "mmadapt/kernels/cuda/activations.cuh",
    "mmadapt/kernels/cuda/forward.cuh",
    "mmadapt/_zoo_data/manifest.json",
    "mmadapt/_zoo_data/tiny/ast/model.safetensors",
    "mmadapt/_zoo_data/tiny/ast/preprocessor_config.json",
    "mmadapt/_zoo_data/tiny/clip/model.safetensors",
    "mmadapt/_zoo_data/tiny/clip/bpe.txt.gz",
    "mmadapt/_zoo_data/tiny/ctc/clips.opus",
    "mmadapt/_zoo_data/tiny/ctc/model.safetensors",
    "mmadapt/_zoo_data/tiny/llama/model.safetensors",
    "mmadapt/_zoo_data/tiny/llama/tokenizer.json",
    "mmadapt/_zoo_data/tiny/sam/config.json",
    "mmadapt/_zoo_data/tiny/sam/model.safetensors",
)
missing = [name for name in wanted if name not in names]
stray = [
    n
    for n in names
    if "recipes" in n or "tutorials" in n or "/tests" in n or "/bench" in n or ".ipynb" in n
]
if missing or stray:
    sys.exit(f"missing: {missing}; must not be there: {stray}")
print(f"wheel: {len(names)} files, nothing missing, nothing stray")
