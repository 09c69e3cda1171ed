"""The formats of an input line: this package's own, and those of public data sets and logs, where they are unambiguous.

Answers, solutions and tests never become part of the prompt. What would change the answer elsewhere and is not
supported here is refused by name; other fields are metadata.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dllm_jax.errors import UsageError

Fields = dict[str, Any]  # those of `prompts.Prompt`
OWN = ("prompt", "messages", "prompt_ids")
IDS = ("id", "task_id", "question_id", "unique_id", "doc_id")  # the first that a line has is its id
TESTS = {"test", "test_list"}  # a line that has them with a prompt is of HumanEval or of sanitized MBPP
SYSTEM = ("system", "system_prompt")
ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ROLES}

# Settings of a request elsewhere, with the setting that holds for all lines here.
_SETTINGS = {
    "temperature": "decode.temperature",
    "top_p": "decode.top_p",
    "seed": "decode.seed",
    "cfg_scale": "decode.cfg_scale",
    "gen_length": "decode.gen_length",
    "block_length": "decode.block_length",
    "max_tokens": "decode.gen_length",
    "max_new_tokens": "decode.gen_length",
    "max_completion_tokens": "decode.gen_length",
    "max_output_tokens": "decode.gen_length",
    "chat_template": "tokenizer.chat_template",
}
_UNSUPPORTED = (
    *_SETTINGS,
    "top_k",
    "min_p",
    "min_tokens",
    "n",
    "best_of",
    "num_beams",
    "do_sample",
    "stop",
    "stop_sequences",
    "stop_token_ids",
    "until",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "bad_words",
    "tools",
    "tool_choice",
    "tool_calls",
    "tool_call_id",
    "parallel_tool_calls",
    "functions",
    "function_call",
    "response_format",
    "json_schema",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "images",
    "image",
    "image_url",
    "audio",
    "audios",
    "video",
    "videos",
    "documents",
    "history",
    "suffix",
    "negative_prompt",
    "generation_config",
    "generation_kwargs",
    "sampling_params",
    "extra_body",
    "chat_template_kwargs",
    "enable_thinking",
    "reasoning_effort",
    "reasoning_content",
)
# Beside a bare question these are a part of it, which a prompt made of the question alone would lack.
_PARTS = ("context", "passage", "choices", "options", "input", "starter_code")


def fields(record: Mapping[str, Any]) -> Fields:
    """What a line asks, in any of the formats: text, messages or prompt_ids, with id, task and answer if it has them.

    Args:
        record: the line's JSON object.

    Raises:
        UsageError: it is no format we know, or more than one, a field is malformed, or has to be refused.
    """
    refuse_unsupported(record)
    kind = _kind(record)
    found = _READERS[kind](record)
    if system := _system(record):
        found = _with_system(found, system)
    ids = [record[name] for name in IDS if name in record]
    own = {name: record[name] for name in ("task", "answer") if name in record}
    public = kind in ("question", "problem", "text") or (kind == "prompt" and TESTS & set(record))
    return found | ({"id": ids[0]} if ids else {}) | own | ({"doc": record} if public else {})


def _kind(record: Mapping[str, Any]) -> str:
    """The field that has the question. Beside a field of our own `question` and `problem` are metadata."""
    given = [name for name in _READERS if name in record]
    if not {"test_list", "code"} & set(record):  # else `text` is any text, such as a result's
        given = [name for name in given if name != "text"]
    if "doc_id" not in record:  # else `arguments` are anybody's
        given = [name for name in given if name != "arguments"]
    if any(name in OWN for name in given):
        given = [name for name in given if name not in ("question", "problem")]
    if len(given) != 1:
        raise UsageError(f"expected exactly one of {', '.join(OWN)}, got {' and '.join(given) or 'none'}")
    return given[0]


def refuse_unsupported(record: Mapping[str, Any], *, where: str = "", names: Sequence[str] = _UNSUPPORTED) -> None:
    """Refuses a field that would change the answer, unless it is null or empty.

    Raises:
        UsageError: naming the field.
    """
    for name in names:
        value = record.get(name)
        if value is None or (isinstance(value, str | list | dict) and not value):
            continue
        instead = f" ({_SETTINGS[name]} is for all lines)" if name in _SETTINGS else ""
        raise UsageError(
            f"{where}{name}: expected none, as it would change the answer and is not supported{instead}, "
            f"got {shorten(value)}"
        )


def _prompt(record: Mapping[str, Any]) -> Fields:
    return {"text": checked_text(record["prompt"], "prompt")}


def _prompt_ids(record: Mapping[str, Any]) -> Fields:
    value = record["prompt_ids"]
    if not isinstance(value, list) or not value:
        raise UsageError(f"prompt_ids: expected a list that is not empty, got {shorten(value)}")
    for token in value:
        if type(token) is not int or token < 0:  # a bool is an int too
            raise UsageError(f"prompt_ids: expected integers from 0, got {shorten(token)}")
    return {"prompt_ids": tuple(value)}


def _messages(record: Mapping[str, Any]) -> Fields:
    return {"messages": _chat(record["messages"], "messages", roles=dict(zip(ROLES, ROLES, strict=True)))}


def _bare(name: str) -> Callable[[Mapping[str, Any]], Fields]:
    """The reader of a question that must be all there is to ask: GSM8K, MATH, MBPP."""

    def read(record: Mapping[str, Any]) -> Fields:
        refuse_unsupported(record, names=_PARTS)
        return {"text": checked_text(record[name], name)}

    return read


def _alpaca(record: Mapping[str, Any]) -> Fields:
    refuse_unsupported(record, names=[name for name in _PARTS if name != "input"])
    text, more = checked_text(record["instruction"], "instruction"), record.get("input")
    if not isinstance(more, str | None):
        raise UsageError(f"input: expected a string, got {shorten(more)}")
    return {"text": f"{text}\n{more}" if more and more.strip() else text, "answer": record.get("output")}


def _sharegpt(record: Mapping[str, Any]) -> Fields:
    """A conversation; a last turn of `gpt` is the answer that belongs to it, and no part of the prompt."""
    value = record["conversations"]
    chat = _chat(value, "conversations", roles=SHAREGPT_ROLES)
    answer = chat[-1]["content"] if chat[-1]["role"] == "assistant" else None
    asked = chat if answer is None else chat[:-1]
    if not any(message["role"] == "user" for message in asked):
        raise UsageError(f"conversations: expected a turn of human, got {shorten(value)}")
    return {"messages": asked, "answer": answer}


def _lm_eval(record: Mapping[str, Any]) -> Fields:
    """The prompt of lm-eval's log of one sample, `[[prompt, settings]]` or with names; its settings are the log's."""
    value = record["arguments"]
    requests = list(value.values()) if isinstance(value, dict) else value
    if not isinstance(requests, list) or len(requests) != 1:
        raise UsageError(f"arguments: expected one request, got {shorten(value)}")
    request = list(requests[0].values()) if isinstance(requests[0], dict) else requests[0]
    if not isinstance(request, list) or len(request) != 2 or not isinstance(request[1], dict):
        raise UsageError(f"arguments: expected a prompt and the settings of a generation, got {shorten(value)}")
    return {"text": checked_text(request[0], "arguments")}


_READERS: dict[str, Callable[[Mapping[str, Any]], Fields]] = {
    "prompt": _prompt,  # HumanEval's too
    "messages": _messages,
    "prompt_ids": _prompt_ids,
    "question": _bare("question"),
    "problem": _bare("problem"),
    "text": _bare("text"),
    "instruction": _alpaca,
    "conversations": _sharegpt,
    "arguments": _lm_eval,
}


def checked_text(value: Any, name: str) -> str:
    """The value, if it is a string with more than white space in it.

    Raises:
        UsageError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise UsageError(f"{name}: expected a string that is not empty or blank, got {shorten(value)}")
    return value


