"""A chat template rendered as transformers renders it, in the child process: a template is a program, and not ours.

The environment is transformers' (utils/chat_template_utils.py): a sandbox whose values cannot be changed, blocks
trimmed, `tojson` that keeps what is not ASCII, `raise_exception`, loop controls, `{% generation %}`. The clock stands
still, so that what a template says of today's date is the same tomorrow.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

from edgedistill.errors import UserError

TODAY = datetime.datetime(2025, 1, 1)


def render(template: str, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
    """The conversation as text, a prompt for an answer at its end; `variables`: bos_token and the like.

    Raises UserError where the template is none, or refuses these messages; ModuleNotFoundError without jinja2.
    """
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}…{% endgeneration %}` marks the assistant's tokens, and shows them."""

        tags = {"generation"}  # noqa: RUF012  (jinja2's own attribute)

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, tools=None, documents=None, **variables
        )
    except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise UserError(
            f"the chat template cannot be rendered: {type(error).__name__}: {str(error)[:300]}",
            "correct the template beside the tokenizer and export again",
        ) from error


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)
