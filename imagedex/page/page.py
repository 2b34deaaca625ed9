"""The page: type and see. Nothing of a visitor is kept, and nothing but the gallery's pictures is served."""

import asyncio
import base64
from pathlib import Path

import gradio as gr

from imagedex.errors import UserError
from imagedex.page import trie_drawing
from imagedex.page.answers import LONGEST_QUERY, Answer, Card, Question, knows_when_nothing_matches, writes
from imagedex.page.service import Service
from imagedex.page.uploads import read_upload, read_uploads

HERE = Path(__file__).parent
ROUTE = "/imagedex"
LETTERS = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "monospace")}  # none is fetched
LOOKS = gr.themes.Default(primary_hue="indigo", neutral_hue="zinc", radius_size="lg", **LETTERS).set(
    body_background_fill="white",
    body_text_color_subdued="*neutral_500",
    block_label_background_fill="transparent",
    block_label_text_size="13px",
    block_title_text_size="13px",
    block_title_text_weight="500",
    block_shadow="none",
    input_border_color_focus="*primary_500",
    input_shadow_focus="none",
)
KEEP = 0.9  # the share of right pictures that the cut-off keeps


def build(service: Service, title: str = "imagedex", keep: float | None = None) -> gr.Blocks:
    """The page over a service; routes for its pictures are in `server`.

    Args: keep, the cut-off's share, with which it is set from the start.
    """
    with gr.Blocks(title=title, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        kept = {name: gr.State([], time_to_live=3600) for name in ("like", "uploads")}
        kept["seen"] = gr.State(None, time_to_live=3600)
        gr.HTML(f"<p><b>{literal(title)}</b><span>{counted(service)}</span></p>", elem_id="head")
        parts = asking() | cut_off(service, keep) | options(service) | kept
        with gr.Row():
            grids = []
            for number in range(len(service.galleries)):  # side by side, on a phone one below the other
                with gr.Column(min_width=320):
                    grids.append(grid(f"grid-{number}"))
        connect(service, parts, grids, keep or KEEP)
    return page


def counted(service: Service) -> str:
    return f"{len(service.galleries[0]):,} pictures"


def asking() -> dict:
    """The line in which one types."""
    line = {"max_lines": 1, "max_length": LONGEST_QUERY}
    wide, narrow = {"autofocus": True, "scale": 6, "min_width": 280}, {"scale": 2, "min_width": 140}
    with gr.Row(equal_height=True, elem_id="asking"):
        return {
            "text": gr.Textbox(
                placeholder="two dogs on a beach", label="What is in the picture?", elem_id="query", **wide, **line
            ),
            "without": gr.Textbox(placeholder="leash", label="but without", elem_id="without", **narrow, **line),
            "ask": gr.Button("Find", variant="primary", scale=1, min_width=90, elem_id="find"),
        }


def cut_off(service: Service, keep: float | None) -> dict:
    """The control is there where a model knows when nothing matches."""
    shown = any(map(knows_when_nothing_matches, service.galleries))
    label = "Hide what probably does not match"
    box = gr.Checkbox(shown and keep is not None, label=label, visible=shown, container=False, elem_id="keep")
    return {"keep": box}


def options(service: Service) -> dict:
    """What else can be said: pictures asked with, a picture, a filter, one's own pictures."""
    with gr.Row(elem_id="asked-with"):
        parts = {
            "chips": gr.Markdown(visible=False, elem_id="chips"),
            "forget": gr.Button("Forget", size="sm", visible=False, elem_id="forget", scale=0, min_width=90),
        }
    heading = "A picture, a filter, your own pictures"
    with gr.Accordion(heading, open=False, elem_id="options"), gr.Row():
        # the file as it was sent: what is no picture is not decoded
        seen = {"type": "filepath", "image_mode": None, "sources": ["upload", "clipboard"], "height": 180}
        parts["picture"] = gr.Image(label="Like this picture", elem_id="picture", buttons=[], **seen)
        with gr.Column():
            example = "folder == 'holiday' and width >= 1000"
            parts["where"] = gr.Textbox(label="Only where", placeholder=example, elem_id="where")
            parts["top_k"] = gr.Slider(1, 100, 24, step=1, label="Pictures")
            parts["fold"] = gr.Checkbox(True, label="Fold near-duplicates")
        several = {"file_count": "multiple", "file_types": ["image"], "height": 180}
        label = "Search these of mine, too"
        taken = not any(map(writes, service.galleries))  # what has no identifier cannot be found
        parts["files"] = gr.File(label=label, elem_id="files", visible=taken, **several)
    return parts


def connect(service: Service, parts: dict, grids: list[gr.HTML], share: float) -> None:
    """What happens when something is typed, clicked or dropped."""
    # past Gradio's queue, which costs more than an answer: questions wait in the service, and hold no thread
    said = {"show_progress": "minimal", "queue": False, "api_visibility": "private", "trigger_mode": "always_last"}
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    names = ("text", "without", "seen", "where", "top_k", "fold", "keep", "like", "uploads")
    asked, liked = [parts[name] for name in names], [parts[name] for name in ("like", "chips", "forget")]

    async def find(text, without, seen, where, top_k, fold, keep, like, uploads):
        keys = [key for key, _ in like]
        question = Question([text or ""], without or "", keys, seen, where or "", int(top_k), fold)
        question.keep = share if keep else None
        shown = [found(service, number, question, uploads) for number in range(len(grids))]
        answers = await asyncio.gather(*shown)
        return answers if len(grids) > 1 else answers[0]

    def more(like, event: gr.EventData):
        like = [*like, (event.key, event.title)][-5:]
        shown = "like " + ", ".join(f"`{title}`" for _, title in like)
        return like, gr.update(value=shown, visible=True), gr.update(visible=True)

    def forget():
        return [], gr.update(visible=False), gr.update(visible=False)

    def dropped(file):
        return read_upload(service, file, gr.Warning) if file else None

    events = [parts[name].submit for name in ("text", "without", "where")]
    events += [parts["ask"].click, parts["top_k"].release, parts["fold"].change, parts["keep"].change]
    for event in events:
        event(find, asked, grids, **said)
    for one in grids:
        one.select(more, liked[:1], liked, **quiet).then(find, asked, grids, **said)
    parts["forget"].click(forget, None, liked, **quiet).then(find, asked, grids, **said)
    parts["picture"].change(dropped, parts["picture"], parts["seen"], **quiet).then(find, asked, grids, **said)
    own = parts["files"].change(
        lambda files: read_uploads(service, files, gr.Warning), parts["files"], parts["uploads"], **quiet
    )
    own.then(find, asked, grids, **said)


def grid(name: str) -> gr.HTML:
    parts = {part: (HERE / f"grid.{part}").read_text(encoding="utf-8") for part in ("html", "css", "js")}
    value = {"message": "Type a sentence and press Enter.", "hint": "Arrows walk, Enter enlarges, m finds more like it.",
             "cards": []}  # fmt: skip
    return gr.HTML(value, html_template=parts["html"], css_template=parts["css"], js_on_load=parts["js"], elem_id=name)


async def found(service: Service, number: int, question: Question, uploads) -> dict:
    """What a grid shows."""
    gallery = service.galleries[number]
    if not knows_when_nothing_matches(gallery):
        question.keep = None
    try:
        answer = await asyncio.wrap_future(service.ask(number, question, uploads))
    except UserError as error:
        return {"message": literal(str(error)), "cards": []}
    shown = as_shown(number, answer)
    if len(service.galleries) > 1:
        shown["heading"] = literal(Path(gallery.model.name).name)
    return shown


def as_shown(number: int, answer: Answer) -> dict:
    cards = [card_as_shown(number, card) for card in answer.cards]
    hidden = sum(not card.probable for card in answer.cards)
    message = ""
    if not cards:
        message = "No picture passes the filter."
    elif hidden == len(cards):
        message = "Nothing here seems to match."
    rest = (
        f"Show the {hidden} closest all the same" if message else f"Show the rest, {hidden} that probably do not match"
    )
    return {
        "message": message,
        "milliseconds": f"{answer.milliseconds:.0f}",
        "cards": cards,
        "rest": rest if hidden else "",
        "trie": trie_drawing.draw(cards, answer.paths, literal),
    }


def literal(text: str) -> str:
    """A text as HTML shows it. What the grid's template gives is read once more, as a template of JavaScript: file names are not
    to be programs there."""
    return "".join(char if char.isalnum() or char in " .,-_/" else f"&#{ord(char)};" for char in text)


def card_as_shown(number: int, card: Card) -> dict:
    if card.upload:
        source = "data:image/jpeg;base64," + base64.b64encode(card.upload.thumbnail).decode()
        urls = {"thumbnail": source, "full": ""}
    else:
        urls = {"thumbnail": f"{ROUTE}/thumbnail/{number}/{card.key}", "full": f"{ROUTE}/picture/{number}/{card.key}"}
    texts = {"title": literal(card.title), "score": f"{card.score:.3f}", "kind": "" if card.probable else "improbable"}
    return urls | texts | {"key": card.key, "folded": card.folded}
