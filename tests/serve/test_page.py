"""The page in Chromium, before a front whose rank 0 has no model."""

import re
import struct

import httpx2
import pytest
from browser import Browser, Tab
from fake_ranks import FakeRanks
from front import serving, until
from needs import needs, skip_without

from mlxtp.serve.front import page

pytestmark = pytest.mark.once

MARKDOWN = """think: Two hops are fewer than eight.
# A ring of five

Every machine holds a **slice** of every<br>layer, H<sub>2</sub>O, <u title="x">u</u>.

1. Each rank sends to both neighbours.
2. It forwards what came.

| bytes | two-step |
|---|---:|
| 4,096 | 2.5 ms |

```python
def allreduce(x, comm):
    return sum(comm.allgather(x))
```

![a picture](https://example.org/x.png) and [a page](https://example.org)
"""

HOSTILE = """think: <img src=x onerror="window.harm = 'reasoning'">
<script>window.harm = 'script'</script>
<img src=x onerror="window.harm = 'img'">
<svg onload="window.harm = 'svg'"><a xlink:href="javascript:window.harm = 1">x</a></svg>
<iframe srcdoc="<script>parent.harm = 'iframe'</script>"></iframe>
<math><mtext><table><mglyph><style><img src=x onerror="window.harm = 'math'">
<form action="https://example.org"><input name="key"><button>Send</button></form>
<style>body { display: none }</style>
<p style="position: fixed; inset: 0" id="prompt" class="welcome" onclick="harm=1"></p>
<object data="x"></object><embed src="x"><base href="https://example.org/">
<meta http-equiv="refresh" content="0; url=https://example.org">

[a](javascript:window.harm='link') [b](JaVaScRiPt:harm=1) [c](data:text/html,x)
[d](vbscript:x) <a href="&#106;avascript:window.harm='entity'">e</a>
![f](javascript:harm=1) ![g](https://example.org/leak?all) ![" onerror="harm=1](x)
[h](https://example.org "x\\" onclick=\\"harm=1") <https://example.org/i>
```"><script>harm=1</script>
x
```
call: <img/src=x/onerror=harm=1> {"a": "<img src=x onerror=harm=1>"}
"""


@pytest.fixture(scope="module")
def front():
    with serving(FakeRanks()) as front:
        yield front


@pytest.fixture(scope="module")
def browser(front):
    """Ends before the front does, which waits for those that are connected."""
    skip_without("chromium")
    browser = Browser()
    yield browser
    browser.close()


def ready(browser, front, **screen):
    """The page, when it takes messages."""
    tab = Tab(browser, f"{front.url}/", **screen)
    tab.wait("document.getElementById('state').textContent === 'Ready'")
    return tab


def send(tab, text):
    tab.click("#prompt")
    tab.write(text)
    tab.press("Enter")


def answers(tab, count):
    """The texts of the answers, when there are so many and nothing streams."""
    tab.wait(
        f"document.querySelectorAll('.answer[aria-busy=false]').length === {count}"
        " && document.getElementById('stop').hidden"
    )
    return tab.evaluate(
        "[...document.querySelectorAll('.answer > .markdown')].map(e => e.innerText)"
    )


def said(start):
    """The messages of a request: [(role, content)]."""
    text = bytes(start.prompt).decode().removesuffix("<|assistant|>")
    return re.findall(r"<\|(\w+)\|>(.*?)\n(?=<\||$)", text, re.DOTALL)


