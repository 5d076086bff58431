"""Zoo names, folders and the bundled weights."""

import json
import shutil

import pytest
import torch

import mmadapt as mm
from mmadapt.errors import MissingDependencyError, ZooError
from mmadapt.zoo import manifest


def test_every_bundled_entry_has_files_digests_a_licence_and_numbers():
    bundled = [item for item in manifest.shipped() if "bundled" in item.source]
    assert len(bundled) >= 5
    for item in bundled:
        assert item.pinned and all(file.sha256 and file.size for file in item.files)
        assert item.licence["weights"] == "Apache-2.0" and item.licence["data"]
        assert item.parameters > 0 and item.metrics and item.recipe


def test_tiny_clip_loads_in_eval_mode_without_moving_the_random_state():
    state = torch.get_rng_state()
    clip = mm.load("tiny/clip")
    assert torch.equal(torch.get_rng_state(), state)
    assert not clip.model.training
    assert clip.entry.name == "tiny/clip"
    assert sum(p.numel() for p in clip.model.parameters()) == clip.entry.parameters
    assert clip.tokenize(["a photo of a red circle"]).shape == (1, 20)


def test_open_clip_itself_loads_the_folder():
    import open_clip

    folder = manifest.data_folder() / "tiny" / "clip"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    mine = mm.load("tiny/clip").model
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval().encode_image(pixels), mine.encode_image(pixels))


def test_tiny_sam_loads_in_single_precision_and_keeps_the_random_state():
    state = torch.get_rng_state()
    sam = mm.load("tiny/sam")
    assert torch.equal(torch.get_rng_state(), state)
    assert not sam.model.training and sam.anatomy.family == "sam"
    assert {p.dtype for p in sam.model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in sam.model.parameters()) == sam.entry.parameters < 1.2e6
    weights = next(file for file in sam.entry.files if file.role == "weights")
    assert weights.size < 2.5e6


def test_transformers_prepares_images_for_tiny_sam_as_the_segmenter_does():
    from transformers import SamImageProcessor

    from mmadapt.tasks import segment

    folder = manifest.data_folder() / "tiny" / "sam"
    image = (torch.rand(64, 48, 3, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    theirs = SamImageProcessor.from_pretrained(folder)(image, return_tensors="pt").pixel_values[0]
    ours = segment.Segmenter(mm.load("tiny/sam")).prepare(image)
    assert torch.allclose(theirs.float(), ours, atol=1e-4)


def test_tiny_sam_finds_things_it_has_not_seen():
    """Far below its measured numbers, on other scenes."""
    from mmadapt.tasks.segment.compare import source_overlap

    metrics = mm.zoo.entry("tiny/sam").metrics
    assert metrics["n"] >= 1000 and metrics["iou"]["seen"]["box"] > 0.85
    assert metrics["iou"]["held_out_shapes"]["box"] > 0.82
    found = source_overlap(mm.load("tiny/sam"), count=64, seed=5)
    assert found["box"] > 0.8 and found["point"] > 0.75


def test_tiny_llama_comes_with_its_head_and_a_tokenizer_of_bytes():
    state = torch.get_rng_state()
    llama = mm.load("tiny/llama")
    assert torch.equal(torch.get_rng_state(), state)
    assert type(llama.model).__name__ == "LlamaForCausalLM" and not llama.model.training
    assert {p.dtype for p in llama.model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in llama.model.parameters()) == llama.entry.parameters < 8e5
    text = "é €\n\t\x00 <s>"[:-4]
    ids = llama.tokenize(text, add_special_tokens=False)["input_ids"]
    assert ids == list(text.encode()) and llama.tokenize.decode(ids) == text
    assert llama.tokenize(text)["input_ids"] == [256, *ids]
    assert llama.tokenize.pad_token_id == llama.model.config.pad_token_id == 258


def test_tiny_llama_can_do_what_it_was_trained_for_and_not_in_other_words():
    """Far below its measured numbers, on other strings."""
    from mmadapt.tasks import instruct
    from mmadapt.tasks.instruct import strings

    llama = mm.load("tiny/llama")
    assert min(llama.entry.metrics["exact_match"].values()) > 0.9
    old = strings.instructions(100, seed=11, split="validation")
    new = strings.instructions(50, seed=12, split="validation", wordings=strings.WORDINGS)
    assert instruct.exact_match(llama, old) > 0.9
    assert instruct.exact_match(llama, new) < 0.1


def test_a_folder_loads_as_well_as_a_name():
    folder = manifest.data_folder() / "tiny" / "clip"
    clip = mm.load(folder)
    assert clip.entry is None
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            clip.model.parameters(), mm.load("tiny/clip").model.parameters(), strict=True
        )
    )


def test_a_transformers_folder_loads(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        image_size=32, patch_size=8,
    )  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path)
    backbone = mm.load(str(tmp_path))
    assert backbone.anatomy.family == "vit" and not backbone.model.training


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ZooError, match=r"the zoo has no 'tiny/clp'\n.*did you mean 'tiny/clip'"):
        mm.load("tiny/clp")


def test_a_name_never_falls_through_to_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(manifest.data_folder() / "tiny" / "clip", tmp_path / "mine")
    with pytest.raises(ZooError, match="the zoo has no 'mine'"):
        mm.load("mine")
    assert mm.load("./mine").anatomy.family == "clip"


def test_what_cannot_be_loaded_says_why(tmp_path):
    with pytest.raises(ZooError, match="no folder at"):
        mm.load(tmp_path / "nowhere")
    with pytest.raises(ZooError, match="holds neither"):
        mm.load(tmp_path)
    with pytest.raises(ZooError, match=r"'hf:org' is no hub id\n.*hf:org/repo@revision"):
        mm.load("hf:org")
    with pytest.raises(ZooError, match=r"dtype is 'int8'"):
        mm.load("tiny/clip", dtype="int8")
    with pytest.raises(ZooError, match="expected a zoo name or a folder, got int"):
        mm.load(3)


def test_damaged_bundled_files_are_refused(tmp_path, monkeypatch):
    copy = tmp_path / "zoo"
    shutil.copytree(manifest.data_folder() / "tiny", copy / "tiny")
    shutil.copy(manifest.data_folder() / "manifest.json", copy)
    monkeypatch.setattr(manifest, "data_folder", lambda: copy)
    weights = copy / "tiny" / "clip" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ZooError, match=r"model.safetensors is damaged"):
        mm.load("tiny/clip")
    weights.unlink()
    with pytest.raises(ZooError, match=r"model.safetensors is missing\n.*reinstall"):
        mm.load("tiny/clip")


def test_the_held_out_number_is_reported_and_good():
    metrics = mm.zoo.entry("tiny/clip").metrics
    assert metrics["accuracy"]["held_out_pairs"]["object"] > 0.77, json.dumps(metrics)


def test_the_list_is_a_table():
    found = mm.zoo.list("tiny/*")
    assert "tiny/clip" in [item.name for item in found] and "Apache-2.0" in repr(found)
    assert "<table>" in found._repr_html_() and len(mm.zoo.list("none/*")) == 0


def test_a_torchvision_that_does_not_fit_torch_is_explained(monkeypatch):
    import builtins
    import importlib.metadata
    import sys

    real = builtins.__import__

    def broken(name, *rest):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    with pytest.raises(MissingDependencyError, match=r"torchvision 9.9 does not fit torch 9.9"):
        mm.load("tiny/clip")
