from __future__ import annotations

import pytest

from serve_app.catalog.reading.card import Card
from serve_app.catalog.reading.repository import RepositoryFile, RepositoryListing, is_valid_id, is_valid_revision
from serve_app.catalog.reading.selection import candidates, embeddings_beside
from serve_app.errors import ModelNotFound
from serve_app.refusals import NotAnAdapter, UnsafeFile


def chosen(files: RepositoryListing, filename: str | None = None) -> list[list[tuple[str, ...]]]:
    return [list(rank) for rank in candidates(files, filename, {})]


def listing(*names: str) -> RepositoryListing:
    return RepositoryListing("a/b", "folder", "a/b", None, tuple(RepositoryFile(n, 9) for n in names), Card())


def test_the_canonical_name_wins_over_any_other():
    files = listing("a.safetensors", "pytorch_lora_weights.safetensors", "z.safetensors")
    assert chosen(files) == [[("pytorch_lora_weights.safetensors",)]]


def test_without_it_every_safetensors_file_at_the_root_may_be_meant():
    files = listing("b.safetensors", "a.safetensors", "deeper/c.safetensors", "README.md")
    assert chosen(files)[0] == [("a.safetensors",), ("b.safetensors",)]


def test_files_below_the_root_are_looked_at_after_those_of_the_root():
    assert chosen(listing("deeper/c.safetensors", "a.safetensors")) == [
        [("a.safetensors",)],
        [("deeper/c.safetensors",)],
    ]


def test_learned_embeddings_and_training_states_are_not_the_adapter():
    files = listing("me_emb.safetensors", "embeddings.safetensors", "me.safetensors", "checkpoint-5/x.safetensors")
    assert chosen(files) == [[("me.safetensors",)]]
    with pytest.raises(NotAnAdapter):
        chosen(listing("checkpoint-5/x.safetensors"))


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


SHARDS = ("x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors")
OF_MODELS = ("unet/adapter_model.safetensors", "text_encoder/adapter_model.safetensors")


@pytest.mark.parametrize("files", [SHARDS, OF_MODELS], ids=["shards", "models"])
def test_files_that_make_one_adapter_together_are_one_candidate(files: tuple[str, ...]):
    assert chosen(listing(*files, "README.md")) == [[files]]


def test_an_adapter_that_is_cut_up_is_named_by_its_index_and_never_by_a_part():
    files = listing(*SHARDS, "x.safetensors.index.json", "y.safetensors")
    assert chosen(files, "x.safetensors.index.json") == [[SHARDS]]
    assert chosen(files, "y.safetensors") == [[("y.safetensors",)]]
    with pytest.raises(NotAnAdapter, match="one of the files that the adapter is cut into"):
        chosen(files, SHARDS[0])


@pytest.mark.parametrize("index", [{}, {"x.safetensors.index.json": dict(zip("ab", SHARDS, strict=True))}])
def test_an_adapter_of_which_a_file_is_missing_is_refused(index: dict[str, dict[str, str]]):
    for filename in (None, "x.safetensors.index.json"):
        with pytest.raises(NotAnAdapter, match=r"'x-00002-of-00002\.safetensors' is missing"):
            candidates(listing(SHARDS[0], "x.safetensors.index.json"), filename, index)


def test_an_index_joins_files_of_any_name():
    index = {"x.safetensors.index.json": {"k": "one.safetensors", "l": "two.safetensors"}}
    files = listing("one.safetensors", "two.safetensors", "x.safetensors.index.json")
    assert list(candidates(files, None, index)[0]) == [("one.safetensors", "two.safetensors")]
    assert list(candidates(files, "x.safetensors.index.json", index)[0]) == [("one.safetensors", "two.safetensors")]


def test_what_peft_saves_for_one_model_of_a_pipeline_is_the_adapter():
    assert chosen(listing("unet/adapter_model.safetensors")) == [[("unet/adapter_model.safetensors",)]]


def test_files_that_lie_where_parts_do_can_be_named():
    with pytest.raises(NotAnAdapter, match="name it as 'filename'"):
        chosen(listing("unet/style.safetensors"))
    assert chosen(listing("unet/style.safetensors"), "unet/style.safetensors") == [[("unet/style.safetensors",)]]


def test_the_file_that_is_asked_for_is_the_one():
    assert chosen(listing("a.safetensors", "b.safetensors"), "b.safetensors") == [[("b.safetensors",)]]
    with pytest.raises(ModelNotFound, match=r"no file 'c\.safetensors'"):
        chosen(listing("a.safetensors"), "c.safetensors")
    with pytest.raises(ModelNotFound):
        chosen(listing("a.safetensors"), "../a.safetensors")


@pytest.mark.parametrize("name", ["x.bin", "x.ckpt", "x.pt"])
def test_pickled_weights_are_never_read(name: str):
    with pytest.raises(UnsafeFile, match=name):
        chosen(listing(name, "README.md"))
    with pytest.raises(UnsafeFile, match=name):
        chosen(listing(name, "a.safetensors"), name)


def test_a_whole_model_is_not_an_adapter():
    with pytest.raises(NotAnAdapter, match="whole model"):
        chosen(listing("model_index.json", "unet/w.safetensors", "vae/w.safetensors", "unet/w.bin"))


def test_a_repository_without_weights_is_not_an_adapter():
    with pytest.raises(NotAnAdapter, match="no safetensors"):
        chosen(listing("README.md"))


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