def test_headers(front):
    """Nothing but this server's own files runs, and nobody may frame the page."""
    answer = httpx2.get(f"{front.url}/")
    policy = answer.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "script-src 'self'", "style-src 'self'"} < set(policy)
    assert {"frame-ancestors 'none'", "connect-src 'self'"} < set(policy)
    assert "unsafe" not in str(policy)
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "<script>" not in answer.text and "style=" not in answer.text
    # Agents ask so whether the server is there.
    head = httpx2.head(f"{front.url}/")
    assert (head.status_code, head.content) == (200, b"")
    again = {"If-None-Match": answer.headers["etag"]}
    assert httpx2.get(f"{front.url}/", headers=again).status_code == 304
    for name in ("", "../messages.py", "%2e%2e/messages.py", "vendor", "/etc/passwd"):
        answer = httpx2.get(f"{front.url}/page/{name}")
        assert answer.status_code == 404 and "error" in answer.json()


def test_no_address_elsewhere():
    """The page names none, and the libraries' licences lie beside them."""
    for name, file in page.FILES.items():
        if not name.startswith("vendor/"):
            addresses = re.findall(r"https?://[^\s\"'`)]+", file.content.decode())
            assert set(addresses) <= {"http://www.w3.org/2000/svg"}, name
    assert {"vendor/marked.esm.js", "vendor/purify.es.mjs"} < set(page.FILES)
    for name in ("marked.LICENSE", "dompurify.LICENSE"):
        assert (page.FOLDER / "vendor" / name).stat().st_size > 1000


@needs("chromium")
def test_conversation(browser, front):
    """Streamed, stopped, retried, edited, kept, deleted, by keyboard and mouse."""
    tab = ready(browser, front)
    assert tab.evaluate("document.activeElement.id") == "prompt"
    assert tab.evaluate("document.getElementById('send').disabled")
    tab.write("first line")
    tab.press("Enter", shift=True)
    tab.write("second line")
    tab.press("Enter")
    assert answers(tab, 1) == ["first line\nsecond line"]
    assert said(front.fake.starts[-1]) == [("user", "first line\nsecond line")]
    facts = tab.evaluate("document.querySelector('.facts').innerText")
    assert re.match(r"23 tokens · [\d.]+ tokens/s · \d+ cached", facts)

    # What has come is seen before the end. Esc stops it, and the ranks forget it.
    send(tab, "begun\nhang:")
    tab.wait(
        "document.querySelectorAll('.answer > .markdown')[1]?.innerText === 'begun'"
    )
    assert tab.evaluate("document.querySelector('.answer[aria-busy=true]') !== null")
    assert tab.evaluate("document.getElementById('send').hidden")
    tab.press("Escape")
    assert answers(tab, 2)[1] == "begun"
    assert tab.evaluate(
        "[...document.querySelectorAll('.facts')].at(-1).innerText"
    ) == ("stopped")
    until(lambda: front.fake.cancelled[-1:] == [front.fake.starts[-1].id])

    # The same question again: what was answered is not part of it.
    before = front.fake.starts[-1].prompt
    count = len(front.fake.starts)
    tab.click(".answer:last-child footer button:nth-child(2)")
    tab.wait("document.querySelector('.answer[aria-busy=true]')?.innerText === 'begun'")
    assert len(front.fake.starts) == count + 1
    assert front.fake.starts[-1].prompt == before
    tab.click("#stop")
    assert answers(tab, 2)[1] == "begun"

    # An edited question forgets what came behind it; Esc leaves it as it was.
    tab.click(".question footer button:last-child")
    tab.press("Escape")
    assert len(answers(tab, 2)) == 2
    tab.click(".question footer button:last-child")
    tab.wait("document.activeElement.closest('.edit') !== null")
    tab.evaluate("document.activeElement.select()")
    tab.write("edited")
    tab.press("Enter")
    assert answers(tab, 1) == ["edited"]
    send(tab, "and then")
    assert answers(tab, 2) == ["edited", "and then"]
    assert said(front.fake.starts[-1]) == [
        ("user", "edited"),
        ("assistant", "edited"),
        ("user", "and then"),
    ]

    # Both are there after the page was loaded again, with what came of an answer.
    tab.click("#new")
    send(tab, "another\nhang:")
    tab.wait("document.querySelector('.answer > .markdown')?.innerText === 'another'")
    tab.reload()
    tab.wait("document.querySelectorAll('.choose').length === 2")
    until(lambda: front.fake.cancelled[-1:] == [front.fake.starts[-1].id])
    titles = "[...document.querySelectorAll('.choose')].map(e => e.innerText)"
    assert tab.evaluate(titles) == ["another hang:", "edited"]
    tab.click("#list li:first-child .choose")
    assert answers(tab, 1) == ["another"]
    assert tab.evaluate("document.querySelector('.error').hidden")
    tab.click("#list li:last-child .choose")
    assert answers(tab, 2) == ["edited", "and then"]
    tab.click("#list li:last-child .forget")
    assert tab.evaluate(titles) == ["another hang:"]
    tab.click("#notice-action")
    assert answers(tab, 2) == ["edited", "and then"]
    assert len(tab.evaluate(titles)) == 2

    # One that is deleted while it is answered does not come back.
    send(tab, "more\nhang:")
    tab.wait("document.querySelector('.answer[aria-busy=true]')?.innerText === 'more'")
    tab.click("#list li:first-child .forget")
    until(lambda: front.fake.cancelled[-1:] == [front.fake.starts[-1].id])
    assert tab.evaluate(titles) == ["another hang:"]
    assert tab.complaints() == []


