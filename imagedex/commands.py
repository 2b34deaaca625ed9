"""The commands over a gallery: `imagedex index`, `remove`, `search`, `serve` and `export`."""

import argparse
import hashlib
import json
import logging
import os
import sys
import tempfile
import webbrowser
from pathlib import Path

from imagedex.errors import UserError

logger = logging.getLogger("imagedex")


class Parser(argparse.ArgumentParser):
    """A complaint is one line."""

    def error(self, message):
        raise UserError(f"{message}; {self.prog} --help lists the arguments")


def parser_of(name: str, description: str) -> Parser:
    parser = Parser(f"imagedex {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gallery", metavar="FOLDER", help="the gallery's folder")
    parser.add_argument(
        "--model",
        metavar="DIR_OR_HUB_ID",
        help="a dual encoder, or a model that writes identifiers; by default the gallery's own",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps; by default the best there is")
    parser.add_argument(
        "--trust_remote_code", action="store_true", help="run the code that a model on the Hub brings with it"
    )
    return parser


def add_engine(parser: Parser) -> None:
    parser.add_argument(
        "--engine", metavar="NAME",
        help="exact, faiss, milvus (a file in the gallery) or milvus:URI (a cluster); auto: by the gallery's size "
        "(default: the one it was last indexed with, at first auto)",
    )  # fmt: skip


def index_parser() -> Parser:
    parser = parser_of(
        "index",
        "Makes a gallery, or brings it in step with its pictures: new and changed ones are encoded, gone ones leave.\n\n"
        "    imagedex index my_photos --gallery my_gallery\n"
        "    imagedex index my_photos shards/0.tar list.txt --gallery my_gallery --model runs/mine\n"
        "    imagedex index pictures.parquet hf:someone/pictures:train --gallery my_gallery",
    )
    parser.add_argument(
        "sources", nargs="+", metavar="PHOTOS",
        help="a folder of pictures, a .tar archive, a .txt with a path a line, a .parquet or .arrow table, a saved data set, or "
        "one of the Hub: hf:owner/name, hf:owner/name:split, hf:owner/name:configuration:split",
    )  # fmt: skip
    parser.add_argument(
        "--image_column", help="of tables: the pictures or their paths; by default found by name and type"
    )
    parser.add_argument("--image_dir", metavar="FOLDER", help="of tables: where the pictures lie whose paths they hold")
    parser.add_argument(
        "--vector_type", choices=("float32", "float16"), help="of a new gallery; float16 takes half the room"
    )
    parser.add_argument("--batch_size", type=positive, default=64, help="pictures encoded at once (default: 64)")
    parser.add_argument(
        "--num_workers", type=not_negative, default=default_workers(), help="processes that decode pictures"
    )
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print what changed as one JSON object")
    return parser


def index(argv: list[str]) -> None:
    """imagedex index PHOTOS --gallery G"""
    args = index_parser().parse_args(argv)
    check_sources(args.sources)  # before a model is looked for, which may be downloaded
    gallery = opened(required(args.gallery, "--gallery"), args, args.vector_type)
    first = int(os.environ.get("RANK", "0")) == 0  # of the processes that `accelerate launch` starts, one speaks
    options = {name: getattr(args, name) for name in ("batch_size", "num_workers", "image_column", "image_dir")}
    changes = gallery.add(*args.sources, progress=first, **options)
    if not first:
        return
    say_what_is_left_out(changes)
    if args.json:
        counts = {name: len(getattr(changes, name)) for name in ("added", "changed", "removed")}
        counts |= {"unchanged": changes.unchanged, "unreadable": changes.unreadable, "passed_over": changes.passed_over}
        print(json.dumps(counts | {"pictures": len(gallery)}, ensure_ascii=False))
    else:
        print(f"{changes.line}; {len(gallery)} pictures in {args.gallery}")


def say_what_is_left_out(changes) -> None:
    for image_id, why in list(changes.unreadable.items())[:20]:
        logger.warning("cannot be read: %s (%s)", image_id, why)
    if len(changes.unreadable) > 20:
        logger.warning("... and %d more", len(changes.unreadable) - 20)
    phones = sum(changes.passed_over.get(ending, 0) for ending in (".heic", ".heif"))
    if phones:
        logger.warning(
            "%d pictures of phones (.heic) are passed over; to read them: pip install 'imagedex[heic]'", phones
        )
    others = {
        ending or "(no ending)": number
        for ending, number in changes.passed_over.items()
        if ending not in (".heic", ".heif")
    }
    if others:
        shown = ", ".join(
            f"{number} {ending}" for ending, number in sorted(others.items(), key=lambda pair: -pair[1])[:8]
        )
        logger.info("files that are no pictures: %s", shown)


def remove_parser() -> Parser:
    parser = parser_of(
        "remove",
        "Takes pictures out of a gallery: those named, and those for which a filter holds. The files stay where they are, and\n"
        "`imagedex index` on a source that still has them brings them back.\n\n"
        "    imagedex remove a.jpg holiday/b.jpg --gallery my_gallery\n"
        "    imagedex remove --where \"root == '/media/old_disk'\" --gallery my_gallery",
    )
    parser.add_argument("image_ids", nargs="*", metavar="IMAGE_ID", help="its name in the gallery, as in search --json")
    parser.add_argument("--where", metavar="FILTER", help="the pictures for which this holds, as in search")
    parser.add_argument("--json", action="store_true", help="print one JSON object: removed (names), pictures (left)")
    return parser


def remove(argv: list[str]) -> None:
    """imagedex remove IMAGE_ID --gallery G"""
    args = remove_parser().parse_args(argv)
    if not args.image_ids and args.where is None:
        raise UserError("which pictures? Give their names, or --where")
    gallery = opened(existing(required(args.gallery, "--gallery")), args)
    removed = gallery.remove(args.image_ids, args.where)
    left = len(gallery.readable)
    if args.json:
        print(json.dumps({"removed": removed, "pictures": left}, ensure_ascii=False))
    else:
        print(f"{len(removed)} removed; {left} pictures in {args.gallery}")


def search_parser() -> Parser:
    parser = parser_of(
        "search",
        "Finds pictures. Each PART is a sentence, or a picture where a file of that name is there; parts combine.\n\n"
        '    imagedex search "two dogs on a beach" --gallery my_gallery\n'
        '    imagedex search a.jpg - "leash" --gallery my_gallery --where "folder == \'holiday\'"\n'
        '    imagedex search "2:dog" + b.jpg --gallery my_gallery --sheet found.jpg\n'
        '    imagedex search "a red car" --photos my_photos',
    )
    parser.add_argument(
        "parts", nargs="+", metavar="PART", help='"text:..." and "image:..." force what a part is; "2:dog" weighs 2'
    )
    parser.add_argument(
        "--photos", metavar="FOLDER", help="no gallery yet: this folder is indexed into your cache first"
    )
    parser.add_argument("--top_k", type=positive, default=10, help="pictures to find (default: 10)")
    parser.add_argument(
        "--where", metavar="FILTER", help="only pictures for which this holds: \"width >= 1000 and 'dog' in captions\""
    )
    parser.add_argument(
        "--keep", type=float, metavar="SHARE",
        help="leave out what probably does not match: 0.9 keeps the right picture of nine in ten sentences",
    )  # fmt: skip
    add_engine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: query, images, scores")
    parser.add_argument("--sheet", metavar="FILE", help="draw what was found into a .jpg or .png")
    parser.add_argument("--open", action="store_true", help="show what was found")
    return parser


def search(argv: list[str]) -> None:
    """imagedex search "two dogs on a beach" --gallery G"""
    args = search_parser().parse_args(shielded(argv))
    words = [word.removeprefix("\0") for word in args.parts]
    from imagedex.gallery.query import read_parts

    parts = read_parts(words)
    if args.photos and args.gallery:
        raise UserError("--photos and --gallery: give one or the other")
    if args.gallery:
        folder = existing(args.gallery)
    else:
        check_sources([required(args.photos, "--gallery", "--photos")])
        folder = cached_gallery(args.photos, args.model)
    gallery = opened(folder, args)
    if args.photos:
        changes = gallery.add(args.photos, num_workers=default_workers(), progress=True)
        say_what_is_left_out(changes)
    if not len(gallery):
        raise UserError(
            f"the gallery {gallery.folder} holds no picture; fill it with: imagedex index PHOTOS --gallery {gallery.folder}"
        )
    found = gallery.search(*parts, top_k=args.top_k, where=args.where, keep=args.keep)
    query = " ".join(words)
    if args.json:
        answer = {
            "query": query,
            "images": [one.image_id for one in found],
            "scores": [round(one.score, 6) for one in found],
        }
        print(json.dumps(answer, ensure_ascii=False))
    else:
        print("\n".join(f"{one.score:7.4f}  {one.path}" for one in found) or nothing_found(args))
    if args.sheet or args.open:
        from imagedex.gallery.sheet import draw

        sheet = args.sheet or os.path.join(tempfile.mkdtemp(prefix="imagedex-"), "found.jpg")
        draw(query, found, Path(sheet))
        if args.open:
            webbrowser.open(Path(sheet).resolve().as_uri())


def nothing_found(args) -> str:
    return "nothing matches" if args.keep is not None else "no picture passes the filter"


def shielded(argv: list[str]) -> list[str]:
    """A lone "-" is a word between parts; argparse would pass it on, but not "-5 degrees" or the like, which stay mistakes."""
    return ["\0-" if word == "-" else word for word in argv]


def export_parser() -> Parser:
    parser = parser_of(
        "export",
        "Writes a gallery's catalog and vectors as one Parquet file, for DuckDB, Spark, Ray, Milvus, ..., or into Milvus.",
    )
    parser.add_argument(
        "--to", metavar="FILE", required=True,
        help="a .parquet file, or milvus:URI (http://HOST:19530, or FILE.db; #NAME after it names the collection)",
    )  # fmt: skip
    return parser


def export(argv: list[str]) -> None:
    """imagedex export --gallery G --to vectors.parquet"""
    args = export_parser().parse_args(argv)
    written = opened(existing(required(args.gallery, "--gallery")), args).export(args.to, progress=True)
    print(f"{written} pictures: {args.to}")


def serve_parser() -> Parser:
    parser = parser_of(
        "serve", "Serves a page to search a gallery in a browser, and a JSON endpoint (POST /imagedex/search)."
    )
    parser.add_argument(
        "--second", metavar="FOLDER", help="a gallery of the same pictures and another model, to compare with"
    )
    add_engine(parser)
    parser.add_argument(
        "--keep", type=share, metavar="SHARE",
        help="hide what probably does not match from the start, see search --keep (default: visitors choose, with 0.9)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (default: this machine alone)")
    parser.add_argument("--port", type=positive, default=7860, help="default: 7860")
    return parser


def serve(argv: list[str]) -> None:
    """imagedex serve --gallery G"""
    args = serve_parser().parse_args(argv)
    try:
        from imagedex.page.server import serve as run_server
    except ImportError as error:
        raise UserError(f"the page needs an extra ({error.name} is missing): pip install 'imagedex[demo]'") from error
    folders = [existing(required(args.gallery, "--gallery"))]
    if args.second:
        folders.append(existing(args.second, "--second"))
    galleries = [opened(folders[0], args)]
    if args.second:
        args.model = args.engine = None
        galleries.append(opened(folders[1], args))
    for gallery in galleries:
        if not len(gallery):
            raise UserError(f"the gallery {gallery.folder} holds no picture; fill it with: imagedex index PHOTOS")
    run_server(galleries, args.host, args.port, args.keep)


COMMANDS = {"index": index, "remove": remove, "search": search, "serve": serve, "export": export}
PARSERS = {
    "index": index_parser,
    "remove": remove_parser,
    "search": search_parser,
    "serve": serve_parser,
    "export": export_parser,
}


def positive(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def not_negative(text: str) -> int:
    return 0 if text == "0" else positive(text)


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share between 0 and 1")
    return value


def default_workers() -> int:
    """Processes that decode. One core encodes; the others decode; on two, a thread does (`read_ahead`), which starts at once."""
    cores = os.cpu_count() or 1
    return 0 if cores <= 2 else min(8, cores - 1)


def required(value: str | None, *flags: str) -> str:
    if not value:
        raise UserError(f"which pictures? Give {' or '.join(flags)}")
    return value


def existing(folder: str, flag: str = "--gallery") -> str:
    """Raises `UserError` where there is none: `Gallery.open` would begin one, and look for a model first."""
    if not (Path(folder).expanduser() / "catalog.parquet").is_file():
        raise UserError(
            f"{flag} {folder}: there is no gallery, so it holds no picture; make one with: "
            f"imagedex index PHOTOS --gallery {folder}"
        )
    return folder


def check_sources(given: list[str]) -> None:
    """Raises `UserError` for a folder or file that is not there."""
    from imagedex.gallery import scanning, tables

    for source in given:
        if not source.startswith(tables.HUB):
            scanning.check_source(source)


def cached_gallery(photos: str, model: str | None) -> Path:
    """Where the gallery of a folder and a model lies in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.blake2b(
        f"{Path(photos).resolve()}\0{model or ''}".encode("utf-8", "surrogateescape"), digest_size=8
    ).hexdigest()
    return cache / "imagedex" / "galleries" / f"{Path(photos).resolve().name}-{name}"


def opened(folder, args, vector_type: str | None = None):
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", stream=sys.stderr)
    logging.getLogger("faiss").setLevel(logging.WARNING)
    from transformers.utils import logging as theirs

    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    from imagedex.gallery.gallery import Gallery

    return Gallery.open(
        folder, args.model, device=args.device, vector_type=vector_type, trust_remote_code=args.trust_remote_code,
        engine=getattr(args, "engine", None),
    )  # fmt: skip
