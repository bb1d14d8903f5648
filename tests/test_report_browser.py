"""The page of an evaluation in a real browser: headless Chromium, driven by Selenium."""

from __future__ import annotations

import shutil

import pytest
from report_samples import EVIL_NAME, as_samples, hostile_report, language, make_report

from tokendrift.demo import PRETRAINED
from tokendrift.evaluation.report import page

webdriver = pytest.importorskip("selenium.webdriver", reason="the page is tested with Selenium")
tokenizers = pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1300,1000",
)  # fmt: skip

# Whether all text of a plot is drawn, and within the plot.
INSIDE = """
const box = arguments[0].getBoundingClientRect();
return box.width > 300 && [...arguments[0].querySelectorAll("text")].every((text) => {
  const own = text.getBoundingClientRect();
  return own.width > 0 && own.left >= box.left - 1 && own.right <= box.right + 1
    && own.top >= box.top - 1 && own.bottom <= box.bottom + 1;
});
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium and chromedriver on the path"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start a browser with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write the page of a report whose names and samples try to break out."""
    tokenizer = tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
    place = tmp_path_factory.mktemp("page") / "report.html"
    place.write_text(page(hostile_report(tokenizer)), encoding="utf-8")
    return place


@pytest.fixture
def opened(browser, file):
    """Open the page afresh, in its light colours."""
    prefer(browser, "light")
    browser.get(file.as_uri())
    return browser


def prefer(browser, scheme):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def visible_samples(browser):
    """Return the indices of the samples that are shown, column by column."""
    columns = browser.find_elements(By.CSS_SELECTOR, "ol.samples")
    items = [column.find_elements(By.XPATH, "./li") for column in columns]
    return [[i for i, item in enumerate(column) if item.is_displayed()] for column in items]


def position(browser):
    return browser.find_element(By.CSS_SELECTOR, "#browser output").text


def test_it_opens_without_an_error_and_asks_for_nothing(opened):
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert EVIL_NAME in opened.title


def test_no_sample_and_no_name_runs_as_code(opened):
    assert opened.execute_script("return document.scripts.length") == 1
    assert opened.find_elements(By.CSS_SELECTOR, "main img, main b") == []
    assert "<script>alert(1)</script>" in opened.find_element(By.CSS_SELECTOR, "ol.samples li").text
    injected = "const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
    opened.execute_script(injected)
    assert opened.execute_script("return window.ran") is None
    (blocked,) = opened.get_log("browser")  # the page's policy forbids any script but its own
    assert "Content Security Policy" in blocked["message"]


def test_the_table_shows_every_set_and_real_text(opened):
    rows = opened.find_elements(By.CSS_SELECTOR, "table.wide tbody tr")
    names = [row.find_element(By.TAG_NAME, "th").text for row in rows]
    assert names == [EVIL_NAME, EVIL_NAME, "dull", "dull", "real text"]
    assert all(row.is_displayed() and len(row.find_elements(By.TAG_NAME, "td")) > 10 for row in rows)
    headings = [cell.text for cell in opened.find_elements(By.CSS_SELECTOR, "table.wide thead th")]
    assert headings[:8] == ["samples", "NFE", "Gen.-PPL", "H sample", "H unigram", "guard", "n", "precision"]


def test_plots_have_axes_labels_and_a_legend_all_within_view(opened):
    plots = opened.find_elements(By.CSS_SELECTOR, "figure svg")
    labels = [
        {"Gen.-PPL", "sample entropy (nats)"},
        {"Gen.-PPL", "unigram entropy (nats)"},
        {"Gen.-PPL", "function evaluations (NFE)"},
        {"sample entropy (nats)", "function evaluations (NFE)"},
        {"unigram entropy (nats)", "function evaluations (NFE)"},
    ]
    for plot, expected in zip(plots, labels, strict=True):
        texts = plot.find_elements(By.CSS_SELECTOR, "text")
        drawn = [text.get_attribute("textContent").strip() for text in texts]
        assert expected <= set(drawn)
        assert {"dull", EVIL_NAME, "real text"} <= set(drawn)  # the legend
        ticks = plot.find_elements(By.CSS_SELECTOR, "[id*='matplotlib.axis'] text")
        assert len(ticks) >= 2 * 2 + 2  # two ticks on each axis, and the labels
        assert plot.aria_role in {"img", "image"} and plot.accessible_name.startswith(("Gen.-PPL", "Sample", "Unigram"))
        assert opened.execute_script(INSIDE, plot)


