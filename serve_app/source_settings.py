"""Where adapters come from, and the files of bases: the configuration under `adapters` and `base_files`.

Must not read the environment, files or the network, as `serve_app.config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, ByteSize, Field, PositiveFloat, model_validator

from serve_app.settings import StrictModel

# The extra that brings the client of each kind of object store, and that client's module.
STORE_EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}


class HubSettings(StrictModel):
    """How adapters are found on the Hugging Face Hub; `endpoint` None means the environment's, else the public one.

    With `forward_tokens`, adapters are looked up without a token, and those that are not public with the caller's own;
    a check of a caller's access is valid for `access_ttl_s`. The service's token is then used for bases only.
    `cache_size` limits the downloaded files on a node's disk, those of object stores too, apart from the admitted
    ones made from them.
    """

    enabled: bool = True
    endpoint: str | None = None
    timeout_s: PositiveFloat = 10.0
    download_timeout_s: PositiveFloat = 600.0
    forward_tokens: bool = False
    access_ttl_s: PositiveFloat = 60.0
    cache_size: ByteSize = Field(default=ByteSize(10 * 1024**3), validate_default=True)


class SharingSettings(StrictModel):
    """Whether adapter files travel between nodes, so that the cluster fetches each from the Hub once.

    `memory` is the limit of shared files in Ray's object store, which spills to disk, over the whole cluster; `disk`
    is the limit of copies from peers on each node's disk. A node waits for another node's download for at most
    `wait_timeout_s`, then downloads the file itself.
    """

    renamed = {"patience_s": "wait_timeout_s"}
    enabled: bool = False
    wait_timeout_s: PositiveFloat = 60.0
    memory: ByteSize = Field(default=ByteSize(4 * 1024**3), validate_default=True)
    disk: ByteSize = Field(default=ByteSize(10 * 1024**3), validate_default=True)


class AdapterFolder(StrictModel):
    """A folder of adapters on every node; a path alone is short for one of layout "hub".

    With "hub", its folders `<owner>/<name>/` are repositories, and files above them are adapters by their path without
    the ending `.safetensors`. With "flat", every file below it is one, as A1111 and ComfyUI keep them.
    """

    path: Path
    layout: Literal["hub", "flat"] = "hub"

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, data: Any) -> Any:
        return {"path": data} if isinstance(data, str | Path) else data


def _address_alone(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in STORE_EXTRAS or not parts.netloc:
        raise ValueError("url must be a bucket and perhaps a prefix, such as s3://bucket/adapters; gs:// or az://")
    if "@" in parts.netloc or ":" in parts.netloc or "?" in url or "#" in url:
        raise ValueError("url is an address alone; credentials go into the environment of each node")
    if any(part in ("", ".", "..") for part in url.rstrip("/").split("/")[3:]):
        raise ValueError("url must not hold empty parts, '.' or '..'")
    return url.rstrip("/")


StoreAddress = Annotated[str, AfterValidator(_address_alone)]


class AdapterStore(StrictModel):
    """A bucket of adapters, or a part of one: `s3://bucket/prefix`, `gs://` or `az://`, in a layout of `AdapterFolder`.

    Credentials come from the environment of each node, as the clients of these stores look for them. Objects that
    appear, change or go are noticed after at most `listing_ttl_s`.
    """

    url: StoreAddress
    layout: Literal["hub", "flat"] = "hub"
    timeout_s: PositiveFloat = 10.0
    download_timeout_s: PositiveFloat = 600.0
    listing_ttl_s: PositiveFloat = 30.0

    @property
    def scheme(self) -> str:
        """The kind of store."""
        return urlsplit(self.url).scheme


class AdapterSources(StrictModel):
    """Where adapters come from. The order of look-up is: embedded, folders, object stores, the Hub."""

    embedded: bool = False
    folders: tuple[AdapterFolder, ...] = ()
    stores: tuple[AdapterStore, ...] = ()
    hub: HubSettings = HubSettings()
    sharing: SharingSettings = SharingSettings()
    resolution_ttl_s: PositiveFloat = 300.0
    failure_ttl_s: PositiveFloat = 15.0


class BaseFileSettings(StrictModel):
    """Where a node gets the files of bases that are on the Hub from, before the Hub.

    With `from_peers` the nodes that have a base's weights give them to those that do not. `store` is a mirror such as
    `s3://bucket/prefix`, in which a file lies under `<owner>/<name>/<file>`; credentials as for `adapters.stores`.
    A file counts only with the digest that the Hub names.
    `idle_memory` is the host memory of each node for files of bases with `replica.idle: host`.
    """

    from_peers: bool = False
    store: StoreAddress | None = None
    idle_memory: ByteSize = Field(default=ByteSize(32 * 1024**3), validate_default=True)

    @property
    def stores(self) -> tuple[AdapterStore, ...]:
        """The mirror, if any; files of gigabytes take their time."""
        return () if self.store is None else (AdapterStore(url=self.store, download_timeout_s=3600.0),)
