"""The page at ``/`` in a browser, before the real server and before one that waits."""

import contextlib
import itertools
import json
import re

import pytest

from grpocem_jax.runs import checkpoints
from grpocem_jax.serving.engine import Piece
from grpocem_jax.serving.jobs import Progress
from grpocem_jax.serving.tenants import PUBLIC
from tests.browser import CONTRAST
from tests.runs import random_offsets
from tests.serving import EXAMPLES, PROMPT, holding, thin_run

HOSTILE = "<script>window.harmed=1</script><img src=x onerror='window.harmed=1'>"
NAME = "<img src=x onerror='window.harmed=1'><b>loud</b>"
GREEDY = {"temperature": 0, "max_tokens": 16}


@pytest.fixture(scope="module")
def expect():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    playwright.expect.set_options(timeout=20_000)
    return playwright.expect


@pytest.fixture(scope="module")
def loud(served, tmp_path_factory):
    """An adapter of alice with another answer than the base, and with a hostile name."""
    from grpocem_jax.serving import archive

    folder = tmp_path_factory.mktemp("loud") / "adapter"
    run = thin_run()
    offsets = random_offsets(run.policy.zero, seed=4, scale=3.0)
    checkpoints.save_adapter(folder, offsets, run.policy.adapter_config(run.config.adapter), "Card")
    found = served(
        "POST",
        "/v1/adapters/upload",
        params={"name": NAME},
        content=archive.pack(folder),
        headers={"Content-Type": "application/zip"},
    )
    assert found.status_code == 201, found.text
    return found.json()


@pytest.fixture
def opened(served, visit, expect):
    """Opens the page with the key of a tenant; it must ask for nothing elsewhere and not fail."""
    pages = []

    def open_page(tenant="alice", width=1280, scheme="light", server=served):
        shown = visit(f"{server.server.url}/", width, scheme)
        pages.append((shown, server))
        if tenant is not None:
            field(shown, "API key").fill(server.keys[tenant])
            shown.keyboard.press("Enter")
            expect(shown.locator("#work")).to_be_visible()
            expect(shown.locator("#model-0 option")).not_to_have_count(0)
        return shown

    yield open_page
    for shown, server in pages:
        assert shown.problems == []
        for address in shown.requests:
            assert address.startswith((f"{server.server.url}/", "blob:")), address
            assert not any(key in address for key in server.keys.values())
        assert shown.evaluate("window.harmed") is None


def field(shown, label):
    return shown.get_by_label(label, exact=True)


def answer(served, model):
    asked = {"model": model, "prompt": PROMPT, **GREEDY}
    return served("POST", "/v1/completions", json=asked).json()["choices"][0]["text"].strip()


