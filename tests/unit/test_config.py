import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.config import AppConfig, BaseModelConfig, SharedSettings
from serve_app.environment import read_environment
from serve_app.settings import RegistrySettings

SOURCE = {"embedded": "demo/sd15"}


def base(**fields: object) -> dict[str, object]:
    return {"id": "one", "source": SOURCE, **fields}


def refusal(**fields: object) -> str:
    with pytest.raises(ValidationError) as caught:
        AppConfig.model_validate({"bases": [base()], **fields})
    return str(caught.value)


def test_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    assert "unknown key 'adaptors'; did you mean 'adapters'?" in refusal(adaptors={})


def test_unknown_key_deep_inside_a_base_is_refused_too() -> None:
    assert "did you mean 'max_steps'?" in refusal(bases=[base(limits={"max_step": 3})])


def test_an_alias_means_its_base() -> None:
    config = AppConfig.model_validate({"bases": [base(aliases=["uno"])], "default_base": "uno"})
    assert config.base("uno") is config.bases[0] is config.default


def test_one_name_for_two_bases_is_refused() -> None:
    assert "'one' names both" in refusal(bases=[base(), base(id="two", aliases=["one"])])


def test_default_base_must_be_served() -> None:
    assert "did you mean 'one'?" in refusal(default_base="ome")


def test_the_first_base_is_the_default_where_none_is_named() -> None:
    config = AppConfig.model_validate({"bases": [base(), base(id="two")]})
    assert config.default.id == "one"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"defaults": {"steps": 200}}, "over max_steps 100"),
        ({"defaults": {"width": 500}}, "multiple of 8"),
        ({"defaults": {"width": 1024, "height": 2048}}, "max_pixels"),
        ({"source": {}}, "exactly one"),
        ({"source": {"hub": "a/b", "folder": "x"}}, "exactly one"),
        ({"source": {"folder": "x", "revision": "main"}}, "'revision' goes with 'hub'"),
        ({"source": {"folder": "x", "filename": "a.safetensors"}}, "'filename' goes with 'hub'"),
        ({"source": {"file": "a.safetensors"}}, "add 'config' to its source"),
        ({"source": {"hub": "a/b", "filename": "a.safetensors"}}, "add 'config' to its source"),
        ({"source": {"file": "a.ckpt", "config": SOURCE}}, "'a.ckpt' is no .safetensors file"),
        ({"source": {"hub": "a/b", "filename": "a.gguf", "config": SOURCE}}, "'a.gguf' is no .safetensors file"),
        ({"source": {"folder": "x", "config": SOURCE}}, "'config' goes with a single file"),
        ({"source": {"file": "a.safetensors", "config": {"file": "b.safetensors"}}}, "names a base that is none"),
        ({"source": {"file": "a.safetensors", "config": SOURCE}, "variant": "fp16"}, "'variant' chooses among"),
        ({"vae": {"file": "a.safetensors", "config": SOURCE}}, "takes no 'config'"),
        ({"fused": [{"id": "a/b"}, {"id": "a/b"}]}, "'fused' names an adapter twice"),
        ({"quantization": "gguf"}, "'int8', 'float8' or 'nf4'"),
        ({"quantization": "int8", "fused": [{"id": "a/b"}]}, "'fused' needs full weights"),
        ({"quantization": "int8", "compile": True}, "'compile' needs full weights"),
        ({"quantization": "int8", "replica": {"base_weights": "host"}}, "'replica.base_weights: host' needs full"),
        (
            {"quantization": "int8", "replica": {"prefetch_swap": "always"}},
            "'replica.prefetch_swap: always' needs full",
        ),
        ({"quantization": "nf4", "source": {"file": "a.safetensors", "config": SOURCE}}, "not with a single file"),
        ({"quantization": "nf4", "parts": {"unet": {"file": "a.safetensors"}}}, "not with a single file"),
        ({"autoscaling": {"min_replicas": 3, "max_replicas": 2}}, "over max_replicas"),
        ({"autoscaling": {"initial_replicas": 5}}, "between"),
        ({"replica": {"max_ongoing_requests": 1}}, "never scale up"),
    ],
)
def test_a_base_that_cannot_work_is_refused(fields: dict[str, object], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        BaseModelConfig.model_validate(base(**fields))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://bucket/adapters", "such as s3://bucket/adapters"),
        ("/srv/adapters", "such as s3://bucket/adapters"),
        ("s3:///adapters", "such as s3://bucket/adapters"),
        ("s3://key:secret@bucket/adapters", "credentials go into the environment"),
        ("s3://bucket/adapters?endpoint=http://127.0.0.1", "credentials go into the environment"),
        ("s3://bucket/../other", "must not hold empty parts"),
        ("s3://bucket//adapters", "must not hold empty parts"),
    ],
)
def test_an_object_store_is_a_bucket_and_a_prefix_and_nothing_else(url: str, reason: str) -> None:
    assert reason in refusal(adapters={"stores": [{"url": url}]})
    assert reason in refusal(base_files={"store": url})


