"""Chat templates against transformers' own rendering: special tokens, forms of content, null, tools, filters."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from nexusengine.errors import InvalidRequest, ModelLoadError
from nexusengine.tokenize.chat_template import ChatTemplate, check_template_variables

USER: list[dict[str, Any]] = [{"role": "user", "content": "Grüße 🦙"}]
CALL: dict[str, Any] = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Zürich"}'}}


def theirs(source: str, messages: list[Any], **more: Any) -> str:
    options = {"add_generation_prompt": True, **more}
    rendered = render_jinja_template([messages], chat_template=source, **options)[0]
    return str(rendered[0])


def text_parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "source",
    [
        "{{ tools is none }} {{ documents is none }} {{ tools is defined }} {{ nothing is defined }}",
        "{% if tools is not none %}{{ tools | tojson }}{% endif %}no tools",
        "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ pad_token is defined }}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{%- for m in messages -%}{%- generation -%} {{ m.content }} {%- endgeneration -%}{%- endfor -%}",
        "{{ messages | tojson }}",
        "{{ messages | tojson(ensure_ascii=True) }}",
        "{{ messages | tojson(indent=2) }}",
        "{{ messages | tojson(indent='\t', sort_keys=true) }}",
        "{{ {'b': '<&>', 'a': messages[0].content} | tojson(separators=(',', ':'), sort_keys=True) }}",
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i > 4 %}{% break %}{% endif %}{{ i }}"
        "{% endfor %}",
        "{% set ns = namespace(a=1, self=2) %}{% set ns.b = ns.a + ns.self %}{{ ns.b }}",
        "{{ dict(a=1) | tojson }}{{ dict.fromkeys(['x']) | tojson }}",
        "{{ strftime_now('%d %b %Y') }}",
        "  {% if true %}\n  a\n  {% endif %}\n b",
        "{% macro f(m) %}[{{ m.content | trim }}]{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}",
    ],
)
def test_a_template_writes_what_it_writes_in_transformers(source: str) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = ChatTemplate(source, {**tokens, "pad_token": None}, "m").render(USER)
    assert ours == theirs(source, USER, **tokens)


def test_a_special_token_that_is_null_is_undefined_and_prints_nothing() -> None:
    template = ChatTemplate("{{ bos_token }}{{ unk_token }}{{ bos_token is defined }}", {"bos_token": None}, "m")
    assert template.render(USER) == "False"


def test_tools_and_documents_reach_the_template_and_must_be_objects() -> None:
    template = ChatTemplate("{{ tools | tojson }}{{ documents | tojson }}", {}, "m")
    assert template.render(USER, tools=[{"a": 1}], documents=[{"b": 2}]) == '[{"a": 1}][{"b": 2}]'
    for name in ("tools", "documents"):
        with pytest.raises(InvalidRequest, match=f"{name} must be a list of objects") as caught:
            template.render(USER, **{name: [1]})  # type: ignore[arg-type]
        assert caught.value.param == name


def test_the_tool_use_template_is_taken_where_there_are_tools() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools", "rag": "rag"}, {}, "m")
    assert (template.render(USER), template.render(USER, tools=[{}])) == ("plain", "tools")
    with pytest.raises(ModelLoadError, match="rag, tool_use, but none called default"):
        ChatTemplate({"tool_use": "x", "rag": "y"}, {}, "m")


PARTS_ONLY = [
    "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'text' %}{{ p['text'] | trim }}{% endif %}"
    "{% endfor %}{% endfor %}",
    "{% for m in messages %}{% set c = m.get('content') %}{% for p in c %}{{ p.text }}{% endfor %}{% endfor %}",
    "{% macro show(x) %}{% for p in x %}{{ p.text }}{% endfor %}{% endmacro %}{% for m in messages %}"
    "{{ show(m.content) }}{% endfor %}",
    "{% for m in messages %}{{ m.content | map(attribute='text') | join }}{% endfor %}",
    "{% for m in messages[0:] %}{% for p in m.content | selectattr('type', 'equalto', 'text') %}{{ p.text }}"
    "{% endfor %}{% endfor %}",
    "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    "{% for m in messages[1:] %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}",
]


@pytest.mark.parametrize("source", PARTS_ONLY)
def test_a_template_that_wants_parts_gets_parts_and_loses_no_text(source: str) -> None:
    template = ChatTemplate(source, {}, "m")
    before = [{"role": "system", "content": "S"}] if "system first" in source else []
    assert template.render([*before, {"role": "user", "content": "hello"}]) == "hello"
    assert (
        template.render([*before, {"role": "user", "content": text_parts("one ", "two")}]).replace(" ", "") == "onetwo"
    )


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ '' + m.content | trim }}{% endfor %}",
        "{% for m in messages %}{% for c in m.content %}{{ c }}{% endfor %}{% endfor %}",
        "{% for m in messages %}{% set content = m.content.split('|') %}{% for c in content %}{{ c }}{% endfor %}"
        "{% endfor %}",
        "{% for m in messages %}{{ m.content | tojson }}{% endfor %}",
    ],
)
def test_a_template_that_wants_a_string_gets_a_string(source: str) -> None:
    template = ChatTemplate(source, {}, "m")
    for content in ("onetwo", text_parts("one", "two")):
        assert template.render([{"role": "user", "content": content}]).strip('"') == "onetwo"
    assert template.render([{"role": "user", "content": []}]).strip('"') == ""


def test_a_template_that_takes_both_gets_what_was_given_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}{% if m.content is string %}S:{{ m.content }}{% else %}"
        "{% for p in m.content %}P:{{ p.text }}{% endfor %}{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, {}, "m")
    for content in ("a", text_parts("a", "b"), ""):
        messages = [{"role": "user", "content": content}]
        assert template.render(messages) == theirs(source, messages)


def test_a_template_that_reads_the_first_part_only_gets_one_part() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", {}, "m")
    assert template.render([{"role": "user", "content": text_parts("a", "b")}]) == "ab"


def test_the_form_of_content_is_found_out_for_each_role() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{% for p in m.content %}{{ p.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %};{% endfor %}"
    )
    messages = [{"role": r, "content": c} for r in ("system", "user", "assistant") for c in ("x", text_parts("y"))]
    assert ChatTemplate(source, {}, "m").render(messages) == "x;y;" * 3


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, r"messages\.0\.content\.1 is of type 'image_url'"),
        ({"type": "input_audio", "input_audio": {}}, "of type 'input_audio'; only text parts are supported"),
        ({"type": "text"}, 'must be {"type": "text", "text": "..."}'),
        ({"type": "text", "text": 5}, "only text parts"),
        ({"type": "refusal", "refusal": None}, "only text parts"),
        ("bare", "got 'bare'"),
        ({"type": []}, "only text parts"),
    ],
)
def test_a_part_that_is_not_text_is_refused_by_its_name(part: Any, words: str) -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "m")
    with pytest.raises(InvalidRequest, match=words):
        template.render([{"role": "user", "content": [*text_parts("a"), part]}])


def test_a_refusal_of_an_assistant_is_its_text() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {}, "m")
    said = [{"type": "refusal", "refusal": "I will not."}]
    assert template.render([*USER, {"role": "assistant", "content": said}]).endswith("I will not.")


NULL = [*USER, {"role": "assistant", "content": None, "tool_calls": [CALL], "name": None}]


def test_a_content_of_null_stays_null_where_a_template_asks_for_it() -> None:
    for asked in ("m.content is none", "m['content'] == none", "none == m.get('content')", "m.content is not none"):
        source = f"{{% for m in messages %}}{{{{ {asked} }}}} {{% endfor %}}"
        assert ChatTemplate(source, {}, "m").render(NULL) == theirs(source, NULL), asked


def test_a_variable_may_have_any_name() -> None:
    names: dict[str, Any] = {"self": 1, "source": 2, "variables": 3, "chat": 4}
    template = ChatTemplate("{{ source }}{{ variables }}{{ chat }}", {}, "m")
    assert template.render(USER, **names) == "234"


def test_a_content_of_null_keeps_its_place_in_the_message() -> None:
    source = "{% for m in messages %}{{ m.content is none }}{{ m | tojson }}{% endfor %}"
    chat = [*USER, {"role": "assistant", "content": None, "name": "a"}]
    assert ChatTemplate(source, {}, "m").render(chat) == theirs(source, chat)


def test_a_null_is_never_printed_as_none() -> None:
    source = "{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}"
    assert ChatTemplate(source, {}, "m").render(NULL) == USER[0]["content"]


def test_an_empty_content_stays_an_empty_string() -> None:
    template = ChatTemplate("{% for m in messages %}{{ m.content is string and m.content == '' }}{% endfor %}", {}, "m")
    assert template.render([{"role": "user", "content": ""}]) == "True"


def test_json_text_becomes_an_object_only_for_a_template_that_needs_one() -> None:
    start = "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    end = "{% endfor %}{{ m.content }}{% endfor %}"
    as_json = ChatTemplate(start + "{{ c.function.arguments | tojson }}" + end, {}, "m")
    as_pairs = ChatTemplate(
        start + "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}" + end, {}, "m"
    )
    as_text = ChatTemplate(start + "{{ 'args ' + c.function.arguments }}" + end, {}, "m")
    chat = [*USER, {"role": "assistant", "content": "ok", "tool_calls": [CALL]}]
    assert as_json.render(chat) == 'Grüße 🦙{"city": "Zürich"}ok'
    assert as_pairs.render(chat) == "Grüße 🦙city=Zürichok"
    assert as_text.render(chat) == 'Grüße 🦙args {"city": "Zürich"}ok'
    wrong = {**CALL, "function": {"name": "f", "arguments": "{"}}
    with pytest.raises(InvalidRequest, match=r"messages\.1\.tool_calls\.0\.function\.arguments is not a JSON object"):
        as_json.render([*USER, {"role": "assistant", "content": "ok", "tool_calls": [wrong]}])


def test_a_developer_is_the_system_for_a_template_that_does_not_know_the_role() -> None:
    chat = [{"role": "developer", "content": "x"}, *USER]
    assert ChatTemplate("{{ messages[0].role }}", {}, "m").render(chat) == "system"
    knows = "{{ 'D' if messages[0].role == 'developer' else messages[0].role }}"
    assert ChatTemplate(knows, {}, "m").render(chat) == "D"


def test_reasoning_is_read_under_every_name_as_in_transformers() -> None:
    source = "{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}|{% endfor %}{{ messages | tojson }}"
    template = ChatTemplate(source, {}, "m")
    for name in ("reasoning_content", "thinking", "reasoning"):
        chat = [*USER, {"role": "assistant", "content": "x", name: "hm"}]
        assert template.render(chat) == theirs(source, chat)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_generation_prompt_is_added_unless_it_is_not_wanted_or_the_last_message_is_continued() -> None:
    template = ChatTemplate(CHATML, {}, "m")
    assert template.render(USER) == theirs(CHATML, USER)
    assert template.render(USER, add_generation_prompt=False) == theirs(CHATML, USER, add_generation_prompt=False)
    with pytest.raises(InvalidRequest, match="exclude each other"):
        template.render(USER, add_generation_prompt=True, continue_final_message=True)


@pytest.mark.parametrize("last", ["Sure,", "Sure, ", " \n Sure,\n", text_parts("Su", "re, ")])
@pytest.mark.parametrize("filters", ["", " | trim"])
def test_the_last_message_is_continued_as_in_transformers(last: Any, filters: str) -> None:
    source = CHATML.replace("m.content", f"(m.content{filters})")
    chat = [*USER, {"role": "assistant", "content": last}]
    joined = [*USER, {"role": "assistant", "content": last if isinstance(last, str) else "Sure, "}]
    expected = theirs(source, joined, add_generation_prompt=False, continue_final_message=True)
    assert ChatTemplate(source, {}, "m").render(chat, continue_final_message=True) == expected


@pytest.mark.parametrize(
    ("source", "last", "words"),
    [
        (CHATML, {"role": "assistant", "content": None, "tool_calls": []}, "has no content"),
        ("{{ messages[0].role }}", {"role": "assistant", "content": "x"}, "does not read the content"),
        ("{{ messages[0].content }}", {"role": "assistant", "content": "x"}, "leaves out the last message"),
        (PARTS_ONLY[0], {"role": "assistant", "content": []}, "has no text"),
    ],
)
def test_what_cannot_be_continued_is_refused(source: str, last: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(source, {}, "m").render([*USER, last], continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_further_variables_reach_the_template_and_come_before_special_tokens() -> None:
    source = "{{ bos_token }}{{ enable_thinking }}{{ limits.deep[1] }}"
    template = ChatTemplate(source, {"bos_token": "<s>"}, "m")
    more: dict[str, Any] = {"enable_thinking": False, "limits": {"deep": [1, 2]}, "bos_token": "B"}
    assert template.render(USER, **more) == theirs(source, USER, **more) == "BFalse2"
    for name in ("messages", "chat_template", "add_generation_prompt", "continue_final_message"):
        with pytest.raises(InvalidRequest, match=f"cannot hold '{name}'"):
            check_template_variables({name: 1})


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is empty"),
        ("x", "an object with role and content, got 'x'"),
        ([["x"]], r"messages\.0 must be an object"),
        ([{"role": "user", "content": 5}], r"messages\.0\.content must be a string or a list of parts, got 5"),
        ([{"role": "user", "content": {"type": "text"}}], "string or a list of parts"),
        ([{"role": "user", "content": "x", "when": datetime.date(2026, 1, 1)}], r"messages\.0 holds a date"),
    ],
)
def test_malformed_messages_are_named(messages: Any, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(CHATML, {}, "m").render(messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must\n alternate') }}", "roles must alternate"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a' + 1 }}", "str"),
        ("{{ [][1].x }}", "no element 1"),
        ("{{ messages | tojson(indent={}) }}", "."),
        ("{{ {}['x'].y }}", "."),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "_x"),
        ("{{ 'x'.encode('latin-9-x') }}", "encoding"),
    ],
)
def test_whatever_a_template_raises_refuses_the_messages_in_one_sentence(source: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"the chat template refuses these messages: .*{words}") as caught:
        ChatTemplate(source, {}, "m").render(USER)
    assert caught.value.param == "messages"
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("source", ["{% if %}", "{{ x | no_such_filter }}", "{% for %}", "{% nonsense %}", "{{ 'a"])
def test_a_template_that_is_not_jinja_fails_at_load(source: str) -> None:
    with pytest.raises(ModelLoadError, match="m: the chat template is not valid"):
        ChatTemplate(source, {}, "m")
    with pytest.raises(ModelLoadError, match="chat template 'rag' is not valid"):
        ChatTemplate({"default": "x", "rag": source}, {}, "m")
