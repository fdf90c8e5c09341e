"""The report: one file, from records only, nothing fetched, and no record can put markup into it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from bundle_fixtures import Ingredients, latency, retention, rung

from edgedistill.bundle.card import _retention as card_retention
from edgedistill.bundle.card import model_card
from edgedistill.bundle.check import verify_bundle
from edgedistill.bundle.files import read_manifest
from edgedistill.bundle.report import report
from edgedistill.cli.show import latency_text, retention_text
from edgedistill.errors import UserError
from edgedistill.records.artifact import Fallback, Sensitivity, SensitivityRow
from edgedistill.records.latency import Percentiles
from edgedistill.records.retention import Scored, TokenizerCheck
from edgedistill.report import plots
from edgedistill.report.html import interval, limits_of, number, plain, render, size
from edgedistill.report.plots import drift_svg, token_ms_svg, ttft_svg

VOID = {"meta", "br", "hr", "img", "link", "input"}
COSTS = Sensitivity(
    metric="nats", source="stories", examples=2947, documents=24, target=0.97, reached=0.9712, as_quantized=0.91,
    bytes_added=9000,
    rows=[
        SensitivityRow(
            group="layer 1 attention", type="Q4_0", cost=0.0123, cost_ci95=(0.011, 0.014), bytes_saved=12340,
            documents=12, effective_documents=9.5,
            chosen="Q8_0",
        )
    ],
)  # fmt: skip
EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory: pytest.TempPathFactory) -> Ingredients:
    return Ingredients(tmp_path_factory.mktemp("ingredients"))


@pytest.fixture(scope="module")
def made(ingredients: Ingredients, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ingredients.make(tmp_path_factory.mktemp("out") / "quickstart-jetson-orin-nano")


class Page(HTMLParser):
    """Tags, attributes and text; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data + " "


def page_of(made: Path, figures: object) -> Page:
    return Page(render(read_manifest(made), [figures]))  # type: ignore[list-item]


def assert_self_contained(html: str) -> Page:
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form"} & set(page.tags)
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name, value)
        assert name not in ("src", "srcset", "action"), (tag, name, value)
        if name in ("href", "xlink:href"):
            assert value.startswith("#"), (tag, name, value)
        assert not re.search(r"url\((?!#)", value), (tag, name, value)
    assert not re.search(r"@import|url\((?!#)|@font-face", html)
    return page


