"""OpenAI's requests as Ollama's: messages, options, formats and tools. Pure; raises BadRequest for what it cannot do.

What Ollama has no word for and a caller can do without (`logit_bias`, `parallel_tool_calls`, a user's `name`) is left
out, as Ollama's own `/v1` does. What would change the answer's shape or drop a part of the question (several choices,
sound, pictures behind URLs) is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gateway.errors import BadRequest
from gateway.wire.chat import ChatRequest, CompletionRequest, Message
from gateway.wire.jsontext import loads
from gateway.wire.operation import OperationRequest

JSON = dict[str, Any]

_OPTIONS = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "seed", "presence_penalty", "frequency_penalty"),
    *("repeat_penalty", "repeat_last_n", "num_keep", "num_predict", "num_ctx", "num_gpu", "num_batch", "num_thread"),
    *("main_gpu", "use_mmap"),
)
_NATIVE = ("keep_alive", "truncate", "shift")
_GENERATE = ("suffix", "raw", "system", "format")
_ROLES = {"developer": "system", "function": "tool"}
_DATA_URL = re.compile(r"\s*data:[^,]*;base64,\s*", re.IGNORECASE)
_THINK: Mapping[str, bool | str] = {
    "none": False,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}


def chat(request: ChatRequest, defaults: Mapping[str, Any]) -> JSON:
    """The body for `/api/chat`. `defaults` are the backend's own `options` and `keep_alive`."""
    data = request.data
    _refuse_several(data, "n")
    if data.get("functions"):
        raise _unsupported("'functions' are not available on this backend: use 'tools'.", "functions")
    body: JSON = {"model": data.get("model"), "messages": _messages(request.messages), "stream": request.stream}
    tools = _tools(data)
    if tools:
        body["tools"] = tools
    if (form := _format(data)) is not None:
        body["format"] = form
    if data.get("logprobs"):
        body |= {"logprobs": True, "top_logprobs": data.get("top_logprobs") or 0}
    return body | _common(data, defaults)


def generate(request: CompletionRequest, defaults: Mapping[str, Any]) -> JSON:
    """The body for `/api/generate`."""
    data = request.data
    _refuse_several(data, "n")
    _refuse_several(data, "best_of")
    if data.get("echo"):
        raise _unsupported("'echo' is not available on this backend.", "echo")
    body: JSON = {"model": data.get("model"), "prompt": _prompt(data.get("prompt")), "stream": request.stream}
    body |= _given(data, _GENERATE)
    if isinstance(count := data.get("logprobs"), int) and count:
        body |= {"logprobs": True, "top_logprobs": int(count)}
    return body | _common(data, defaults)


def embed(request: OperationRequest, defaults: Mapping[str, Any]) -> JSON:
    """The body for `/api/embed`."""
    data = request.data
    texts = data.get("input")
    if not isinstance(texts, str) and (not isinstance(texts, list) or not texts):
        raise BadRequest("'input' must be a string or an array of strings.", param="input")
    if isinstance(texts, list) and not all(isinstance(text, str) for text in texts):
        raise _unsupported("'input' must be text: this backend takes no arrays of tokens.", "input")
    body = {"model": data.get("model"), "input": texts, **_given(data, ("dimensions",))}
    return body | _common(data, defaults, thinks=False)


def load(model: str, defaults: Mapping[str, Any]) -> JSON:
    """The body for `/api/chat` that loads only. Options are those of later calls: others would load it once more."""
    body = {"model": model, "messages": [], "stream": False, **defaults}
    return body | {"keep_alive": "5m"} if defaults.get("keep_alive") == 0 else body


def unload(model: str) -> JSON:
    """The body for `/api/chat` that takes the model out of memory."""
    return {"model": model, "messages": [], "stream": False, "keep_alive": 0}


def _common(data: Mapping[str, Any], defaults: Mapping[str, Any], *, thinks: bool = True) -> JSON:
    """What all calls have: the client's wishes over the backend's defaults."""
    body = {**defaults, **_given(data, _NATIVE)}
    if options := {**defaults.get("options", {}), **_options(data)}:
        body["options"] = options
    if thinks and (think := _think(data)) is not None:
        body["think"] = think
    return body


def _options(data: Mapping[str, Any]) -> JSON:
    found = _given(data, _OPTIONS)
    most = data.get("max_completion_tokens") or data.get("max_tokens")
    if most is not None:
        found["num_predict"] = most
    stop = data.get("stop")
    if stop:
        found["stop"] = [stop] if isinstance(stop, str) else stop
    own = data.get("options")
    if own is not None and not isinstance(own, dict):
        raise BadRequest("'options' must be an object.", param="options", code="invalid_type")
    return found | _given(own or {}, own or ())


def _think(data: Mapping[str, Any]) -> object:
    if data.get("think") is not None:
        return data["think"]
    effort, param = data.get("reasoning_effort"), "reasoning_effort"
    if effort is None and isinstance(reasoning := data.get("reasoning"), dict):
        effort, param = reasoning.get("effort"), "reasoning.effort"
    if effort is None:
        return None
    if not isinstance(effort, str) or effort not in _THINK:
        raise BadRequest(f"'{param}' must be one of {', '.join(_THINK)}.", param=param, code="invalid_value")
    return _THINK[effort]


def _format(data: Mapping[str, Any]) -> object:
    """`response_format`, or Ollama's own `format` where a client sends that."""
    wanted = data.get("response_format")
    if wanted is None:
        return data.get("format")
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "text":
        return None
    inside = wanted.get("json_schema") if kind == "json_schema" else wanted if kind == "json_object" else None
    if not isinstance(inside, dict):
        raise _unsupported(
            "'response_format' must be of type text, json_object or json_schema on this backend.", "response_format"
        )
    schema = inside.get("schema")
    return schema if isinstance(schema, dict) else "json"


