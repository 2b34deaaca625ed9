"""The page: type and see. Nothing of a visitor is kept, and nothing but the gallery's pictures is served."""

import base64
import logging
from pathlib import Path

import gradio as gr
from PIL import Image

from imagedex.errors import UserError
from imagedex.page.service import MOST_UPLOADS, Card, Question, Service

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
ROUTE = "/imagedex"
HEAD = "<style>footer { display: none !important; }</style>"


def build(service: Service, title: str = "imagedex") -> gr.Blocks:
    """The page over a service; routes for its pictures are in `server`."""
    two = len(service.galleries) > 1
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        like, uploads = gr.State([]), gr.State([])
        with gr.Row(equal_height=True):
            text = gr.Textbox(
                placeholder="two dogs on a beach", label="What is in the picture?", autofocus=True, scale=6, min_width=280,
                elem_id="query",
                max_length=2000,
            )  # fmt: skip
            without = gr.Textbox(
                placeholder="leash", label="but without", scale=2, min_width=140, elem_id="without", max_length=2000
            )
            ask = gr.Button("Find", variant="primary", scale=1, min_width=90, elem_id="find")
        chips = gr.Markdown(visible=False, elem_id="chips")
        forget = gr.Button("Forget the pictures asked with", size="sm", visible=False, elem_id="forget")
        with (
            gr.Accordion("A picture as the question, filters, your own pictures", open=False, elem_id="options"),
            gr.Row(),
        ):
            picture = gr.Image(
                type="pil", sources=["upload", "clipboard"], label="Like this picture", height=180, elem_id="picture"
            )
            with gr.Column():
                where = gr.Textbox(
                    label="Only where", placeholder="folder == 'holiday' and width >= 1000", elem_id="where"
                )
                top_k = gr.Slider(1, 100, 24, step=1, label="Pictures")
                fold = gr.Checkbox(True, label="Fold near-duplicates")
            files = gr.File(
                file_count="multiple", file_types=["image"], label="Search in your pictures, too (kept while this page is open)",
                height=180, elem_id="files",
            )  # fmt: skip
        with gr.Row():
            grids = []
            for number in range(len(service.galleries)):  # side by side, on a phone one below the other
                with gr.Column(min_width=320):
                    grids.append(grid(f"grid-{number}"))

        def find(text, without, picture, where, top_k, fold, like, uploads):
            question = Question(
                [text or ""], without or "", [key for key, _ in like], picture, where or "", int(top_k), fold
            )
            answers = [found(service, number, question, uploads, two) for number in range(len(service.galleries))]
            return answers if two else answers[0]

        asked = [text, without, picture, where, top_k, fold, like, uploads]
        options = {"show_progress": "hidden", "concurrency_limit": 4, "api_visibility": "private"}
        for event in (text.submit, without.submit, where.submit, ask.click, picture.change, top_k.release, fold.change):
            event(find, asked, grids, **options)

        def more(like, event: gr.EventData):
            like = [*like, (event.key, event.title)][-5:]
            shown = "like " + ", ".join(f"`{title}`" for _, title in like)
            return like, gr.update(value=shown, visible=True), gr.update(visible=True)

        for one in grids:
            one.select(more, [like], [like, chips, forget], **options).then(find, asked, grids, **options)
        forget.click(
            lambda: ([], gr.update(visible=False), gr.update(visible=False)), None, [like, chips, forget], **options
        ).then(find, asked, grids, **options)
        files.change(lambda files: read_uploads(service, files), [files], [uploads], **options).then(
            find, asked, grids, **options
        )
    return page


def grid(name: str) -> gr.HTML:
    parts = {part: (HERE / f"grid.{part}").read_text(encoding="utf-8") for part in ("html", "css", "js")}
    return gr.HTML(
        {"message": "Type a sentence and press Enter.", "cards": []}, html_template=parts["html"], css_template=parts["css"],
        js_on_load=parts["js"], elem_id=name,
    )  # fmt: skip


def found(service: Service, number: int, question: Question, uploads, two: bool) -> dict:
    """What a grid shows."""
    try:
        answer = service.answer(number, question, uploads)
    except UserError as error:
        return {"message": str(error), "cards": []}
    message = "" if answer.cards else "No picture passes the filter."
    cards = [as_shown(number, card) for card in answer.cards]
    name = Path(service.galleries[number].model.name).name
    return {
        "message": message,
        "heading": name if two else "",
        "milliseconds": f"{answer.milliseconds:.0f}",
        "cards": cards,
    }


def as_shown(number: int, card: Card) -> dict:
    if card.upload:
        source = "data:image/jpeg;base64," + base64.b64encode(card.upload.thumbnail).decode()
        urls = {"thumbnail": source, "full": ""}
    else:
        urls = {"thumbnail": f"{ROUTE}/thumbnail/{number}/{card.key}", "full": f"{ROUTE}/picture/{number}/{card.key}"}
    return urls | {"key": card.key, "title": card.title, "score": f"{card.score:.3f}", "folded": card.folded}


def read_uploads(service: Service, files) -> list:
    """The visitor's pictures, encoded; those that cannot be read are said."""
    read = []
    for file in (files or [])[:MOST_UPLOADS]:
        name = Path(file).name
        try:
            with Image.open(file) as picture:
                picture.load()
                read.append(service.upload(name, picture))
        except (UserError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            gr.Warning(f"{name} cannot be read")
    if files and len(files) > MOST_UPLOADS:
        gr.Warning(f"{len(files) - MOST_UPLOADS} pictures beyond {MOST_UPLOADS} are left out")
    return read
