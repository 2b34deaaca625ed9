"""The contact sheet as one HTML file: pictures inside, no script, nothing fetched, usable from the keyboard."""

import base64
import io
from html import escape
from pathlib import Path

from imagedex.evaluation.rankings import Ranking
from imagedex.files import write_atomically
from imagedex.retrieval.contact_sheet import (
    MAX_SHOWN,
    Sheet,
    Thumbnails,
    figure_title,
    format_figure,
    is_found,
    rank_words,
)

_STYLE = """
:root { color-scheme: light dark; --paper: #f7f6f3; --card: #fff; --ink: #1b1c1e; --muted: #63656a; --rule: #dedcd6;
  --green: #15803d; --amber: #b45309; --on-mark: #fff; --cell: 6.4rem; --gap: 1.1rem; }
@media (prefers-color-scheme: dark) { :root { --paper: #151618; --card: #1f2124; --ink: #ececee; --muted: #a3a6ad;
  --rule: #33363b; --green: #4ade80; --amber: #fbbf24; --on-mark: #10120f; } }
:root:has(#size-l:checked) { --cell: 15rem; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.45 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", sans-serif; }
header, main { max-width: 110rem; margin: 0 auto; padding: 0 clamp(1rem, 4vw, 3.5rem); }
header { padding-top: clamp(1.5rem, 4vw, 3rem); }
h1 { font-size: clamp(1.8rem, 4vw, 2.6rem); font-weight: 650; letter-spacing: -.02em; margin: 0; }
.counts { color: var(--muted); margin: .25rem 0 1.25rem; }
.figures { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem 1.5rem .35rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 500; font-size: .85rem; }
tbody th, td { font-size: 1.1rem; font-weight: 600; border-top: 1px solid var(--rule); }
.choices { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1.25rem 0 0; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; gap: .15rem .9rem; flex-wrap: wrap; }
legend { float: left; color: var(--muted); margin-right: .9rem; }
input { accent-color: var(--green); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); color: var(--ink); padding: .5rem 1rem; z-index: 2; }
article { border-top: 1px solid var(--rule); padding: 1.4rem 0 1.8rem; margin-top: 1.4rem; }
article + article { margin-top: 0; }
h2 { font-size: 1.3rem; font-weight: 600; margin: 0 0 .9rem; text-wrap: balance; overflow-wrap: anywhere; }
h3 { font-size: .95rem; font-weight: 500; color: var(--muted); margin: 1rem 0 .6rem; }
ol { list-style: none; margin: 0; padding: 0; display: grid; gap: var(--gap);
  --even: calc((100% - (var(--columns) - 1) * var(--gap)) / var(--columns));
  grid-template-columns: repeat(auto-fill, minmax(max(min(var(--cell), 44%), var(--even)), 1fr)); }
figure { margin: 0; position: relative; border-radius: .8rem; }
img { display: block; width: 100%; height: auto; aspect-ratio: 4 / 3; object-fit: contain; border-radius: .8rem;
  background: var(--rule); }
figure:focus-visible { outline: 3px solid var(--ink); outline-offset: 4px; }
figcaption { display: flex; justify-content: space-between; gap: .5rem; padding: .4rem .15rem 0; font-size: .85rem;
  font-variant-numeric: tabular-nums; }
.score, .name { color: var(--muted); }
.name { display: none; overflow-wrap: anywhere; }
:root:has(#size-l:checked) .name { display: inline; }
.right img { box-shadow: 0 0 0 3px var(--paper), 0 0 0 7px var(--green); }
.missed img { box-shadow: 0 0 0 3px var(--paper), 0 0 0 7px var(--amber); }
.mark { position: absolute; top: .5rem; left: .5rem; padding: .1rem .6rem; border-radius: 1rem; font-size: .8rem;
  font-weight: 600; color: var(--on-mark); background: var(--green); }
.missed .mark { background: var(--amber); }
.none { color: var(--muted); }
:root:has(#show-found:checked) article.miss, :root:has(#show-missed:checked) article:not(.miss) { display: none; }
@media print { .choices { display: none; } article { break-inside: avoid; } }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_sheet_page(sheet: Sheet, thumbnails: Thumbnails, path: str | Path) -> Path:
    """Writes the sheet as a page that needs nothing but itself."""
    path = Path(path)
    write_atomically(path, render_page(sheet, thumbnails))
    return path


def render_page(sheet: Sheet, thumbnails: Thumbnails) -> str:
    """The page as HTML. Every text that comes from outside is escaped."""
    targets_known = any(ranking.target for row in sheet.rows for ranking in row)
    articles = "\n".join(_article(number, row, sheet.models, thumbnails) for number, row in enumerate(sheet.rows, 1))
    shown = [("all", "all queries"), ("found", "found"), ("missed", "missed")]
    columns = max((_places(ranking) for row in sheet.rows for ranking in row), default=0)
    columns = max(columns, 6)  # so that few pictures are not blown up
    title = f"Pictures found by {', '.join(sheet.models)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<a class="skip" href="#queries">Skip to the queries</a>
<header>
<h1>Pictures found</h1>
<p class="counts">{escape(sheet.counts())}</p>
{_figures(sheet)}
<div class="choices">
{_choice("size", "Pictures", [("m", "medium"), ("l", "large")], "m")}
{_choice("show", "Show", shown, "all") if targets_known else ""}
</div>
</header>
<main id="queries" style="--columns: {columns}">
{articles}
</main>
</body>
</html>
"""