@needs("chromium")
def test_what_models_write(browser, front):
    """Markdown is shown as such, and what is hostile does nothing."""
    tab = ready(browser, front)
    send(tab, MARKDOWN)
    answers(tab, 1)
    shown = tab.evaluate("""(() => {
        const of = (selector) =>
            [...document.querySelectorAll(`.answer ${selector}`)]
                .map(e => e.textContent);
        return [of("h1"), of("strong"), of("ol li"), of("td"), of(".code-head span"),
            of("pre"), of("a"), of("sub"), of("u"), of(".reasoning .markdown"),
            of("img")];
    })()""")
    assert shown == [
        ["A ring of five"],
        ["slice"],
        ["Each rank sends to both neighbours.", "It forwards what came."],
        ["4,096", "2.5 ms"],
        ["python"],
        ["def allreduce(x, comm):\n    return sum(comm.allgather(x))\n"],
        ["a picture", "a page"],
        ["2"],
        [],
        ["Two hops are fewer than eight.\n"],
        [],
    ]
    assert not tab.evaluate("document.querySelector('.reasoning').open")

    send(tab, HOSTILE)
    answers(tab, 2)
    tags = set(
        tab.evaluate(
            "[...document.querySelectorAll('.answer *')]"
            ".map(e => e.tagName.toLowerCase())"
        )
    )
    assert "a" in tags and "strong" in tags
    shown = tab.evaluate("[...document.querySelectorAll('.answer')].at(-1).innerText")
    assert "<img src=x onerror=" in shown and "<iframe srcdoc=" in shown
    wrong = {"script", "img", "svg", "iframe", "math", "form", "input", "style", "base"}
    assert not tags & (wrong | {"object", "embed", "meta", "template", "link"})
    addresses = tab.evaluate(
        "[...document.querySelectorAll('.answer a[href]')].map(e => [e.href, e.rel])"
    )
    assert len(addresses) >= 5
    for address, rel in addresses:
        assert address.startswith("https://example.org")
        assert rel == "noopener noreferrer nofollow"
    attributes = tab.evaluate(
        "[...document.querySelectorAll('.answer .markdown *')]"
        ".flatMap(e => e.getAttributeNames())"
    )
    ours = {"class", "tabindex", "type"}
    assert set(attributes) <= {"href", "title", "target", "rel", "align"} | ours
    assert tab.evaluate("document.querySelectorAll('.answer .welcome').length") == 0
    assert tab.evaluate("document.querySelector('.tool-name').textContent") == (
        "Calls <img/src=x/onerror=harm=1>"
    )
    tab.reload()
    tab.click(".choose")
    answers(tab, 2)
    assert tab.evaluate("window.harm ?? null") is None
    assert tab.complaints() == []


