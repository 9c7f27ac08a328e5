"""The tables in the package are those that the script makes of the measurements."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

SHARED = ROOT.parent / "shared"
DATA = ROOT / "nexusengine" / "profiles" / "data"


@pytest.mark.skipif(not (SHARED / "gpu_profiles").exists(), reason="../shared/gpu_profiles is not here")
def test_the_shipped_tables_are_what_the_script_makes(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "build_profiles.py"
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    made = {p.name for p in tmp_path.iterdir()}
    assert made | {"NOTICE"} == {p.name for p in DATA.iterdir()}
    for name in made:
        if name.endswith(".npz"):
            ours, theirs = (np.load(folder / name, allow_pickle=False) for folder in (DATA, tmp_path))
            assert set(ours.files) == set(theirs.files), name
            for key in ours.files:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-6), (name, key)
    ours_index, made_index = (json.loads((folder / "index.json").read_text()) for folder in (DATA, tmp_path))
    assert ours_index["noise"].keys() == made_index["noise"].keys()
    for ours_entry, made_entry in zip(ours_index["profiles"], made_index["profiles"], strict=True):
        assert ours_entry.pop("weights_s", []) == pytest.approx(made_entry.pop("weights_s", []), rel=1e-3)
        assert ours_entry == made_entry


def test_the_tables_are_small_and_come_with_licences() -> None:
    files = list(DATA.iterdir())
    assert sum(f.stat().st_size for f in files) < 3_000_000
    notice = (DATA / "NOTICE").read_text()
    for licence in ("LICENSE.llmservingsim", "LICENSE.aiconfigurator"):
        assert (DATA / licence).stat().st_size > 500
        assert licence in notice


def test_the_tables_are_part_of_the_package() -> None:
    assert '"profiles/data/*"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.skipif(not (SHARED / "gpu_profiles").exists(), reason="../shared/gpu_profiles is not here")
def test_unequal_contexts_cost_what_was_measured_where_its_authors_apply_it() -> None:
    for name in (path.stem for path in DATA.glob("*.npz")):
        tables = np.load(DATA / f"{name}.npz", allow_pickle=False)
        if "skew_alpha" in tables.files:  # meta.yaml of the RTX 4090 says skew_fit: enabled: false
            assert tables["skew_alpha"].any() == (name != "rtx4090_llama-3.1-8b"), name
