from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from serve_app.catalog.reading.bases import BaseArchitecture, BaseArchitectureReader, BaseNames, facts_from
from serve_app.catalog.sources.folder import FolderSource
from serve_app.catalog.sources.hub import HubSource
from serve_app.config import BaseModelConfig
from serve_app.settings import ModelSource
from serve_app.source_settings import HubSettings
from tests.clock import Clock
from tests.hub_server import ErrorDetail, HubServer
from tests.unit.catalog.builders import SD_TEXT, SD_WIDTHS, base_files, write_files

FILES = base_files(SD_TEXT, SD_WIDTHS, "StableDiffusionPipeline")
KNOWN = BaseArchitecture("sd", "sd1", "unet", SD_TEXT, frozenset(SD_WIDTHS))


def base(**source: object) -> BaseModelConfig:
    return BaseModelConfig(id="sd", source=ModelSource.model_validate(source))


async def test_facts_of_a_folder_and_of_an_embedded_base_come_from_its_configuration(tmp_path: Path):
    folder = write_files(tmp_path / "demo" / "sd", FILES)
    reader = BaseArchitectureReader([FolderSource((tmp_path,), origin="embedded")], Clock(1000.0))
    assert replace(await reader.facts(base(folder=folder)), row=None) == KNOWN
    reader = BaseArchitectureReader([FolderSource((tmp_path,), origin="embedded")], Clock(1000.0))
    assert replace(await reader.facts(base(embedded="demo/sd")), row=None) == KNOWN
    reader = BaseArchitectureReader([], Clock(1000.0))
    single = base(file=tmp_path / "sd.safetensors", config={"folder": folder})
    assert replace(await reader.facts(single), row=None) == KNOWN


@pytest.mark.parametrize(
    ("kinds", "widths"),
    [
        (["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], {640, 1280}),  # SDXL
        (["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"], {320, 640, 1280}),  # the middle has attention
        (None, {320, 640, 1280}),
    ],
)
def test_the_widths_of_a_unet_are_those_of_its_attention(kinds: list[str] | None, widths: set[int]):
    config = {"block_out_channels": [320, 640, 1280], "down_block_types": kinds}
    assert facts_from("b", "unet", config, {}).hidden_widths == widths


async def test_facts_of_a_base_on_the_hub_are_read_once_and_tried_again_after_a_failure(hub: HubServer, tmp_path: Path):
    hub.push("their/sd", FILES)
    hub.fail("their/sd", ErrorDetail(status=503))
    clock = Clock(1000.0)
    settings = HubSettings(endpoint=hub.endpoint, timeout_s=60)
    reader = BaseArchitectureReader([HubSource(settings, token=None, cache_dir=tmp_path)], clock)
    config = base(hub="their/sd")
    assert await reader.facts(config) == BaseArchitecture("sd")
    hub.fail("their/sd", None)
    assert await reader.facts(config) == BaseArchitecture("sd"), "not asked again at once"
    clock.now += 60
    assert replace(await reader.facts(config), row=None) == KNOWN
    asked = hub.count()
    assert replace(await reader.facts(config), row=None) == KNOWN
    assert hub.count() == asked


@pytest.mark.parametrize(
    "files", [{}, {"unet/config.json": b"nonsense"}, {"unet/config.json": b"[1]"}, {"vae/config.json": b"{}"}]
)
async def test_a_base_that_cannot_be_read_is_unknown(tmp_path: Path, files: dict[str, bytes]):
    folder = write_files(tmp_path / "demo" / "sd", files)
    assert await BaseArchitectureReader([], Clock(1000.0)).facts(base(folder=folder)) == BaseArchitecture("sd")


async def test_a_transformer_is_told_by_its_folder_and_pipeline(tmp_path: Path):
    files = {"transformer/config.json": b"{}", "model_index.json": b'{"_class_name": "FluxPipeline"}'}
    folder = write_files(tmp_path / "flux", files)
    facts = await BaseArchitectureReader([], Clock(1000.0)).facts(base(folder=folder))
    assert (facts.denoiser, facts.family, facts.text_width) == ("transformer", "flux", None)


def test_a_card_may_name_a_base_by_id_alias_source_or_an_old_name_in_any_case():
    names = BaseNames(
        [
            BaseModelConfig(
                id="sd15",
                aliases=("mine/sd",),
                source=ModelSource(hub="stable-diffusion-v1-5/stable-diffusion-v1-5"),
            ),
            BaseModelConfig(id="demo", source=ModelSource(embedded="demo/sd15")),
        ]
    )
    for name in (
        "sd15", "mine/sd", "Stable-Diffusion-v1-5/stable-diffusion-v1-5", "runwayml/stable-diffusion-v1-5",
    ):  # fmt: skip
        assert names.served_as(name) == ("sd15",)
    assert names.served_as("demo/sd15") == ("demo",)
    assert names.served_as("sd") == ()
