"""The page served in this process, and opened in a real browser."""

import contextlib
import json
import threading
import time

import uvicorn
from browser import Browser


@contextlib.contextmanager
def served(app):
    """The address of the application, on a port of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=30)


class Page(Browser):
    """The page, opened."""

    def __init__(self, folder, address, **size):
        super().__init__(folder, **size)
        self.call("Page.navigate", url=address)
        self.until(
            "document.querySelector('#query :is(input, textarea)') && document.querySelector('#grid-0 .message')"
        )

    def until(self, expression, seconds=60):
        end = time.time() + seconds
        while not self.ask(f"!!({expression})"):
            assert time.time() < end, f"never: {expression}"
            time.sleep(0.05)

    def type(self, selector, text):
        left, top, right, bottom = self.box(selector)
        self.click((left + right) / 2, (top + bottom) / 2)
        self.ask(f"(field => (field.focus(), field.select()))(document.querySelector({json.dumps(selector)}))")
        self.call("Input.insertText", text=text)
        self.press("Enter")

    def titles(self, grid=0):
        return self.ask(f"[...document.querySelectorAll('#grid-{grid} figure img')].map(image => image.alt)")

    def choose(self, selector, *files):
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=list(map(str, files)))
