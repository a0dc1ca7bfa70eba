"""The page in a headless Chromium: pointer, keys, two widths, without JavaScript."""

import shutil

import pytest
import torch

from rgtg_fast.demo.run import inspected, load_assets

api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium"),
]


@pytest.fixture(scope="module")
def seen():
    torch.manual_seed(0)
    assets = load_assets()
    betas = {"base": 0.0, "ARGS": 1.0, "PARGS": 4.0}
    return inspected(assets, assets.prompts["test"][:3], betas, 3)


@pytest.fixture(scope="module")
def browser():
    with api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("size", [(1280, 800), (390, 844)])
def test_candidates_show_by_pointer_and_keys(seen, browser, tmp_path, size):
    page = browser.new_page(viewport={"width": size[0], "height": size[1]})
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.goto(seen.to_html(tmp_path / "page.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
    panel = page.locator("#panel")
    assert not panel.is_visible()
    page.locator("i").nth(5).hover()
    first = seen.texts[0]["base"].tokens[5]
    assert panel.locator("tbody tr").count() == len(first.candidates)
    assert panel.locator("tr.taken td").nth(1).inner_text().strip("␣") == first.text.strip()
    texts = page.locator(".text")
    texts.nth(2).focus()
    for _ in range(8):
        page.keyboard.press("ArrowRight")
    token = seen.texts[0]["PARGS"].tokens[7]
    assert panel.locator("strong").inner_text().strip("“␣”") == token.text.strip()
    assert f"token 7: reward {token.reward:+.3f}".replace("-", "−") in panel.inner_text()
    page.keyboard.press("End")
    assert page.locator("i.on").inner_text() == seen.texts[0]["PARGS"].tokens[-1].text.strip()
    page.keyboard.press("Escape")
    assert not panel.is_visible() and errors == []


def test_without_javascript_the_texts_can_be_read(seen, browser, tmp_path):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(seen.to_html(tmp_path / "page.html").as_uri())
    shown = page.locator(".text").nth(2).inner_text()
    answer = seen.texts[0]["PARGS"]
    assert shown.split() == "".join(token.text for token in answer.tokens).split()
    assert not page.locator(".keys").is_visible()