def test_sizes_may_be_written_with_units() -> None:
    config = BaseModelConfig.model_validate(base(replica={"host_cache": "1GiB"}))
    assert config.replica.host_cache == 1024**3


def test_sdxl_in_float16_gets_the_vae_that_does_not_overflow_unless_another_is_named() -> None:
    sdxl = {"hub": "stabilityai/stable-diffusion-xl-base-1.0"}
    half = BaseModelConfig.model_validate(base(source=sdxl, dtype="float16"))
    assert half.part_sources["vae"].hub == "madebyollin/sdxl-vae-fp16-fix"
    named = BaseModelConfig.model_validate(base(source=sdxl, dtype="float16", vae={"hub": "a/b"}))
    assert named.part_sources == {"vae": named.vae}
    assert BaseModelConfig.model_validate(base(source=sdxl, dtype="bfloat16")).part_sources == {}


RENAMED = {
    ("cache_size",): ("disk_cache", "3GiB"),
    ("adapters", "sharing", "patience_s"): ("wait_timeout_s", 7.0),
    ("ingress", "keep_alive_s"): ("sse_ping_interval_s", 7.0),
    ("bases", "replica", "batch_delay_s"): ("batch_priority_delay_s", 7.0),
    ("bases", "replica", "adapters_per_replica"): ("max_warm_up_adapters", 7),
    ("bases", "replica", "prepare_ahead"): ("prefetch_swap", "always"),
    ("bases", "replica", "pristine_in"): ("base_weights", "host"),
    ("bases", "replica", "stall_after_s"): ("stall_timeout_s", 7.0),
    ("bases", "router", "stall_after_s"): ("deprioritize_after_s", 7.0),
}


def with_setting(path: tuple[str, ...], value: object) -> dict[str, object]:
    """A configuration with one setting; "bases" stands for its one base."""
    if path[0] == "bases":
        return {"bases": [base(**with_setting(path[1:], value))]}
    rest = with_setting(path[1:], value) if len(path) > 1 else value
    return {path[0]: rest}


def config_with(path: tuple[str, ...], value: object) -> AppConfig:
    return AppConfig.model_validate({"bases": [base()], **with_setting(path, value)})


@pytest.mark.parametrize("path", RENAMED, ids=".".join)
def test_a_setting_works_under_its_former_name_and_the_log_names_the_present_one(
    path: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    present, value = RENAMED[path]
    expected = config_with((*path[:-1], present), value)
    assert caplog.text == ""
    assert config_with(path, value) == expected != AppConfig.model_validate({"bases": [base()]})
    assert f"'{path[-1]}' is now called '{present}'" in caplog.text


def test_a_setting_under_both_its_names_is_refused() -> None:
    assert "'cache_size' is the former name of 'disk_cache'" in refusal(cache_size=1, disk_cache=1)


def test_the_file_of_every_cluster_uses_the_present_names() -> None:
    former = {path[-1] for path in RENAMED} - {"cache_size"}
    files = list((Path(__file__).parents[2] / "cluster").rglob("*.yaml"))
    assert files
    for file in files:
        assert not former & set(re.findall(r"\w+", file.read_text())), file


@pytest.mark.parametrize(
    ("registry", "reason"),
    [
        ({"path": "a.sqlite3", "redis": "redis://127.0.0.1/1"}, "either 'path' or 'redis'"),
        ({"redis": "http://127.0.0.1/1"}, "must begin with 'redis://'"),
    ],
)
def test_aliases_are_kept_in_one_place(registry: dict[str, str], reason: str) -> None:
    assert reason in refusal(registry=registry)


def test_what_does_not_validate_is_not_printed_since_it_may_be_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    address = "redi://:a-password@redis/1"
    told = refusal(registry={"redis": address})
    assert "registry.redis" in told
    assert "a-password" not in told
    monkeypatch.setenv("LORAPLEX_REGISTRY_REDIS", address)
    with pytest.raises(ValidationError) as caught:
        read_environment(SharedSettings(), RegistrySettings())
    assert "a-password" not in str(caught.value)
