"""Gemma's chat template in Jinja, as other libraries read it: the same ids as data/chat.py gives.

Texts are trimmed; the system text precedes the first user's. A content may be a list of text parts.
An assistant's reasoning may stand in a field of its own; it is joined with the answer as training
joins them, and removed from earlier turns if training did so. What the model was not trained with
(images, audio, tools, documents, other roles) is refused by name.
"""

import json
import re

from jaxsft.data.fields import PARTS
from jaxsft.data.messages import TEXT_PARTS
from jaxsft.weights.find import Taught

_CHAT_TEMPLATE = r"""{{- bos_token -}}
{%- macro text_of(content) -%}
    {%- if content is undefined or content is none -%}
        {{- raise_exception('the content of a message is null or missing') -}}
    {%- elif content is string -%}
        {{- content -}}
    {%- elif content is mapping or content is not iterable -%}
        {{- raise_exception('the content of a message is neither a text nor a list of parts') -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part is string -%}
                {{- part -}}
            {%- elif part['text'] is string and (part['type'] or 'text') in @TEXT_PARTS@ -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('a part of a message is not text: ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- if tools or documents -%}
    {{- raise_exception('this model was not trained with tools or documents') -}}
{%- endif -%}
{%- set system = @SYSTEM@ -%}
{%- set turns = messages -%}
{%- if messages and messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- set system = text_of(messages[0]['content']) | trim -%}
{%- endif -%}
{%- set preface = system + '\n\n' if system else '' -%}
{%- for turn in turns -%}
    {%- if turn['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
        {{- raise_exception('the roles must be [system,] user, assistant, user, …') -}}
    {%- endif -%}
    {%- if turn['tool_calls'] or turn['function_call'] -%}
        {{- raise_exception('this model was not trained to call tools') -}}
    {%- endif -%}
    {%- set thought = '' -%}
    {%- if turn['role'] == 'assistant' -%}
        {%- set thought = text_of(@THOUGHT_FIELDS@ or '') | trim -%}
    {%- endif -%}
    {%- set text = text_of((turn['content'] or '') if thought else turn['content']) | trim -%}
    {%- if thought -%}
        @REASONING@
    {%- endif -%}
    @EARLIER@
    {{- '<start_of_turn>' + ('user\n' if turn['role'] == 'user' else 'model\n') -}}
    {{- (preface if loop.first else '') + text | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\n' -}}
{%- endif -%}
"""
# Servers that cut off the reasoning may leave the answer in its tags: it is taken out of them.
_JOIN = """{%- if text.startswith(@BEGIN@) and text.endswith(@END@) -%}
            {%- set text = text[@NUM_BEGIN@:(text | length) - @NUM_END@] | trim -%}
        {%- endif -%}
        {%- set text = @OPENING@ + thought + @MIDDLE@ + text + @END@ -%}"""
_REFUSE = """{{- raise_exception('it is not known how this model was trained to reason') -}}"""
_STRIP = """{%- if turn['role'] == 'assistant' and not loop.last -%}
        {%- set text = text.split(@END_OF_REASONING@)[-1] -%}
    {%- endif -%}"""


def chat_template(taught: Taught | None) -> str:
    """Gemma's template. A chat without a system turn gets that of the training, and reasoning is
    treated as there. None: nothing is known of the training; reasoning in a field is refused."""
    strips = taught is not None and taught.earlier_reasoning == "strip"
    text = _CHAT_TEMPLATE.replace("@REASONING@", _REFUSE if taught is None else _JOIN)
    text = text.replace("@EARLIER@", _STRIP if strips else "")
    values = {
        "TEXT_PARTS": repr(TEXT_PARTS),
        "SYSTEM": _literal("" if taught is None else taught.system_prompt.strip()),
        "THOUGHT_FIELDS": " or ".join(f"turn['{name}']" for name in PARTS["reasoning"]),
    }
    if taught is not None:
        template = taught.template
        begin = template.middle.strip().removeprefix(template.end_of_reasoning).strip()
        values |= {
            "OPENING": _literal(template.opening),
            "MIDDLE": _literal(template.middle),
            "BEGIN": _literal(begin),
            "END": _literal(template.end),
            "NUM_BEGIN": str(len(begin)),
            "NUM_END": str(len(template.end)),
            "END_OF_REASONING": _literal(template.end_of_reasoning),
        }
    return re.sub(r"@([A-Z_]+)@", lambda name: values[name[1]], text)


def _literal(text: str) -> str:
    """A string in Jinja, which has JSON's escapes, except pairs of surrogates: those characters
    are not escaped."""
    return json.dumps(text, ensure_ascii=False)
