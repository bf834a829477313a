"""Self-contained pages: markup, scales, charts and blocks, as HTML and as Markdown."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from study.pages import (
    Bar,
    Bullets,
    Cell,
    Charts,
    Document,
    Facts,
    Line,
    Markup,
    Paragraph,
    Plot,
    Scale,
    Section,
    Table,
    bar_chart,
    command_text,
    line_chart,
    number,
    swatch,
    write_text,
)
from study.pages.drawing import shortened
from study.pages.markup import anchor, decimal, element
from tests.study.pages_read_back import drawings, parsed, tables, text_of

EVIL = '<script>alert("a & b")</script>'


def drawn(svg: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def classed(svg: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [e for e in svg.iter() if name in e.attrib.get("class", "").split()]


def edges(rect: ElementTree.Element) -> tuple[float, float]:
    left = float(rect.attrib["x"])
    return left, left + float(rect.attrib["width"])


# --- markup ---


def test_text_is_escaped_and_markup_is_not() -> None:
    made = element("p", EVIL, element("b", "x"), title=EVIL, class_="a", data_x=None)
    assert made == (
        '<p title="&lt;script&gt;alert(&quot;a &amp; b&quot;)&lt;/script&gt;" class="a">'
        '&lt;script&gt;alert("a &amp; b")&lt;/script&gt;<b>x</b></p>'
    )


def test_empty_elements_and_numbers() -> None:
    assert element("line", x1=1.25, x2=3, stroke_width=0.04) == (
        '<line x1="1.2" x2="3" stroke-width="0"/>'
    )
    assert [decimal(v) for v in (-0.04, -0.06, -10.0, 99.96, 1e4)] == [
        *("0", "-0.1", "-10", "100", "10000")
    ]


def test_anchor() -> None:
    assert anchor("digits: 20-layer MLP, 1.5 x He") == "digits-20-layer-mlp-1-5-x-he"


# --- scales ---


def test_linear_scale() -> None:
    scale = Scale(-1.0, 3.0)
    assert [scale.place(v) for v in (-1, 1, 3, -5, 9, math.inf, -math.inf, math.nan)] == [
        *(0, 0.5, 1, 0, 1, 1, 0, 0)
    ]
    assert scale.ticks(4) == [-1, 0, 1, 2, 3]


def test_log_scale() -> None:
    scale = Scale(0.01, 100.0, log=True)
    places = [scale.place(v) for v in (0.01, 1.0, 100.0, 0.0, -1.0, math.inf, math.nan)]
    assert places == pytest.approx([0, 0.5, 1, 0, 0, 1, 0])
    assert scale.ticks(5) == pytest.approx([0.01, 0.1, 1, 10, 100])
    assert scale.ticks(3) == pytest.approx([0.01, 1, 100])


@pytest.mark.parametrize(
    ("low", "high", "most"),
    [(0.7, 19, 4), (1, 2, 4), (0.9, 660, 5), (1e-30, 1e30, 4), (3.1, 3.9, 4), (2.0, 2.3, 3)],
)
@pytest.mark.parametrize("log", [False, True])
def test_ticks_are_on_the_scale_in_order_and_not_too_many(
    low: float, high: float, most: int, log: bool
) -> None:
    ticks = Scale(low, high, log).ticks(most)
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (high - low)
    assert all(low * 0.99 - slack <= tick <= high * 1.01 for tick in ticks)
    assert len(ticks) <= most + 1
    assert ticks or log  # less than a decade may hold no round value


def test_scale_around_values() -> None:
    assert Scale.around([math.nan, 0.0, -1, math.inf, 2, 8], log=True, default=(1, 2)) == Scale(
        2 / 1.2, 8 * 1.2, True
    )
    assert Scale.around([], log=True, default=(1, 2)) == Scale(1, 2, True)
    assert Scale.around([5.0, 5.0], default=(0, 1)) == Scale(0, 5)
    assert Scale.around([0.0], default=(0, 0)) == Scale(-1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 1.0), "low < high"),
        ((0.0, math.inf), "finite"),
        ((0.0, 1.0, True), "expected a number above 0, got 0.0"),
    ],
)
def test_scale_refuses(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scale(*arguments)  # type: ignore[arg-type]


def test_numbers_of_axes() -> None:
    assert [number(v) for v in (0, 0.001, 0.5, 1, 3000, 1e4, 2e-5, -1e6)] == [
        *("0", "0.001", "0.5", "1", "3000", "10⁴", "2·10⁻⁵", "-1·10⁶")
    ]


# --- charts ---


def test_bars_end_at_their_values_on_both_sides_of_the_origin() -> None:
    bars = [
        Bar("fast", 4.0, "4.00"),
        Bar("slow", 0.25, "0.25", style="hatched"),
        Bar("none", None, "-"),
    ]
    scale = Scale(0.125, 8.0, log=True)
    svg = drawn(bar_chart("ratios", bars, scale, origin=1.0, axis="x", marks=[(1.0, "solid")]))
    (one,) = [float(e.attrib["x1"]) for e in classed(svg, "mark")]
    (fast,), (slow,) = (
        classed(svg, "solid")[:1],
        [e for e in classed(svg, "hatched") if e.tag == "rect"],
    )
    assert edges(fast)[0] == pytest.approx(one, abs=0.11)
    assert edges(slow)[1] == pytest.approx(one, abs=0.11)
    widths = [right - left for left, right in (edges(fast), edges(slow))]
    assert widths[0] == pytest.approx(widths[1], abs=0.2)  # as far from 1 on a logarithmic scale
    assert [text_of(e) for e in classed(svg, "strong")] == ["4.00", "0.25", "-"]
    assert text_of(svg.find("title")) == "ratios"  # type: ignore[arg-type]
    assert svg.attrib["role"] == "img"


def test_bars_beyond_the_scale_stay_within_the_drawing() -> None:
    bars = [Bar("far", 1e9, "1e9", low=-5.0, high=1e10, dots=(1e10, math.inf, math.nan))]
    svg = drawn(bar_chart("t", bars, Scale(0.0, 1.0), origin=0.0, axis="x"))
    width = float(svg.attrib["viewBox"].split()[2])
    assert all(edges(rect)[1] <= width for rect in svg.iter("rect"))
    assert all(0 <= float(dot.attrib["cx"]) <= width for dot in svg.iter("circle"))
    (whisker,) = classed(svg, "whisker")
    assert all(0 <= float(v) <= width for v in re.findall(r"[MH]([\d.]+)", whisker.attrib["d"]))


def test_headings_among_bars_and_long_labels() -> None:
    long = "a remedy with a name that nobody can read in such a narrow drawing"
    bars = [Bar("ResNet-50"), Bar(long, 1.0, "1")]
    svg = drawn(bar_chart("t", bars, Scale(0.0, 2.0), origin=0.0, axis="x"))
    assert len(classed(svg, "bar")) == 1
    texts = [text_of(e) for e in svg.iter("text")]
    assert "ResNet-50" in texts and long not in texts
    assert long in [text_of(e) for e in svg.iter("title")]  # what a pointer shows
    assert shortened("abc", 100) == "abc"


def test_chart_without_bars() -> None:
    assert drawn(bar_chart("t", [], Scale(0.0, 1.0), origin=0.0, axis="x")).tag == "svg"


def test_lines_are_lifted_at_what_is_no_number_and_follow_the_edge_beyond() -> None:
    line = Line(
        (1, 2, 3, 4), (1.0, math.nan, 1e9, 10.0), 2, (1, 1, 1, 1), (2, 2, math.inf, 2), (3,)
    )
    plot = Plot("loss", Scale(1.0, 100.0, log=True), (line,), limit=10.0)
    svg = drawn(line_chart("none", "0 of 5", [plot], Scale(1.0, 4.0, log=True), "step"))
    (curve,) = classed(svg, "curve")
    assert re.fullmatch(r"M[\d.]+ [\d.]+M[\d.]+ [\d.]+L[\d.]+ [\d.]+", curve.attrib["d"])
    heights = [float(v) for v in re.findall(r"[\d.]+ ([\d.]+)", curve.attrib["d"])]
    assert heights[1] < heights[2] < heights[0]
    assert "nan" not in ElementTree.tostring(svg, "unicode")
    assert len(classed(svg, "band")) == len(classed(svg, "cross")) == len(classed(svg, "mark")) == 1
    assert text_of(svg.find("title")) == "none: 0 of 5"  # type: ignore[arg-type]


# --- blocks and documents ---

TABLE = Table(
    ("remedy", "a", "b"),
    [("clip | 1", Cell("5/5", "learned 5", "heat4", strong=True), "2")],
    legend=[("heat4", "all")],
    above=[Cell(""), Cell("both", span=2)],
    below=("remedy", "1", "2"),
)


@pytest.fixture
def document() -> Document:
    chart = bar_chart(EVIL, [Bar(EVIL, 1.0, EVIL)], Scale(0.0, 1.0), origin=0.0, axis=EVIL)
    return Document(
        title=EVIL,
        lead="lead_ of *it*",
        summary=[Paragraph(EVIL), Bullets([("lead", EVIL), ("", "no lead")])],
        sections=[
            Section("First", [TABLE, Charts(EVIL, [chart], [(swatch("curve rank1"), EVIL)])]),
            Section("Second", [Section("inner", [Paragraph("quiet", quiet=True)])]),
            Section("Drawings alone", [Charts("c", [chart])]),
        ],
        facts=[("Machine", EVIL)],
    )


def test_document_as_html(document: Document) -> None:
    page = parsed(document.html())
    assert text_of(page.find("head/title")) == EVIL  # type: ignore[arg-type]
    assert page.attrib["lang"] == "en"
    assert [text_of(link) for link in page.iter("a")] == [
        *("First", "Second", "Drawings alone", "How this was measured")
    ]
    assert tables(page) == [
        [["", "both"], ["remedy", "1", "2"], ["clip | 1", "5/5 learned 5", "2"]]
    ]
    assert len(drawings(page)) == 2
    assert [text_of(e) for e in page.iter("h3")] == ["inner"]
    assert page.find(".//td[@class='number heat4']/b") is not None
    assert "width=device-width" in document.html() and "@media print" in document.html()


def test_document_as_markdown(document: Document) -> None:
    text = document.markdown()
    escaped = r'\<script>alert("a & b")\</script>'
    assert text.splitlines()[0] == f"# {escaped}"
    assert r"lead_ of \*it\*" in text
    assert f"- **lead:** {escaped}\n- no lead" in text
    table = r"""| remedy | a | b |
