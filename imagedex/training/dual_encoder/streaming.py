"""Training from a stream: what it cannot do, the rows it gives, the loader, and what it says at the end."""

import itertools
import logging
import os
from dataclasses import dataclass, replace

import torch
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import gather_object
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from imagedex.corpora import RetrievalSplits, load_corpus, split_corpus
from imagedex.corpora.arguments import DataArguments
from imagedex.corpora.forms.shards import PictureStream, decode, open_stream, picture_number
from imagedex.corpora.schema import counted
from imagedex.errors import LocalUserError, UserError
from imagedex.training.draws import drawing_from, number_of
from imagedex.training.pictures import picture_inputs
from imagedex.training.texts import warn_of_cut

logger = logging.getLogger(__name__)

TOKENIZER_CAPTIONS = 10_000  # read in full from the shards before training, pictures included
REMEMBERED = 10_000  # pictures left out that one worker can tell apart


def check_streaming(data: DataArguments, args) -> None:
    """What asks for more than one look at the corpus cannot be had with a stream. Raises `UserError`."""
    if not data.streaming:
        return
    refused = {
        "keep_pixels": data.keep_pixels and "keeps the pixels of a corpus of known size",
        "head_start": args.head_start != "none" and "is fitted to the kept states of a corpus of known size",
        "keep_states": args.keep_states and "keeps the states of a corpus of known size",
        "held_out_captions_per_image": data.held_out_captions_per_image and "needs the whole corpus to hold out from",
        "held_out_images": data.held_out_images and "needs the whole corpus to hold out from",
        "eval_gallery": data.eval_gallery == "held_out" and "held_out goes with --held_out_images",
        "compare_with_baselines": args.compare_with_baselines and "needs all training captions",
        "max_train_samples": data.max_train_samples and "counts the pictures of a corpus; name fewer shards",
        "max_images": data.max_images and "draws from the whole corpus",
        "captions_per_image": data.captions_per_image and "draws from the whole corpus",
        "shuffle_every_epoch": not args.shuffle_every_epoch and "false needs epochs, and a stream has none",
    }
    for name, reason in refused.items():
        if reason:
            raise UserError(f"--{name} cannot be had with --streaming: it {reason}")
    if not args.do_train:
        raise UserError("--streaming is for training: give --do_train, or leave --streaming out to evaluate")
    if args.max_steps <= 0:
        raise UserError("--streaming has no end: say with --max_steps how many steps to train")
    for name in ("save_strategy", "eval_strategy"):
        if getattr(args, name) == "epoch":
            logger.warning("--%s epoch: a stream has no epochs, so this happens once, after the last step", name)


def load_streamed_splits(data: DataArguments) -> RetrievalSplits:
    """`train` is a `PictureStream`; `gallery` and `evaluation` are those of --validation_file or, where --train_file
    names the shards, of the corpus --dataset_name; None without either. Raises `UserError`."""
    stream = open_stream(
        None if data.train_file else data.dataset_name,
        data.dataset_config_name,
        train_file=data.train_file,
        image_column=data.image_column,
        caption_column=data.caption_column,
    )
    corpus = data.dataset_name if data.train_file else None
    if corpus and data.validation_file:
        raise UserError("--dataset_name and --validation_file: give one of the two to evaluate on")
    if not (corpus or data.validation_file):
        return RetrievalSplits(stream, None, None)
    found = load_corpus(
        corpus,
        data.dataset_config_name if corpus else None,
        train_file=data.validation_file,
        image_dir=data.image_dir,
        unreadable_images=data.unreadable_images,
        num_proc=data.preprocessing_num_workers,
    )
    if set(found.splits) == {"train"}:  # all of it is there to be asked, nothing of it is trained
        found.splits["validation"] = found.splits["train"]
    return replace(split_corpus(found, max_eval_samples=data.max_eval_samples), train=stream)


def first_captions(stream: PictureStream):
    """What a tokenizer from scratch is trained on; nothing is read before the first is asked for."""
    logger.info("the tokenizer is trained on the first captions of the stream, at most %d", TOKENIZER_CAPTIONS)
    yield from stream.first_captions(TOKENIZER_CAPTIONS)


