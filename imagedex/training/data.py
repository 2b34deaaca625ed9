"""From a corpus to batches: pictures as pixels, captions as tokens, rows of both as a batch of tensors."""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset, Features, Value
from tqdm.auto import tqdm

from imagedex.corpora import RetrievalSplits, flatten_captions, load_corpus, split_corpus
from imagedex.training.arguments import CorpusArguments

logger = logging.getLogger(__name__)


def load_splits(data: CorpusArguments) -> RetrievalSplits:
    """The corpus that the arguments name, split as they say. Raises `UserError`."""
    corpus = load_corpus(
        data.dataset_name,
        data.dataset_config_name,
        train_file=data.train_file,
        validation_file=data.validation_file,
        image_dir=data.image_dir,
        visual_genome_dir=data.visual_genome_dir,
        image_column=data.image_column,
        caption_column=data.caption_column,
        unreadable_images=data.unreadable_images,
        num_proc=data.preprocessing_num_workers,
    )
    return split_corpus(
        corpus,
        held_out_captions_per_image=data.held_out_captions_per_image,
        held_out_images=data.held_out_images,
        split_seed=data.split_seed,
        eval_gallery=getattr(data, "eval_gallery", "all"),
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
    )


def training_captions(splits: RetrievalSplits) -> list[str]:
    return [caption for captions in splits.train["captions"] for caption in captions]


def resized(images: list, image_processor) -> np.ndarray:
    """RGB pictures as the processor resizes and crops them: (B, 3, height, width) uint8."""
    pixels = image_processor(images=images, do_rescale=False, do_normalize=False, return_tensors="np")
    return pixels["pixel_values"].astype(np.uint8, copy=False)


def augmented(image, augment) -> np.ndarray:
    """An RGB picture through `augment`: (3, height, width) uint8."""
    return np.asarray(augment(image)).transpose(2, 0, 1)


class Pictures(torch.utils.data.Dataset):
    """Row -> {"pixel_values": (3, height, width) uint8}; normalised in the collator, when the batch is one tensor.

    Args:
        gallery: a corpus split, one row a picture.
        image_processor: resizes and crops as it says.
        keep: resize every picture once with `datasets.map` (parallel, cached on disk) and read bytes from then on.
        augment: for training only, PIL picture -> PIL picture of the processor's size, in place of its resizing and
            cropping (see `augmentation.py`).
    """

    def __init__(
        self, gallery: Dataset, image_processor, keep: bool = False, num_proc: int | None = None, augment=None
    ):
        self.image_processor, self.augment = image_processor, augment
        self.rows = gallery.select_columns(["image"])
        self.shape = None
        if keep:
            self.shape = self._resize([self.rows[0]["image"]])[0].shape
            self.rows = self.rows.map(
                lambda batch: {"pixels": [pixels.tobytes() for pixels in self._resize(batch["image"])]},
                batched=True,
                batch_size=64,
                num_proc=num_proc,
                remove_columns=["image"],
                features=Features({"pixels": Value("binary")}),
                desc="Resizing pictures",
            )

    def _resize(self, images) -> np.ndarray:
        return resized([image.convert("RGB") for image in images], self.image_processor)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row: int) -> dict:
        if self.augment is not None:
            pixels = augmented(self.rows[row]["image"].convert("RGB"), self.augment)
        elif self.shape is None:
            pixels = self._resize([self.rows[row]["image"]])[0]
        else:
            pixels = np.frombuffer(self.rows[row]["pixels"], dtype=np.uint8).reshape(self.shape)
        return {"pixel_values": torch.tensor(pixels)}


def tokenize_captions(split: Dataset, tokenizer, max_length: int, num_proc: int | None = None) -> Dataset:
    """One row a caption: image_row, image_id, caption and the tokenizer's columns. Captions that are cut are counted aloud."""

    def tokenize(batch):
        encoded = dict(tokenizer(batch["caption"], truncation=True, max_length=max_length))
        whole = tokenizer(batch["caption"], truncation=False, verbose=False)["input_ids"]
        encoded["was_cut"] = [len(ids) > max_length for ids in whole]
        return encoded

    rows = flatten_captions(split)
    rows = rows.map(tokenize, batched=True, num_proc=num_proc, desc="Tokenising captions")
    cut = int(np.sum(rows["was_cut"]))
    if cut:
        logger.warning("%d of %d captions are longer than %d tokens and were cut", cut, len(rows), max_length)
    return rows.remove_columns(["was_cut", "caption"])