def _chat(value: Any, name: str, *, roles: Mapping[str, str]) -> tuple[dict[str, str], ...]:
    """Messages with a role and content, from a list of them or of ShareGPT's turns."""
    if not isinstance(value, list) or not value:
        raise UsageError(f"{name}: expected a list that is not empty, got {shorten(value)}")
    chat = tuple(_message(message, name, roles=roles) for message in value)
    for message, given in zip(chat, value, strict=True):
        if not message["content"].strip() and (message["role"] == "user" or message is chat[-1]):
            raise UsageError(f"{name}: expected text in a message to be answered, got {shorten(given)}")
    if chat[-1]["role"] == "system":
        raise UsageError(f"{name}: expected a last message of user or assistant, got {shorten(value[-1])}")
    return chat


def _message(message: Any, name: str, *, roles: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UsageError(f"{name}: expected objects, got {shorten(message)}")
    refuse_unsupported(message, where=f"{name}: ")
    turn = "from" in message and roles is SHAREGPT_ROLES
    keys = ("from", "value") if turn else ("role", "content")
    role, content = (message.get(key) for key in keys)
    if not isinstance(role, str) or not isinstance(content, str | list):
        raise UsageError(f"{name}: expected objects with strings {' and '.join(keys)}, got {shorten(message)}")
    if role not in roles:
        raise UsageError(f"{name}: expected {keys[0]} to be one of {', '.join(roles)}, got {shorten(role)}")
    return {"role": roles[role], "content": content if isinstance(content, str) else _joined(content, name)}


def _joined(parts: list[Any], name: str) -> str:
    """The content of a message whose parts are all text, a line each."""
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UsageError(f"{name}: expected content to be text or parts of the type text, got {shorten(part)}")
    return "\n".join(part["text"] for part in parts)


def _system(record: Mapping[str, Any]) -> str:
    """The system message beside the question, "" if there is none."""
    given = [(name, record[name]) for name in SYSTEM if record.get(name) not in (None, "")]
    if len(given) > 1:
        raise UsageError(f"{given[1][0]}: expected none beside {given[0][0]}, got both")
    return checked_text(given[0][1], given[0][0]) if given else ""


def _with_system(found: Fields, system: str) -> Fields:
    if "prompt_ids" in found:
        raise UsageError(f"system: expected none beside prompt_ids, got {shorten(system)}")
    chat = found.get("messages") or ({"role": "user", "content": found["text"]},)
    if any(message["role"] == "system" for message in chat):
        raise UsageError(f"system: expected none beside a system message, got {shorten(system)}")
    return found | {"text": None, "messages": ({"role": "system", "content": system}, *chat)}


def shorten(value: Any) -> str:
    """A value in an error message."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."
