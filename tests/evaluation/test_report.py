"""The report: one page that fetches nothing, shows what it should, and survives hostile replies, in a browser too."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import make_log, run_oirl

import oirl
from oirl import PromptSelector
from oirl.evaluation.audit import audit
from oirl.evaluation.details import audit_details, evaluation_details
from oirl.evaluation.evaluate import evaluate
from oirl.evaluation.report import render_report, write_report

ATTACK = "</script><script>window.hacked = 1</script><!--<img src=x onerror='window.hacked=2'>"
ARABIC = "كم عدد البيض؟"
HOSTILE = [ATTACK, "x" * 300_000, ARABIC, "$\\frac{1}{2}$ & \u2028 \u0000 <b>bold</b>", "plain"]


def hostile_log(n: int = 80) -> pa.Table:
    table = make_log(n, seed=61)
    rows = table.to_pylist()
    for i, row in enumerate(rows):
        row["response"] = HOSTILE[i % len(HOSTILE)]
        row["answer"] = ATTACK if i % 7 == 0 else "4"
        row["query"] = row["query"] + (
            ATTACK if row["query_id"] == "q3" else f" {ARABIC}" if row["query_id"] == "q4" else ""
        )
    schema = table.schema.append(pa.field("response", pa.string())).append(pa.field("answer", pa.string()))
    return pa.Table.from_pylist(rows, schema=schema)


@pytest.fixture(scope="module")
def page(log: pa.Table) -> str:
    selector, table = PromptSelector().fit(log), hostile_log()
    return render_report(evaluate(selector, table, draws=100).to_dict(), evaluation_details(selector, table))


@pytest.fixture(scope="module")
def audit_page() -> str:
    table = hostile_log()
    return render_report(audit(table).to_dict(), audit_details(table))


def test_the_verdict_comes_first_and_every_part_is_there(page: str) -> None:
    heads = re.findall(r"<h[12]>(.*?)</h[12]>", page)
    assert heads == [
        "Evaluation of prompts", "Prompts", "What policies would reach", "Where choosing pays", "The reward model",
        "Replies side by side", "Warnings", "Method",
    ]  # fmt: skip
    assert page.index('class="verdict"') < page.index("<h2>")
    assert page.count("<figure>") == 4  # no costs in this log
    for word in ("best_prompt", "selector", "random", "knn", "Ceiling", "replay"):
        assert word in page


def test_the_page_of_an_audit_has_its_parts(audit_page: str) -> None:
    heads = re.findall(r"<h[12]>(.*?)</h[12]>", audit_page)
    assert heads[0] == "Audit of an evaluation log"
    assert {"Prompts", "The log", "Replies side by side", "Warnings", "Method"} <= set(heads)


@pytest.mark.parametrize("kind", ["page", "audit_page"])
def test_nothing_is_fetched_and_nothing_of_the_log_is_markup(kind: str, request: pytest.FixtureRequest) -> None:
    text: str = request.getfixturevalue(kind)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", text)
    assert "@import" not in text
    assert "default-src 'none'" in text.replace("&#x27;", "'")
    assert text.count("<script") == 2
    assert "<img" not in text
    assert "<b>bold</b>" not in text
    assert len(text) < 3_000_000


def test_the_same_evaluation_gives_the_same_page(log: pa.Table) -> None:
    selector, table = PromptSelector().fit(log), make_log(40, seed=5)
    pages = [
        render_report(evaluate(selector, table, draws=50).to_dict(), evaluation_details(selector, table)) for _ in "ab"
    ]
    assert pages[0] == pages[1]


def test_a_log_without_values_or_verdicts_has_a_page(log: pa.Table) -> None:
    selector = PromptSelector().fit(log)
    table = make_log(40, seed=5)
    few = table.filter(pa.array([p != "b" for p in table["prompt_id"].to_pylist()]))
    text = render_report(evaluate(selector, few, draws=50).to_dict(), evaluation_details(selector, few))
    assert "does not tell" in text
    blank = table.set_column(table.schema.get_field_index("correct"), "correct", pa.nulls(len(table), pa.bool_()))
    assert "No row has a verdict" in render_report(audit(blank).to_dict(), audit_details(blank))


def test_costs_have_a_figure() -> None:
    table = make_log(100, seed=5)
    table = table.append_column("cost", pa.array([float("abc".index(p)) for p in table["prompt_id"].to_pylist()]))
    selector = PromptSelector().fit(table)
    text = render_report(evaluate(selector, table, draws=50).to_dict(), evaluation_details(selector, table))
    assert "<h2>Cost</h2>" in text
    assert text.count("<figure>") == 5


def test_a_large_log_makes_no_large_page() -> None:
    table = make_log(3000, seed=5)
    rows = table.append_column("response", pa.array(["A long reply. " * 60] * len(table)))
    text = render_report(audit(rows).to_dict(), audit_details(rows))
    assert len(text) < 3_000_000
    assert "A random sample of 200 of 3,000 queries." in text


def test_details_by_hand(log: pa.Table) -> None:
    selector, table = PromptSelector().fit(log), make_log(120, seed=77)
    found = evaluation_details(selector, table)
    curve, result = found.gain_curve, evaluate(selector, table, draws=50)
    assert curve[0]["gain"] == curve[0]["ci_low"] == 0
    assert all(c["ci_low"] <= c["gain"] <= c["ci_high"] for c in curve)
    # Those switched by the selector are the first of the curve, up to its margin.
    share = result.policies["selector"]["switched"]
    nearest = min(curve, key=lambda c: abs(c["share"] - share))
    assert nearest["gain"] == pytest.approx(result.policies["selector"]["gain"], abs=0.03)
    assert sum(s["queries"] for s in found.switches) == round(share * 120)
    assert {s["prompt_id"]: s["words"][0] for s in found.switches} == {"a": "alpha", "b": "beta"}
    assert sum(b["runs"] for b in found.reliability) <= 720
    row = found.rows[0]
    cell = [r for r in table.to_pylist() if r["query_id"] == row["query_id"] and r["prompt_id"] == "a"]
    assert row["replies"][found.prompts.index("a")][:2] == [2, sum(r["correct"] for r in cell)]


def test_commands_write_pages_and_refuse_other_names(tmp_path: Path) -> None:
    oirl.write_log(make_log(60, seed=1), tmp_path / "log.parquet")
    done = run_oirl("audit", tmp_path / "log.parquet", "--report", tmp_path / "audit.html", "--json")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "audit.html").read_text().startswith("<!doctype html>")
    assert run_oirl("fit", tmp_path / "log.parquet", "--out", tmp_path / "model").returncode == 0
    done = run_oirl("evaluate", tmp_path / "model", tmp_path / "log.parquet", "--report", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    assert "Where choosing pays" in (tmp_path / "page.html").read_text()
    refused = run_oirl("audit", tmp_path / "log.parquet", "--report", tmp_path / "page.pdf")
    assert refused.returncode == 2
    assert "ends in .html" in refused.stderr


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium; or name it in CHROMIUM)")
    playwright = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=chromium, args=flags)
        yield launched
        launched.close()


@pytest.fixture(params=["page", "audit_page"])
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "report.html").write_text(request.getfixturevalue(request.param), encoding="utf-8")
    context = browser.new_context(viewport={"width": 390, "height": 800})  # a phone
    tab = context.new_page()
    problems: list[str] = []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda sent: problems.append(sent.url) if not sent.url.startswith("file:") else None)
    tab.goto((tmp_path / "report.html").as_uri())
    yield tab
    assert problems == []
    assert tab.evaluate("window.hacked") is None
    context.close()


def test_it_renders_without_errors_and_fits_a_phone(opened: Any) -> None:
    assert opened.locator("#table-body tr").count() == 25
    assert opened.evaluate("document.documentElement.scrollWidth") <= 390
    assert opened.locator("figure svg").first.bounding_box()["width"] <= 390


def test_the_table_can_be_searched_filtered_sorted_and_paged(opened: Any) -> None:
    assert opened.locator("#count").inner_text() == "1–25 of 80 queries"
    opened.locator("#next").click()
    assert opened.locator("#count").inner_text() == "26–50 of 80 queries"
    opened.locator("#search").fill("window.hacked onerror alpha")
    found = opened.locator("#table-body tr").count()
    assert 0 < found <= 25
    opened.locator("#search").fill("no such words anywhere")
    assert opened.locator("#count").inner_text() == "no query fits"
    opened.locator("#search").fill("")
    opened.locator("#filter").select_option("disagree")
    assert int(opened.locator("#count").inner_text().split(" of ")[1].split()[0]) < 80
    opened.locator("#filter").select_option("all")
    opened.locator("th button[data-sort='0']").click()
    assert "✓" in opened.locator("#table-body tr").first.locator("td").nth(1).inner_text()
    opened.locator("th button[data-sort='0']").click()
    assert "✗" in opened.locator("#table-body tr").first.locator("td").nth(1).inner_text()


def test_it_can_be_used_by_keyboard_and_shows_hostile_text_as_text(opened: Any) -> None:
    opened.locator("#search").fill("window.hacked = 1")
    summary = opened.locator("#table-body summary").first
    summary.focus()
    opened.keyboard.press("Enter")
    details = opened.locator("#table-body details[open]")
    assert details.count() == 1
    assert details.locator("script, img").count() == 0
    assert details.locator("pre").get_attribute("dir") == "auto"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: str, browser: Any, page: str, tmp_path: Path) -> None:
    write = tmp_path / "report.html"
    write.write_text(page, encoding="utf-8")
    context = browser.new_context(color_scheme=scheme)
    tab = context.new_page()
    tab.goto(write.as_uri())
    script = """() => { const s = getComputedStyle(document.body);
      const light = (c) => c.match(/[0-9.]+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 765;
      const text = document.querySelector("figure svg text");
      return [light(s.backgroundColor), light(s.color), light(getComputedStyle(text).fill)]; }"""
    paper, ink, label = tab.evaluate(script)
    assert abs(paper - ink) > 0.6
    assert abs(paper - label) > 0.6
    assert (paper < 0.5) == (scheme == "dark")
    context.close()


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    table = make_log(30)
    write_report(audit(table).to_dict(), audit_details(table), tmp_path / "a.html")
    assert [p.name for p in tmp_path.iterdir()] == ["a.html"]