def test_the_page_is_there_for_everyone_and_holds_the_browser_to_it(served):
    page = served("GET", "/", None)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "//" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    again = served("GET", "/", None, headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    code = served("GET", "/page/main.js", None)
    assert code.headers["content-type"].startswith("text/javascript")
    for path in ("/page/", "/page/page.py", "/page/..%2fpage.py", "/page/%2e%2e/page.py"):
        assert served("GET", path, None).status_code == 404, path
    assert served("POST", "/", None).status_code == 405


def test_a_key_is_asked_for_and_kept_as_long_as_the_user_wants(served, visit, expect):
    shown = visit(f"{served.server.url}/")
    key = field(shown, "API key")
    expect(key).to_be_focused()
    expect(shown.locator("#work")).to_be_hidden()
    assert shown.problems == []
    for wrong in ("gj-wrong", "schlüssel"):
        key.fill(wrong)
        shown.keyboard.press("Enter")
        expect(shown.get_by_role("alert")).to_contain_text("The API key is not known")
    assert [x for x in shown.problems if "401" not in x] == []

    key.fill(served.keys["alice"])
    shown.keyboard.press("Enter")
    expect(shown.locator("#tenant")).to_have_text("alice")
    assert shown.evaluate("sessionStorage.length + localStorage.length") == 0
    shown.reload()
    expect(key).to_be_visible()

    key.fill(served.keys["bob"])
    field(shown, "Keep it until this tab is closed").check()
    shown.get_by_role("button", name="Open").click()
    expect(shown.locator("#tenant")).to_have_text("bob")
    shown.reload()
    expect(shown.locator("#tenant")).to_have_text("bob")
    shown.get_by_role("button", name="Forget the key").click()
    expect(key).to_be_visible()
    assert shown.evaluate("sessionStorage.length") == 0
    assert not any(x in address for x in served.keys.values() for address in shown.requests)


def test_base_and_adapter_answer_side_by_side(served, loud, opened, expect):
    shown = opened()
    field(shown, "Prompt").fill(PROMPT)
    shown.get_by_text("How to answer").click()
    field(shown, "Longest answer, in tokens").fill("16")
    model = served.server.catalogue.default
    field(shown, "First model").select_option(model)
    field(shown, "Second model").select_option(label=NAME)
    shown.get_by_role("button", name="Answer").click()
    expect(shown.locator("#compare-status")).to_contain_text("They differ where words are marked.")
    wanted = [answer(served, x) for x in (model, loud["id"])]
    assert wanted[0] != wanted[1]
    for side, text in enumerate(wanted):
        found = shown.locator(f"#answer-{side}")
        assert found.text_content().strip() == text
        assert found.locator("mark").count() >= 1
        expect(shown.locator(f"#note-{side}")).to_contain_text("16 tokens in ")
    field(shown, "Second model").select_option(model)
    shown.keyboard.press("Control+Enter")  # which answers from the prompt alone
    field(shown, "Prompt").press("Control+Enter")
    expect(shown.locator("#compare-status")).to_contain_text("Both answer the same.")
    assert shown.locator("mark").count() == 0
    field(shown, "The prompt is a message in a chat").check()
    field(shown, "Second model").select_option("")
    shown.get_by_role("button", name="Answer").click()
    expect(shown.locator("#compare-status")).to_contain_text("Answered.")
    chat = {"model": model, "messages": [{"role": "user", "content": PROMPT}], **GREEDY}
    found = served("POST", "/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert shown.locator("#answer-0").text_content().strip() == found["content"].strip()
    assert shown.locator("#answer-1").text_content() == ""


def test_pasted_examples_become_an_adapter(served, opened, expect):
    shown = opened()
    field(shown, "Examples").fill("\n\n".join(EXAMPLES))
    expect(shown.locator("#examples-found")).to_contain_text("4 examples, with empty lines between")
    field(shown, "Name").fill("Cold things")
    field(shown, "Generations at most").fill("12")
    shown.evaluate(
        """() => {
            window.seen = [];
            const place = document.getElementById('watch-status');
            new MutationObserver(() => window.seen.push(place.textContent)).observe(
                place, {childList: true, subtree: true, characterData: true});
        }"""
    )
    shown.get_by_role("button", name="Search").click()
    verdict = shown.locator("#verdict")
    expect(verdict).to_be_visible(timeout=60_000)
    assert shown.evaluate("window.seen").count("The search has ended.") == 1

    (record, *_) = served("GET", "/v1/adapters").json()["data"]
    record = served("GET", f"/v1/adapters/{record['id']}").json()
    assert record["name"] == "Cold things"
    assert record["asked"]["examples"] == 4
    assert record["generations"] == 12
    word = "Adapted:" if record["result"]["adapted"] else "Not adapted:"
    expect(shown.locator("#verdict-title")).to_contain_text(word)
    points = shown.locator("#chart path.best").get_attribute("d").replace("M", "L").split("L")[1:]
    assert len(points) == len(record["curve"]) == record["result"]["generations"]
    heights = [float(point.split()[1]) for point in points]
    rises = [a < b for a, b in itertools.pairwise(x["best"] for x in record["curve"])]
    assert rises == [a > b for a, b in itertools.pairwise(heights)]
    rows = shown.locator("#numbers tbody tr")
    assert rows.count() == len(points)
    best = f"{record['curve'][-1]['best']:.4f}".replace("-", "−")
    assert rows.last.locator("td").nth(1).text_content() == best

    shown.get_by_role("button", name="Compare with before").click()
    expect(field(shown, "Second model")).to_have_value(record["id"])
    expect(field(shown, "Prompt")).to_be_focused()

    row = shown.locator("#list li").filter(has_text="Cold things")
    with shown.expect_download() as download:
        row.get_by_role("button", name="Download").click()
    content = served("GET", f"/v1/adapters/{record['id']}/download").content
    path = download.value.path()
    assert path.read_bytes() == content
    assert download.value.suggested_filename == f"{record['id']}.zip"
    field(shown, "Upload an adapter that was downloaded").set_input_files(path)
    expect(shown.locator("#adapters-status")).to_contain_text("is there")
    (newest, *_) = served("GET", "/v1/adapters").json()["data"]
    assert newest["asked"] == {"method": "upload"}
    assert newest["sha256"] == record["sha256"]


def test_prompts_are_adapted_to_by_a_reward_and_a_single_prompt_by_itself(served, opened, expect):
    shown = opened()
    reward = field(shown, "What is to improve")
    names = reward.locator("option").evaluate_all("all => all.map(x => x.value)")
    assert names[0] == ""
    assert {"sentiment", "qa"} <= set(names)
    methods = shown.locator("#method option")
    assert methods.first.get_attribute("value") == "gradient"
    reward.select_option("sentiment")
    expect(shown.locator("#reward-hint")).to_contain_text("JSON object a line, with text, label")
    assert methods.first.get_attribute("value") == "cem"
    words = ("cold", "good", "bad", "warm")
    field(shown, "Examples").fill("The soup was cold.")
    expect(shown.locator("#examples-found")).to_have_text("Each prompt has to be a JSON object.")
    rows = [{"text": f"The soup was {x}.", "label": "negative"} for x in words]
    field(shown, "Examples").fill("\n".join(json.dumps(row) for row in rows))
    expect(shown.locator("#examples-found")).to_have_text("4 prompts.")
    field(shown, "Generations at most").fill("2")
    shown.get_by_role("button", name="Search").click()
    expect(shown.locator("#verdict")).to_be_visible(timeout=120_000)
    expect(shown.locator("#chart-title")).to_have_text("Mean reward of the prompts")
    (record, *_) = served("GET", "/v1/adapters").json()["data"]
    assert (record["asked"]["reward"], record["asked"]["method"]) == ("sentiment", "cem")
    assert record["asked"]["examples"] == 4

    reward.select_option("")
    expect(shown.locator("#reward-hint")).to_be_hidden()
    field(shown, "Method").select_option("gradient")
    field(shown, "Examples").fill("The soup was cold and the room was warm.")
    shown.get_by_role("button", name="Search").click()
    expect(shown.locator("#facts")).to_contain_text("Log-likelihood per token", timeout=120_000)
    (record, *_) = served("GET", "/v1/adapters").json()["data"]
    assert (record["asked"]["reward"], record["asked"]["examples"]) == (None, 1)


def tab_to(shown, locator):
    """Presses Tab until an element has the focus, which then can be seen."""
    for _ in range(40):
        shown.keyboard.press("Tab")
        if locator.evaluate("x => x === document.activeElement"):
            assert locator.evaluate("x => x.matches(':focus-visible')")
            return
    raise AssertionError(shown.evaluate("document.activeElement.outerHTML"))


def test_the_keyboard_is_enough(served, opened, expect):
    shown = opened()
    shown.keyboard.press("Shift+Tab")
    expect(shown.get_by_role("button", name="Forget the key")).to_be_focused()
    tab_to(shown, field(shown, "Prompt"))
    shown.keyboard.insert_text(PROMPT)
    shown.keyboard.press("Control+Enter")
    expect(shown.locator("#compare-status")).to_contain_text(": ")
    tab_to(shown, field(shown, "Examples"))
    shown.keyboard.insert_text("\n".join(x.replace("\n", " ") for x in EXAMPLES))
    tab_to(shown, field(shown, "Name"))
    shown.keyboard.insert_text("By keyboard")
    tab_to(shown, field(shown, "Generations at most"))
    shown.keyboard.insert_text("2")
    shown.keyboard.press("Enter")
    expect(shown.locator("#verdict")).to_be_visible(timeout=60_000)
    expect(shown.locator("#list li").filter(has_text="By keyboard")).to_contain_text("ready")
    (record, *_) = served("GET", "/v1/adapters").json()["data"]
    assert record["name"] == "By keyboard"

    delete = shown.locator("#watch-actions").get_by_role("button", name="Delete")
    for answered in ("Escape", "Enter"):
        tab_to(shown, delete)
        shown.keyboard.press("Enter")
        expect(shown.get_by_role("button", name="Keep it")).to_be_focused()
        if answered == "Enter":
            shown.keyboard.press("Tab")
        shown.keyboard.press(answered)
        expect(shown.get_by_role("dialog")).to_be_hidden()
        if answered == "Escape":
            expect(delete).to_be_focused()
            shown.keyboard.press("Shift+Tab")
    expect(shown.locator("#list li").filter(has_text="By keyboard")).to_have_count(0)
    expect(shown.locator("#watch-title")).to_be_focused()
    assert served("GET", f"/v1/adapters/{record['id']}").status_code == 404


@contextlib.contextmanager
def answering(shown, path, **response):
    """What a path of the server answers for a while."""
    shown.route(path, lambda route: route.fulfill(**response))
    yield
    shown.unroute(path)


def test_text_of_models_users_and_errors_is_never_html(loud, opened, expect):
    shown = opened()
    row = shown.locator("#list li").filter(has_text=NAME)
    expect(row).to_have_count(1)
    field(shown, "Prompt").fill(HOSTILE)
    field(shown, "Second model").select_option(label=NAME)
    chunks = [
        {"choices": [{"index": 0, "text": text, "finish_reason": reason}]}
        for text, reason in ((" a " + HOSTILE, None), (HOSTILE, "stop"))
    ]
    events = "".join(f"data: {json.dumps(x)}\n\n" for x in (*chunks, "[DONE]"))
    events = events.replace('"[DONE]"', "[DONE]")
    with answering(shown, "**/v1/completions", content_type="text/event-stream", body=events):
        shown.get_by_role("button", name="Answer").click()
        expect(shown.locator("#compare-status")).to_contain_text("Both answer the same.")
    assert shown.locator("#answer-1").text_content() == f"a {HOSTILE}{HOSTILE}"
    error = json.dumps({"error": {"message": HOSTILE}})
    with answering(shown, "**/v1/completions", status=500, body=error):
        shown.get_by_role("button", name="Answer").click()
        expect(shown.locator("#compare-error")).to_contain_text(HOSTILE)
    row.get_by_role("button", name="Delete").click()
    expect(shown.get_by_role("dialog")).to_contain_text(NAME)
    shown.keyboard.press("Escape")
    made = "document.querySelectorAll('main img, main b b, main script, dialog img').length"
    assert shown.evaluate(made) == 0
    # Whatever the code does, the browser makes no element of text.
    refused = "() => { try { document.body.innerHTML = '<b>x</b>' } catch (e) { return e.name } }"
    assert shown.evaluate(refused) == "TypeError"
    assert [x for x in shown.problems if "TrustedHTML" not in x and "500" not in x] == []
    shown.problems.clear()


def test_what_the_server_refuses_is_said_in_its_words(served, opened, expect):
    shown = opened("bob")
    field(shown, "Prompt").fill("soup " * 60)
    shown.get_by_role("button", name="Answer").click()
    asked = {"model": served.server.catalogue.default, "prompt": "soup " * 60}
    sentence = served("POST", "/v1/completions", json=asked).json()["error"]["message"]
    expect(shown.locator("#compare-error")).to_contain_text(sentence[1:])
    expect(shown.get_by_role("button", name="Answer")).to_be_enabled()
    field(shown, "Examples").fill('[{"prompt": 7}]')
    shown.get_by_role("button", name="Search").click()
    expect(shown.locator("#adapt-error")).to_contain_text("xamples[0]")
    assert len(shown.problems) == 2
    assert all("400" in x for x in shown.problems)
    shown.problems.clear()


def test_a_user_sees_its_own_and_public_adapters_and_deletes_its_own(served, loud, opened, expect):
    public = served.adapter(PUBLIC, generations=1, name="For all")
    shown = opened("bob")
    expect(shown.locator("#list li")).to_have_count(1)
    row = shown.locator("#list li").first
    expect(row).to_contain_text("For all")
    expect(row).to_contain_text("public")
    assert row.get_by_role("button", name="Delete").count() == 0
    row.get_by_role("button", name="See").click()
    expect(shown.locator("#watch-title")).to_have_text("For all")
    expect(shown.locator("#verdict")).to_be_visible()
    assert shown.locator("#watch-actions").get_by_role("button", name="Delete").count() == 0
    values = shown.locator("#model-1 option").evaluate_all("all => all.map(x => x.value)")
    assert public["id"] in values
    assert loud["id"] not in values
    served("DELETE", f"/v1/adapters/{public['id']}", PUBLIC)


def test_a_search_is_watched_generation_by_generation(tmp_path, opened, expect):
    with holding(tmp_path) as held:
        shown = opened(server=held)
        field(shown, "Examples").fill("\n\n".join(EXAMPLES))
        field(shown, "Method").select_option("cem")
        field(shown, "Generations at most").fill("10")
        shown.get_by_role("button", name="Search").click()
        status = shown.locator("#watch-status")
        expect(status).to_have_text("Waiting for its turn.")
        (job,) = held.server.searches.jobs
        assert job.generations == 10
        job.state = "running"
        held.server.keeper.look()
        expect(status).to_contain_text("Starting")
        for done in (1, 3):
            job.curve = tuple(Progress(i, -2 + i / 8, -3 + i / 8) for i in range(1, done + 1))
            job.generation = done
            held.server.keeper.look()
            expect(status).to_have_text(f"Generation {done} of 10.")
            assert shown.get_by_role("progressbar").evaluate("x => [x.value, x.max]") == [done, 10]
        expect(shown.locator("#chart-text")).to_contain_text("−1.875 after the first generation")
        assert shown.locator("#chart path.mean").get_attribute("d").count("L") == 2
        assert shown.get_by_role("img", name="How well the examples are predicted").count() == 1

        # Another visit finds the search that is under way.
        later = opened(server=held)
        expect(later.locator("#watch-status")).to_have_text("Generation 3 of 10.")
        shown.get_by_role("button", name="Cancel the search").click()
        shown.get_by_role("button", name="Cancel it").click()
        expect(shown.locator("#list li")).to_have_count(0)
        expect(shown.locator("#watch-title")).to_have_text("No search yet")
        assert job.state == "cancelled"
        expect(later.locator("#watch-error")).to_contain_text("there is no such adapter")
        assert all("404" in x for x in later.problems)
        later.problems.clear()


def test_an_answer_is_shown_as_it_comes_and_can_be_stopped(tmp_path, opened, expect):
    with holding(tmp_path) as held:
        shown = opened(server=held)
        field(shown, "Prompt").fill(PROMPT)
        shown.get_by_role("button", name="Answer").click()
        (ticket,) = held.server.engine.wait_for(1)
        ticket.emit(Piece(" cold", 1, None))
        expect(shown.locator("#answer-0")).to_have_text("cold")
        ticket.emit(Piece(" and wet", 3, None))
        expect(shown.locator("#answer-0")).to_have_text("cold and wet")
        shown.get_by_role("button", name="Stop").click()
        expect(shown.locator("#compare-status")).to_have_text("Stopped.")
        expect(shown.get_by_role("button", name="Answer")).to_be_enabled()
        assert ticket.cancelled.wait(10)
        expect(shown.locator("#answer-0")).to_have_text("cold and wet")


def test_a_search_is_watched_again_after_the_connection_was_cut_off(tmp_path, opened, expect):
    with holding(tmp_path) as held:
        shown = opened(server=held)
        field(shown, "Examples").fill("\n\n".join(EXAMPLES))
        with answering(shown, "**/events", content_type="text/event-stream", body=": \n\n"):
            shown.get_by_role("button", name="Search").click()
            expect(shown.locator("#watch-error")).to_contain_text("trying again")
        (job,) = held.server.searches.jobs
        job.state, job.error = "failed", "the adapter has no memory; give fewer examples"
        held.server.keeper.look()
        expect(shown.locator("#verdict")).to_contain_text("The search failed. The adapter has no")
        expect(shown.locator("#watch-error")).to_be_hidden()
        expect(shown.locator("#list li")).to_contain_text("failed")


def test_what_came_of_a_search_is_said_in_words(opened):
    shown = opened(None)
    result = {
        "fitness_before": -2.0, "fitness_after": -1.5, "adapted": True, "held_back_gain": 0.25,
        "note": "", "fitness_unit": "nats/token",
    }  # fmt: skip
    cases = {
        "gain": {"result": result},
        "start": {"result": {**result, "adapted": False, "held_back_gain": 0.01}},
        "worse": {"result": {**result, "adapted": False, "held_back_gain": -1.0}},
        "note": {
            "result": {**result, "adapted": False, "held_back_gain": None, "note": "too few tokens"}
        },
        "reward": {"result": {**result, "fitness_unit": "reward"}},
        "ungated": {"result": {**result, "held_back_gain": None}},
        "failed": {"status": "failed", "error": "no memory; give fewer"},
        "interrupted": {"status": "interrupted", "error": "the server ended"},
    }
    said = shown.evaluate(
        """async cases => {
            const { verdict } = await import('/page/words.js');
            return Object.fromEntries(Object.entries(cases).map(([name, record]) => {
                const { title, text } = verdict({ status: 'ready', name: '', ...record }, 'gpt2');
                return [name, `${title} ${text}`];
            }));
        }""",
        cases,
    )
    for name, fragments in {
        # exp(0.25) is 1.284, exp(0.01) 1.010, and exp(1) 2.718.
        "gain": ["Adapted:", "28% more probable", "+0.250 nats"],
        "start": ["Not adapted: nothing did better", "1.0% more probable", "from chance", "gpt2"],
        "worse": ["Not adapted:", "2.7 times less probable", "−1.000 nats"],
        "note": ["Not adapted: too few tokens."],
        "reward": ["Adapted:", "the mean reward changed by +0.250"],
        "ungated": ["Adapted.", "switched off"],
        "failed": ["The search failed.", "no memory; give fewer"],
        "interrupted": ["Interrupted.", "the server ended"],
    }.items():
        for fragment in fragments:
            assert fragment in said[name], name
    assert "chance" not in said["worse"]


PASTED = [
    ("", []),
    ("one\ntwo\n", ["one", "two"]),
    ("one\nmore\n\n \ntwo\n", ["one\nmore", "two"]),
    ("a => b\n\nc\nd =>  e f ", [["a", " b"], ["c\nd", " e f"]]),
    ("a =>\nb", ["a", "b"]),
    ('["x", {"prompt": "p", "completion": "c"}]', ["x", ["p", "c"]]),
    ('{"text": "x"}\n\n{"text": "y"}\n', [["x"], ["y"]]),
    ("[no JSON\n{nor this", ["[no JSON", "{nor this"]),
]
"""What is pasted, and the examples: strings, or the values of objects."""


def test_examples_are_read_as_they_are_pasted(opened):
    found = opened(None).evaluate(
        """async pasted => {
            const { readExamples } = await import('/page/words.js');
            return pasted.map(x => readExamples(x, ' ').examples);
        }""",
        [pasted for pasted, _ in PASTED],
    )
    values = [[list(x.values()) if isinstance(x, dict) else x for x in each] for each in found]
    assert values == [examples for _, examples in PASTED]
    assert found[3][0].keys() == {"prompt", "completion"}


def test_what_differs_between_two_answers_is_found(opened):
    read = "async ([a, b]) => (await import('/page/words.js')).differences(a, b)"
    shown = opened(None)
    found = shown.evaluate(read, ["the old cat sat", "the cat sat down"])
    assert found == [["the ", True], ["old", False], [" cat sat", True]]
    assert shown.evaluate(read, ["", "a"]) == []
    assert shown.evaluate(read, [" a b", "c"]) == [[" ", True], ["a b", False]]


@pytest.mark.parametrize("width", [320, 1280])
def test_no_width_needs_scrolling_sideways(served, loud, opened, expect, width):
    shown = opened(width=width)
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    field(shown, "Prompt").fill(PROMPT)
    field(shown, "Examples").fill("x" * 300)
    shown.get_by_role("button", name="Answer").click()
    expect(shown.locator("#compare-status")).to_contain_text(re.compile("marked|the same"))
    made = served.adapter(generations=2, name="N" * 64)
    shown.get_by_role("button", name="Refresh").click()
    row = shown.locator("#list li").filter(has_text="N" * 64)
    row.get_by_role("button", name="See").click()
    expect(shown.locator("#verdict")).to_be_visible()
    shown.evaluate("document.querySelectorAll('details').forEach(x => x.open = true)")
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    small = shown.locator("button:visible, select:visible, input:visible").evaluate_all(
        "all => all.filter(x => !x.matches('.link, [type=checkbox]')"
        " && x.getBoundingClientRect().height < 44).map(x => x.outerHTML)"
    )
    assert small == []
    row.get_by_role("button", name="Delete").click()
    assert shown.evaluate("document.documentElement.scrollWidth") == width
    shown.get_by_role("button", name="Delete it").click()
    expect(row).to_have_count(0)
    assert served("GET", f"/v1/adapters/{made['id']}").status_code == 404


def test_light_and_dark_can_be_read(opened, loud):
    grounds = set()
    for scheme in ("light", "dark"):
        shown = opened(scheme=scheme)
        found = shown.evaluate(
            """() => {
                const ground = x => {
                    const own = getComputedStyle(x).backgroundColor;
                    return own === 'rgba(0, 0, 0, 0)' ? ground(x.parentElement) : own;
                };
                document.querySelectorAll('.error, #verdict, #door').forEach(x => x.hidden = false);
                return [...document.querySelectorAll(
                    'h1, h2, h3, p, label, button, input, .state, code, summary'
                )].map(x => [x.outerHTML.slice(0, 80), getComputedStyle(x).color, ground(x)]);
            }"""
        )
        assert len(found) > 50
        read = f"all => all.map(({CONTRAST}))"
        contrasts = shown.evaluate(read, [[ink, ground] for _, ink, ground in found])
        assert [x[0] for x, c in zip(found, contrasts, strict=True) if c < 4.5] == [], scheme
        grounds.add(shown.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(grounds) == 2


def test_a_screen_reader_finds_labels_landmarks_headings_and_news(opened, loud):
    shown = opened()
    for role in ("banner", "main", "contentinfo"):
        assert shown.get_by_role(role).count() == 1
    for name in ("Compare", "Adapt", "Adapters"):
        assert shown.get_by_role("region", name=name, exact=True).count() == 1
    levels = shown.evaluate(
        """() => [...document.querySelectorAll('h1, h2, h3')]
            .filter(x => x.checkVisibility()).map(x => Number(x.tagName[1]))"""
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = shown.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, #list button')].filter(
            x => !(x.labels?.[0]?.textContent.trim() || x.ariaLabel)).map(x => x.outerHTML)"""
    )
    assert nameless == []
    news = "[...document.querySelectorAll('[role=status], [role=alert]')].length"
    assert shown.evaluate(news) >= 9
    names = shown.locator("#list button").evaluate_all("all => all.map(x => x.ariaLabel)")
    assert len(names) == len(set(names))