@needs("chromium")
def test_settings_and_mistakes(browser, front):
    """Settings go with each request; what went wrong is said in words."""
    tab = ready(browser, front)
    tab.click("#open-settings")
    for name, value in [("system", "be short"), ("seed", "42"), ("top_p", "0.5")]:
        tab.evaluate(f"document.forms['settings-form'].elements.{name}.focus()")
        tab.write(value)
    tab.press("Enter")
    tab.wait("!document.getElementById('settings').open")
    send(tab, "seed:")
    assert answers(tab, 1) == ["42"]
    start = front.fake.starts[-1]
    assert said(start)[0] == ("system", "be short")
    assert (start.settings.top_p, start.settings.temperature) == (0.5, 1.0)

    send(tab, "error: rank 3 on studio3 has gone")
    answers(tab, 2)
    error = "[...document.querySelectorAll('.error')].at(-1).innerText"
    assert tab.evaluate(error) == "rank 3 on studio3 has gone"
    send(tab, "go on")
    answers(tab, 3)
    assert said(front.fake.starts[-1])[-1] == (
        "user",
        "error: rank 3 on studio3 has gone\n\ngo on",
    )
    tab.evaluate(
        "localStorage.setItem('mlxtp.settings', JSON.stringify({max_tokens: 99999}))"
    )
    tab.click("#new")
    send(tab, "too long")
    answers(tab, 1)
    assert "4096" in tab.evaluate(error).replace(",", "")
    tab.evaluate(
        "localStorage.setItem('mlxtp.settings', JSON.stringify({max_tokens: 3}))"
    )
    tab.click(".answer footer button:nth-child(2)")
    assert answers(tab, 1) == ["too"]
    assert tab.evaluate("document.querySelector('.facts').innerText").endswith(
        "ended at the most tokens"
    )

    # A full browser says so, and the conversation goes on.
    tab.evaluate(
        "(() => { let size = 2 ** 22; while (size) { try {"
        "localStorage.setItem('other' + Math.random(), 'x'.repeat(size)); }"
        "catch { size >>= 1; } } })()"
    )
    tab.click("#new")
    send(tab, "one more")
    assert answers(tab, 1) == ["one"]
    assert "storage is full" in tab.evaluate(
        "document.getElementById('notice').innerText"
    )


@needs("chromium")
def test_cluster(browser):
    """The panel follows the ranks from loading to their end."""
    fake = FakeRanks(step_seconds=0.01)
    with serving(fake) as front:
        ranks, is_loaded = front.ranks, front.ranks.ready
        ranks.state, ranks.ready = "loading", None
        ranks.words, ranks.done = "the ranks load the model", 0.5
        tab = Tab(browser, f"{front.url}/")
        state = "document.getElementById('state').textContent"
        tab.wait(f"{state} === 'Loading'")
        assert tab.evaluate("document.getElementById('loading').value") == 0.5
        assert tab.evaluate("document.getElementById('state-words').textContent") == (
            "The ranks load the model"
        )
        assert tab.evaluate("document.getElementById('prompt').placeholder") == (
            "The ranks load the model"
        )
        ranks.state, ranks.ready = "ready", is_loaded
        tab.wait(f"{state} === 'Ready'")
        hosts = "[...document.querySelectorAll('.host h3')].map(e => e.textContent)"
        tab.wait(f"{hosts}.length === 5")
        assert tab.evaluate(hosts) == [f"studio{rank}" for rank in range(5)]
        assert tab.evaluate("document.getElementById('progress').hidden")
        tab.wait(
            "document.querySelector('.meter .value').textContent === '10 / 256 GB'"
        )
        assert tab.evaluate(
            "document.querySelector('.weights').style.width.startsWith('3.5')"
        )
        line = "document.getElementById('line-stroke').getAttribute('d')"
        before = tab.evaluate(line)
        send(tab, "x" * 1000)
        tab.wait("Number(document.getElementById('tokens-a-second').textContent) > 5")
        assert "1 running, 0 waiting" in tab.evaluate(
            "document.getElementById('figures').innerText"
        )
        assert tab.evaluate(line) != before
        # The fake's collectives take longer than its steps.
        tab.wait(
            "document.querySelector('.meter:last-child .value').innerText === '100 %'"
        )
        loop = front.ranks._server.get_loop()
        loop.call_soon_threadsafe(fake._writer.close)
        # What the server's supervisor does, which is not here.
        loop.call_soon_threadsafe(ranks.recover, "studio3 lost: going on with 4 ranks")
        ranks.missing = {"studio3": "it does not answer"}
        tab.wait(f"{state} === 'Recovering'")
        words = "document.getElementById('state-words').textContent"
        assert tab.evaluate(words) == "Studio3 lost: going on with 4 ranks"
        tab.wait(f"{hosts}.length === 6")
        loop.call_soon_threadsafe(ranks.lost, "the ranks have gone")
        tab.wait(f"{state} === 'Lost'")
        assert tab.evaluate(words) == "The ranks have gone"
        answers(tab, 1)
        tab.wait("document.getElementById('send').disabled")
        shown = tab.evaluate("document.querySelector('.error').innerText")
        assert shown == "the ranks have gone"
    tab.wait(f"{words} === 'The server does not answer.'")


