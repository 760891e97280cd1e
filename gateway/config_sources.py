"""Where settings come from: the file, the environment and flags, put into one tree before anybody looks at types.

From strong to weak: flags; GATEWAY_HOST, GATEWAY_PORT, GATEWAY_WORKERS; GATEWAY__SECTION__KEY; the file (seed 3's keys
are other names of ours there); the seeds' environment names, which only fill what nobody gave.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, get_origin

from pydantic import BaseModel

from gateway.config_draft import Draft, Path, Tree, bare, dotted, inside, is_section, nearest
from gateway.config_values import dollars, free_value, items

PREFIX = "GATEWAY__"
SHORT_NAMES: dict[str, Path] = {
    "GATEWAY_HOST": ("server", "host"),
    "GATEWAY_PORT": ("server", "port"),
    "GATEWAY_WORKERS": ("server", "workers"),
}
SEED_NAMES: dict[str, Path] = {
    "GATEWAY_ADMIN_KEY": ("auth", "admin_key"),
    "DATABASE_URL": ("database", "url"),
    "APP_NAME": ("server", "name"),
    "APP_VERSION": ("server", "version"),
}
S3_NAMES: dict[str, Path] = {
    "S3_ENDPOINT": ("storage", "endpoint"),
    "S3_ACCESS_KEY": ("storage", "access_key"),
    "S3_SECRET_KEY": ("storage", "secret_key"),
}
SEED_KEYS: dict[str, Path] = {
    "model": ("default_model",),
    "rate_limit_per_minute": ("limits", "requests_per_minute"),
    "max_file_size_mb": ("files", "max_mb"),
}
SEED_PRICES = {"input_per_1k": "input", "output_per_1k": "output"}
VENDORS: dict[str, tuple[str, Tree]] = {
    "openai": ("OPENAI_API_KEY", {"type": "openai", "base_url": "https://api.openai.com/v1"}),
    "deepseek": (
        "DEEPSEEK_API_KEY",
        {"type": "openai", "base_url": "https://api.deepseek.com", "on_disconnect": "drain"},
    ),
}
VENDOR_URLS = {"deepseek": "DEEPSEEK_BASE_URL"}

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def nearest_setting(path: Path, schema: type[BaseModel], *, seed_keys: bool = True) -> Path:
    """The known setting that an unknown one was probably meant to be; `seed_keys`: or a key of seed 3."""
    level: Any = schema
    for key in path[:-1]:
        level = bare(inside(level, key))
    if not is_section(level):
        return path[:-1]
    here = [*level.model_fields]
    if level is schema:
        here += [*SEED_KEYS, "pricing"] if seed_keys else []
    name = str(path[-1]).lower()
    if len(path) <= 2 and not difflib.get_close_matches(name, here, n=1):
        sections: dict[str, Any] = {section: field.annotation for section, field in schema.model_fields.items()}
        homes = {key: section for section, kind in sections.items() if is_section(kind) for key in kind.model_fields}
        for key in difflib.get_close_matches(name, homes, n=1):
            return (homes[key], key)
    return (*path[:-1], nearest(name, here))


# The environment


def effective_environment(environ: Mapping[str, str], draft: Draft) -> dict[str, str]:
    """DATABASE_ENABLED=false hides DATABASE_URL, also from `${DATABASE_URL}` in the file."""
    hidden = {"DATABASE_URL"} if _switch("DATABASE_ENABLED", ("database", "url"), environ, draft) is False else set()
    return {name: value for name, value in environ.items() if name not in hidden}


def read_environment(environ: Mapping[str, str], draft: Draft, schema: type[BaseModel]) -> None:
    """GATEWAY__SECTION__KEY, then the short names, which are stronger. An empty short name is as good as none."""
    for name in sorted(environ):
        if name.upper().startswith(PREFIX) and (path := _named_path(name, draft, schema)):
            draft.put(path, _as_written(environ[name], path, schema), name)
    for name, path in SHORT_NAMES.items():
        value = environ.get(name, "").strip()
        if value.startswith("tcp://"):  # Kubernetes makes NAME_PORT for every service, also for one called gateway
            draft.notes.append(f"{name} is ignored: it is the address of a Kubernetes service, not a setting")
        elif value:
            draft.put(path, value, name)


def _named_path(name: str, draft: Draft, schema: type[BaseModel]) -> Path | None:
    """The setting that an environment name means; None and a complaint if there is none."""
    path: Path = ()
    level: Any = schema
    for part in name[len(PREFIX) :].split("__"):
        key = part.lower() if is_section(level) else _entry(part, draft.get(path))
        path = (*path, key)
        level = None if get_origin(level) is tuple else bare(inside(level, key))
        if level is None:
            near = SEED_KEYS.get(key) or nearest_setting(path, schema, seed_keys=False)
            meant = PREFIX + "__".join(str(key).upper() for key in near)
            draft.complain(path, f"unknown setting in the environment, {name}; did you mean {meant}?")
            return None
    if is_section(level) or get_origin(level) is dict:
        draft.complain(path, f"{name} names a whole section; name one of its settings", value_gone=False)
        return None
    return path


def _as_written(text: str, path: Path, schema: type[BaseModel]) -> Any:
    """A setting's type tells how its text is read. Where anything may stand, the text itself has to tell."""
    level: Any = schema
    for key in path:
        level = inside(level, key)
    return free_value(text) if level is Any else text