| --- | ---: | ---: |
| clip \| 1 | **5/5** (learned 5) | 2 |"""
    assert f"## First\n\n{table}\n\n## Second\n\n### inner\n\nquiet\n\n## How" in text
    assert "Drawings alone" not in text and "<svg" not in text
    assert text.endswith(f"- Machine: {escaped}\n")
    assert not re.search(r"\n\n\n|[ \t]\n", text)


def test_markdown_with_drawings(document: Document, tmp_path: Path) -> None:
    charts = document.sections[2].blocks[0]
    assert isinstance(charts, Charts)
    wide = dataclasses.replace(charts, charts=charts.charts * 5, name="My Bars")
    sections = [*document.sections[:2], Section("inner", [Section("most", [wide])])]
    dataclasses.replace(document, sections=sections).write_markdown(tmp_path / "report.md")
    assert "### most\n\n![c](report/my-bars.svg)\n\nc\n" in (tmp_path / "report.md").read_text()
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["my-bars.svg"]
    drawing = (tmp_path / "report" / "my-bars.svg").read_text()
    (tmp_path / "report" / "users.svg").write_text(drawing)
    document.write_markdown(tmp_path / "report.md")  # which has other drawings
    left = {path.name for path in (tmp_path / "report").iterdir()}
    assert "users.svg" in left and "my-bars.svg" not in left
    (tmp_path / "report" / "my-bars.svg").write_text(drawing)
    root = ElementTree.parse(tmp_path / "report" / "my-bars.svg").getroot()
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    placed = [svg.attrib for svg in root if svg.tag.endswith("}svg")]
    assert len(placed) == 5
    assert len({(svg["x"], svg["y"]) for svg in placed}) == 5
    for svg in placed:
        assert float(svg["x"]) + float(svg["width"]) <= width
        assert float(svg["y"]) + float(svg["height"]) <= height


def test_a_legend_that_is_long_takes_more_lines() -> None:
    chart = bar_chart("t", [Bar("a", 1.0, "1")], Scale(0.0, 1.0), origin=0.0, axis="x")
    legend = [(swatch("curve rank0"), f"a rather long name, number {k}") for k in range(5)]
    root = ElementTree.fromstring(Charts("c", [chart], legend).drawing(""))
    names = [e for e in root if e.tag.endswith("}text")]
    assert len({e.attrib["y"] for e in names}) > 1
    below = [float(e.attrib["y"]) for e in root if e.tag.endswith("}svg")][-1]
    assert below > max(float(e.attrib["y"]) for e in names)


def test_columns_say_what_is_text() -> None:
    table = Table(("a", "b", "c"), [("x", "1", "y")], "tnt")
    assert table.markdown().splitlines()[1] == "| --- | ---: | --- |"
    assert [c.attrib.get("class") for c in ElementTree.fromstring(table.html()).iter("td")] == [
        *("number", None)
    ]


def test_facts_as_markdown() -> None:
    assert Facts([("a", "b_"), ("c", "_d")]).markdown() == "- a: b_\n- c: \\_d"


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "page.html"
    write_text("é", path)
    assert path.read_text(encoding="utf-8") == "é"
    with pytest.raises(UnicodeEncodeError):
        write_text("\ud800", path)
    assert path.read_text(encoding="utf-8") == "é"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


def test_no_link_is_followed_as_a_file_is_written(tmp_path: Path) -> None:
    others = tmp_path / "others"
    others.write_text("theirs")
    for name in (".page.html.part", "page.html"):
        (tmp_path / name).symlink_to(others)
    write_text("ours", tmp_path / "page.html")
    assert others.read_text() == "theirs"
    assert (tmp_path / "page.html").read_text() == "ours"


def test_command_text() -> None:
    assert command_text(["/a/python3", "-m", "steadygrad", "bench", "my file"]) == (
        "python3 -m benchmarks 'my file'"
    )
    assert command_text(["/a/python3", "/b/bin/steadygrad", "/c"]) == "python3 steadygrad /c"
    assert command_text([]) == "not recorded"


def test_pages_import_nothing_else_of_the_package() -> None:
    import study.pages

    for path in Path(study.pages.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(from|import) (steadygrad|\.\.)", path.read_text(), re.MULTILINE)


# --- colours ---


def luminance(colour: str) -> float:
    digits = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def style() -> str:
    return Document("", "", [], [], []).html()


def test_text_stands_out_from_what_is_behind_it() -> None:
    colours = dict(re.findall(r"--(\w+): #(\w+)", style()))
    assert contrast(colours["ink"], "ffffff") > 12
    assert contrast(colours["quiet"], "ffffff") > 4.5  # WCAG 2, level AA
    for heat in re.findall(r"\.heat\d {([^}]*)}", style()):
        behind = re.findall(r"#(\w+)", heat.partition("color:")[0])
        ink = re.search(r"(?<!-)color: #(\w+)", heat)
        for colour in behind:
            assert contrast(ink.group(1) if ink else colours["ink"], colour) > 4.5, heat


def test_curves_differ_in_lightness_and_dashes() -> None:
    colours = dict(re.findall(r"--(rank\d): #(\w+)", style()))
    assert len(colours) == 5
    order = [luminance(colours[f"rank{rank}"]) for rank in range(5)]
    assert order == sorted(order, reverse=True)  # seen without colour vision
    assert contrast(colours["rank0"], "ffffff") > 3
    dashes = re.findall(r"\.curve\.rank\d { stroke-dasharray: ([^;]*);", style())
    assert len(set(dashes)) == 4  # and the last is solid
