from __future__ import annotations

import pytest

from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.repository import RepositoryFile, RepositoryListing, is_valid_id, is_valid_revision
from serve_app.catalog.reading.selection import candidates, embeddings_beside
from serve_app.errors import ModelNotFound
from serve_app.refusals import NotAnAdapter, UnsafeFile


def listing(*names: str) -> RepositoryListing:
    return RepositoryListing("a/b", "folder", "a/b", None, tuple(RepositoryFile(n, 9) for n in names), Card())


def test_the_canonical_name_wins_over_any_other():
    files = listing("a.safetensors", "pytorch_lora_weights.safetensors", "z.safetensors")
    assert candidates(files, None) == ("pytorch_lora_weights.safetensors",)


def test_without_it_every_safetensors_file_at_the_root_may_be_meant():
    files = listing("b.safetensors", "a.safetensors", "deeper/c.safetensors", "README.md")
    assert candidates(files, None) == ("a.safetensors", "b.safetensors")


def test_files_below_the_root_count_only_where_the_root_has_none():
    assert candidates(listing("deeper/c.safetensors"), None) == ("deeper/c.safetensors",)


def test_learned_embeddings_and_training_states_are_not_the_adapter():
    files = listing("me_emb.safetensors", "embeddings.safetensors", "me.safetensors", "checkpoint-5/x.safetensors")
    assert candidates(files, None) == ("me.safetensors",)
    with pytest.raises(NotAnAdapter):
        candidates(listing("checkpoint-5/x.safetensors"), None)


@pytest.mark.parametrize(
    ("adapter", "names", "found"),
    [
        ("x.safetensors", ["embeddings.safetensors"], "embeddings.safetensors"),
        ("x.safetensors", ["b_emb.safetensors", "embeddings.safetensors"], "b_emb.safetensors"),
        ("x.safetensors", ["x_emb.safetensors", "b_emb.safetensors"], "x_emb.safetensors"),
        ("x.safetensors", ["other_emb.safetensors"], "other_emb.safetensors"),
        ("x.safetensors", ["other_emb.safetensors", "y.safetensors"], None),
        ("x.safetensors", ["other_emb.safetensors", "another_emb.safetensors"], None),
        ("x.safetensors", ["deeper/embeddings.safetensors", "b_emb.bin", "README.md"], None),
        ("deeper/x.safetensors", ["embeddings.safetensors", "deeper/b_emb.safetensors"], "deeper/b_emb.safetensors"),
        ("embeddings.safetensors", [], None),
        ("x.safetensors", [], None),
    ],
)
def test_learned_words_lie_beside_their_adapter(adapter: str, names: list[str], found: str | None):
    assert embeddings_beside(listing(adapter, *names), adapter) == found


@pytest.mark.parametrize(
    "names",
    [
        ("pytorch_lora_weights-00001-of-00002.safetensors", "pytorch_lora_weights-00002-of-00002.safetensors"),
        ("unet/adapter_model.safetensors", "text_encoder/adapter_model.safetensors"),
    ],
)
def test_an_adapter_in_several_files_is_refused_as_that(names: tuple[str, ...]):
    with pytest.raises(NotAnAdapter, match="it lies in 2 files"):
        candidates(listing(*names), None)


def test_what_peft_saves_for_one_model_of_a_pipeline_is_the_adapter():
    assert candidates(listing("unet/adapter_model.safetensors"), None) == ("unet/adapter_model.safetensors",)


def test_files_that_lie_where_parts_do_can_be_named():
    with pytest.raises(NotAnAdapter, match="name it as 'filename'"):
        candidates(listing("unet/style.safetensors"), None)
    assert candidates(listing("unet/style.safetensors"), "unet/style.safetensors") == ("unet/style.safetensors",)


def test_the_file_that_is_asked_for_is_the_one():
    assert candidates(listing("a.safetensors", "b.safetensors"), "b.safetensors") == ("b.safetensors",)
    with pytest.raises(ModelNotFound, match=r"no file 'c\.safetensors'"):
        candidates(listing("a.safetensors"), "c.safetensors")
    with pytest.raises(ModelNotFound):
        candidates(listing("a.safetensors"), "../a.safetensors")


@pytest.mark.parametrize("name", ["x.bin", "x.ckpt", "x.pt"])
def test_pickled_weights_are_never_read(name: str):
    with pytest.raises(UnsafeFile, match=name):
        candidates(listing(name, "README.md"), None)
    with pytest.raises(UnsafeFile, match=name):
        candidates(listing(name, "a.safetensors"), name)


def test_a_whole_model_is_not_an_adapter():
    with pytest.raises(NotAnAdapter, match="whole model"):
        candidates(listing("model_index.json", "unet/w.safetensors", "vae/w.safetensors", "unet/w.bin"), None)


def test_a_repository_without_weights_is_not_an_adapter():
    with pytest.raises(NotAnAdapter, match="no safetensors"):
        candidates(listing("README.md"), None)


@pytest.mark.parametrize("name", ["a/b", "name", "A.b-c_d/1", "_a/b_"])
def test_ids_look_like_those_of_the_hub(name: str):
    assert is_valid_id(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/a",
        "a/",
        "a//b",
        "../a",
        "a/..",
        "a/b/c",
        ".a/b",
        "a/b.",
        "a--b",
        "a..b/c",
        "a\\b",
        "a b",
        "a/b\n",
        "-a",
        "%2e/b",
    ],
)
def test_names_that_could_climb_are_no_ids(name: str):
    assert not is_valid_id(name)


def test_revisions_are_branches_tags_and_commits():
    assert all(map(is_valid_revision, ("main", "refs/pr/1", "v1.0", "a" * 40)))
    assert not any(map(is_valid_revision, ("", "../main", "a//b", "/main", "a b", "main?x=1")))
