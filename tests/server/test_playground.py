"""The playground, used as a person would: in a browser, with the mouse and with keys, on a desk and on a phone.

What the page shows of routing is compared with the record that the API gives for the same question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.keys import Keys

from pointsman import tiny
from pointsman.routed_experts import decode_record
from pointsman.server.playground import FOLDER, SCRIPTS
from pointsman.server.playground import Page as Sent
from tests.server.browser import Page, start_browser
from tests.server.conftest import Server, start_server
from tests.server.fake_engine import SENTENCE, THOUGHT

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "the weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = (
    '</think><minimax:tool_call><invoke name="get_weather"><parameter name="city">Lisbon</parameter>'
    '<parameter name="days">3</parameter></invoke></minimax:tool_call>'
)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with start_browser() as page:
        yield page
        assert page.complaints() == []


@pytest.fixture
def asked(page: Page, server: Server) -> Page:
    """The page of the server with the fake engine, after one answer."""
    page.open(server.url)
    page.ready()
    page.ask("hello")
    return page


def test_the_page_is_one_and_runs_nothing_else(server: Server) -> None:
    with server.client() as client:
        response = client.get("/")
        assert client.head("/").status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy and "*" not in policy
    html = response.text
    assert html.encode() == Sent.load().body
    assert not re.search(r"""(src|href)=["'](?!data:,|#)""", html) and "style=" not in html
    assert not re.search(r"https?://", html) and not re.search(r"\bon\w+=", html)
    assert "localStorage" not in html and "sessionStorage" not in html and "document.cookie" not in html


def test_every_element_that_a_script_looks_for_is_there() -> None:
    html = (FOLDER / "page.html").read_text()
    script = "".join((FOLDER / name).read_text() for name in SCRIPTS)
    assert {path.name for path in FOLDER.iterdir()} == {"page.html", "style.css", *SCRIPTS}
    identifiers = set(re.findall(r'id="([\w-]+)"', html))
    assert set(re.findall(r'find\("([\w-]+)"\)', script)) <= identifiers
    assert set(re.findall(r'(?:for|aria-labelledby|aria-describedby)="([\w-]+)"', html)) <= identifiers


def test_an_answer_streams_with_its_thinking_apart(asked: Page) -> None:
    assert asked.find(".user").text == "hello"
    assert asked.find(".answer .text").text == SENTENCE
    thinking = asked.find(".thinking")
    assert thinking.get_attribute("open") is None
    asked.find(".thinking summary").click()
    assert asked.find(".thinking > div").text == THOUGHT
    meta = asked.find(".meta").text
    assert "first token" in meta and "tokens/s" in meta and re.search(r"\b\d+ tokens\b", meta)
    asked.ask("SAY and again")
    assert [element.text for element in asked.all(".user")] == ["hello", "SAY and again"]


def shown(page: Page) -> list[list[int]]:
    """The experts in the table of the chosen token."""
    cells = page.run("return [...document.querySelectorAll('#token-table td')].map((cell) => cell.textContent)")
    return [[int(expert) for expert in cell.split(", ")] for cell in cells]


