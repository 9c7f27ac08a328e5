"""Which promise a request asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nexusengine import SLO
from nexusengine.errors import ConfigError, InvalidRequest
from nexusengine.slo.classes import CLASSES, SLOClass
from nexusengine.slo.resolve import SLOClasses

CONFIGURED = SLOClasses.configured()
INTERACTIVE, STANDARD = CLASSES["interactive"], CLASSES["standard"]


def wanted(body: Any = None, classes: SLOClasses = CONFIGURED, **headers: str) -> SLOClass | None:
    return classes.wanted(body, {name.replace("_", "-"): [value] for name, value in headers.items()})


def test_who_asks_for_nothing_gets_the_default_class() -> None:
    assert wanted() == STANDARD
    assert wanted(classes=SLOClasses.configured(default="batch")) == CLASSES["batch"]
    assert wanted(classes=SLOClasses.configured(default="none")) is None


def test_the_body_outweighs_the_headers_which_outweigh_the_default() -> None:
    assert wanted("interactive", x_slo_class="batch", x_slo_ttft_ms="5") == INTERACTIVE
    assert wanted({"class": "interactive"}, x_slo_class="batch") == INTERACTIVE
    assert wanted(None, x_slo_class="interactive") == INTERACTIVE


def test_bounds_in_numbers_replace_those_of_the_class_and_the_rest_stays() -> None:
    assert wanted({"class": "interactive", "tpot_ms": 20}) == SLOClass("custom", 0.5, 0.02, 0.001, patience=1.5)
    assert wanted({"class": "interactive", "ttft_ms": 900, "e2e_ms": 5000}) == SLOClass(
        "custom", 0.9, 0.05, 0.0, 5.0, 1.5
    )
    assert wanted(None, x_slo_class="batch", x_slo_tpot_ms="70.5") == SLOClass(
        "custom", 30.0, 0.0705, 0.004, patience=1.5
    )
    assert wanted({"ttft_ms": 100}) == SLOClass("custom", 0.1, 0.1, patience=1.5)  # the rest from the default class


def test_how_long_a_request_may_wait_is_asked_for_like_a_bound() -> None:
    assert wanted({"class": "batch", "patience": 3}) == SLOClass("custom", 30.0, 0.5, 0.004, patience=3.0)
    assert wanted(None, x_slo_class="batch", x_slo_patience="1") == SLOClass("custom", 30.0, 0.5, 0.004, patience=1.0)
    with pytest.raises(InvalidRequest, match=r"slo\.patience must be between 1 and 1000 TTFTs, got 0\.5"):
        wanted({"class": "batch", "patience": 0.5})
    with pytest.raises(InvalidRequest, match="x-slo-patience must be a number of TTFTs, got 'long'"):
        wanted(None, x_slo_patience="long")
    assert wanted({"class": "none", "ttft_ms": 100, "tpot_ms": 9}) == SLOClass("custom", 0.1, 0.009)


def test_none_is_no_promise_and_a_bound_in_null_is_no_bound() -> None:
    assert wanted("none") is None
    assert wanted(None, x_slo_class="none") is None
    assert wanted({"class": "none"}) is None
    assert wanted({"class": "batch", "ttft_ms": None}) == CLASSES["batch"]
    assert wanted({"class": "none", "ttft_ms": 100, "tpot_ms": 9}) == SLOClass("custom", 0.1, 0.009)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x_slo_class", "fast"),
        ("x_slo_class", ""),
        ("x_slo_ttft_ms", "nan"),
        ("x_slo_ttft_ms", "-1"),
        ("x_slo_ttft_ms", "0"),
        ("x_slo_ttft_ms", "inf"),
        ("x_slo_ttft_ms", "1e300"),
        ("x_slo_tpot_ms", "fast"),
        ("x_slo_tpot_ms", ""),
        ("x_slo_e2e_ms", "1,5"),
    ],
)
def test_a_wrong_header_is_named_even_where_the_body_outweighs_it(header: str, value: str) -> None:
    for body in (None, "batch"):
        with pytest.raises(InvalidRequest) as caught:
            wanted(body, CONFIGURED, **{header: value})
        assert caught.value.param == header.replace("_", "-")
        assert header.replace("_", "-") in caught.value.message


def test_a_header_given_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="x-slo-class is there 2 times"):
        CONFIGURED.wanted(None, {"x-slo-class": ["batch", "batch"]})


def test_a_bound_in_a_header_without_a_class_to_complete_it_names_the_missing_header() -> None:
    with pytest.raises(InvalidRequest) as caught:
        wanted(None, SLOClasses.configured(default="none"), x_slo_ttft_ms="100")
    assert caught.value.param == "x-slo-tpot-ms"


def test_classes_come_from_a_file_and_standard_is_the_default_only_if_it_is_there(tmp_path: Path) -> None:
    file = tmp_path / "slo.toml"
    file.write_text("[gold]\nttft_s = 0.2\ntpot_s = 0.02\n")
    classes = SLOClasses.configured(str(file))
    assert (list(classes.by_name), classes.default) == (["gold"], None)
    assert wanted("gold", classes) == SLOClass("gold", 0.2, 0.02)
    with pytest.raises(InvalidRequest, match="unknown class 'batch'; known: gold, none"):
        wanted("batch", classes)
    file.write_text("[standard]\nttft_s = 9\ntpot_s = 9\n")
    assert wanted(None, SLOClasses.configured(str(file))) == SLOClass("standard", 9.0, 9.0)


@pytest.mark.parametrize("name", ["none", "custom", '"a\\nb"', '"' + "x" * 65 + '"'])
def test_a_class_cannot_have_a_name_that_means_something_else_or_cannot_be_shown(tmp_path: Path, name: str) -> None:
    file = tmp_path / "slo.toml"
    file.write_text(f"[{name}]\nttft_s = 1\ntpot_s = 1\n")
    with pytest.raises(ConfigError, match="cannot be the name"):
        SLOClasses.configured(file)


def test_the_number_of_classes_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "slo.toml"
    file.write_text("".join(f"[c{i}]\nttft_s = 1\ntpot_s = 1\n" for i in range(33)))
    with pytest.raises(ConfigError, match="33 classes"):
        SLOClasses.configured(file)


def test_a_default_that_does_not_exist_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"'gold' is none of interactive, standard, batch, none"):
        SLOClasses.configured(default="gold")


def test_python_takes_an_slo_a_class_by_name_or_nothing() -> None:
    assert CONFIGURED.in_python(SLO(1.0, 0.1)) == SLOClass("custom", 1.0, 0.1)
    assert CONFIGURED.in_python("batch") == CLASSES["batch"]
    assert CONFIGURED.in_python(None) is None
    for wrong in ("fast", 5, {"ttft_ms": 5}):
        with pytest.raises(InvalidRequest) as caught:
            CONFIGURED.in_python(wrong)  # type: ignore[arg-type]
        assert caught.value.param == "slo"
