"""The page of a report: complete in itself, and written whole or not at all."""

import os
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from diffaug.audit.page import MOST_SHOWN, WORDS, write_page
from diffaug.audit.record import Figure, Report, Suspect, Utility
from diffaug.audit.verdicts import LIMITS
from tests.audit.conftest import Audited
from tests.audit.world import intensities_of, standard_sets


@pytest.fixture(scope="module")
def page(leaky: Audited) -> str:
    return (leaky.output / "report.html").read_text(encoding="utf-8")


def written(report: Report, path: Path) -> str:
    """The page of a report, with figures of made-up cases."""
    sets = standard_sets(MOST_SHOWN + 4, MOST_SHOWN + 4, 12)
    write_page(report, [intensities_of(sets)], sets, [], path)
    return path.read_text(encoding="utf-8")


class Checker(HTMLParser):
    """Collects what a page refers to, and tags that do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.mismatched: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "srcset", "data")]
        self.links += [value or "" for name, value in attributes if name in ("href", "action", "xlink:href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.mismatched.append(tag)


def test_nothing_is_fetched(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.sources
    assert all(source.startswith("data:image/png;base64,") for source in checker.sources)
    assert checker.links == []
    assert not checker.tags & {"script", "link", "iframe", "object", "embed", "base"}
    assert "http://" not in page
    assert "https://" not in page
    assert not re.search(r"@import|url\s*\(|\bon\w+\s*=", re.sub(r"base64,[\w+/=]+", "", page))


def test_tags_match(page: str) -> None:
    checker = Checker()
    checker.feed(page)
    assert checker.mismatched == []
    assert checker.open == []


def test_every_verdict_is_there_with_its_reasons(page: str, leaky: Audited) -> None:
    for verdict in leaky.report.verdicts:
        row = f"<b>{escape(verdict.question)}</b><br>{escape(verdict.found)}</td>"
        assert (
            f'<span class="{verdict.answer}">{WORDS[verdict.answer]}</span></td><td>{row}'
            f"<td>{escape(verdict.threshold)}" in page
        )
    for about, name in (("privacy", "Privacy"), ("use", "Use")):
        answer = leaky.report.answer_about(about)
        assert f'<span class="{answer}">{answer.title()}</span> <b>{name}.</b>' in page
    for limit in LIMITS:
        assert escape(limit) in page


def test_sets_and_suspects_are_named(page: str, leaky: Audited) -> None:
    for record in (leaky.report.synthetic, leaky.report.training, leaky.report.held_out):
        assert f"<td>{record.name}</td><td>{record.cases}</td>" in page
        assert record.files in page
    assert "not given" in page
    assert "16 x 16 x 16 voxels of 2 x 2 x 2 mm" in page
    for suspect in leaky.report.suspects:
        assert f"<td>{suspect.synthetic}</td><td>{suspect.training}</td>" in page
    assert "they stay with those who may see these scans" in page


def test_names_are_text_and_no_markup(leaky: Audited, tmp_path: Path) -> None:
    sly = '<img src="https://example.org/x.png">'
    first = leaky.report.verdicts[0].model_copy(update={"found": sly})
    report = leaky.report.model_copy(
        update={
            "synthetic": leaky.report.synthetic.model_copy(update={"name": sly, "licence": sly}),
            "verdicts": [first],
            "suspects": [],
            "notes": [sly],
        }
    )
    page = written(report, tmp_path / "page.html")
    assert "<img src=" not in page
    # In the title, the heading, the table of sets twice, the verdict and the note.
    assert page.count(escape(sly)) == 6


def test_without_suspects_the_page_shows_no_scan(leaky: Audited, tmp_path: Path) -> None:
    page = written(leaky.report.model_copy(update={"suspects": []}), tmp_path / "page.html")
    assert "<p>None.</p>" in page
    assert "Suspected copies, the most alike first" not in page


def test_many_suspects_are_cut_and_counted(leaky: Audited, tmp_path: Path) -> None:
    suspects = [
        Suspect(
            synthetic=f"synthetic_{n}", training=f"training_{n}", search="x", similarity=0.9, clear=n == 0
        )
        for n in range(MOST_SHOWN + 4)
    ]
    page = written(leaky.report.model_copy(update={"suspects": suspects}), tmp_path / "page.html")
    assert f"<td>synthetic_{MOST_SHOWN - 1}</td>" in page
    assert f"<td>synthetic_{MOST_SHOWN}</td>" not in page
    assert "4 more are listed in report.json" in page


def test_utility_is_a_table_where_it_was_measured(page: str, leaky: Audited, tmp_path: Path) -> None:
    assert "Utility" not in page
    figure = Figure(value=0.8125, low=0.75, high=0.875)
    utility = Utility(
        trained_on_synthetic_tested_on_real=figure,
        trained_on_real_tested_on_real=figure.model_copy(update={"value": 0.8525}),
        trained_on_real_tested_on_synthetic=figure.model_copy(update={"value": 0.9045}),
        training_cases=24,
        steps=6000,
    )
    report = leaky.report.model_copy(update={"suspects": [], "utility": utility})
    found = written(report, tmp_path / "page.html")
    assert "Utility: Dice of a U-Net (6000 steps)" in found
    for value in ("0.812", "0.853", "0.904"):
        assert f"<td>{value} [0.75, 0.875]</td>" in found


def test_pages_of_copies_alone_can_be_drawn(leaky: Audited, tmp_path: Path) -> None:
    """All similarities are 1, but for rounding."""
    sets = standard_sets()
    copies = sets._replace(synthetic=sets.training, held_out=sets.training)
    report = leaky.report.model_copy(update={"suspects": []})
    path = tmp_path / "page.html"
    write_page(report, [intensities_of(copies)], copies, [], path)
    assert path.read_text().endswith("</html>\n")


def test_a_page_that_cannot_be_written_leaves_the_old_one(
    leaky: Audited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    before = written(leaky.report.model_copy(update={"suspects": []}), path)

    def full(*arguments: object) -> None:
        raise OSError("No space left on device")

    changed = leaky.report.model_copy(update={"suspects": [], "notes": ["changed"]})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            written(changed, path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert "<p>changed</p>" in written(changed, path)


def test_equal_reports_have_equal_pages(leaky: Audited, tmp_path: Path) -> None:
    report = leaky.report.model_copy(update={"suspects": []})
    first, again = (written(report, tmp_path / f"{n}.html") for n in range(2))
    assert first == again
    assert first.count("<figure>") == 3
