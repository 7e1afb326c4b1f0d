"""A replica that changes between its requests at random steps: everything of production, but for whose turn it is."""

from __future__ import annotations

from typing import Any

from ray import serve

from serve_app.config import AppConfig, BaseModelConfig, Environment
from serve_app.deployments.replica.replica import BaseModelReplica


@serve.deployment
class AnyTurnReplica(BaseModelReplica.func_or_class):
    """`BaseModelReplica`, whose next step is anybody's."""

    async def __init__(self, base: BaseModelConfig, config: AppConfig, environment: Environment, keeper: Any) -> None:
        from tests.any_turn import AnyTurn

        await super().__init__(base, config, environment, keeper)
        self._worker._queue._choose = AnyTurn(0)
