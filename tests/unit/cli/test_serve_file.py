import json
from pathlib import Path

import pytest
import yaml

from serve_app.cli.serve_file import ServeFileInvalid, check_serve_file, gpus_for, timeout_disagreements
from serve_app.config import AppConfig

SHIPPED = Path(__file__).parents[3] / "serve_config.yaml"


def faults(tmp_path: Path, text: str) -> str:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ServeFileInvalid) as caught:
        check_serve_file(path)
    return "\n".join(caught.value.faults)


def test_the_shipped_file_is_valid() -> None:
    report = check_serve_file(SHIPPED)
    assert report.url == "http://127.0.0.1:8000"
    assert [base.id for base in report.applications[0].bases] == ["demo/sdxl", "demo/sd15"]


@pytest.mark.parametrize(
    ("right", "typo", "place"),
    [
        ("proxy_location", "proxy_locaton", "proxy_locaton: unknown key; did you mean 'proxy_location'?"),
        ("host:", "hots:", "http_options.hots: unknown key; did you mean 'host'?"),
        ("import_path", "import_paht", "applications.0.import_paht: unknown key"),
        ("num_cpus: 0.4", "num_cpu: 0.4", "applications.1.args.base.replica: unknown key 'num_cpu'"),
        ("max_replicas: 2", "max_replicas: two", "applications.1.args.base.autoscaling.max_replicas"),
        ("default_base", "default_bass", "user_config.default_bass: unknown key; did you mean 'default_base'?"),
    ],
)
def test_a_planted_typo_is_found_and_placed(tmp_path: Path, right: str, typo: str, place: str) -> None:
    text = SHIPPED.read_text()
    assert right in text
    assert place in faults(tmp_path, text.replace(right, typo))


def test_a_typo_in_a_deployment_override_is_found(tmp_path: Path) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    data["applications"][0]["deployments"] = [{"name": "LoraplexIngress", "num_replica": 3}]
    assert "deployments.0.num_replica: unknown key; did you mean 'num_replicas'?" in faults(
        tmp_path, yaml.safe_dump(data)
    )


def test_a_file_without_our_application_is_refused(tmp_path: Path) -> None:
    text = "applications: [{name: other, import_path: 'other:app'}]"
    assert "no application has import_path serve_app.app:ingress" in faults(tmp_path, text)


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "\x00"])
def test_what_is_no_mapping_is_refused_in_a_line(tmp_path: Path, text: str) -> None:
    assert len(faults(tmp_path, text).splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"request_timeout_s": 400}, "http_options.request_timeout_s: 330 s must be over shared.request_timeout_s"),
        ({"graceful_shutdown_timeout_s": 20}, "graceful_shutdown_timeout_s 20 s is under shared.request_timeout_s"),
        ({"max_backlog_s": 900}, "max_backlog_s 900 s is over shared.request_timeout_s"),
    ],
)
def test_times_that_do_not_go_together_are_found(tmp_path: Path, change: dict[str, int], told: str) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    args = data["applications"][1]["args"]
    # What the ingress refers to is the same object.
    (args["shared"] if "request_timeout_s" in change else args["base"]["replica"]).update(change)
    assert told in faults(tmp_path, yaml.safe_dump(data))


def test_a_store_whose_client_is_not_installed_is_told_with_the_extra(tmp_path: Path) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    shared = data["applications"][0]["args"]["shared"]
    shared["adapters"] = {"stores": [{"url": "s3://bucket"}, {"url": "gs://bucket/adapters"}]}
    needs = "is configured, but gcsfs is not installed: pip install 'loraplex[gs]'"
    assert f"gs://bucket/adapters {needs}" in faults(tmp_path, yaml.safe_dump(data))
    shared["adapters"], shared["base_files"] = {}, {"store": "gs://bucket/bases"}
    assert f"gs://bucket/bases {needs}" in faults(tmp_path, yaml.safe_dump(data))
    shared["base_files"] = {"store": "/srv/bases"}
    assert "shared.base_files.store: url must be a bucket" in faults(tmp_path, yaml.safe_dump(data))


