"""What clients make of pruned choices: ``PYTHON client_programs.py URL PROGRAM...`` prints JSON.

Runs in an environment of the client's own, so it imports nothing of ours. Every program asks for 24
choices, of which some are pruned, with each value of `custom_params.step.pruned`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

CHAT = [{"role": "user", "content": "What is 12 + 30?"}]
LETTERS, N = 120, 24  # 1,400 tokens: twice the pool of the test
PATTERN = f"[a-z]{{{LETTERS}}}"
FORMAT = {
    "type": "json_schema",
    "json_schema": {
        "name": "Word",
        "schema": {
            "type": "object",
            "properties": {"word": {"type": "string", "pattern": f"^{PATTERN}$"}},
            "required": ["word"],
            "additionalProperties": False,
        },
    },
}


def extra(mode: str, *, free: bool = True) -> dict[str, Any]:
    """What goes beside OpenAI's own members."""
    step = {"custom_params": {"step": {"pruned": mode}}}
    return {**step, "regex": PATTERN} if free else step


def reasons(choices: Any) -> dict[str, Any]:
    """How choices ended."""
    found = [choice.finish_reason for choice in choices]
    return {"choices": len(found), "reasons": sorted(set(found))}


def parsed(texts: list[str]) -> dict[str, Any]:
    """How many texts are what was asked for."""
    whole = 0
    for text in texts:
        try:
            whole += len(json.loads(text)["word"]) == LETTERS
        except (ValueError, KeyError):
            continue
    return {"choices": len(texts), "whole": whole}


def openai_strict(url: str, mode: str) -> dict[str, Any]:
    """`chat.completions.create` with strict validation."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", _strict_response_validation=True)
    found = client.chat.completions.create(
        model="default", messages=CHAT, n=N, max_tokens=400, temperature=1.0,
        extra_body=extra(mode),
    )  # fmt: skip
    return reasons(found.choices)


def openai_parse(url: str, mode: str) -> dict[str, Any]:
    """`chat.completions.parse`."""
    import openai
    import pydantic

    class Word(pydantic.BaseModel):
        word: str = pydantic.Field(pattern=f"^{PATTERN}$")

    client = openai.OpenAI(base_url=url, api_key="none")
    found = client.chat.completions.parse(
        model="default", messages=CHAT, n=N, max_tokens=400, temperature=1.0,
        response_format=Word, extra_body=extra(mode, free=False),
    )  # fmt: skip
    return {
        **reasons(found.choices),
        "whole": sum(c.message.parsed is not None for c in found.choices),
    }


def litellm_completion(url: str, mode: str) -> dict[str, Any]:
    """`completion`."""
    import litellm

    found = litellm.completion(
        model="openai/default", api_base=url, api_key="none", messages=CHAT, n=N, max_tokens=400,
        temperature=1.0, extra_body=extra(mode),
    )  # fmt: skip
    return reasons(found.choices)


def litellm_text(url: str, mode: str) -> dict[str, Any]:
    """`text_completion`."""
    import litellm

    found = litellm.text_completion(
        model="text-completion-openai/default", api_base=url, api_key="none", prompt="So", n=N,
        max_tokens=400, temperature=1.0, extra_body=extra(mode),
    )  # fmt: skip
    return reasons(found.choices)


def litellm_stream(url: str, mode: str) -> dict[str, Any]:
    """`completion(stream=True)`."""
    import litellm

    texts: dict[int, str] = {}
    for chunk in litellm.completion(
        model="openai/default", api_base=url, api_key="none", messages=CHAT, n=N, max_tokens=400,
        temperature=1.0, stream=True, extra_body=extra(mode),
    ):  # fmt: skip
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    return {"choices": len(texts), "whole": sum(len(t) == LETTERS for t in texts.values())}


def litellm_parse(url: str, mode: str) -> dict[str, Any]:
    """`completion` with a `response_format`, each choice parsed."""
    import litellm

    found = litellm.completion(
        model="openai/default", api_base=url, api_key="none", messages=CHAT, n=N, max_tokens=400,
        temperature=1.0, response_format=FORMAT, extra_body=extra(mode, free=False),
    )  # fmt: skip
    return parsed([choice.message.content for choice in found.choices])


def langchain_generate(url: str, mode: str) -> dict[str, Any]:
    """`ChatOpenAI.generate`."""
    from langchain_core.messages import HumanMessage
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=url, api_key="none", model="default", n=N, max_tokens=400, temperature=1.0,
        extra_body=extra(mode),
    )  # fmt: skip
    (found,) = chat.generate([[HumanMessage(CHAT[0]["content"])]]).generations
    ends = [(one.generation_info or {}).get("finish_reason") for one in found]
    return {"choices": len(ends), "reasons": sorted(set(ends))}


def langchain_structured(url: str, mode: str) -> dict[str, Any]:
    """`with_structured_output`."""
    import pydantic
    from langchain_openai import ChatOpenAI

    class Word(pydantic.BaseModel):
        """A word."""

        word: str = pydantic.Field(pattern=f"^{PATTERN}$")

    chat = ChatOpenAI(
        base_url=url, api_key="none", model="default", n=N, max_tokens=400, temperature=1.0,
        extra_body=extra(mode, free=False),
    )  # fmt: skip
    found: Any = chat.with_structured_output(Word).invoke(CHAT[0]["content"])
    return {"whole": int(len(found.word) == LETTERS)}


PROGRAMS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    program.__name__: program
    for program in (
        openai_strict, openai_parse, litellm_completion, litellm_text, litellm_stream,
        litellm_parse, langchain_generate, langchain_structured,
    )
}  # fmt: skip


def main() -> None:
    """Run some, and say of each and of each mode what came."""
    url, *names = sys.argv[1:]
    said: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name in names:
        for mode in ("abort", "length", "omit"):
            try:
                said[name][mode] = PROGRAMS[name](url, mode)
            except Exception as error:  # what a client raises is the answer
                said[name][mode] = {"raises": type(error).__name__, "text": str(error)[:300]}
    print(json.dumps(said))


if __name__ == "__main__":
    main()