def token_rows(captions: Dataset) -> Dataset:
    """Of tokenised captions only what the model takes."""
    return captions.remove_columns(["image_row", "image_id"])


class KeptStates(torch.utils.data.Dataset):
    """Row -> {name: pooled states of a frozen tower}, computed once and kept in memory (4 bytes a number).

    Args:
        rows: token rows or `Pictures`, in the order they will be asked for.
        name: "text_states" or "image_states".
        pool: batch of tensors -> (rows, width) states.
    """

    def __init__(self, rows, name: str, pool, collator, batch_size: int, num_workers: int = 0):
        loader = torch.utils.data.DataLoader(rows, batch_size, collate_fn=collator, num_workers=num_workers)
        with torch.no_grad():
            bar = tqdm(loader, desc=f"Keeping {name.replace('_', ' ')}", disable=None)
            self.name, self.states = name, torch.cat([pool(batch).float().cpu() for batch in bar])

    def __len__(self):
        return len(self.states)

    def __getitem__(self, row: int) -> dict:
        return {self.name: self.states[row]}


def keep_frozen_states(model, texts, pictures, collator, args):
    """(texts, pictures), each replaced by its kept states where the model's tower is frozen.

    An epoch then costs the heads (and the other tower) alone. Pictures that are augmented change from epoch to epoch and
    are not kept.
    """
    device = args.device
    model.to(device).eval()

    def pool_with(method):
        return lambda batch: method(**{name: value.to(device) for name, value in batch.items()})[1]

    options = (collator, args.per_device_eval_batch_size, args.dataloader_num_workers)
    if model.config.freeze_text_tower:
        texts = KeptStates(texts, "text_states", pool_with(model.pool_text), *options)
    if model.config.freeze_vision_tower and pictures.augment is None:
        pictures = KeptStates(pictures, "image_states", pool_with(model.pool_image), *options)
    return texts, pictures


@dataclass
class RetrievalEvaluation:
    """What is asked and what can be found.

    texts: rows of tokens (or kept states), one a caption; pictures: the gallery; targets (captions,): the right picture's
    row in it.
    """

    texts: Dataset | KeptStates
    pictures: Pictures | KeptStates
    targets: np.ndarray

    def __len__(self):
        return len(self.texts)


def gallery_rows(gallery: Dataset, image_ids: list[str]) -> np.ndarray:
    """(len(image_ids),) int64: the row of each image_id in the gallery."""
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    return np.array([row_of[image_id] for image_id in image_ids], dtype=np.int64)


class CaptionPairs(torch.utils.data.Dataset):
    """Item i: caption i, its picture, and `image_ids`, the picture's row.

    Args: texts and pictures, rows of model inputs; image_rows (captions,), the picture of each caption.
    """

    def __init__(self, texts: Dataset | KeptStates, pictures: Pictures | KeptStates, image_rows):
        self.texts, self.pictures, self.image_rows = texts, pictures, np.asarray(image_rows)

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index: int) -> dict:
        row = int(self.image_rows[index])
        return self.texts[index] | self.pictures[row] | {"image_ids": row}


@dataclass
class Collator:
    """Rows -> a batch: captions padded by the tokenizer, pixels rescaled and normalised as the image processor says.

    Takes rows of captions, of pictures, or of both. Gives input_ids, attention_mask (B, T), pixel_values
    (B, 3, height, width) float32, kept states (B, width) and image_ids (B,) int64, each where the rows have it.
    """

    tokenizer: object
    image_processor: object

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        tokens = [{name: row[name] for name in self.tokenizer.model_input_names if name in row} for row in rows]
        if tokens[0]:
            batch |= self.tokenizer.pad(tokens, return_tensors="pt")
        if "pixel_values" in rows[0]:
            batch["pixel_values"] = self.normalize(torch.stack([row["pixel_values"] for row in rows]))
        for name in ("text_states", "image_states"):
            if name in rows[0]:
                batch[name] = torch.stack([row[name] for row in rows])
        if "image_ids" in rows[0]:
            batch["image_ids"] = torch.tensor([row["image_ids"] for row in rows])
        return batch

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3, height, width) uint8 -> float32."""
        pixels, processor = pixels.float(), self.image_processor
        if processor.do_rescale:
            pixels = pixels * processor.rescale_factor
        if processor.do_normalize:
            mean, std = (
                torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std)
            )
            pixels = (pixels - mean) / std
        return pixels