class TestReport:
    def test_same_as_in_the_bundle_and_beside_it(self, made: Path) -> None:
        out = report(made)
        assert out == made.parent / f"{made.name}.report.html"
        assert out.read_bytes() == (made / "reports/report.html").read_bytes()
        verify_bundle(made, replay=False)

    def test_self_contained(self, made: Path) -> None:
        page = assert_self_contained((made / "reports/report.html").read_text(encoding="utf-8"))
        assert page.tags["svg"] == 5

    def test_says_what_the_records_say(self, made: Path, ingredients: Ingredients) -> None:
        measured = latency(ingredients.artifact, ingredients.artifact_dir)
        decode, decode_ci95 = measured.decode_tokens_per_s, measured.decode_tokens_per_s_ci95
        page = Page((made / "reports/report.html").read_text(encoding="utf-8"))
        text = re.sub(r"\s+", " ", page.text)
        for needle in (
            "quickstart-jetson-orin-nano",
            "NVIDIA Jetson Orin Nano",
            "passed",
            "88.24 %",
            "23.12",
            "22.20–24.28",
            "0.8691–0.8929",
            "proxy , not on the target",
            f"{number(decode)} {interval(decode_ci95)} at most {number(measured.ceiling.value)}",
            "proxy, on a build server derived: ceiling of jetson-orin-nano",
            "p90 84.1, p99 –",
            "all 64 varied texts",
            "Q4_0 15",
            "edgedistill bundle verify quickstart-jetson-orin-nano",
            "sha256sum --check --strict SHA256SUMS",
            "big-llama (folder)",
            "Text in both parts 1 held-out documents whole; 7 share a run of 13 words",
            "not measured",
            "Drift 1.00",
        ):
            assert needle in text, needle

    def test_ids_are_unique_and_referred_to_rightly(self, made: Path) -> None:
        page = Page((made / "reports/report.html").read_text(encoding="utf-8"))
        ids = [value for _, name, value in page.attributes if name == "id"]
        assert [i for i, count in Counter(ids).items() if count > 1] == []
        for tag, name, value in page.attributes:
            if name == "aria-labelledby":
                assert value in ids
            for reference in re.findall(r"url\(#([^)]*)\)", value) + ([value[1:]] if name.endswith("href") else []):
                assert reference in ids, (tag, name, value)

    def test_plots_can_be_read_aloud(self, made: Path) -> None:
        html = (made / "reports/report.html").read_text(encoding="utf-8")
        svgs = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
        for svg in svgs:
            root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
            assert root.attrib["role"] == "img"
            assert root[0].tag == "title"
            assert "p50" in svg or "rung" in root[0].text or "quarter" in root[0].text
        assert "shipped 0.8824, 95 % 0.8691 to 0.8929. The gate is at 0.8" in html

    def test_what_each_layer_costs(self, ingredients: Ingredients, tmp_path: Path) -> None:
        artifact = ingredients.artifact.model_copy(update={"sensitivity": COSTS})
        made = ingredients.make(tmp_path / "quickstart-costs", artifacts=[ingredients.bundled(artifact=artifact)])
        text = re.sub(r"\s+", " ", Page((made / "reports/report.html").read_text(encoding="utf-8")).text)
        assert "What quantizing each layer costs" in text
        assert "Kept 0.9712 of the float model on the stories; asked: 0.97." in text
        assert "layer 1 attention 0.0123 0.0110–0.0140 12.34 kB Q4_0 Q8_0" in text

    def test_hostile_strings_stay_text(self, made: Path, ingredients: Ingredients) -> None:
        base, artifact = read_manifest(made), ingredients.artifact
        fallback = Fallback(tensor=EVIL, wanted=EVIL, got=EVIL, why=EVIL)
        assert base.teacher is not None
        changes = {
            "artifacts": [base.artifacts[0].model_copy(update={"fallbacks": [fallback]})],
            "tool_versions": {EVIL: EVIL},
            "teacher": base.teacher.model_copy(update={"origin": "hub", "name": EVIL}),
        }
        manifest = base.model_copy(update=changes)
        kept = retention(
            artifact,
            tokenizer=TokenizerCheck(texts=3, mismatches=1, first_mismatch=EVIL),
            rungs=[
                rung("teacher", 20.4, 20.4, "a" * 64, runtime=EVIL),
                rung("shipped", 23.12, 20.4, artifact.sha256, runtime=EVIL),
            ],
        )
        fast = latency(artifact, measured_on={"machine": EVIL, "cpu": EVIL, EVIL: EVIL}, notes=[EVIL])
        page = assert_self_contained(render(manifest, [(kept, fast)]))
        assert page.text.count(EVIL) >= 9
        assert "49" not in page.text.split(EVIL, 1)[1][:20]
        card = model_card(manifest, [(kept, fast)], [])
        assert "<script>" not in card
        assert "base_model" not in card

    def test_failed_gate_and_no_latency(self, made: Path, ingredients: Ingredients) -> None:
        failed = retention(ingredients.artifact, 0.9)
        page = page_of(made, (failed, None))
        assert "gate FAILED" in page.text
        assert "passed" not in page.text
        assert "This bundle holds no latency record" in page.text
        assert page.tags["svg"] == 2

    def test_two_bases_never_share_a_table(self, made: Path, ingredients: Ingredients) -> None:
        digest = ingredients.artifact.sha256
        rungs = [rung("teacher", 20.4, 20.4, digest), rung("shipped", 23.1, 20.4, digest, basis="emulated")]
        html = render(read_manifest(made), [(retention(ingredients.artifact, rungs=rungs), None)])
        tables = [t for t in re.findall(r"<table.*?</table>", html, flags=re.DOTALL) if "Retention ladder" in t]
        assert len(tables) == 2
        assert "emulated" in tables[1]
        assert "teacher" not in re.sub(r"<caption.*?</caption>", "", tables[1], flags=re.DOTALL)

    def test_two_artifacts(self, ingredients: Ingredients, tmp_path: Path) -> None:
        both = ingredients.make(tmp_path / "b", artifacts=[ingredients.bundled(), ingredients.exported("Q8_0")])
        page = assert_self_contained(report(both).read_text(encoding="utf-8"))
        assert page.tags["svg"] == 10
        ids = [value for _, name, value in page.attributes if name == "id"]
        assert len(ids) == len(set(ids))

    @pytest.mark.parametrize(
        ("path", "content", "needle"),
        [
            ("reports/retention.json", b"{}", "reports/retention.json"),
            ("reports/retention.json", None, "reports/retention.json"),
            ("reports/latency.json", b"\xff", "reports/latency.json"),
            ("manifest.json", b"[]", "manifest.json"),
            ("manifest.json", None, "manifest.json is missing"),
        ],
    )
    def test_broken_records(self, made: Path, tmp_path: Path, path: str, content: bytes | None, needle: str) -> None:
        copy = Path(shutil.copytree(made, tmp_path / "b"))
        (copy / path).unlink()
        if content is not None:
            (copy / path).write_bytes(content)
        with pytest.raises(UserError) as caught:
            report(copy)
        assert needle in caught.value.cause
        assert not (tmp_path / "b.report.html").exists()

    def test_out(self, made: Path, tmp_path: Path) -> None:
        assert report(made, tmp_path / "deep" / "r.html").is_file()
        with pytest.raises(UserError, match="is in the bundle"):
            report(made, made / "reports/report.html")
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="cannot be written"):
            report(made, tmp_path / "file" / "r.html")