@needs("chromium")
def test_key(browser):
    """Asked for where the server wants one, again if it was wrong; kept for the tab."""
    with serving(FakeRanks(), api_keys=("secret",)) as front:
        tab = Tab(browser, f"{front.url}/")
        tab.wait("document.getElementById('key').open")
        tab.write("wrong")
        tab.press("Enter")
        tab.wait("document.getElementById('key-words').innerText.includes('not take')")
        tab.write("secret")
        tab.press("Enter")
        tab.wait("document.getElementById('state').textContent === 'Ready'")
        send(tab, "let in")
        assert answers(tab, 1) == ["let in"]
        assert tab.evaluate("JSON.stringify(localStorage)").count("secret") == 0


@needs("chromium")
def test_looks(browser, front, tmp_path):
    """Nothing lies outside of the screen, every button has a name; screenshots."""
    tab = ready(browser, front)
    send(tab, MARKDOWN)
    answers(tab, 1)
    tab.wait("document.getElementById('hosts').children.length === 5")
    for width, height in [(1280, 800), (390, 844)]:
        for is_dark in (False, True):
            tab.resize(width, height, is_dark)
            name = f"{width}-{'dark' if is_dark else 'light'}"
            is_folded = tab.evaluate(
                "document.getElementById('summary').offsetWidth > 0"
            )
            assert is_folded == (width == 390)
            tab.screenshot(tmp_path / f"{name}.png")
            if is_folded:
                tab.click("#summary")
                tab.wait(
                    "document.getElementById('cluster').getBoundingClientRect().right"
                    " <= innerWidth"
                )
                tab.screenshot(tmp_path / f"{name}-cluster.png")
                tab.press("Escape")
                tab.wait(
                    "getComputedStyle(document.getElementById('cluster')).visibility"
                    " === 'hidden'"
                )
            header = (tmp_path / f"{name}.png").read_bytes()[16:24]
            scale = 2 if is_folded else 1
            assert struct.unpack(">II", header) == (scale * width, scale * height)
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
            ground = tab.evaluate(
                "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/)[0]"
            )
            assert (int(ground) < 60) == is_dark
    nameless = """[...document.querySelectorAll("button")].filter((e) =>
        !e.textContent.trim() && !e.getAttribute("aria-label")).map((e) => e.id)"""
    assert tab.evaluate(nameless) == ["notice-action"]  # hidden until it has one
    assert tab.complaints() == []
