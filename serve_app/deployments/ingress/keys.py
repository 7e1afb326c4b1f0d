"""The keys in force on one ingress replica: those of the configuration, and those of a file.

Owns reading the file, again when it has changed, so that a key can be given or taken without a restart.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import yaml
from pydantic import ValidationError

from serve_app.config import ApiKey, AuthSettings
from serve_app.core import PromptSyntax

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAX_FILE_BYTES = 1024 * 1024


class KeyFileInvalid(Exception):
    """The file of keys cannot be read, which its text explains without showing any of it."""


class Keys:
    """All keys of now.

    Invariant: once there were keys, there is never none because of a file that cannot be read: a service must not
    open by accident. The keys read last hold until the file is whole again.
    """

    def __init__(self, settings: AuthSettings, *, clock: Callable[[], float]) -> None:
        """Read the keys; `clock` is in monotonic seconds.

        Raises:
            KeyFileInvalid: the file is not there, or not one of keys.
        """
        self._clock = clock
        self.replace(settings)

    def replace(self, settings: AuthSettings) -> None:
        """Read the keys of other settings; raises as the constructor does, and then the keys known before hold on."""
        self._keys = read_keys(settings)
        self._settings = settings
        self._looked_at = self._clock()
        self._stamp = _stamp(settings.keys_file)

    def __call__(self) -> tuple[ApiKey, ...]:
        """Return the keys, at most a second behind the file."""
        now = self._clock()
        if self._settings.keys_file is not None and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            self._renew()
        return self._keys

    def weight_of(self, name: str | None) -> float:
        """Return the weight of a key; of no key, or one that has just been taken away, that of any."""
        return next((key.weight for key in self() if key.name == name), 1.0)

    def prompt_syntax_of(self, name: str | None) -> PromptSyntax | None:
        """Return how the prompts of a key are written, None where the base decides."""
        return next((key.prompt_syntax for key in self() if key.name == name), None)

    def _renew(self) -> None:
        stamp = _stamp(self._settings.keys_file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(self._settings)
        except KeyFileInvalid as error:
            log.error("the keys known before hold on: %s", error)
        else:
            log.info("%d keys are in force", len(self._keys))


def read_keys(settings: AuthSettings) -> tuple[ApiKey, ...]:
    """Return the keys of the configuration and of its file.

    Raises:
        KeyFileInvalid: the file is not there, or not one of keys, or holds none.
    """
    if settings.keys_file is None:
        return settings.keys
    try:
        with settings.keys_file.open("rb") as file:
            content: object = yaml.safe_load(file.read(MAX_FILE_BYTES))
    except OSError as error:
        raise KeyFileInvalid(f"the file of keys cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):
        raise KeyFileInvalid("the file of keys is not YAML") from None
    if not isinstance(content, dict) or set(content) != {"keys"} or not content["keys"]:
        raise KeyFileInvalid("the file of keys must hold 'keys:' with a list, and nothing else")
    try:
        read = AuthSettings.model_validate({"keys": content["keys"]}).keys
        return AuthSettings(keys=(*settings.keys, *read)).keys
    except ValidationError as error:
        where = ", ".join(".".join(str(part) for part in fault["loc"]) for fault in error.errors(include_input=False))
        raise KeyFileInvalid(f"the file of keys is not valid: {where}") from None


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    try:
        status = None if path is None else path.stat()
    except OSError:
        return None
    return None if status is None else (status.st_mtime_ns, status.st_size, status.st_ino)