def test_a_token_shows_its_experts(page: Page) -> None:
    """With the real engine: the same question over the API has the same record, row for row."""
    question = "There are 15 boxes with 12 eggs in each. How many eggs are there in total?"
    weights = "auto" if (tiny.path() / "model.safetensors").is_file() else "dummy"
    with start_server({"load_format": weights}, program=None) as server:
        server.wait_ready()
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 40}
        with server.client() as client:
            answer = client.post("/v1/chat/completions", json=body | {"return_routed_experts": True, "return_token_ids": True}).json()
        record = decode_record(answer["choices"][0]["routed_experts"])
        prompt, tokens = answer["prompt_token_ids"], answer["choices"][0]["token_ids"]
        page.open(server.url)
        page.ready()
        for name, value in (("temperature", "0"), ("max_tokens", "40")):
            page.run(f"document.querySelector('[name={name}]').value = '{value}'")
        page.ask(question)
        assert len(page.all(".token")) == len(tokens)
        page.all(".token")[3].click()
        for step in range(3, 8):
            assert shown(page) == record.rows_RLK[len(prompt) + step].tolist()
            page.press(Keys.ARROW_RIGHT)
        assert page.run("return document.activeElement.dataset.position") == str(len(prompt) + 8)
        page.press(Keys.END)
        assert "never fed back" in page.find("#token-map").text
        page.find("#token-back").click()
        assert shown(page) == record.rows_RLK[-1].tolist()
        check_marks(page, record.rows_RLK[len(prompt) :])
        page.find(".tokens button").click()
        page.wait(f"document.querySelectorAll('.token').length === {len(prompt) + len(tokens)}")
        page.all(".token")[5].click()
        assert shown(page) == record.rows_RLK[5].tolist()
        page.find("[data-span=all]").click()
        page.wait("document.querySelector('#server-title').textContent.includes('Busiest expert')")
        page.wait("document.querySelector('#server-map canvas')")


def check_marks(page: Page, rows_RLK: Any) -> None:
    """Pick an expert on the map of the answer with the arrow keys: the tokens that used it stand out."""
    page.run("document.querySelector('#answer-map canvas').focus()")
    page.press(Keys.ARROW_DOWN, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ENTER)
    layer, expert = 1, 2
    marked = page.run("return [...document.querySelectorAll('.token')].flatMap((chip, at) => chip.classList.contains('lit') ? [at] : [])")
    assert marked == np.flatnonzero((rows_RLK[:, layer] == expert).any(axis=1)).tolist()
    assert f"Layer {layer}, expert {expert}: {len(marked)} tokens" in page.find("#answer-card .note").text


def test_the_record_can_be_kept(asked: Page) -> None:
    """What the button would save is the record."""
    asked.run(
        "window.saved = null; URL.createObjectURL = (blob) => { blob.text().then((text) => (window.saved = text)); return 'data:,'; };"
    )
    asked.find("#download").click()
    asked.wait("window.saved")
    assert decode_record(json.loads(asked.run("return window.saved"))).num_rows > 0
    asked.driver.refresh()


def test_tool_calls_are_cards_and_results_go_back(page: Page, server: Server) -> None:
    page.open(server.url)
    page.ready()
    page.run(
        "const box = document.querySelector('#tools'); box.value = arguments[0]; box.dispatchEvent(new Event('input'))", json.dumps(TOOLS)
    )
    page.ask(f"SAY {CALL}")
    assert page.find(".call h3 b").text == "get_weather"
    assert [entry.text for entry in page.all(".call dt, .call dd")] == ["city", "Lisbon", "days", "3"]
    page.find(".call textarea").send_keys("sunny")
    page.find(".calls > button").click()
    page.wait("document.querySelectorAll('.answer').length === 2 && !document.querySelector('.busy')")
    assert not page.all(".error")
    page.find("[data-show=settings]").click()
    page.find("#tools").send_keys("!")
    assert "cannot be read" in page.find("#tools-note").text
    page.find("#tools-example").click()
    assert "get_weather" in page.find("#tools-note").text


def test_escape_stops_and_an_error_is_shown(page: Page, server: Server) -> None:
    page.open(server.url)
    page.ready()
    page.find("#message").send_keys("ENDLESS", Keys.ENTER)
    page.wait("document.querySelectorAll('.token').length === 0 && document.querySelector('.meta').textContent.includes('tokens/s')")
    assert page.find("#stop").is_displayed() and not page.find("#send").is_displayed()
    page.press(Keys.ESCAPE)
    page.wait("document.querySelector('.meta').textContent.includes('stopped')")
    assert page.find("#send").is_displayed() and page.run("return document.activeElement.id") == "message"
    page.find("#new-chat").click()
    assert not page.all(".answer") and page.find("#welcome").is_displayed()
    page.run("document.querySelector('[name=temperature]').value = '500'")
    page.ask("hello")
    assert "temperature" in page.find(".error").text
    assert any("400" in complaint for complaint in page.complaints())


