"""The page: type and see. Nothing of a visitor is kept, and nothing but the gallery's pictures is served."""

import base64
import logging
from pathlib import Path

import gradio as gr
from PIL import Image

from imagedex.errors import UserError
from imagedex.page.service import LONGEST_QUERY, MOST_UPLOADS, Card, Question, Service

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "HEIF", "AVIF")  # others start programs, or are no one's photographs
LARGEST_UPLOAD = 2048  # pixels of a side; larger ones are made smaller while they are read
ROUTE = "/imagedex"
HEAD = "<style>footer { display: none !important; }</style>"


def build(service: Service, title: str = "imagedex") -> gr.Blocks:
    """The page over a service; routes for its pictures are in `server`."""
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        parts = (
            asking() | options() | {"like": gr.State([], time_to_live=3600), "uploads": gr.State([], time_to_live=3600)}
        )
        with gr.Row():
            grids = []
            for number in range(len(service.galleries)):  # side by side, on a phone one below the other
                with gr.Column(min_width=320):
                    grids.append(grid(f"grid-{number}"))
        connect(service, parts, grids)
    return page


def asking() -> dict:
    """The line in which one types."""
    wide = {"autofocus": True, "scale": 6, "min_width": 280, "max_length": LONGEST_QUERY}
    narrow = {"scale": 2, "min_width": 140, "max_length": LONGEST_QUERY}
    with gr.Row(equal_height=True):
        return {
            "text": gr.Textbox(
                placeholder="two dogs on a beach", label="What is in the picture?", elem_id="query", **wide
            ),
            "without": gr.Textbox(placeholder="leash", label="but without", elem_id="without", **narrow),
            "ask": gr.Button("Find", variant="primary", scale=1, min_width=90, elem_id="find"),
        }


def options() -> dict:
    """What else can be said: pictures asked with, a picture, a filter, one's own pictures."""
    parts = {
        "chips": gr.Markdown(visible=False, elem_id="chips"),
        "forget": gr.Button("Forget the pictures asked with", size="sm", visible=False, elem_id="forget"),
    }
    heading = "A picture as the question, filters, your own pictures"
    with gr.Accordion(heading, open=False, elem_id="options"), gr.Row():
        seen = {"type": "pil", "sources": ["upload", "clipboard"], "height": 180}
        parts["picture"] = gr.Image(label="Like this picture", elem_id="picture", **seen)
        with gr.Column():
            example = "folder == 'holiday' and width >= 1000"
            parts["where"] = gr.Textbox(label="Only where", placeholder=example, elem_id="where")
            parts["top_k"] = gr.Slider(1, 100, 24, step=1, label="Pictures")
            parts["fold"] = gr.Checkbox(True, label="Fold near-duplicates")
        several = {"file_count": "multiple", "file_types": ["image"], "height": 180}
        label = "Search in your pictures, too (kept while this page is open)"
        parts["files"] = gr.File(label=label, elem_id="files", **several)
    return parts


def connect(service: Service, parts: dict, grids: list[gr.HTML]) -> None:
    """What happens when something is typed, clicked or dropped."""
    said = {"show_progress": "hidden", "concurrency_limit": 4, "api_visibility": "private"}
    asked = [parts[name] for name in ("text", "without", "picture", "where", "top_k", "fold", "like", "uploads")]
    liked = [parts[name] for name in ("like", "chips", "forget")]

    def find(text, without, picture, where, top_k, fold, like, uploads):
        keys = [key for key, _ in like]
        question = Question([text or ""], without or "", keys, picture, where or "", int(top_k), fold)
        answers = [found(service, number, question, uploads) for number in range(len(grids))]
        return answers if len(grids) > 1 else answers[0]

    def more(like, event: gr.EventData):
        like = [*like, (event.key, event.title)][-5:]
        shown = "like " + ", ".join(f"`{title}`" for _, title in like)
        return like, gr.update(value=shown, visible=True), gr.update(visible=True)

    def forget():
        return [], gr.update(visible=False), gr.update(visible=False)

    events = [parts[name].submit for name in ("text", "without", "where")]
    events += [parts["ask"].click, parts["picture"].change, parts["top_k"].release, parts["fold"].change]
    for event in events:
        event(find, asked, grids, **said)
    for one in grids:
        one.select(more, liked[:1], liked, **said).then(find, asked, grids, **said)
    parts["forget"].click(forget, None, liked, **said).then(find, asked, grids, **said)
    own = parts["files"].change(lambda files: read_uploads(service, files), parts["files"], parts["uploads"], **said)
    own.then(find, asked, grids, **said)


def grid(name: str) -> gr.HTML:
    parts = {part: (HERE / f"grid.{part}").read_text(encoding="utf-8") for part in ("html", "css", "js")}
    return gr.HTML(
        {"message": "Type a sentence and press Enter.", "cards": []}, html_template=parts["html"], css_template=parts["css"],
        js_on_load=parts["js"], elem_id=name,
    )  # fmt: skip


def found(service: Service, number: int, question: Question, uploads) -> dict:
    """What a grid shows."""
    try:
        answer = service.answer(number, question, uploads)
    except UserError as error:
        return {"message": literal(str(error)), "cards": []}
    message = "" if answer.cards else "No picture passes the filter."
    cards = [as_shown(number, card) for card in answer.cards]
    name = Path(service.galleries[number].model.name).name
    return {
        "message": message,
        "heading": literal(name) if len(service.galleries) > 1 else "",
        "milliseconds": f"{answer.milliseconds:.0f}",
        "cards": cards,
    }


def literal(text: str) -> str:
    """A text as HTML shows it. What the grid's template gives is read once more, as a template of JavaScript: file names are not
    to be programs there."""
    return "".join(char if char.isalnum() or char in " .,-_/" else f"&#{ord(char)};" for char in text)


def as_shown(number: int, card: Card) -> dict:
    if card.upload:
        source = "data:image/jpeg;base64," + base64.b64encode(card.upload.thumbnail).decode()
        urls = {"thumbnail": source, "full": ""}
    else:
        urls = {"thumbnail": f"{ROUTE}/thumbnail/{number}/{card.key}", "full": f"{ROUTE}/picture/{number}/{card.key}"}
    return urls | {"key": card.key, "title": literal(card.title), "score": f"{card.score:.3f}", "folded": card.folded}


def read_uploads(service: Service, files) -> list:
    """The visitor's pictures, encoded; those that cannot be read are said."""
    read = []
    for file in (files or [])[:MOST_UPLOADS]:
        name = Path(file).name
        try:
            with Image.open(file, formats=FORMATS) as picture:
                picture.draft("RGB", (LARGEST_UPLOAD, LARGEST_UPLOAD))
                picture.thumbnail((LARGEST_UPLOAD, LARGEST_UPLOAD))
                read.append(service.upload(name, picture))
        except Exception as error:  # whatever a visitor's file does to a decoder
            logger.info("an uploaded picture cannot be read: %s", error)
            gr.Warning(f"{name} cannot be read")
        finally:
            Path(file).unlink(missing_ok=True)  # nothing of a visitor is kept
    if files and len(files) > MOST_UPLOADS:
        gr.Warning(f"{len(files) - MOST_UPLOADS} pictures beyond {MOST_UPLOADS} are left out")
    return read
