"""What a hostile template, or hostile messages, can do to the process that renders: nothing that lasts."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from nexusengine.errors import InternalError, InvalidRequest, ModelLoadError
from nexusengine.templates import pool as pool_module
from nexusengine.templates.pool import PROCESSES, LimitMet, RenderPool
from nexusengine.templates.render_process import MEMORY_LIMIT_BYTES, OUTPUT_LIMIT
from nexusengine.tokenize.chat_template import ChatTemplate

pytestmark = pytest.mark.slow

USER = [{"role": "user", "content": "x"}]
MEMORY = "needed more than 512 MiB"
TIME = "took more than"
GROWING = (
    "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(64) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}"
)
HOSTILE = {
    "a nested loop": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "a loop of macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        TIME,
    ),
    "numbers that square": (
        "{% set ns = namespace(n=7) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}{{ ns.n }}",
        f"{TIME}|{MEMORY}",
    ),
    "a tower of powers": ("{{ 9 ** (9 ** 9) }}", f"{TIME}|{MEMORY}"),
    "much filler text": ("{{ lipsum(n=10**7) | length }}", TIME),
    "a wide indent": ("{{ 'x' | indent(10**9, first=True) }}", MEMORY),
    "a long repetition": ("{{ 'x' * 10**10 }}", MEMORY),
    "a long list": ("{{ ([0] * 10**10) | length }}", MEMORY),
    "a wide format": ("{{ '%1000000000d' % 1 }}", MEMORY),
    "a wide format method": ("{{ '{:>1000000000}'.format(1) }}", MEMORY),
    "a wide center": ("{{ 'x' | center(10**10) }}", MEMORY),
    "a wide ljust": ("{{ 'x'.ljust(10**10) }}", MEMORY),
    "a wide indent of JSON": ("{{ messages | tojson(indent=10**10) }}", MEMORY),
    "a text that doubles": (GROWING, MEMORY),
    "a list that doubles": (
        "{% set ns = namespace(l=[1, 2]) %}{% for i in range(64) %}{% set ns.l = ns.l + ns.l %}{% endfor %}",
        MEMORY,
    ),
    "much output": ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", f"wrote more than {OUTPUT_LIMIT}"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    "a macro without end": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
}


@pytest.fixture(scope="module")
def pool() -> RenderPool:
    return RenderPool()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_with_the_limit_that_it_met(name: str, pool: RenderPool) -> None:
    source, words = HOSTILE[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InvalidRequest, match=f"the chat template refuses these messages: .*({words})") as caught:
        pool.render(source, {}, USER)
    assert caught.value.param == "messages"
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 64 * 2**20
    assert pool.render("{{ messages[0].content }}", {}, USER) == "x"


def test_what_renders_a_hostile_template_stays_within_its_memory() -> None:
    """In a process of its own, which has no other children whose memory would be counted."""
    program = f"""
import resource
from nexusengine.errors import InvalidRequest
from nexusengine.templates.pool import RenderPool
for source in {[source for source, words in HOSTILE.values() if words == MEMORY]!r}:
    try:
        RenderPool().render(source, {{}}, {USER!r})
    except InvalidRequest:
        print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    peaks_bytes = [int(line) * 1024 for line in said.stdout.split()]
    assert len(peaks_bytes) > 5
    assert max(peaks_bytes) < MEMORY_LIMIT_BYTES


@pytest.mark.parametrize("costly", ["'x' * 10**10", "9 ** (9 ** 9)", "'x' | indent(10**9, first=True)"])
def test_loading_a_template_computes_nothing_of_it_nor_does_a_branch_that_is_not_taken(costly: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    template = ChatTemplate(f"{{% if false %}}{{{{ {costly} }}}}{{% endif %}}{{{{ messages[0].content }}}}", {}, "m")
    assert template.render(USER) == "x"
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * 2**20


def test_a_template_nested_too_deeply_is_refused_at_load() -> None:
    with pytest.raises(ModelLoadError, match="nested too deeply"):
        ChatTemplate("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", {}, "m")


def test_a_template_that_always_meets_a_limit_is_not_tried_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def limit(self: RenderPool, source: str, variables: Any, messages: Any) -> str:
        asked.append(source)
        raise LimitMet("it took more than 5 s", param="messages")

    monkeypatch.setattr(RenderPool, "render", limit)
    template = ChatTemplate("a", {}, "m")
    for _ in range(2):
        with pytest.raises(LimitMet):
            template.render(USER)
    assert len(asked) == 3


def test_long_messages_come_through_whole() -> None:
    text = "x" * 8_000_000 + "🦙"
    template = ChatTemplate("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}", {}, "m")
    assert template.render([{"role": "user", "content": text}]) == f"<{text}>"


@pytest.mark.parametrize("value", ["\ud800", "a\x00b", 10**400, -(2**70), 1e308, float("inf"), (1, 2), "\U000f0000"])
def test_any_value_that_python_holds_reaches_the_template(value: Any) -> None:
    template = ChatTemplate("{{ messages[0].x }}{{ value }}", {}, "m")
    assert template.render([{"role": "user", "content": "", "x": value}], value=value) == f"{value}{value}"


def nested(depth: int) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (nested(100_000), r"messages\.0 is nested too deeply"),
        ([1] * 100_001, r"messages\.0 holds more than 100000 values"),
        ({str(i): i for i in range(60_000)}, "holds more than 100000 values"),
    ],
)
def test_messages_with_senseless_structure_are_refused(extra: Any, words: str) -> None:
    template = ChatTemplate("{{ messages[0].content }}", {}, "m")
    with pytest.raises(InvalidRequest, match=words):
        template.render([{"role": "user", "content": "", "x": extra}])
    with pytest.raises(InvalidRequest, match=r"chat_template_kwargs"):
        template.render(USER, x=extra)


