"""Text files of users: UTF-8, or one line that says where they are not; lines as an editor counts them; JSON."""

import codecs
import json
import re
from pathlib import Path

from imagedex.errors import UserError


def read_text(file: str | Path) -> str:
    """The text of a file without its byte order mark. Raises `UserError`: it cannot be opened, is not UTF-8, or is damaged."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UserError(f"{file} is not UTF-8 text but UTF-16; save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        wrong = f"line {line}, byte 0x{content[error.start]:02x}"
        raise UserError(f"{file} is not UTF-8 text ({wrong}); save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: a NUL byte; the file is damaged, or no UTF-8 text")
    return text


def read_lines(file: str | Path) -> list[str]:
    """The lines without their ends. Unlike `str.splitlines`, a line separator (U+2028) within a caption ends no line."""
    lines = re.split(r"\r\n|\n|\r", read_text(file))
    return lines[:-1] if not lines[-1] else lines


def parse_json(text: str, where: str) -> object:
    """What a JSON text holds; `UserError` that begins with `where` when it is no JSON."""
    try:
        return json.loads(text)
    except ValueError as error:  # malformed, or a number of thousands of digits
        raise UserError(f"{where} is no valid JSON: {error}") from error
    except RecursionError as error:
        raise UserError(f"{where} is no valid JSON: nested too deeply") from error


def read_json(file: Path) -> object:
    """What a JSON file holds; UserError when it is no JSON."""
    return parse_json(read_text(file), str(file))


def name_in(value: object, file: str | Path) -> str:
    """A picture's name as a JSON file has it. Raises `UserError`: it is no text, or none that a file name can be."""
    if isinstance(value, str) and value and (value.isascii() or value.encode("utf-8", "ignore").decode() == value):
        return value
    raise UserError(f"{file}: the name of a picture is {repr(value)[:60]}; text is needed")