def test_the_default_times_go_together() -> None:
    config = AppConfig.model_validate({"bases": [{"id": "demo/sd15", "source": {"embedded": "demo/sd15"}}]})
    assert timeout_disagreements(config, 330.0) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "LoraplexIngress",
            "applications.0.deployments: LoraplexIngress: user_config.ingress.replicas: goes into args",
        ),
        (
            "base-demo--sd15",
            "applications.0.deployments: only LoraplexIngress takes a user_config, not base-demo--sd15",
        ),
    ],
)
def test_a_user_config_that_its_deployment_would_not_take_is_found(tmp_path: Path, name: str, told: str) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    data["applications"][0]["deployments"] = [{"name": name, "user_config": {"ingress": {"replicas": 3}}}]
    assert told in faults(tmp_path, yaml.safe_dump(data))


@pytest.mark.parametrize(
    ("pipeline", "told"),
    [
        ("StableDiffusionXLPipeline", "canaries: demo/sd15 draws nothing for demo/sdxl: it is SDXL, not SD"),
        ("StableDiffusionPipeline", None),
        (None, None),
    ],
)
def test_a_canary_of_another_family_is_found_where_both_lie_in_folders(
    tmp_path: Path, pipeline: str | None, told: str | None
) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    for application, name in zip(data["applications"][1:], ("StableDiffusionPipeline", pipeline), strict=True):
        folder = tmp_path / str(name)
        folder.mkdir(exist_ok=True)
        (folder / "model_index.json").write_text(json.dumps({"_class_name": name}))
        application["args"]["base"]["source"] = {"folder": str(folder)}
        application["args"]["base"]["autoscaling"]["min_replicas"] = 1
    ingress = data["applications"][0]["deployments"][0]["user_config"]
    ingress["canaries"] = {"demo/sdxl": {"base": "demo/sd15", "share": 0.1}}
    text = yaml.safe_dump(data)
    if told is not None:
        assert told in faults(tmp_path, text)
        return
    (tmp_path / "serve.yaml").write_text(text)
    check_serve_file(tmp_path / "serve.yaml")


@pytest.mark.parametrize(
    ("replicas", "gpus"),
    [
        ([], 0),
        ([(8, 0)], 0),
        ([(2, 1), (1, 4)], 6),
        ([(3, 0.33)], 1),
        ([(1, 1 / 3), (2, 0.5), (2, 1 / 3)], 2),
        ([(3, 0.6)], 3),
        ([(2, 0.4), (2, 0.6)], 2),
    ],
)
def test_fractions_of_gpus_are_packed(replicas: list[tuple[int, float]], gpus: int) -> None:
    assert gpus_for(replicas) == gpus


def test_what_applications_do_not_say_alike_is_found(tmp_path: Path) -> None:
    data = json.loads(json.dumps(yaml.safe_load(SHIPPED.read_text())))  # nothing is the same object any more
    ingress, sdxl, sd15 = data["applications"]
    sdxl["args"]["base"]["limits"]["max_steps"] = 51
    sdxl["args"]["shared"]["service"] = "other"
    sd15["name"] = "mine"
    told = faults(tmp_path, yaml.safe_dump(data))
    assert "applications.1.args.base: differs from the ingress'; write it once, as an anchor" in told
    assert "applications.1.args.shared: differs from the ingress'" in told
    assert "applications.0: demo/sd15 is not deployed: add {name: demo--sd15, import_path: 'serve_app.app:base'" in told

    ingress["name"], sd15["name"], sd15["route_prefix"] = "mine", "demo--sd15", "/sd15"
    assert "applications.2.route_prefix: must be null" in faults(tmp_path, yaml.safe_dump(data))
    sd15["route_prefix"] = None
    assert "its name is mine, and args.shared.service 'loraplex'" in faults(tmp_path, yaml.safe_dump(data))


def test_an_application_without_an_ingress_is_found(tmp_path: Path) -> None:
    data = yaml.safe_load(SHIPPED.read_text())
    data["applications"][0]["deployments"][0]["user_config"]["bases"].pop()
    assert "applications.2: no ingress has it among its bases" in faults(tmp_path, yaml.safe_dump(data))


def test_the_owner_of_a_file_of_one_application_is_told_what_to_write(tmp_path: Path) -> None:
    args = {"adapters": {}, "ingress": {"request_timeout_s": 9}, "bases": [{"id": "demo/sd15"}]}
    data = {"applications": [{"name": "loraplex", "import_path": "serve_app.app:build", "args": args}]}
    told = faults(tmp_path, yaml.safe_dump(data))
    assert "move adapters, ingress.request_timeout_s from args to 'args: {shared: &shared {...}}'" in told
    assert "add an application for each (demo--sd15)" in told