@pytest.mark.parametrize("depth", [150, 400, 800])
def test_deep_messages_are_rendered_or_refused_but_never_break_anything(depth: int) -> None:
    template = ChatTemplate("{{ messages | tojson }}", {}, "m")
    message = {"role": "user", "content": "", "x": nested(depth)}
    try:
        outcome = f"{template.render([message]).count('[')} brackets"
    except InvalidRequest as error:
        outcome = error.message
    assert outcome == f"{depth + 1} brackets" or "recursion" in outcome or "nested too deeply" in outcome
    assert ChatTemplate("{{ messages[0].content }}", {}, "m").render(USER) == "x"


def children() -> list[psutil.Process]:
    return [c for c in psutil.Process().children() if "nexusengine.templates.render_process" in c.cmdline()]


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=10)[1]


def test_a_process_that_dies_while_it_is_idle_is_replaced() -> None:
    pool, before = RenderPool(), children()
    for _ in range(3):
        assert pool.render("a", {}, USER) == "a"
        (mine,) = (c for c in children() if c not in before)
        mine.kill()


def test_a_rendering_that_ends_its_process_is_refused() -> None:
    pool, before = RenderPool(), {c.pid for c in children()}
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(pool.render, HOSTILE["a nested loop"][0], {}, USER)
        while not (mine := [c for c in children() if c.pid not in before]):
            time.sleep(0.01)
        mine[0].kill()
        with pytest.raises(LimitMet, match="ended the process"):
            asked.result()
    assert pool.render("a", {}, USER) == "a"


def test_many_threads_share_a_few_processes() -> None:
    pool, before = RenderPool(), children()
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with ThreadPoolExecutor(16) as threads:
        texts = list(threads.map(lambda i: pool.render(source, {}, [{"content": str(i)}]), range(400)))
    assert texts == [str(i) for i in range(400)]
    assert len([c for c in children() if c not in before]) <= PROCESSES


def test_the_processes_end_with_their_template() -> None:
    before = {c.pid for c in children()}
    template = ChatTemplate("a", {}, "m")
    assert template.render(USER) == "a"
    mine = [c for c in children() if c.pid not in before]
    assert mine
    template.close()
    assert gone(mine)
    assert template.render(USER) == "a"
    mine = [c for c in children() if c.pid not in before]
    del template
    gc.collect()
    assert gone(mine)


def test_a_process_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, before = RenderPool(), children()
    pool.render("a", {}, USER)
    monkeypatch.setattr(pool_module, "_GIVE_UP_S", 0.5)
    (mine,) = (c for c in children() if c not in before)
    mine.suspend()
    with pytest.raises(LimitMet, match="took more than"):
        pool.render("a", {}, USER)
    assert gone([mine])


def test_the_processes_end_with_a_parent_that_is_killed() -> None:
    code = (
        "import psutil\n"
        "from nexusengine.templates.pool import RenderPool\n"
        "pool = RenderPool(); pool.render('a', {}, [])\n"
        "print(psutil.Process().children()[0].pid, flush=True); input()\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        rendering = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert gone([rendering])


def test_a_forked_child_starts_a_process_of_its_own() -> None:
    pool = RenderPool()
    pool.render("a", {}, USER)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if pool.render("b", {}, USER) == "b" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert pool.render("c", {}, USER) == "c"


def test_a_template_sees_no_secrets_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEXUSENGINE_API_KEY", "secret")
    pool, before = RenderPool(), children()
    pool.render("a", {}, USER)
    (mine,) = (c for c in children() if c not in before)
    assert "NEXUSENGINE_API_KEY" not in mine.environ()


def test_a_process_that_cannot_be_started_is_said_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(InternalError, match="the process that renders chat templates cannot be started"):
        RenderPool().render("a", {}, USER)
