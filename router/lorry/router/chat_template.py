"""The chat template of the base model's directory: messages to prompt text.

Templates come from the operator's model only, and run in jinja2's immutable sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lorry.router.generation import Chat, ChatMessage
from lorry.rpc.errors import InvalidRequest

SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class ChatTemplate:
    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self._template = _environment().from_string(source)
        self._special_tokens = special_tokens

    @classmethod
    def read(cls, directory: Path) -> "ChatTemplate | None":
        """The template of a model directory, None if it has none."""
        path = directory / "tokenizer_config.json"
        config = json.loads(path.read_text()) if path.exists() else {}
        file = directory / "chat_template.jinja"
        source = file.read_text() if file.exists() else _default_template(config)
        return None if source is None else cls(source, _special_tokens(config))

    def render(self, chat: Chat) -> str:
        """Raises InvalidRequest with the template's own words where it refuses the messages."""
        messages = [_as_template_sees(message) for message in chat.messages]
        try:
            text = self._template.render(
                messages=messages,
                tools=list(chat.tools) or None,
                add_generation_prompt=chat.add_generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template does with what clients may send
            text = str(error) or type(error).__name__
            raise InvalidRequest.of("chat", f"the model's chat template: {text}") from error
        return _opened(text, chat.messages[-1]) if chat.continue_final_message else text


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(value: Any, indent: int | None = None) -> str:
    """Unlike jinja2's own filter without HTML escapes, which models have never seen."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _default_template(config: Mapping[str, Any]) -> str | None:
    """`chat_template` is one template or a list of named ones."""
    source = config.get("chat_template")
    if isinstance(source, list):
        named = {entry["name"]: entry["template"] for entry in source}
        return named.get("default")
    return source


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """A special token is written as its text or as an object that holds it."""
    tokens = {name: config.get(name) for name in SPECIAL_TOKENS}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in tokens.items()
        if token is not None
    }


def _as_template_sees(message: ChatMessage) -> dict[str, Any]:
    seen: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        seen["tool_calls"] = list(message.tool_calls)
    if message.tool_call_id:
        seen["tool_call_id"] = message.tool_call_id
    return seen


def _opened(text: str, last: ChatMessage) -> str:
    """Cut what the template wrote after the last message's content, so that it is continued."""
    content: Sequence[str] = (last.content, last.content.strip())
    for wanted in content:
        start = text.rfind(wanted)
        if wanted and start >= 0:
            return text[: start + len(wanted)]
    raise InvalidRequest.of(
        "chat.continue_final_message", "the model's chat template does not show the last message"
    )