def test_enter_sends_and_shift_enter_does_not(page: Page, server: Server) -> None:
    page.open(server.url)
    page.ready()
    page.find("#message").send_keys("one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "two")
    assert not page.all(".answer") and page.run("return document.querySelector('#message').value") == "one\ntwo"
    page.ask("")
    assert page.find(".user").text == "one\ntwo"


def test_text_of_the_model_is_text(page: Page, server: Server) -> None:
    page.open(server.url)
    page.ready()
    page.ask("SAY </think><img src=x onerror=alert(1)><script>document.title='x'</script>")
    assert page.find(".answer .text").text == "<img src=x onerror=alert(1)><script>document.title='x'</script>"
    assert not page.all("#log img, #log script")


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone(page: Page, server: Server, dark: bool) -> None:
    page.open(server.url, width=360, height=740, dark=dark)
    page.ready()
    page.ask("hello " + "long" * 40)
    assert luminance(page) < 0.2 if dark else luminance(page) > 0.8
    for view in ("chat", "routing", "settings"):
        page.find(f"[data-show={view}]").click()
        assert page.run("return document.documentElement.scrollWidth") == 360
        assert page.find(f"#{view}").is_displayed()
        small = "[...document.querySelectorAll('button')].filter((b) => b.offsetParent && b.offsetHeight < 24).length"
        assert page.run(f"return {small}") == 0
    page.find("[data-show=chat]").click()
    page.all(".token")[2].click()
    page.find(".tokens .phone").click()
    assert page.find("#token-map canvas").is_displayed()


def luminance(page: Page) -> float:
    colour = page.run("return getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 765


def test_everything_can_be_reached_with_the_tab_key_and_has_a_name(asked: Page) -> None:
    nameless = asked.run(
        """return [...document.querySelectorAll('button, input, textarea, select, canvas, summary')].filter((element) => {
             const labels = element.labels && element.labels.length;
             return !(labels || element.getAttribute('aria-label') || element.textContent.trim());
           }).map((element) => element.outerHTML)"""
    )
    assert nameless == []
    seen = []
    asked.all(".token")[1].click()
    asked.run("document.activeElement.blur(); document.querySelector('#scroll').scrollTop = 0; document.body.focus()")
    for _ in range(40):
        asked.press(Keys.TAB)
        seen.append(asked.run("const e = document.activeElement; return e.id || e.className || e.parentElement.id || e.tagName"))
    for wanted in ("message", "send", "new-chat", "token-next", "token-map", "answer-map", "tint", "skip"):
        assert any(wanted in name for name in seen), (wanted, seen)
    assert any("token" in name.split() for name in seen), seen


def test_with_a_key_the_page_asks_and_keeps_it_to_itself(page: Page, folder: Path) -> None:
    with start_server({"model_path": str(folder), "served_model_name": "fake"}, {"api_key": "sesame"}) as server:
        server.wait_ready()
        with server.client() as client:
            assert client.get("/").status_code == 200
            assert all(client.get(path).status_code == 401 for path in ("/metrics", "/routing_load", "/v1/models"))
        page.open(server.url)
        page.wait("document.querySelector('#key-dialog').open")
        page.find("#key").send_keys("wrong", Keys.ENTER)
        page.wait("document.querySelector('#key-title').textContent.includes('not accepted')")
        page.find("#key").send_keys("sesame", Keys.ENTER)
        page.ready()
        page.ask("hello")
        assert page.find(".answer .text").text == SENTENCE
        assert "sesame" not in page.run("return document.documentElement.outerHTML + JSON.stringify([localStorage, sessionStorage])")
        page.driver.refresh()
        page.wait("document.querySelector('#key-dialog').open")
    assert any("401" in complaint for complaint in page.complaints())
