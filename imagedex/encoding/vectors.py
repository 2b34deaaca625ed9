"""Sentences and pictures to unit vectors, for any model with `get_text_features` / `get_image_features`.

CLIPModel, SiglipModel and XMatchingModel are such models. Vectors are L2-normalised in float32, whatever the model's
precision, so that dot products are cosines.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from imagedex.errors import UserError
from imagedex.modeling.picture_reading import as_rgb, read_pictures
from imagedex.modeling.processing_retrieval import SentenceProcessor
from imagedex.modeling.towers import evaluating

# Trained on sentences padded to one length without a mask, so that other padding gives other vectors.
PADDED_TO_MAX_LENGTH = frozenset({"siglip", "siglip2"})
_NO_LIMIT = 100_000  # tokenizers that know no limit say 1e30
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken files


def encode_texts(
    model: torch.nn.Module,
    tokenizer: Callable,
    sentences: Sequence[str],
    batch_size: int = 256,
    device: str | torch.device | None = None,
    progress: bool = False,
    text_kwargs: dict | None = None,
) -> torch.Tensor:
    """Vectors of sentences.

    Args:
        tokenizer: the model's, or a `SentenceProcessor`, which knows how its sentences are written.
        model: has `get_text_features`; put into evaluation mode for the call, moved to `device` if one is given.
        sentences: (Q,) strings. They are batched by length (less padding) and come back in their own order.
        text_kwargs: for the tokenizer call, over the defaults `padding=True` (to the longest of the batch; to the full
            length for SigLIP), `truncation=True` and `max_length` (see `text_length_limit`).

    Returns:
        (Q, D) float32 on the CPU, L2-normalised.

    Raises:
        UserError: the model gives vectors that are not finite.
    """
    read = sentence_reader(model, tokenizer, text_kwargs)
    accepted = set(inspect.signature(model.get_text_features).parameters) | {"input_ids"}
    order = sorted(range(len(sentences)), key=lambda row: len(sentences[row]), reverse=True)
    vectors = None
    with encoding_on(model, device) as device, progress_bar(len(sentences), "sentences", progress) as bar:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            tokens = read([sentences[row] for row in rows])
            inputs = {name: value.to(device) for name, value in tokens.items() if name in accepted}
            batch = unit_vectors(model.get_text_features(**inputs))
            if vectors is None:
                vectors = torch.empty(len(sentences), batch.shape[1])
            vectors[rows] = batch
            bar.update(len(rows))
    return torch.empty(0, 0) if vectors is None else vectors


def sentence_reader(model, tokenizer, text_kwargs: dict | None = None) -> Callable[[list[str]], dict]:
    """Sentences -> the model's inputs: a processor of ours knows how; for any other model as `encode_texts` says."""
    if isinstance(tokenizer, SentenceProcessor):
        return lambda sentences: tokenizer(text=sentences, return_tensors="pt", **(text_kwargs or {}))
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    options = {"padding": "max_length" if model_type in PADDED_TO_MAX_LENGTH else True, "truncation": True}
    options |= {"max_length": text_length_limit(model, tokenizer)} | (text_kwargs or {})
    if options["max_length"] is None:
        options |= {"truncation": False, "padding": True}
    return lambda sentences: tokenizer(sentences, return_tensors="pt", **options)