def test_a_long_name_stays_within_its_legend(browser, tmp_path):
    tokenizer = tokenizers.Tokenizer.from_file(str(PRETRAINED / "tokenizer.json"))
    sets = [(name * 30, as_samples(tokenizer, language(5), nfe=4)) for name in ("long-", "LONG_")]
    (tmp_path / "long.html").write_text(page(make_report(tokenizer, sets)), encoding="utf-8")
    browser.get((tmp_path / "long.html").as_uri())
    for plot in browser.find_elements(By.CSS_SELECTOR, "figure svg"):
        assert browser.execute_script(INSIDE, plot)
    assert browser.execute_script("return document.scrollingElement.scrollWidth <= window.innerWidth")


def test_the_numbers_of_a_plot_open_by_keyboard(opened):
    details = opened.find_element(By.CSS_SELECTOR, "figure details")
    table = details.find_element(By.TAG_NAME, "table")
    assert not table.is_displayed()
    details.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    assert table.is_displayed() and "Gen.-PPL" in table.text and "real text" in table.text


def test_the_browser_of_samples_is_worked_by_arrow_keys(opened):
    assert position(opened) == "Sample 1 of 20"
    assert visible_samples(opened) == [[0]] * 5
    area = opened.find_element(By.ID, "browser")
    for key, shown in (
        (Keys.ARROW_RIGHT, 1), (Keys.ARROW_RIGHT, 2), (Keys.ARROW_LEFT, 1), (Keys.END, 19), (Keys.ARROW_RIGHT, 19),
        (Keys.HOME, 0), (Keys.ARROW_LEFT, 0),
    ):  # fmt: skip
        area.send_keys(key)
        assert position(opened) == f"Sample {shown + 1} of 20"
        assert visible_samples(opened) == [[shown]] * 5


def test_the_buttons_are_reached_by_tab_and_show_where_the_focus_is(opened):
    opened.find_element(By.ID, "browser").send_keys(Keys.TAB)
    focused = opened.switch_to.active_element
    assert focused.text == "First"
    focused.send_keys(Keys.TAB, Keys.TAB)
    focused = opened.switch_to.active_element
    assert focused.text == "Next" and focused.value_of_css_property("outline-style") == "solid"
    assert focused.value_of_css_property("outline-width") == "3px"
    focused.send_keys(Keys.ENTER)
    opened.switch_to.active_element.send_keys(Keys.SPACE)
    assert position(opened) == "Sample 3 of 20"


def test_repeated_phrases_are_marked_and_listed(opened):
    dull = opened.find_elements(By.CSS_SELECTOR, "#browser article")[2]
    assert dull.find_element(By.TAG_NAME, "h3").text == "dull, 4 NFE"
    assert dull.find_element(By.TAG_NAME, "mark").is_displayed()
    assert dull.find_element(By.TAG_NAME, "mark").value_of_css_property("text-decoration-line") == "underline"
    dull.find_element(By.TAG_NAME, "summary").click()
    assert "times)" in dull.find_element(By.TAG_NAME, "details").text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(opened, scheme):
    prefer(opened, scheme)
    body = opened.find_element(By.TAG_NAME, "body")
    paper = colour(body, "background-color")
    assert (luminance(paper) > 0.8) if scheme == "light" else (luminance(paper) < 0.05)
    assert contrast(colour(body, "color"), paper) > 7  # WCAG AAA
    mark = opened.find_elements(By.CSS_SELECTOR, "#browser article")[2].find_element(By.TAG_NAME, "mark")
    assert contrast(colour(mark, "color"), colour(mark, "background-color")) > 7
    text = opened.find_element(By.CSS_SELECTOR, "figure svg [id*='matplotlib.axis'] text")
    assert colour(text, "fill") == colour(body, "color")  # plots follow the page
    assert colour(opened.find_element(By.TAG_NAME, "button"), "color") == colour(body, "color")
    assert opened.get_log("browser") == []


def test_on_a_narrow_screen_the_page_does_not_scroll_sideways(opened):
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert opened.execute_script("return document.scrollingElement.scrollWidth <= window.innerWidth")
        headline = opened.find_elements(By.CSS_SELECTOR, "table.wide")[0].find_elements(By.CSS_SELECTOR, "tr > *")[:5]
        assert [cell.text for cell in headline][-3:] == ["Gen.-PPL", "H sample", "H unigram"]
        assert headline[-1].rect["x"] + headline[-1].rect["width"] <= size["width"]
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def colour(element, name):
    """Return a computed colour as red, green and blue."""
    parts = element.value_of_css_property(name).partition("(")[2].rstrip(")").split(",")
    return tuple(float(part) for part in parts[:3])


def luminance(rgb):
    """Return the relative luminance of WCAG 2."""
    linear = [c / 12.92 if (c := part / 255) <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for part in rgb]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(ink, paper):
    light, dark = sorted((luminance(ink), luminance(paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)
