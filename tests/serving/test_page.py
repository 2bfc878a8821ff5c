"""The page at / in a real browser, where there is one: columns that stream, tokens that are marked, and nothing that becomes markup."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from served import Served, serving, until

from runtimes.artifacts.bundle import Bundle
from runtimes.serving.settings import ServeSettings

pytest.importorskip("playwright", reason="the page is tested by playwright, which is not installed: pip install playwright")
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
HOSTILE = '<img src="data:," onerror="document.title=\'broken\'">'


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is on PATH: {', '.join(BROWSERS)}; apt-get install chromium")
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def keyed(bundle: Bundle) -> Iterator[Served]:
    with serving(bundle, ServeSettings(api_keys=("sk-one",)), slow=0.01) as each:
        yield each


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """Whose console says nothing."""
    opened = browser.new_page(viewport={"width": 1100, "height": 700})
    opened.set_default_timeout(20_000)
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    opened.close()
    assert not [each for each in said if " 401 " not in each and " 400 " not in each]  # a browser's own words for an answer's status


def ready(page: Page, served: Served) -> None:
    page.goto(served.url)
    expect(page.get_by_label("Adapter", exact=True).locator("option")).to_have_text(["none", "ends", "prompt", "all"])


def compare(page: Page) -> None:
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("status")).to_have_text("Answers are there", timeout=20_000)


def test_it_needs_nothing_from_elsewhere(served: Served) -> None:
    answer = served.http().get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "http" not in answer.text.replace("http-equiv", "") and "innerHTML" not in answer.text
    assert "/" not in served.http().get("/openapi.json").json()["paths"]


def test_base_and_adapters_side_by_side(page: Page, served: Served) -> None:
    ready(page, served)
    expect(page.get_by_label("API key")).to_be_hidden()
    page.get_by_label("Prompt", exact=True).fill("The fox")
    page.get_by_label("Second adapter", exact=True).select_option("all")
    page.get_by_label("Strength").nth(1).fill("0.5")
    page.get_by_label("New tokens").fill("12")
    page.keyboard.press("Control+Enter")
    expect(page.get_by_role("status")).to_have_text("Answers are there", timeout=20_000)
    expect(page.get_by_role("heading", level=2)).to_have_text(["Base", "ends", "all at 0.5"])
    for title, model, strength in (("Base", "base", None), ("ends", "ends", None), ("all at 0.5", "all", 0.5)):
        ask: dict[str, Any] = {"messages": [{"role": "user", "content": "The fox"}], "max_tokens": 12, "temperature": 0}
        want = served.client().chat.completions.create(model=model, **ask, extra_body={"strength": strength} if strength else {})
        column = page.get_by_role("region", name=f"Answer of {title}", exact=True)
        assert column.text_content() == want.choices[0].message.content
        marks, plain = column.locator("mark").count(), column.locator("span").count()
        assert (marks > 0 and plain == 1) if model == "all" else not marks  # the last token is not fed
    figures = page.locator(".figures").all_inner_texts()
    assert all("first token" in each and "tokens/s" in each and "12 tokens" in each for each in figures)
    page.get_by_text("Prompt, as the model read it").nth(1).click()
    prompt = page.locator(".prompt").nth(1)
    assert prompt.locator("mark").all_text_contents() == ["u", "s", " fox", " "] and prompt.text_content() == "user: The fox "
    assert page.locator(".prompt").nth(0).locator("mark").count() == 0


def test_the_keyboard_alone_and_an_end_before_the_end(page: Page, keyed: Served) -> None:
    page.goto(keyed.url)
    key = page.get_by_label("API key")
    expect(key).to_be_focused()
    page.keyboard.type("sk-wrong\n")
    expect(page.get_by_role("alert").first).to_have_text("the API key is not known")
    key.fill("sk-one")
    key.press("Enter")
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    page.keyboard.press("Control+a")
    page.keyboard.type("Hi")
    page.get_by_label("New tokens").fill("55")
    page.keyboard.press("Control+Enter")
    expect(page.locator(".answer span").first).to_be_attached()
    page.keyboard.press("Escape")
    expect(page.get_by_role("status")).to_have_text("Answers are there")
    expect(page.locator(".figures").first).to_contain_text("stopped")
    until(lambda: keyed.metric("reft_requests_running") == 0)
    assert not any("sk-" in line for line in keyed.lines)


def test_errors_are_shown_where_they_belong(page: Page, served: Served) -> None:
    ready(page, served)
    page.get_by_label("New tokens").fill("2000")
    compare(page)
    assert all("at most 1024 are given" in each for each in page.locator(".column .wrong").all_inner_texts())
    page.get_by_label("New tokens").fill("")
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("alert").first).to_have_text("\u201cNew tokens\u201d is not a number")


def test_what_a_model_or_a_server_says_is_never_markup(page: Page, served: Served) -> None:
    """The answer is held to a constant; no adapter can have such a name, so the list is another server's."""

    def hold(route: Route) -> None:
        body = json.loads(route.request.post_data or "")
        schema = {"name": "x", "schema": {"const": "<img src=x onerror=alert(1)>"}}
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
        route.continue_(post_data=json.dumps({**body, "model": "all"}))

    page.route("**/v1/chat/completions", hold)
    page.route("**/v1/adapters", lambda route: route.fulfill(json={"data": [{"id": HOSTILE}]}))
    page.on("dialog", lambda _: pytest.fail("a script ran"))
    page.goto(served.url)
    expect(page.get_by_label("Adapter", exact=True).locator("option")).to_have_text(["none", HOSTILE])
    page.get_by_label("Prompt", exact=True).fill("<b>x</b>")
    page.get_by_label("New tokens").fill("45")
    compare(page)
    assert page.locator("img, b").count() == 0
    assert page.get_by_role("heading", level=2).all_text_contents() == ["Base", HOSTILE]
    assert "<img src=x onerror=alert(1)>" in page.locator(".answer").first.inner_text()
    assert "<b>x</b>" in (page.locator(".prompt").first.text_content() or "")
    assert "side by side" in page.title()


def test_markup_that_came_in_all_the_same_would_not_run(browser: Browser, served: Served) -> None:
    """The policy's part: it knows no script but the page's own."""
    page = browser.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.route(f"{served.url}/", _with_script)
    page.goto(served.url)
    expect(page.get_by_label("Adapter", exact=True).locator("option")).to_have_count(4)
    assert "side by side" in page.title() and page.locator("img").count() == 1
    assert any("Content Security Policy" in each for each in said)
    page.close()


def _with_script(route: Route) -> None:
    answer = route.fetch()
    route.fulfill(response=answer, body=answer.text().replace("</main>", f"<script>document.title='broken'</script>{HOSTILE}</main>"))
