"""The chat template of a pretrained model: messages → text.

A template is a program in the language of Jinja, in chat_template.jinja or in the field
`chat_template` of tokenizer_config.json. It runs in Jinja's sandbox, with the settings and
functions that `transformers` gives it. Needs the package jinja2 (pip install -e '.[lm-eval]').
"""

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from esolm_jax.errors import UserError, brief, nearest
from esolm_jax.files import regular_file

FILE, OLD_FILE, CONFIG = "chat_template.jinja", "chat_template.json", "tokenizer_config.json"
DEFAULT = "default"  # the name of the template that is used without a name
Message = Mapping[str, Any]  # role and content
_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Templates by name, and the special tokens that they may name, such as bos_token."""

    templates: Mapping[str, str]
    tokens: Mapping[str, str]

    def source(self, name: str = "") -> str:
        """The template of this name. UserError: none has it."""
        name = name or DEFAULT
        if name not in self.templates:
            names = list(self.templates)
            raise UserError(
                f"chat_template={name!r}: must be one of {', '.join(names)}{nearest(name, names)}"
            )
        return self.templates[name]

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, name: str = ""
    ) -> str:
        """The text of a chat. Without a generation prompt it ends with the content of the last
        message, to be continued, as `transformers` does with continue_final_message.

        Raises:
          UserError: the template refuses the messages, or needs jinja2.
        """
        text = self._render(messages, add_generation_prompt, name)
        return text if add_generation_prompt else _without_end(text, messages[-1]["content"])

    def end_of_turn(self, name: str = "") -> str:
        """The text behind a message, such as <|im_end|>. UserError: as render()."""
        question, answer = "question", "answer"
        turns = {"role": "user", "content": question}, {"role": "assistant", "content": answer}
        return self._render(turns, False, name).rpartition(answer)[2].strip()

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, name: str) -> str:
        try:
            return _compiled(self.source(name)).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self.tokens
            )
        except UserError:
            raise
        except Exception as error:  # templates raise many types
            raise UserError(f"chat template: {brief(error)}") from error


def _without_end(text: str, last: str) -> str:
    """The text up to the end of the last message."""
    stripped = last.strip()
    if stripped not in text:
        raise UserError("chat template: must keep the content of the last message to continue it")
    start = text.rindex(stripped)
    is_whole = text[start : start + len(last)] == last
    return text[: start + len(last if is_whole else stripped)]


def of_tokenizer(tokenizer: Any) -> ChatTemplate | None:
    """The chat template that came with a tokenizer; None if there is none. UserError: damaged."""
    return of_files(getattr(tokenizer, "companions", {}), "the tokenizer's folder")


def of_files(files: Mapping[str, bytes], where: str) -> ChatTemplate | None:
    """The chat template of the files of a model's folder, by name; None if they bring none.

    Raises:
      UserError: a file is damaged; `where` names the folder.
    """
    config, old = (_object(files, name, where) for name in (CONFIG, OLD_FILE))
    given = config.get("chat_template") or old.get("chat_template")
    if FILE in files:
        given = files[FILE].decode("utf-8", errors="replace")
    if isinstance(given, str):
        given = [{"name": DEFAULT, "template": given}]
    if not given:
        return None
    try:
        templates = {str(one["name"]): str(one["template"]) for one in given}
    except (TypeError, KeyError) as error:
        raise UserError(f"{where}/{CONFIG}: chat_template: must be a text or a list") from error
    tokens = {f"{role}_token": _name(config.get(f"{role}_token")) for role in _TOKENS}
    return ChatTemplate(templates, {role: name for role, name in tokens.items() if name})


def _object(files: Mapping[str, bytes], name: str, where: str) -> dict[str, Any]:
    text = files.get(name, b"{}").decode("utf-8", errors="replace")
    found = regular_file.parse_json(text, f"{where}/{name}")
    if not isinstance(found, dict):
        raise UserError(f"{where}/{name}: damaged: must be an object")
    return found


def _name(token: Any) -> str | None:
    """The text of a special token, which may be an object."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _compiled(source: str) -> Any:
    try:
        from jinja2 import ext, sandbox
    except ImportError as error:
        raise UserError(f"chat template: {error}: pip install -e '.[lm-eval]'") from error

    def raise_exception(message: str) -> None:
        raise UserError(f"chat template: {message}")

    def to_json(value: Any, **settings: Any) -> str:
        return json.dumps(value, **({"ensure_ascii": False} | settings))

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(source)