def encode_images(
    model: torch.nn.Module,
    image_processor: Callable,
    dataset,
    batch_size: int = 64,
    device: str | torch.device | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> torch.Tensor:
    """Vectors of pictures.

    Args:
        model: has `get_image_features`; put into evaluation mode for the call, moved to `device` if one is given.
        dataset: rows with `image_id` and `image` (decoded lazily, in the worker processes).

    Returns:
        (N, D) float32 on the CPU, L2-normalised, in the order of the rows.

    Raises:
        UserError: a picture that cannot be read (named), vectors that are not finite.
    """
    batches = [range(start, min(start + batch_size, len(dataset))) for start in range(0, len(dataset), batch_size)]
    vectors = list(image_vector_batches(model, image_processor, dataset, batches, device, num_workers, progress))
    return torch.cat(vectors) if vectors else torch.empty(0, 0)


def image_vector_batches(
    model,
    image_processor,
    dataset,
    batches: Sequence[Sequence[int]],
    device=None,
    num_workers=0,
    progress=False,
    unreadable: dict[int, str] | None = None,
) -> Iterator[torch.Tensor]:
    """As `encode_images`, for the given batches of rows, one (B, D) tensor at a time.

    Args: dataset, as there, or one of (picture, None) and (None, what is wrong with it); unreadable, gets the rows of pictures
    that cannot be read, and why; their vectors are zeros then.
    """
    loader = picture_batches(image_processor, dataset, batches, num_workers, unreadable)
    with progress_bar(sum(map(len, batches)), "pictures", progress) as bar:
        for rows, inputs in zip(batches, loader, strict=True):
            with encoding_on(
                model, device
            ) as place:  # not around the yield: whoever asks for batches may train between them
                inputs = {name: _to_model(value, model, place) for name, value in inputs.items()}
                vectors = unit_vectors(model.get_image_features(**inputs))
            bad = [place for place, row in enumerate(rows) if unreadable and row in unreadable]
            vectors[bad] = 0.0
            yield vectors
            bar.update(len(rows))


def picture_batches(
    image_processor, dataset, batches: Sequence[Sequence[int]], num_workers: int = 0, unreadable: dict | None = None
) -> Iterator[dict]:
    """What the image processor makes of the given batches of rows, see `image_vector_batches`. Raises `UserError` for a picture
    that cannot be read, where nobody counts these."""
    loader = DataLoader(
        _Pictures(dataset) if hasattr(dataset, "select_columns") else dataset,
        batch_sampler=batches,
        num_workers=min(num_workers, len(batches)),
        collate_fn=_Preprocess(image_processor),
        pin_memory=torch.cuda.is_available(),
    )
    for rows, (inputs, bad) in zip(batches, loader if num_workers else read_ahead(loader), strict=True):
        if bad and unreadable is None:
            raise UserError(f"cannot read the picture {next(iter(bad.values()))}")
        for place, reason in bad.items():
            unreadable[rows[place]] = reason
        yield inputs


def read_ahead(batches: Iterable) -> Iterator:
    """The same, each got in a thread while the one before it is used: decoding and resizing leave Python's lock alone."""
    with ThreadPoolExecutor(1) as thread:
        waiting, end = iter(batches), object()
        coming = thread.submit(next, waiting, end)
        while (batch := coming.result()) is not end:
            coming = thread.submit(next, waiting, end)
            yield batch


def unit_vectors(output) -> torch.Tensor:
    """(B, D) float32 unit vectors on the CPU, from a tensor or an output whose `pooler_output` is the embedding."""
    embeds = output if isinstance(output, torch.Tensor) else output.pooler_output
    embeds = embeds.detach().float()
    if not torch.isfinite(embeds).all():
        raise UserError("the model gives vectors with NaN or infinity; its weights or its precision are broken")
    return torch.nn.functional.normalize(embeds, dim=-1).cpu()


def count_unknown(tokenizer, texts: Iterable[Sequence[int]]) -> int:
    """How many of these texts, given as tokens, have a word or a sign that the tokenizer does not know."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in (None, tokenizer.eos_token_id, tokenizer.pad_token_id):  # CLIP's is the end of each text, too
        return 0
    return sum(unknown in tokens for tokens in texts)


UNKNOWN = "%d of %d texts have words or signs that the tokenizer does not know"


def text_length_limit(model, tokenizer) -> int | None:
    """The longest sentence in tokens: the smaller of what the tokenizer says and of the text tower's positions."""
    config = getattr(model, "config", None)
    text_config = getattr(config, "text_config", None) or config
    limits = (getattr(tokenizer, "model_max_length", None), getattr(text_config, "max_position_embeddings", None))
    limits = [limit for limit in limits if isinstance(limit, int) and 0 < limit < _NO_LIMIT]
    return min(limits, default=None)


@contextmanager
def encoding_on(model: torch.nn.Module, device=None) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the device the model is on. Args: device, to move it to first."""
    if device is not None:
        model.to(device)
    with evaluating(model), torch.no_grad():
        yield next(model.parameters()).device


def progress_bar(total: int, unit: str, shown: bool, doing: str = "encoding", done: int = 0):
    """A bar; where nobody watches, in a file, it is written every half minute and at its end alone."""
    pace = 0.1 if sys.stderr.isatty() else 30
    options = {"disable": not shown, "dynamic_ncols": True, "mininterval": pace, "initial": done}
    return tqdm(total=total, unit=f" {unit}", desc=f"{doing} {unit}", **options)


def _to_model(value: torch.Tensor, model, device) -> torch.Tensor:
    if value.is_floating_point():
        value = value.to(next(model.parameters()).dtype)
    return value.to(device, non_blocking=True)


class _Pictures(Dataset):
    """(picture, None), or (None, what is wrong): an exception would reach the user as a worker's traceback."""

    def __init__(self, dataset):
        self.dataset = dataset.select_columns(["image_id", "image"])

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, row: int):
        try:
            return as_rgb(self.dataset[row]["image"]), None
        except _UNREADABLE as error:
            image_id = self.dataset.select_columns(["image_id"])[row]["image_id"]
            return None, f"{image_id} ({' '.join(str(error).split())})"


class _Preprocess:
    """Runs the image processor in the worker; gives what it makes, and the reasons by place of what cannot be read, where a white
    picture stands. A class, so that it can be sent to spawned processes."""

    def __init__(self, image_processor):
        self.image_processor = image_processor

    def __call__(self, items):
        unreadable = {place: reason for place, (_, reason) in enumerate(items) if reason}
        pictures = [Image.new("RGB", (64, 64), "white") if reason else picture for picture, reason in items]
        return read_pictures(pictures, self.image_processor), unreadable
