"""The Hub of the tests speaks to the real client as the real one does."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_server import CDN, FILE, TREE, HubServer
from tests.unit.catalog.builders import WEIGHTS, adapter_files, lora, write_files


def test_the_client_lists_downloads_and_resumes_nothing_twice(hub: HubServer, tmp_path: Path):
    commit = hub.push("me/sketch", adapter_files("demo/sd"))
    api = HfApi(endpoint=hub.endpoint, token=False)
    path = api.hf_hub_download("me/sketch", WEIGHTS, cache_dir=tmp_path)
    assert Path(path).read_bytes() == lora()
    assert commit in path
    assert hub.count(kind=CDN, method="GET") == 1
    readme = api.hf_hub_download("me/sketch", "README.md", cache_dir=tmp_path)
    assert Path(readme).read_bytes() == adapter_files("demo/sd")["README.md"]


def test_the_client_takes_a_whole_snapshot(hub: HubServer, tmp_path: Path):
    root = tmp_path / "root"
    write_files(root / "me" / "base", {"model_index.json": b"[]", "unet/config.json": b"{}"})
    hub.push_root(root)
    api = HfApi(endpoint=hub.endpoint, token=False)
    folder = snapshot_download("me/base", endpoint=api.endpoint, cache_dir=tmp_path / "cache", token=False)
    assert (Path(folder) / "unet" / "config.json").read_bytes() == b"{}"
    assert hub.count(kind=TREE) == 1
    assert hub.count(kind=FILE) == 4


def test_the_client_reads_a_header_by_range(hub: HubServer):
    hub.push("me/sketch", adapter_files("demo/sd"))
    metadata = HfApi(endpoint=hub.endpoint, token=False).parse_safetensors_file_metadata("me/sketch", WEIGHTS)
    assert len(metadata.tensors) == 4


def test_the_client_recognises_each_refusal(hub: HubServer, tmp_path: Path):
    api = HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("no/body")
    hub.push("me/sketch", adapter_files("demo/sd"))
    with pytest.raises(RevisionNotFoundError):
        api.model_info("me/sketch", revision="v2")
    hub.gate("me/sketch")
    with pytest.raises(GatedRepoError):
        api.hf_hub_download("me/sketch", WEIGHTS, cache_dir=tmp_path)


def test_a_test_can_wait_until_the_hub_was_asked(hub: HubServer):
    hub.push("me/sketch", adapter_files("demo/sd"))
    HfApi(endpoint=hub.endpoint, token=False).model_info("me/sketch")
    hub.wait_for(lambda seen: seen.count("me/sketch") == 1)
    with pytest.raises(AssertionError, match="not asked"):
        hub.wait_for(lambda seen: seen.count("me/sketch") == 2, timeout_s=0.01)
