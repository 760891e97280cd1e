"""What of Dockerfile and docker-compose.yml can be checked without an engine."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import ServerSettings, Settings
from gateway.supervisor import GatewaySupervisor
from tests_standalone.support.gateway import ROOT, GatewayProcess, clean_environment, free_port

DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
NGINX = (ROOT / "deploy" / "nginx.conf").read_text()
EXAMPLE = dict(re.findall(r"^(\w+)=(.*)$", (ROOT / "deploy" / ".env.example").read_text(), re.MULTILINE))

GATEWAYS = ("gateway1", "gateway2")


def healthcheck(port: int, path: str) -> int:
    command = [sys.executable, str(ROOT / "deploy" / "healthcheck.py"), path]
    environment = {**os.environ, "GATEWAY_PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def filled(value: str) -> str:
    """A value of the compose file, with an `.env` in which everything has been filled in."""
    return re.sub(r"\$\{(\w+)[^}]*\}", lambda name: EXAMPLE[name[1]] or f"filled-{name[1].lower()}", value)


def test_what_is_copied_exists_and_is_all_that_the_context_holds() -> None:
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
    copied = {source for line in lines for source in line.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule[1:] for rule in rules if rule.startswith("!")} == copied


def test_the_image_ends_as_somebody_without_rights_and_serves_all_addresses() -> None:
    last_stage = DOCKERFILE.rpartition("\nFROM ")[2]
    assert "\nUSER 10001\n" in last_stage
    assert json.loads(re.findall(r"^CMD (.+)$", last_stage, re.MULTILINE)[-1])[:2] == ["gateway", "serve"]


def test_the_health_check_knows_a_gateway_that_is_ready_from_one_that_is_not() -> None:
    with GatewayProcess() as gateway:
        assert healthcheck(gateway.port, "/health/live") == 0
        assert healthcheck(gateway.port, "/health/ready") == 0
        assert healthcheck(gateway.port, "/health/never") == 1
    assert healthcheck(free_port(), "/health/live") == 1


@pytest.mark.parametrize("name", GATEWAYS)
def test_the_health_checks_name_a_script_of_the_image(name: str) -> None:
    in_image = json.loads(re.findall(r"^ +CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)[0])
    asked = COMPOSE["services"][name]["healthcheck"]["test"]
    assert asked[1:3] == in_image[:2] == ["python", "/opt/gateway/healthcheck.py"]
    assert (asked[3], in_image[2]) == ("/health/ready", "/health/live")
    assert "COPY deploy/healthcheck.py gunicorn.conf.py /opt/gateway/\n" in DOCKERFILE


@pytest.mark.parametrize("name", GATEWAYS)
def test_the_environment_of_the_gateways_is_understood(name: str, tmp_path: Path) -> None:
    given = {key: filled(value) for key, value in COMPOSE["services"][name]["environment"].items()}
    environment = {**clean_environment(tmp_path), "GATEWAY_CONFIG": str(ROOT / "config.yaml"), **given}
    command = [sys.executable, "-m", "gateway", "check-config"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = yaml.safe_load(done.stdout)
    assert found["server"]["workers"] == 2
    assert found["server"]["trusted_proxies"] == [_address("nginx")]
    assert found["database"]["url"].endswith("@postgres:5432/gateway")
    assert (found["storage"]["url"], found["storage"]["endpoint"]) == ("s3://gateway", "http://s3:7070")
    assert {*found["backends"]} == {"openai", "deepseek"}
    assert all(found["storage"][key] for key in ("access_key", "secret_key"))
    assert found["auth"]["admin_key"]


def test_what_must_be_filled_in_is_in_the_example() -> None:
    asked = set(re.findall(r"\$\{(\w+)", (ROOT / "docker-compose.yml").read_text()))
    assert asked == set(EXAMPLE)
    assert [name for name, value in EXAMPLE.items() if value and "KEY" in name] == ["S3_ACCESS_KEY"]


def test_a_gateway_is_stopped_later_than_it_ends() -> None:
    longest = ServerSettings().drain_seconds + GatewaySupervisor.kill_after_seconds
    for name in GATEWAYS:
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) > longest
    assert int(re.findall(r"--stop-timeout (\d+)", DOCKERFILE)[0]) > longest


def test_nginx_knows_the_gateways_and_takes_what_they_take() -> None:
    assert re.findall(r"^ +server (\S+) ", NGINX, re.MULTILINE) == [f"{name}:8000" for name in GATEWAYS]
    assert len({_address(name) for name in ("nginx", *GATEWAYS)}) == 3
    assert "EXPOSE 8000\n" in DOCKERFILE
    most = int(re.findall(r"client_max_body_size (\d+)m;", NGINX)[0])
    settings = Settings()
    assert most > max(settings.files.max_upload_mb, settings.files.max_request_mb, settings.server.max_body_mb)


def _address(service: str) -> str:
    address: str = COMPOSE["services"][service]["networks"]["default"]["ipv4_address"]
    return address