class TestLimits:
    def rows(self, made: Path, **changes: object) -> dict[str, str]:
        artifact = read_manifest(made).artifacts[0]
        limits = {
            "max_artifact_bytes": 1_000_000,
            "max_memory_bytes": 10**9,
            "min_decode_tokens_per_s": 100,
            "max_ttft_ms": 50,
        }
        record = None
        if changes.pop("latency", True):
            from edgedistill.records.artifact import Artifact

            stub = Artifact.model_construct(sha256="0" * 64)
            record = latency(stub, **changes)
        return {row["label"]: row["verdict"] for row in limits_of(limits, artifact, record)}

    def test_speed_counts_only_where_it_was_measured(self, made: Path) -> None:
        assert self.rows(made, basis="measured") == {
            "Artifact size": "met",
            "Peak memory": "met",
            "Decode": "met",
            "First token, p50": "BROKEN",
        }
        for basis in ("proxy", "emulated"):
            found = self.rows(made, basis=basis)
            assert (found["Decode"], found["First token, p50"]) == ("not measured", "not measured")
            assert (found["Artifact size"], found["Peak memory"]) == ("met", "met")
        assert self.rows(made, latency=False)["Peak memory"] == "not measured"
        assert self.rows(made, peak_rss_bytes=2 * 10**9)["Peak memory"] == "BROKEN"


