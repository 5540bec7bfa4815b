"""The page at `/` of a server that tells of itself: whole by itself, and made of what /status says.

No browser is at hand where the tests run, so the page is taken apart, and its script runs in node, where that is, on a stand-in for a
document.
"""

import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from support.model import pattern
from support.process import run
from support.server import KI, MI
from support.stores import free_port
from support.endpoints import ask

pytestmark = pytest.mark.file_only

# A document as far as the script knows one: elements that keep what is put into them.
STAND_IN = """
const fs = require("fs");
const [page, ...answers] = JSON.parse(fs.readFileSync(0, "utf8"));
class Element {
  constructor(name) { this.name = name; this.children = []; this.dataset = {}; this.attributes = {}; this.text = ""; }
  appendChild(child) { this.children.push(child); return child; }
  replaceChildren(...children) { this.children = children; }
  setAttribute(key, value) { this.attributes[key] = value; }
  get firstElementChild() { return this.children[0]; }
  set textContent(text) { this.text = text; }
  get textContent() { return this.text + this.children.map((child) => child.textContent).join("|"); }
}
const ids = {}, paths = [];
for (const id of page.ids) { ids[id] = new Element(id); ids[id].appendChild(new Element("child")); }
for (const data of page.data) { const element = new Element("data"); element.dataset = data; paths.push(element); }
global.document = {
  getElementById: (id) => ids[id],
  querySelectorAll: () => paths,
  createElement: (name) => new Element(name),
};
let turn = 0;
global.fetch = async () => {
  if (turn >= answers.length) throw new Error("it is gone");
  return { json: async () => answers[turn++] };
};
global.setTimeout = (look) => { if (turn < answers.length || !global.over) { global.over = turn >= answers.length; queueMicrotask(look); } };
process.on("exit", () => console.log(JSON.stringify({
  said: Object.fromEntries(paths.map((element) => [element.dataset.path, element.textContent])),
  parts: Object.fromEntries(Object.entries(ids).map(([id, element]) => [id, element.textContent])),
  before: global.seen,
})));
"""


class Parts(HTMLParser):
    """What of the page the tests look at."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.data, self.names, self.outside, self.script = [], [], [], [], ""
        self.within = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.within = tag
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if "data-path" in attributes:
            self.data.append({"path": attributes["data-path"], **({"as": attributes["data-as"]} if "data-as" in attributes else {})})
        if tag == "meta" and "name" in attributes:
            self.names.append((attributes["name"], attributes["content"]))
        self.outside += [value for key, value in attributes.items() if key in ("src", "href", "action", "data")]

    def handle_data(self, data):
        if self.within == "script":
            self.script += data


@pytest.fixture
def told(make_volume, make_server):
    """The page, and what /status says before and after some writes."""
    address = f"127.0.0.1:{free_port()}"
    env = {"HYPERNBD_NBD_URI": "nbd+unix:///?socket=/run/it's"}
    server = make_server(make_volume(64 * MI), env=env, metrics=address, checkpoint_interval="1h").start()
    page = ask(address, "/")
    with server.connect() as client:
        client.pwrite(pattern(1 * MI, 1), 0)
        client.flush()
        first = ask(address, "/status").json
        client.pwrite(pattern(1 * MI, 2), 1 * MI)
        client.flush()
        second = ask(address, "/status").json
    return page, first, second


def test_the_page_is_whole_by_itself(told):
    page, _, _ = told
    parts = Parts(page.text)
    assert page.status == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert parts.outside == [] and not re.search(r"https?://|@import|url\(", page.text)
    assert ("viewport", "width=device-width, initial-scale=1") in parts.names
    assert ("color-scheme", "light dark") in parts.names and "prefers-color-scheme: dark" in page.text
    # On 400 pixels: nothing has a width that is more, and what is wide scrolls by itself.
    widths = [int(px) for px in re.findall(r"(?:^|[;{ ])(?:min-)?width:\s*(\d+)px", page.text)]
    assert all(width <= 368 for width in widths)
    assert "overflow-x: auto" in page.text and "overflow-wrap: anywhere" in page.text
    assert page.text.index('id="problems"') < page.text.index("<h1"), "problems come first"
    assert set(re.findall(r'\$\("([\w-]+)"\)', parts.script)) == set(parts.ids)


def test_what_the_page_shows_is_told(told):
    page, first, _ = told
    parts = Parts(page.text)
    assert len(parts.data) > 15
    for data in parts.data:
        value = first
        for key in data["path"].split("."):
            if value is None and data["path"].startswith("space."):
                break  # counted after the first round of a retention
            assert key in value, data["path"]
            value = value[key]
    assert [entry["checkpoint"] for entry in first["volume"]["recent"]] == [1]


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node")
def test_the_script_shows_it(told, tmp_path):
    page, first, second = told
    second["problems"] = ["it <b>burns</b>"]
    parts = Parts(page.text)
    script = tmp_path / "page.js"
    script.write_text(STAND_IN + parts.script.replace('"use strict";', ""))
    given = json.dumps([{"ids": parts.ids, "data": parts.data}, first, second])
    done = run("node", script, stdin=given)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    said, drawn = shown["said"], shown["parts"]
    assert said["url"] == first["url"] and said["state"] == "open"
    assert said["volume.size_bytes"] == "64.0 MiB" and said["volume.undurable_age_s"] == "none"
    assert said["requests.write.bytes"].endswith("/s") and said["requests.write.bytes"] != "0 B/s"
    assert "write|" in drawn["requests"] and "flush|" in drawn["requests"] and "trim" not in drawn["requests"]
    assert drawn["checkpoints"].startswith("2|") and "|1|" in drawn["checkpoints"], "the newest first"
    command = "mkdir -p checkpoint-2 && nbdfuse -r checkpoint-2 'nbd+unix:///@2?socket=/run/it%27s'"
    assert command in drawn["checkpoints"]
    assert drawn["problems"] == "the server does not answer: it is gone", "after the last answer"