def _tools(data: Mapping[str, Any]) -> list[JSON]:
    """The tools that may be called. Ollama cannot be made to call one: where a tool or a few are named, only those are
    offered, and `required` is a wish."""
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(data.get("tools") or ())]
    choice = data.get("tool_choice")
    if choice == "none":
        return []
    if not isinstance(choice, dict):
        return tools
    allowed = choice.get("allowed_tools")
    named = allowed.get("tools") if isinstance(allowed, dict) else [choice]
    names = {name for entry in named or () if (name := _name(entry))}
    offered = [tool for tool in tools if tool["function"].get("name") in names]
    if not offered:
        raise BadRequest("'tool_choice' names no tool of 'tools'.", param="tool_choice", code="invalid_value")
    return offered


def _tool(tool: object, path: str) -> JSON:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict):
        raise _unsupported(f"'{path}' must be of type function: this backend has no other tools.", path)
    if not isinstance(function.get("parameters"), dict):
        function = {**function, "parameters": {"type": "object", "properties": {}}}
    return {"type": "function", "function": function}


def _name(entry: object) -> str | None:
    function = entry.get("function") if isinstance(entry, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _messages(messages: list[Message]) -> list[JSON]:
    names: dict[str, str] = {}
    return [_message(message, f"messages[{index}]", names) for index, message in enumerate(messages)]


def _message(message: Message, path: str, names: dict[str, str]) -> JSON:
    """`names` are those of the tools called so far, by the id of the call."""
    texts, images = _content(message.get("content"), path)
    role = _ROLES.get(message["role"], message["role"])
    made: JSON = {"role": role, "content": "\n".join(texts)}
    if images:
        made["images"] = images
    thought = message.get("reasoning_content") or message.get("reasoning")
    if role == "assistant" and isinstance(thought, str) and thought:
        made["thinking"] = thought
    calls = _calls(message)
    if calls:
        made["tool_calls"] = calls
        names.update({call["id"]: call["function"]["name"] for call in calls if "id" in call})
    if role == "tool":
        made |= _result_of(message, names)
    return made


def _result_of(message: Message, names: Mapping[str, str]) -> JSON:
    call = message.get("tool_call_id")
    name = message.get("name") or (names.get(call) if isinstance(call, str) else None)
    found = {"tool_name": name, "tool_call_id": call}
    return {key: value for key, value in found.items() if isinstance(value, str) and value}


def _content(content: object, path: str) -> tuple[list[str], list[str]]:
    """The texts and the pictures (base64) of a message."""
    if not isinstance(content, list):
        return [content] if isinstance(content, str) else [], []
    texts: list[str] = []
    images: list[str] = []
    for index, part in enumerate(content):
        kind = part["type"]
        if kind == "image_url":
            images.append(_image(part.get("image_url"), f"{path}.content[{index}]"))
        elif kind in ("text", "refusal") and isinstance(part.get(kind), str):
            texts.append(part[kind])
        else:
            where = f"{path}.content[{index}]"
            raise _unsupported(f"'{where}' is of type '{kind}': this backend takes text and images.", where)
    return texts, images


def _image(image: object, path: str) -> str:
    url = image.get("url") if isinstance(image, dict) else image
    if not isinstance(url, str):
        raise BadRequest(f"'{path}.image_url' must be an object with a 'url'.", param=path, code="invalid_type")
    found = _DATA_URL.match(url[:200])
    if found is None:
        raise _unsupported(
            f"The image at '{path}' is behind a URL, and URLs are not fetched: send it as data:image/...;base64,...",
            path,
        )
    return url[found.end() :].rstrip()


def _calls(message: Message) -> list[JSON]:
    calls = message.get("tool_calls")
    if isinstance(old := message.get("function_call"), dict):
        calls = [{"function": old}]
    if not isinstance(calls, list):
        return []
    return [_call(index, call) for index, call in enumerate(calls) if isinstance(call, dict)]


def _call(index: int, call: Mapping[str, Any]) -> JSON:
    named: JSON = next((call[key] for key in ("function", "custom") if isinstance(call.get(key), dict)), {})
    said = named.get("arguments", named.get("input"))
    made: JSON = {"function": {"index": index, "name": str(named.get("name") or ""), "arguments": _arguments(said)}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) and call["id"] else made


def _arguments(said: object) -> JSON:
    """An object, always. What a model once wrote that is none stays readable: refusing it would end the talk."""
    value = said
    if isinstance(said, str):
        try:
            value = loads(said.encode()) if said.strip() else {}
        except ValueError:
            value = said
    if isinstance(value, dict):
        return value
    return {} if value is None else {"arguments": value}


def _prompt(prompt: object) -> str:
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, list) or len(texts) != 1 or not isinstance(texts[0], str) or not texts[0]:
        raise _unsupported("'prompt' must be one text: this backend takes no tokens and no several prompts.", "prompt")
    return texts[0]


def _refuse_several(data: Mapping[str, Any], key: str) -> None:
    if (data.get(key) or 1) != 1:
        raise _unsupported(f"'{key}' must be 1: this backend gives one answer.", key)


def _given(data: Mapping[str, Any], keys: Any) -> JSON:
    return {key: data[key] for key in keys if data.get(key) is not None}


def _unsupported(message: str, param: str) -> BadRequest:
    return BadRequest(message, param=param, code="unsupported_value")