class LeftOut:
    """Counts that DataLoader workers, processes of their own, tell the main one through shared memory.

    pictures (workers, REMEMBERED) int64: a number for each picture left out, 0 where there is none yet; counts (workers, 2):
    of captions read, and of captions that were cut.
    """

    def __init__(self, workers: int):
        self.pictures = torch.zeros(workers, REMEMBERED, dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(workers, 2, dtype=torch.int64).share_memory_()
        self.seen = set()  # of this worker

    def picture(self, worker: int, number: int, why: str) -> None:
        if number not in self.seen and len(self.seen) < REMEMBERED:
            self.pictures[worker, len(self.seen)] = number
            self.seen.add(number)
            if len(self.seen) <= 10:
                logger.warning("left out: %s", why)


class CaptionStream(IterableDataset):
    """Rows as `CaptionPairs` gives them, decoded and tokenised on the way: tokens, pixel_values (3, height, width)
    and image_ids, a hash of the picture.

    Endless: pass after pass, each in its own order, so that processes never wait for one whose share has ended and every
    batch is full. Rows, their order and their augmentation depend on `seed`, the numbers of processes and of workers, and
    `buffer_size` alone.

    Args:
        stream: this process's share.
        processor: reads captions and pictures.
        augment: PIL picture -> PIL picture in place of the image processor's resizing, drawing from torch's generator.
        skip_unreadable: leave pictures out that cannot be read, and count them; else `LocalUserError`.
        workers: DataLoader workers that will read this (0: none but the process itself).
        passes: end after so many; None: never.
    """

    def __init__(
        self,
        stream: PictureStream,
        processor,
        *,
        augment=None,
        seed: int = 0,
        buffer_size: int = 1000,
        skip_unreadable: bool = False,
        workers: int = 0,
        passes: int | None = None,
    ):
        self.stream, self.augment, self.seed, self.buffer_size = stream, augment, seed, buffer_size
        self.processor = processor
        self.skip_unreadable, self.workers, self.passes = skip_unreadable, workers, passes
        self.left_out = LeftOut(max(1, workers))
        self.batches_to_pass, self.batch_size = 0, 1

    @classmethod
    def of(cls, stream: PictureStream, processor, data: DataArguments, args, augment=None) -> "CaptionStream":
        """This process's rows, as the arguments say; says aloud where shards cannot be shared out evenly."""
        share = stream.share(args.process_index, args.world_size)
        if stream.num_shards % args.world_size:
            logger.warning(
                "the %s cannot be shared out evenly over %d processes: each reads all of them and keeps its part of the "
                "captions",
                stream.form,
                args.world_size,
            )
        workers = min(args.dataloader_num_workers, share.num_shards)
        if workers < args.dataloader_num_workers:
            logger.warning("a shard is read by one worker: --dataloader_num_workers is %d", workers)
        if share.num_shards % max(1, workers):
            logger.warning(
                "%d shards over %d workers: captions of the workers with fewer shards are seen more often",
                share.num_shards,
                workers,
            )
        return cls(
            share,
            processor,
            augment=augment,
            seed=args.seed if args.data_seed is None else args.data_seed,
            buffer_size=data.shuffle_buffer_size,
            skip_unreadable=data.unreadable_images == "skip",
            workers=workers,
        )

    def __iter__(self):
        info = get_worker_info()
        worker = info.id if info else 0
        if info:
            os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one caption at a time; unset, it warns of the fork
        # DataLoader takes a batch from each worker in turn
        to_pass = len(range(worker, self.batches_to_pass, max(1, self.workers))) * self.batch_size
        for number in itertools.count() if self.passes is None else range(self.passes):
            seen = given = 0
            for row in self.stream.one_pass(self.seed, number, self.buffer_size):
                seen += 1
                item = self.item(row, number, worker, passed=to_pass > 0)
                if item is not None:
                    given, to_pass = given + 1, to_pass - 1
                    yield item
            if not seen:
                return  # more workers than shards
            if not given:
                raise LocalUserError(
                    f"{self.stream.form}: nothing to train on in {counted(seen, 'row')} read by one reader"
                )

    def item(self, row: dict, number: int, worker: int = 0, passed: bool = False) -> dict | None:
        """What the model takes of one row in pass `number`; None when it is left out; {} when it is only passed."""
        picture = picture_number(row)
        if row["caption"] is None:
            self.left_out.picture(worker, number_of(row["sample"], picture), f"sample {row['sample']} has no caption")
            return None
        if passed and not self.skip_unreadable:
            return {}
        try:
            image = decode(row)
        except LocalUserError as error:
            if not self.skip_unreadable:
                raise
            self.left_out.picture(worker, number_of(row["sample"], picture), str(error).split("; mend it")[0])
            return None
        if passed:
            return {}
        self.left_out.counts[worker, 0] += 1
        with drawing_from(number_of(self.seed, number, picture, row["caption"])):
            pixels = picture_inputs(image, self.processor.image_processor, self.augment)
        return self.tokens(row["caption"], worker) | pixels | {"image_ids": picture}

    def tokens(self, caption: str, worker: int) -> dict:
        encoded, (cut,) = self.processor.tokens([caption])
        self.left_out.counts[worker, 1] += cut
        return {name: values[0] for name, values in encoded.items()}

    def loader(self, batch_size: int, collator, args, device=None) -> DataLoader:
        """Batches for `Trainer`. The rows are this process's already: accelerate only moves them to the device."""
        self.batch_size = batch_size
        loader = DataLoader(
            self,
            batch_size=batch_size,
            collate_fn=PassingCollator(collator),
            num_workers=self.workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and self.workers > 0,
            prefetch_factor=args.dataloader_prefetch_factor if self.workers else None,
            drop_last=True,
        )
        return prepare_data_loader(
            loader, device, num_processes=1, process_index=0, put_on_device=device is not None, dispatch_batches=False
        )

    def pass_by(self, batches: int) -> None:
        """The first so many batches of the next iteration are empty: a run that goes on has seen them. Their rows are read
        and counted, but not decoded (unless unreadable ones are left out, which only decoding can tell)."""
        self.batches_to_pass = batches

    def report(self) -> int:
        """Says in the log what was left out and what was cut, by all processes; returns how many pictures were left out."""
        pictures = set(gather_object(self.left_out.pictures[self.left_out.pictures != 0].tolist()))
        read, cut = (sum(gather_object([count])) for count in self.left_out.counts.sum(0).tolist())
        warn_of_cut(cut, read, self.processor.max_text_length)
        if pictures:
            logger.warning(
                "left out %s%s of the stream, unreadable or without caption",
                "at least " if len(pictures) >= REMEMBERED else "",
                counted(len(pictures), "picture"),
            )
        return len(pictures)


@dataclass
class PassingCollator:
    """`collator`, but an empty batch of rows that are only passed."""

    collator: object

    def __call__(self, rows: list[dict]) -> dict:
        return self.collator(rows) if rows[0] else {}