class TestPlots:
    def test_few_samples(self, ingredients: Ingredients) -> None:
        p = Percentiles(p50=1.0, p90=1.0, p99=None)
        few = latency(ingredients.artifact, samples={"token_ms": [1.0, 1.0], "ttft_ms": [3.0]}, token_ms=p, ttft_ms=p)
        assert "<svg" in token_ms_svg(few, "a")
        assert drift_svg(few, "b") == ""
        assert "<svg" in ttft_svg(few, "c")
        none = latency(ingredients.artifact, samples={})
        assert (token_ms_svg(none, "a"), drift_svg(none, "b"), ttft_svg(none, "c")) == ("", "", "")

    def test_same_records_same_bytes(self, ingredients: Ingredients) -> None:
        record = latency(ingredients.artifact)
        assert token_ms_svg(record, "a") == token_ms_svg(record, "a")


def test_too_few_units_are_said_where_an_interval_would_stand(ingredients: Ingredients, made: Path) -> None:
    """In the page, the card, the plots and on the terminal: no number that could be read as an interval."""
    none = {
        f"{name}_ci95": None
        for name in ("perplexity", "next_token_accuracy", "retention", "kl_mean_nats", "kl_p99_nats", "top1_agreement")
    }
    whole = retention(ingredients.artifact)
    few = whole.model_copy(
        update={
            "documents": 3,
            "effective_documents": 2.8,
            "rungs": [rung.model_copy(update=none | {"ci95": None}) for rung in whole.rungs],
            "retention": Scored(value=0.9, ci95=None),
        }
    )
    slow = latency(ingredients.artifact, rate_units=1, prefill_tokens_per_s_ci95=None, decode_tokens_per_s_ci95=None)
    manifest = read_manifest(made)
    said = "too few documents (3, which weigh as much as 2.8 equal ones) for an interval"
    page = Page(render(manifest, [(few, slow)])).text
    assert said in page and "too few repeats (1) for an interval" in page and "None" not in page
    card = "\n".join(card_retention("model", few))
    assert said in card.lower() and "None" not in card
    text = retention_text(few)
    assert said in text and "[too few]" in text and "intervals: 95 %" not in text
    assert "intervals: 95 %, t over documents" in retention_text(whole)
    assert "too few documents" in plots.retention_svg(few, "r") and "too few" in plots.perplexity_svg(few, "p")
    slow_text = latency_text(slow)
    assert (
        "too few repeats (1) for an interval" in slow_text and f"{slow.decode_tokens_per_s:.1f} [too few]" in slow_text
    )


def test_numbers() -> None:
    assert [number(v) for v in (None, 0.0, 3, 1234567, 0.123456, 12.3, 1580.0, 123456.7, 0.9999)] == [
        "–", "0", "3", "1,234,567", "0.1235", "12.30", "1,580", "123,457", "0.9999",
    ]  # fmt: skip
    assert [size(v) for v in (None, 999, 1000, 5_200_000_000, 7e12)] == [
        "–",
        "999 B",
        "1.00 kB",
        "5.20 GB",
        "7,000.00 GB",
    ]
    assert interval((0.5, 1.25), 3) == "0.500–1.25"
    assert interval(None) == "too few"
    assert plain([True, None, {"a": 1}, []]) == "yes, unknown, a 1, none"


def test_the_reports_of_a_failed_gate(made: Path, tmp_path: Path) -> None:
    """A retention.json without a bundle: its page has nothing from outside, and no record puts markup into it."""
    record = json.loads((made / "reports/retention.json").read_text())
    record["gate"] |= {"passed": False, "verdict": "failed"}
    record["gate"]["checks"][0] |= {"passed": False, "why": "<script>alert(1)</script>"}
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "retention.json").write_text(json.dumps(record))
    page = assert_self_contained(report(folder).read_text(encoding="utf-8"))
    assert "gate FAILED" in page.text and "<script>alert(1)</script>" in page.text
    assert report(folder, tmp_path / "else.html") == tmp_path / "else.html"
    for broken in (b"{}", b"[", b'{"gate": NaN}', json.dumps(record | {"more": 1}).encode()):
        (folder / "retention.json").write_bytes(broken)
        with pytest.raises(UserError, match="retention"):
            report(folder)