def _figures(sheet: Sheet) -> str:
    names = list(dict.fromkeys(name for figures in sheet.figures.values() for name in figures))
    head = "".join(f'<th scope="col">{escape(figure_title(name))}</th>' for name in names)
    body = ""
    for model in sheet.models:
        values = sheet.figures.get(model, {})
        cells = "".join(f"<td>{format_figure(name, values[name]) if name in values else ''}</td>" for name in names)
        body += f'<tr><th scope="row">{escape(model)}</th>{cells}</tr>\n'
    return (
        '<div class="figures" tabindex="0" role="region" aria-label="Figures"><table>\n'
        f'<thead><tr><th scope="col">model</th>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table></div>'
    )


def _choice(name: str, legend: str, options: list[tuple[str, str]], chosen: str) -> str:
    inputs = ""
    for value, text in options:
        checked = " checked" if value == chosen else ""
        inputs += f'<label><input type="radio" name="{name}" id="{name}-{value}"{checked}> {text}</label>'
    return f"<fieldset><legend>{legend}</legend>{inputs}</fieldset>"


def _article(number: int, row: list[Ranking], models: list[str], thumbnails: Thumbnails) -> str:
    missed = any(ranking.target and not is_found(ranking) for ranking in row)
    parts = [f'<article aria-labelledby="query-{number}" class="{"miss" if missed else "hit"}">']
    parts.append(f'<h2 id="query-{number}">{escape(row[0].query)}</h2>')
    for model, ranking in zip(models, row, strict=True):
        if len(models) > 1:
            parts.append(f"<h3>{escape(model)}</h3>")
        parts.append(_answer(ranking, thumbnails))
    parts.append("</article>")
    return "\n".join(parts)


def _places(ranking: Ranking) -> int:
    """How many pictures an answer shows, a right one that was missed included."""
    return min(len(ranking.images), MAX_SHOWN) + bool(ranking.target and not is_found(ranking))


def _answer(ranking: Ranking, thumbnails: Thumbnails) -> str:
    items = []
    if not ranking.images:
        items.append('<li class="none">nothing was found</li>')
    for place, (image_id, score) in enumerate(zip(ranking.images, ranking.scores, strict=True), start=1):
        if place > MAX_SHOWN:
            break
        right_one = image_id == ranking.target
        mark = f'<span class="mark">{rank_words(ranking)}</span>' if right_one else ""
        alt = f"Place {place}: {image_id}" + (", the right picture" if right_one else "")
        caption = (
            f'<span>{place}</span><span class="name">{escape(image_id)}</span><span class="score">{score:.3f}</span>'
        )
        items.append(_figure(image_id, alt, "right" if right_one else "", mark, caption, thumbnails))
    if ranking.target and not is_found(ranking):
        mark = f'<span class="mark">{rank_words(ranking)}</span>'
        alt = f"The right picture, {rank_words(ranking)}: {ranking.target}"
        caption = f'<span>right one</span><span class="name">{escape(ranking.target)}</span>'
        items.append(_figure(ranking.target, alt, "missed", mark, caption, thumbnails))
    return "<ol>\n" + "\n".join(items) + "\n</ol>"


def _figure(image_id: str, alt: str, kind: str, mark: str, caption: str, thumbnails: Thumbnails) -> str:
    picture = thumbnails(image_id)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=80, optimize=True)
    source = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<li><figure tabindex="0" class="{kind}" title="{escape(image_id)}">'
        f'<img src="{source}" alt="{escape(alt)}" width="{picture.width}" height="{picture.height}">'
        f"{mark}<figcaption>{caption}</figcaption></figure></li>"
    )
