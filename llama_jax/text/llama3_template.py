"""Meta's reference format as a Jinja chat template, for transformers, llama.cpp and servers that read one.

It renders dialogs as text, and the text encodes to the ids of `chat.encode_dialog`: the same roles, tools and calls,
with nothing stripped or added. Those programs encode that text as a whole, and read any name of a control token as the
token. The ids may therefore differ where a content begins with white space (it joins the two newlines of the header),
comes in parts, or holds such a name. Two things are refused by `raise_exception`: arguments of calls given as strings
of JSON, and content that is neither text nor parts of text.
"""

import json

from llama_jax.text import chat, messages
from llama_jax.text.vocabulary import Vocabulary

_NEEDED = ("begin_of_text", "start_header_id", "end_header_id", "eot_id", "eom_id", "python_tag")


def fits(vocabulary: Vocabulary) -> bool:
    """True if a vocabulary has every control token of the format."""
    return all(f"<|{name}|>" in vocabulary.specials for name in _NEEDED)


_SETTINGS = {
    "query_tools": list(messages.QUERY_TOOLS),
    "builtin_tools": list(messages.BUILTIN_TOOLS),
    "code_tool": messages.CODE_TOOL,
    "tools_before": chat.TOOLS_BEFORE,
    "tools_after": chat.TOOLS_AFTER,
}

_BODY = r"""
{%- macro texts(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- elif content is defined and content is iterable and content is not mapping -%}
    {%- for part in content -%}
      {%- if part is not mapping or part.type != "text" -%}
        {{- raise_exception("content must be text, or a list of {type: text, text: ...}") -}}
      {%- endif -%}
      {{- part.text -}}
    {%- endfor -%}
  {%- else -%}
    {{- raise_exception("a message has no content that is text") -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro header(name) -%}
  {{- "<|start_header_id|>" ~ name ~ "<|end_header_id|>\n\n" -}}
{%- endmacro -%}

{#- JSON indented by four, with lists of plain values on one line. -#}
{%- macro pretty(value, indent) -%}
  {%- set inner = indent ~ "    " -%}
  {%- set found = namespace(nested=false) -%}
  {%- if value is iterable and value is not string and value is not mapping -%}
    {%- for item in value if item is iterable and item is not string -%}
      {%- set found.nested = true -%}
    {%- endfor -%}
  {%- endif -%}
  {%- if value is mapping and value -%}
    {{- "{\n" -}}
    {%- for key, item in value.items() -%}
      {{- inner ~ (key | string | tojson) ~ ": " ~ pretty(item, inner) ~ ("\n" if loop.last else ",\n") -}}
    {%- endfor -%}
    {{- indent ~ "}" -}}
  {%- elif found.nested -%}
    {{- "[\n" -}}
    {%- for item in value -%}
      {{- inner ~ pretty(item, inner) ~ ("\n" if loop.last else ",\n") -}}
    {%- endfor -%}
    {{- indent ~ "]" -}}
  {%- else -%}
    {{- value | tojson -}}
  {%- endif -%}
{%- endmacro -%}

{%- macro call_text(name, arguments) -%}
  {%- set arguments = arguments or {} -%}
  {%- if arguments is not mapping -%}
    {{- raise_exception("the arguments of a call must be an object, not a string of JSON") -}}
  {%- elif name in query_tools -%}
    {{- name ~ '.call(query="' ~ arguments.query ~ '")' -}}
  {%- elif name == code_tool -%}
    {{- arguments.code -}}
  {%- else -%}
    {{- '{"type": "function", "name": ' ~ (name | tojson(ensure_ascii=true)) -}}
    {{- ', "parameters": ' ~ (arguments | tojson(ensure_ascii=true)) ~ "}" -}}
  {%- endif -%}
{%- endmacro -%}

{%- set system = namespace(text=none, tools=false) -%}
{%- set rest = messages -%}
{%- if messages and messages[0].role in ["system", "developer"] -%}
  {%- set system.text = texts(messages[0].content) -%}
  {%- set rest = messages[1:] -%}
{%- endif -%}
{%- set system.tools = true if tools else false -%}
{%- if system.text is not none and system.text.startswith("Environment:") -%}
  {%- set system.tools = system.tools or system.text.startswith("Environment: ipython") -%}
{%- elif system.tools -%}
  {%- set system.text = "Environment: ipython" ~ ("\n\n" ~ system.text if system.text else "") -%}
{%- endif -%}

{{- bos_token -}}
{%- if system.text is not none -%}
  {{- header("system") ~ system.text ~ "<|eot_id|>" -}}
{%- endif -%}
{%- if tools -%}
  {{- header("user") ~ tools_before -}}
  {%- for tool in tools -%}
    {%- if tool is not mapping -%}
      {{- raise_exception("a tool must be an object with the schema of a function") -}}
    {%- endif -%}
    {{- pretty({"type": "function", "function": tool.function if tool.function is defined else tool}, "") ~ "\n" -}}
  {%- endfor -%}
  {{- tools_after ~ "<|eot_id|>" -}}
{%- endif -%}
{%- for message in rest -%}
  {%- if message.role in ["system", "developer"] -%}
    {{- header("system") ~ texts(message.content) ~ "<|eot_id|>" -}}
  {%- elif message.role == "user" -%}
    {{- header("user") ~ texts(message.content) ~ "<|eot_id|>" -}}
  {%- elif message.role in ["tool", "ipython"] -%}
    {{- header("ipython") ~ texts(message.content) ~ "<|eot_id|>" -}}
  {%- elif message.role == "assistant" -%}
    {%- set calls = message.tool_calls or [] -%}
    {%- set turn = namespace(builtin=false) -%}
    {%- for call in calls if (call.function or call).name in builtin_tools -%}
      {%- set turn.builtin = true -%}
    {%- endfor -%}
    {%- if turn.builtin and calls | length > 1 -%}
      {{- raise_exception("a call of a built-in tool must be the only call of its message") -}}
    {%- endif -%}
    {%- set stop = message.stop or ("eom" if calls and (turn.builtin or system.tools) else "eot") -%}
    {{- header("assistant") -}}
    {%- if not calls or (message.content is defined and message.content is not none) -%}
      {{- texts(message.content) -}}
    {%- endif -%}
    {%- if turn.builtin or (calls and stop == "eom") -%}
      {{- "<|python_tag|>" -}}
    {%- endif -%}
    {%- for call in calls -%}
      {{- call_text((call.function or call).name, (call.function or call).arguments) -}}
    {%- endfor -%}
    {{- "<|" ~ stop ~ "_id|>" -}}
  {%- else -%}
    {{- raise_exception("a message must be of role system, developer, user, assistant or tool") -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- header("assistant") -}}
{%- endif -%}
"""

CHAT_TEMPLATE = "\n".join([*(f"{{%- set {k} = {json.dumps(v)} -%}}" for k, v in _SETTINGS.items()), _BODY.strip()])
