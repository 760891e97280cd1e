"""The gateway as gunicorn starts it, with the configuration that is shipped."""

from __future__ import annotations

import sys

from tests_standalone.support.gateway import ROOT, GatewayProcess, children

GUNICORN = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "gateway.app:create_app()"]


class GunicornProcess(GatewayProcess):
    """The same gateway, started by gunicorn; `arguments` are gunicorn's."""

    def _command(self, *arguments: str) -> list[str]:
        if arguments != ("serve",):
            return super()._command(*arguments)
        self._environment["GATEWAY_CONFIG"] = str(self.config_file)
        return GUNICORN

    def worker_pids(self) -> list[int]:
        return children(self.pid)