def _entry(part: str, existing: Any) -> str:
    """The existing entry meant by `part`, in any case, where a shell's `_` stands for `-`, `.` and the like."""
    names = [str(name) for name in existing] if isinstance(existing, dict) else []
    same = [name for name in names if name.lower() == part.lower()]
    like = same or [name for name in names if re.sub(r"\W", "_", name).lower() == part.lower()]
    return like[0] if len(like) == 1 else part.lower()


def read_flags(flags: Mapping[str, Any], draft: Draft) -> None:
    """Dotted keys; None is a flag that was not given."""
    for key, value in flags.items():
        if value is not None:
            draft.put(tuple(key.split(".")), value)


def _switch(name: str, path: Path, environ: Mapping[str, str], draft: Draft) -> bool | None:
    """The environment variable as yes, no or not given."""
    text = environ.get(name, "").strip().lower()
    if text and text not in _YES + _NO:
        draft.complain(path, f"{name} must be true or false", value_gone=False)
    return text in _YES if text in _YES + _NO else None


# The seeds


def adopt_seed_keys(draft: Draft) -> None:
    """Move seed 3's keys in the file to the places of ours."""
    for old, path in SEED_KEYS.items():
        if old in draft.tree:
            value = draft.tree.pop(old)
            if draft.has(path):
                text = f"given twice, as {old} and as {dotted(path)}; keep {dotted(path)}"
                draft.complain(path, text, value_gone=False)
            else:
                draft.put(path, value, old)


def adopt_pricing(pricing: Any, model: Any, draft: Draft) -> dict[str, dict[str, Decimal]]:
    """Seed 3's `pricing`, put into the entry of the model; returned by name where the model has no entry."""
    price = dict(_seed_prices(pricing, draft))
    if not price:
        return {}
    if not isinstance(model, str) or not model:
        draft.complain(("pricing",), "is the price of `model`, which is not given; add model: NAME")
        return {}
    models = draft.get(("models",))
    entries = {name: entry or {} for name, entry in models.items()} if isinstance(models, dict) else {}
    name = next((n for n, e in entries.items() if isinstance(e, dict) and model in _texts(e.get("aliases"))), model)
    path = ("models", name, "price")
    if name not in entries:
        return {name: price}
    if draft.get(path) is not None:
        draft.complain(path, f"given twice, as pricing and as {dotted(path)}; keep {dotted(path)}", value_gone=False)
    else:
        draft.put(path, price, "pricing")
    return {}


def _seed_prices(pricing: Any, draft: Draft) -> Iterator[tuple[str, Decimal]]:
    if not isinstance(pricing, dict | None):
        draft.complain(("pricing",), "must be a mapping of input_per_1k and output_per_1k")
        return
    for key, value in (pricing or {}).items():
        path = ("pricing", key)
        if key not in SEED_PRICES:
            draft.complain(path, f"unknown setting; did you mean pricing.{nearest(key, SEED_PRICES)}?")
        elif value not in (None, ""):
            try:
                yield SEED_PRICES[key], dollars(value, times=1000)
            except ValueError as error:
                draft.complain(path, str(error))


def fill_from_seeds(environ: Mapping[str, str], draft: Draft) -> None:
    """The environment names of the seeds, for what nobody gave."""
    for name, path in SEED_NAMES.items():
        if environ.get(name):
            draft.fill(path, environ[name], name)
    enabled = _switch("S3_ENABLED", ("storage", "url"), environ, draft)
    if enabled is False:
        return
    url: Path = ("storage", "url")
    bucket = environ.get("S3_BUCKET", "").strip().removeprefix("s3://")
    if bucket:
        draft.fill(url, f"s3://{bucket}", "S3_BUCKET")
    elif enabled and not draft.has(url):
        draft.complain(url, "S3_ENABLED is true but S3_BUCKET is empty; name the bucket or set S3_ENABLED=false")
    if str(draft.get(url)).startswith("s3://"):
        for name, path in S3_NAMES.items():
            if environ.get(name):
                draft.fill(path, environ[name], name)


def fill_vendors(environ: Mapping[str, str], draft: Draft) -> bool:
    """For a file without backends: every vendor whose key is in the environment, or that the environment names. False
    if the environment has backends of its own: then nothing is added."""
    named = draft.names("backends")
    if not named <= set(VENDORS):
        return False
    for name, (variable, preset) in VENDORS.items():
        if environ.get(variable, "").strip() or name in named:
            draft.fill(("backends", name, "api_key"), environ.get(variable, ""), variable)
            url = VENDOR_URLS.get(name, "")
            if environ.get(url):
                draft.fill(("backends", name, "base_url"), environ[url], url)
            for key, value in preset.items():
                draft.fill(("backends", name, key), value)
    return True


def _texts(value: Any) -> list[Any]:
    """A list of names in either spelling; empty where it is neither."""
    if isinstance(value, str):
        try:
            return items(value)
        except ValueError:
            return []
    return value if isinstance(value, list) else []
