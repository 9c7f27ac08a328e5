# ruff: noqa: E501 (templates are written as they are published)
"""Twenty chat templates with the constructs of published ones, written for these tests, and what each takes.

takes: the form of content by role ("text", "parts", "both"), found by reading the template, so that it is a check on what
the product finds out by itself. arguments: whether JSON text must become an object. null: whether a content is asked to
be none. developer: whether the role is known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class Case:
    name: str
    source: str | Mapping[str, str]
    takes: str | Mapping[str, str] = "text"
    arguments_as_object: bool = False
    null: bool = False
    developer: bool = False
    tokens: Mapping[str, str] = field(default_factory=lambda: TOKENS)
    variables: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def form(self, role: str) -> str:
        return self.takes if isinstance(self.takes, str) else self.takes.get(role, self.takes["user"])


LLAMA = """{{- bos_token }}
{%- if custom_tools is defined %}{%- set tools = custom_tools %}{%- endif %}
{%- if not place_of_tools is defined %}{%- set place_of_tools = 'user' %}{%- endif %}
{%- if not day is defined %}{%- if strftime_now is defined %}{%- set day = strftime_now("%d %b %Y") %}
{%- else %}{%- set day = "01 Jan 2026" %}{%- endif %}{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|head|>system<|body|>\\n\\n" }}
{%- if tools is not none %}{{- "Place: here\\n" }}{%- endif %}
{{- "Today is " + day + ".\\n\\n" }}
{%- if tools is not none and place_of_tools != 'user' %}
    {{- "These functions may be called:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system + "<|end|>" }}
{%- if place_of_tools == 'user' and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("Tools need a first message to stand in!") }}
    {%- endif %}
    {{- '<|head|>user<|body|>\\n\\n' -}}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
    {{- first + "<|end|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|body|>\\n\\n' + message['content'] | trim + '<|end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception("One call at a time!") }}{%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|body|>\\n\\n' -}}
        {{- '{"name": "' + call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- call.arguments | tojson }}
        {{- "}" }}
        {{- "<|end|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|head|>ipython<|body|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|body|>\\n\\n' }}{%- endif %}
"""

VISION = """{{- bos_token }}
{%- set image = namespace(seen=false) %}
{%- for message in messages %}
    {%- if message['content'] is not string %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}{%- set image.seen = true %}{%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if image.seen and messages[0].role == 'system' %}{{- raise_exception('No pictures beside a system message.') }}{%- endif %}
{%- for message in messages %}
    {{- '<|h|>' + message.role + '<|b|>\\n' }}
    {%- if message['content'] is string %}
        {{- message['content'] }}
    {%- else %}
        {%- for part in message['content'] %}
            {%- if part['type'] == 'image' %}
                {{- '<|image|>' }}
            {%- elif part['type'] == 'text' %}
                {{- part['text'] }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|e|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|h|>assistant<|b|>\\n' }}{%- endif %}
"""

GUARD = """{% if messages|length % 2 == 0 %}{% set judged = "Model" %}{% else %}{% set judged = "User" %}{% endif %}
{{- bos_token -}}
<|h|>user<|b|>

Judge whether the {{ judged }}'s last words are harmful.
<CATEGORIES>
{% if categories is defined and categories %}
{% for key, value in categories.items() -%}
{{ key }}: {{ value }}.
{% endfor %}
{%- else -%}
A: Cruelty.
B: Fraud.
{%- endif %}

</CATEGORIES>

{% for message in messages %}
{% if message['role'] == 'user' and loop.index0 % 2 == 0 or message['role'] == 'assistant' and loop.index0 % 2 == 1 %}
{% if message['role'] == 'user' %}User: {% else %}Model: {% endif %}
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] | trim }}{% endif %}{% endfor %}


{% else %}
{{- raise_exception('Roles take turns: user, assistant, user, ...') -}}
{% endif %}
{% endfor %}
Answer "safe" or "unsafe".<|e|><|h|>assistant<|b|>
"""

QWEN2 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You help.' }}
    {%- endif %}
    {{- "\\n\\n# Functions\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou help.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(searching=true, last_question=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(message.content.startswith('<result>') and message.content.endswith('</result>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last_question = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_question %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
                {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
                {{- '<tool_call>\\n{"name": "' }}
                {{- tool_call.name }}
                {{- '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<result>\\n' }}
        {{- content }}
        {{- '\\n</result>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After an optional system message, user and assistant take turns") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[TOOLS][" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" }}{%- endif %}
            {%- endfor %}
            {{- "[/TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[CALLS][" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Ids of tool calls have nine characters") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[RESULTS]{"content": ' + content|string + ", " }}
        {%- if not message.tool_call_id is defined or message.tool_call_id|length != 9 %}
            {{- raise_exception("Ids of tool calls have nine characters") }}
        {%- endif %}
        {{- '"call_id": "' + message.tool_call_id + '"}[/RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user, assistant and tool can speak after the system") }}
    {%- endif %}
{%- endfor %}
"""

MISTRAL_SMALL = """{%- set today = strftime_now("%Y-%m-%d") %}
{%- set default_system_message = "You were made by a company in Paris.\\nToday is " + today + "." %}
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- if messages[0]['content'] is string %}
        {%- set system_message = messages[0]['content'] %}
    {%- else %}
        {%- set system_message = messages[0]['content'][0]['text'] %}
    {%- endif %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = default_system_message %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- '[SYSTEM]' + system_message + '[/SYSTEM]' }}
{%- for message in loop_messages %}
    {%- if message['role'] == 'user' %}
        {%- if message['content'] is string %}
            {{- '[INST]' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST]' }}
            {%- for block in message['content'] %}
                {%- if block['type'] == 'text' %}
                    {{- block['text'] }}
                {%- elif block['type'] in ['image', 'image_url'] %}
                    {{- '[IMG]' }}
                {%- else %}
                    {{- raise_exception('Only text and image blocks!') }}
                {%- endif %}
            {%- endfor %}
            {{- '[/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {%- if message['content'] is string %}
            {{- message['content'] + eos_token }}
        {%- else %}
            {{- message['content'][0]['text'] + eos_token }}
        {%- endif %}
    {%- else %}
        {{- raise_exception('Only user, system and assistant roles!') }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('There is no system here') }}{% endif %}
{% for turn in messages %}{% set expected = ['user', 'assistant'][loop.index0 % 2] %}{% if turn['role'] != expected %}{{ raise_exception('It is the turn of ' ~ expected) }}{% endif %}{{ '<turn>' + {'assistant': 'model'}.get(turn['role'], turn['role']) + '
' + turn['content'] | trim + '</turn>
' }}{% endfor %}{% if add_generation_prompt %}{{'<turn>model
'}}{% endif %}"""

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set prefix = messages[0]['content'] + '

' -%}
    {%- else -%}
        {%- set prefix = messages[0]['content'][0]['text'] + '

' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Turns alternate!") }}
    {%- endif -%}
    {{ '<turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '
' + (prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '</turn>
' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model
'}}{%- endif -%}
"""

PHI3 = """{% set known = ['system', 'user', 'assistant'] %}{% for turn in messages if turn.role in known %}{% if turn.content or turn.role != 'system' %}{{ '<|' ~ turn.role ~ '|>\n' + turn.content + '<|z|>\n' }}{% endif %}{% endfor %}{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

PHI4 = """{% for turn in messages %}{{ '<|' + turn['role'] + '|>' + turn['content'] }}{% if turn['role'] == 'system' and turn['tools'] is string %}{{ '<|t|>' + turn['tools'] + '<|/t|>' }}{% elif loop.first and tools is iterable %}{{ '<|t|>' + tools | tojson + '<|/t|>' }}{% endif %}{{ '<|z|>' }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt else eos_token }}"""

DEEPSEEK = """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system_prompt='', is_first_sp=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.is_first_sp %}{% set ns.system_prompt = ns.system_prompt + message['content'] %}{% set ns.is_first_sp = false %}{%- else %}{% set ns.system_prompt = ns.system_prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.system_prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<|U|>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}{%- for tool in message['tool_calls'] %}{%- if not ns.is_first %}{{'<|A|><|calls|><|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<|/call|>'}}{%- set ns.is_first = true -%}{%- else %}{{'\\n' + '<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n' + '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + '<|/call|>'}}{%- endif %}{%- endfor %}{{'<|/calls|><|E|>'}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- if ns.is_tool %}{{'<|/outputs|>' + message['content'] + '<|E|>'}}{%- set ns.is_tool = false -%}{%- else %}{% set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<|A|>' + content + '<|E|>'}}{%- endif %}{%- endif %}{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}{%- if ns.is_output_first %}{{'<|outputs|><|output|>' + message['content'] + '<|/output|>'}}{%- set ns.is_output_first = false %}{%- else %}{{'\\n<|output|>' + message['content'] + '<|/output|>'}}{%- endif %}{%- endif %}{%- endfor -%}{% if ns.is_tool %}{{'<|/outputs|>'}}{% endif %}{% if add_generation_prompt and not ns.is_tool %}{{'<|A|>'}}{% endif %}"""

GRANITE = """{%- set first = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- if first is none %}
    {%- set system_message = "Knowledge ends in spring.\\nToday's date: " + strftime_now('%B %d, %Y') + ".\\nYou are made of stone." %}
    {%- if tools and documents %}
        {%- set system_message = system_message + " You have tools and documents." %}
    {%- elif tools %}
        {%- set system_message = system_message + " You have tools." %}
    {%- elif documents %}
        {%- set system_message = system_message + " Use the documents." %}
    {%- elif thinking %}
        {%- set system_message = system_message + " Think first." %}
    {%- endif %}
    {%- if 'citations' in controls and documents %}
        {%- set system_message = system_message + '\\nCite.' %}
    {%- endif %}
{%- else %}
    {%- set system_message = first %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|role|>system<|/role|>' + system_message + '<|end|>\\n' }}
{%- if tools %}
    {{- '<|role|>tools<|/role|>' }}
    {{- tools | tojson(indent=4) }}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- if documents %}
    {{- '<|role|>documents<|/role|>' }}
    {%- for document in documents %}
        {{- 'Document ' + loop.index | string + '\\n' }}
        {{- document['text'] }}
        {%- if not loop.last %}{{- '\\n\\n'}}{%- endif %}
    {%- endfor %}
    {{- '<|end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|role|>' + message['role'] + '<|/role|>' + message['content'] + '<|end|>\\n' }}
    {%- if loop.last and add_generation_prompt %}
        {{- '<|role|>assistant' }}
        {%- if controls %}{{- ' ' + controls | tojson()}}{%- endif %}
        {{- '<|/role|>' }}
    {%- endif %}
{%- endfor %}
"""

HERMES = """{%- macro to_python(spec) %}
{%- set basic = {"string": "str", "number": "float", "integer": "int", "boolean": "bool"} %}
{%- if basic[spec.type] is defined %}
    {{- basic[spec.type] }}
{%- elif spec.type == "array" %}
    {{- "list[" + to_python(spec|items|selectattr(0, "equalto", "items")|map(attribute=1)|first) + "]" }}
{%- elif spec.type is iterable and spec.type is not string %}
    {{- "Union[" }}
    {%- for t in spec.type %}
        {{- to_python({"type": t}) }}
        {%- if not loop.last %}{{- "," }}{%- endif %}
    {%- endfor %}
    {{- "]" }}
{%- else %}
    {{- "Any" }}
{%- endif %}
{%- endmacro %}
{{- bos_token }}
{{- "<|im_start|>system\\n" }}
{%- for tool in tools or [] %}
    {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
    {{- '{"name": "' + tool.name + '", "description": "' + tool.name + '(' }}
    {%- for name, spec in tool.parameters.properties|items %}
        {{- name + ": " + to_python(spec) }}
        {%- if not loop.last %}{{- ", " }}{%- endif %}
    {%- endfor %}
    {{- ")" }}
    {%- if tool.return is defined %}{{- " -> " + to_python(tool.return) }}{%- endif %}
    {{- " - " + tool.description + '"' }}
    {{- ', "parameters": ' }}
    {%- if tool.parameters.properties | length == 0 %}{{- "{}" }}{%- else %}{{- tool.parameters|tojson }}{%- endif %}
    {{- "}" }}
    {%- if not loop.last %}{{- "\\n" }}{%- endif %}
{%- endfor %}
{{- "<|im_end|>\\n" }}
{%- for message in messages %}
    {%- if message.role == "user" or message.role == "system" or (message.role == "assistant" and message.tool_calls is not defined) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- for tool_call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' }}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '{"name": "' + tool_call.name + '", ' }}
            {%- for k, v in tool_call.arguments | dictsort %}
                {{- k | tojson + ': ' + v | tojson }}
                {%- if not loop.last %}{{- ', ' }}{%- endif %}
            {%- endfor %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>tool\\n' }}{%- endif %}
        {{- '<tool_response>\\n' + message.content }}
        {%- if not loop.last %}{{- '\\n</tool_response>\\n' }}{%- else %}{{- '\\n</tool_response>' }}{%- endif %}
        {%- if not loop.last and loop.nextitem.role != "tool" %}{{- '<|im_end|>' }}{%- elif loop.last %}{{- '<|im_end|>' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

COMMAND_TURNS = """{%- for message in loop_messages %}
{%- if message['role'] == 'system' %}{{ '<|SYS|>' ~ message['content'].strip() ~ '<|END|>' }}
{%- elif message['role'] == 'user' %}{{ '<|USER|>' ~ message['content'].strip() ~ '<|END|>' }}
{%- elif message['role'] == 'assistant' %}{{ '<|BOT|>' ~ (message['content'] or '').strip() ~ '<|END|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|BOT|>' }}{%- endif %}"""
COMMAND_START = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% elif false == true %}{% set loop_messages = messages %}{% set system_message = 'x' %}{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% if system_message != false %}{{ '<|SYS|>' + system_message + '<|END|>' }}{% endif %}"""
COMMAND_TOOLS = """{%- macro typed(kind) -%}
{%- if kind in ['string', 'str'] -%}str{%- elif kind in ['integer'] -%}int{%- elif kind is string -%}{{ kind | title }}{%- else -%}object{%- endif -%}
{%- endmacro -%}
{%- macro signature(parameters) -%}
{% for name, value in parameters.items() %}{{ name }}: {{ typed(value.type) }}{% if not loop.last %}, {% endif %}{% endfor %}
{%- endmacro -%}
{{ '## Tools\\n' }}
{% for tool in tools %}
{% set f = tool.function if tool.function is defined else tool %}
```python
def {{ f.name }}({{ signature(f.parameters.properties) }}):
    {{ '"' * 3 }}{{ f.description | replace('\\n', ' ') | wordwrap(40) | indent(4) }}{{ '"' * 3 }}
```
{% endfor %}
"""
COMMAND = {
    "default": COMMAND_START + COMMAND_TURNS,
    "tool_use": COMMAND_START + COMMAND_TOOLS + COMMAND_TURNS,
    "rag": COMMAND_START
    + "{% for d in documents %}{{ loop.index0 }} {{ d.title | upper }}{% endfor %}"
    + COMMAND_TURNS,
}

OLMO = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + '
' }}
{%- elif message['role'] == 'user' -%}
{{ '<|user|>
' + message['content'] + '
' }}
{%- elif message['role'] == 'assistant' -%}
{% if not loop.last %}
{{ '<|assistant|>
'  + message['content'] + eos_token + '
' }}
{% else %}
{{ '<|assistant|>
'  + message['content'] + eos_token }}
{% endif %}
{%- endif -%}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>
' }}
{%- endif %}
{% endfor %}"""

GENERATION = """{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant'] %}{% continue %}{% endif %}
    {%- if loop.index > 12 %}{% break %}{% endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content }}
            {%- set inside = message.content | default('', true) | length %}
            {%- if inside > 3 %}{{- '<' ~ inside ~ '>' }}{% endif %}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- (message.name ~ ': ') if message.name is defined and message.name else '' }}
        {{- message.content }}{{ '<|im_end|>' }}
    {%- endif %}
    {{- inside | default('none') }}{{ '\\n' }}
{%- else %}{{ 'nothing' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

PARTS = """<start>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

DUMP = """{{- bos_token }}{{ unk_token }}{{ pad_token }}{{ sep_token }}{{ cls_token is defined }}{{ tools is none }}{{ documents is none }}
{{ messages | tojson(indent=2) }}
{{ messages | tojson(ensure_ascii=true, sort_keys=true) }}
{{ messages | map(attribute='role') | unique | list | tojson(separators=(',', ':')) }}
{{ {'tools': tools, 'documents': documents, 'n': 1.5, 'big': 12345678901234567890, 'html': "<a href='x'>&"} | tojson }}
{%- for message in messages | rejectattr('role', 'in', ['tool', 'function']) %}
{{ loop.index }}/{{ loop.length }} {{ loop.cycle('odd', 'even') }} {{ message.content | string | length }}
{%- if loop.changed(message.role) %} new{% endif %}
{%- endfor %}
{%- for role, group in messages | groupby('role') %}
{{ '%s has %d' | format(role, group | length) }}
{%- endfor %}
{{ '{0:>8}|{1}'.format('x', messages | length) }}"""

MIXED = """{%- macro turn(role, closed=true) -%}
{{ '[' ~ role ~ ']' }}{{ caller() }}{{ '[/' ~ role ~ ']' if closed else '' }}
{%- endmacro -%}
{%- set names = {'developer': 'operator', 'system': 'operator', 'function': 'tool'} -%}
{%- set rules -%}
{% filter trim | upper %} rules of {{ bos_token }}{{ eos_token }}{{ mask_token }} {% endfilter %}
{%- endset -%}
{{ rules }}
{%- set state = namespace(turns=0, seen=[]) -%}
{%- for message in messages -%}
    {%- if message.role is not string -%}{{ raise_exception('no role') }}{%- endif -%}
    {%- set role = names.get(message.role, message.role) -%}
    {%- set state.turns = state.turns + 1 -%}
    {%- set state.seen = state.seen + [role] -%}
    {%- if message.content == none or message.content is undefined -%}
        {%- call turn(role) -%}(nothing){%- endcall -%}
    {%- elif message.content is string -%}
        {%- call turn(role, closed=not loop.last) -%}{{ message.content | trim }}{%- endcall -%}
    {%- else -%}
        {%- call turn(role) -%}{{ message.content | map(attribute='text') | join }}{%- endcall -%}
    {%- endif -%}
    {%- for call in message.tool_calls | default([], true) -%}
        {{ '{' ~ call.function.name ~ ' ' ~ call.function.arguments ~ '}' }}
    {%- endfor -%}
    {%- if message.reasoning_content is defined -%}{{ '(' ~ message.reasoning_content[:20] ~ ')' }}{%- endif -%}
{%- endfor -%}
{{ state.turns }} {{ state.seen | join(',') | replace('user', 'u') }} {{ style | default('plain') }}
{%- if 'operator' not in state.seen and strict is defined and strict -%}{{ raise_exception('an operator must speak') }}{%- endif -%}
{%- if add_generation_prompt %}[assistant]{% endif -%}"""

CASES = (
    Case("llama", LLAMA, arguments_as_object=True, variables={"day": ("2 Mai 2026",), "place_of_tools": ("system",)}),
    Case("vision", VISION, takes="both"),
    Case("guard", GUARD, takes="parts", variables={"categories": ({"X": "Rudeness"}, None, {})}),
    Case("qwen2", QWEN2, arguments_as_object=True, tokens={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    Case("qwen3", QWEN3, variables={"enable_thinking": (True, False)}),
    Case("mistral", MISTRAL, arguments_as_object=True),
    Case("mistral-small", MISTRAL_SMALL, takes={"user": "both", "system": "text", "assistant": "text"}),
    Case("gemma", GEMMA),
    Case("gemma3", GEMMA3, takes={"user": "both", "system": "text", "assistant": "both"}),
    Case("phi3", PHI3),
    Case("phi4", PHI4, tokens={"eos_token": "<|endoftext|>"}),
    Case("deepseek", DEEPSEEK, null=True),
    Case("granite", GRANITE, variables={"thinking": (True,), "controls": ({"length": "long"}, ["citations"], {})}),
    Case("hermes", HERMES, arguments_as_object=True),
    Case("command", COMMAND),
    Case("olmo", OLMO),
    Case("generation", GENERATION, tokens={}),
    Case("parts", PARTS, takes="parts"),
    Case("dump", DUMP, arguments_as_object=True, tokens={"bos_token": "<s>", "sep_token": "[SEP]"}),
    Case(
        "mixed", MIXED, takes="both", null=True, developer=True, variables={"style": ("bold",), "strict": (True, False)}
    ),
)
