"""What stands in for what a reader of the pages has: one table of names, and the small things behind them."""

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import torch
from PIL import Image
from tiny_models import TOWER, WORDS, tiny_tokenizer
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ANIMALS = ("otter", "heron", "badger", "lynx", "salmon", "falcon")


def sentence_encoder(folder: Path) -> None:
    tokenizer = tiny_tokenizer(max_length=128)
    torch.manual_seed(0)
    BertModel(BertConfig(**TOWER, vocab_size=len(tokenizer), max_position_embeddings=128)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def vision_transformer(folder: Path) -> None:
    torch.manual_seed(0)
    ViTModel(ViTConfig(**TOWER, image_size=32, patch_size=8)).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def t5(folder: Path) -> None:
    tokenizer = train_tokenizer([" ".join(WORDS), "question: who is on the left?"], 200)
    special = {"decoder_start_token_id": tokenizer.pad_token_id, "pad_token_id": tokenizer.pad_token_id}
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = T5Config(**sizes, **special, eos_token_id=tokenizer.eos_token_id)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# A name on the Hub -> what makes its stand-in in an empty folder; a text: the fixture whose folder it is.
HUB: dict[str, Callable[[Path], None] | str] = {
    "openai/clip-vit-base-patch32": "tiny_clip",
    "google/siglip2-base-patch16-224": "tiny_siglip",
    "sentence-transformers/all-MiniLM-L6-v2": sentence_encoder,
    "sentence-transformers/all-mpnet-base-v2": sentence_encoder,
    "google/vit-base-patch16-224-in21k": vision_transformer,
    "facebook/dinov2-small": vision_transformer,
    "google-t5/t5-base": t5,
    "google-t5/t5-small": t5,
}

# What is written otherwise in the tests: a hundred shards are four.
TEXTS = {"{00000..00099}": "{00000..00003}"}

# What a page takes from another one -> how it is made, with the commands' own stand-ins.
EARLIER = {
    "runs/mine": ["python run_xmatching.py recipes/photos/xmatching.yaml --dataset_name my_photos --output_dir runs/mine"],
    "runs/codebook_t5": [
        "python run_dsi.py recipes/photos/codebook_t5.yaml --dataset_name my_photos --output_dir runs/codebook_t5"
    ],
    "runs/vision_grounded_t5": [
        "python run_image_indexing.py recipes/photos/vision_grounded_t5_indexing.yaml --dataset_name my_photos "
        "--output_dir runs/vision_grounded_t5_indexing",
        "python run_dsi.py recipes/photos/vision_grounded_t5_retrieval.yaml --dataset_name my_photos "
        "--model_name_or_path runs/vision_grounded_t5_indexing --output_dir runs/vision_grounded_t5",
    ],
    "runs/documents": [
        "python run_dsi.py recipes/nq10k/dsi.yaml --dataset_name my_documents --text_model_name_or_path google-t5/t5-small "
        "--output_dir runs/documents"
    ],
}  # fmt: skip

# Written after a command's own flags, so that it takes a second or two.
SMALL = {
    "training": "--use_cpu --bf16 false --max_steps 2 --per_device_train_batch_size 4 --per_device_eval_batch_size 8 "
    "--dataloader_num_workers 0 --report_to none --disable_tqdm true",
    "retrieval": "--device cpu --num_workers 0 --batch_size 8",
}
STREAMED = "--shuffle_buffer_size 4"

# Commands that are not run, by their first words -> why not. What is checked instead: `instead` in page_blocks.py.
NOT_RUN = {
    "make": "builds an environment and trains for minutes; the target exists and `make -n` expands it",
    "pip install .": "the wheel's own test builds and installs it; here: the extras exist",
    "accelerate launch": "wants several GPUs; accelerate's parser reads its flags, the script's parser the others",
    "imagedex serve": "serves until it is stopped; tests/page does it; here: the command's parser reads the flags",
    "curl": "asks that server; here: the body is one that the endpoint takes",
}

# Blocks in no language are no commands, by their first words -> what they are, and who checks them.
NOT_CODE = {
    "run_xmatching.py   ": "the tree; tests/test_documents.py compares it with git's files",
    "i saw a heron": "a line of a corpus; tests/retrieval/test_queries.py reads such lines",
    "0a1b2c": "a line of rankings; tests/evaluation/test_rankings.py reads such lines",
    "---\ntitle:": "a Space's front matter; tests/page/test_app.py reads it",
}


def hub_cache(folder: Path, fixture_folders: dict[str, Path]) -> Path:
    """A cache of the Hub in which every name of `HUB` has been downloaded already."""
    for name, made in HUB.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        commit = hashlib.sha1(name.encode()).hexdigest()
        snapshot = repository / "snapshots" / commit
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        if isinstance(made, str):
            shutil.copytree(fixture_folders[made], snapshot)
        else:
            snapshot.mkdir(parents=True)
            made(snapshot)
    return folder


def furnish(folder: Path, flickr_folder: Path, write_shard) -> None:
    """What the pages take for granted: a checkout's data folders, pictures with captions, sentences, documents."""
    for name in ("recipes", "metrics", "accelerate_configs"):
        (folder / name).symlink_to(ROOT / name)
    with open(flickr_folder / "captions.txt", newline="") as file:
        pairs = [(row["image"], row["caption"]) for row in csv.DictReader(file)]
    pictures = sorted((flickr_folder / "images").iterdir())
    shutil.copytree(flickr_folder, folder / "my_photos")
    for name in ("pictures", "val_images", "more_photos"):
        shutil.copytree(flickr_folder / "images", folder / name)
    Image.new("RGB", (32, 24), "white").save(folder / "more_photos" / "new.jpg")
    for name, picture in zip("ab", pictures, strict=False):
        shutil.copy(picture, folder / f"{name}.jpg")
    for name, columns, rows in (
        ("pairs.csv", ("image", "caption"), pairs),
        ("val.csv", ("image", "caption"), pairs),
        ("sentences.csv", ("image", "caption"), [*pairs[::4], ("new.jpg", "a white picture")]),
    ):
        with open(folder / name, "w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
    (folder / "sentences.txt").write_text("red beside green\na dog runs in the grass\n")
    (folder / "dialogues.txt").write_text("a dog\twhere ?\tin the grass\nred\tgreen\tblue\n")
    (folder / "shards").mkdir()
    for number in range(4):
        own = pictures[3 * number : 3 * number + 3]
        files = [(picture.name, picture.read_bytes()) for picture in own]
        files += [(f"{p.stem}.txt", "\n".join(text for name, text in pairs if name == p.name)) for p in own]
        write_shard(folder / "shards" / f"{number:05d}.tar", sorted(files))
    rows = [
        {"image": {"bytes": p.read_bytes(), "path": p.name}, "caption": [t for n, t in pairs if n == p.name]}
        for p in pictures
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "pictures.parquet")
    write_documents(folder / "my_documents")


def write_documents(folder: Path) -> None:
    """Six documents, two trained questions and a held-out one of each."""
    folder.mkdir()
    rows = {
        "documents": [{"document_id": f"d{i}", "text": f"The {name} lives by the water."} for i, name in enumerate(ANIMALS)],
        "train": [{"document_id": f"d{i}", "question": f"{ask} the {name}"}
                  for i, name in enumerate(ANIMALS) for ask in ("where lives", "what is")],
        "validation": [{"document_id": f"d{i}", "question": f"who saw the {name}"} for i, name in enumerate(ANIMALS)],
    }  # fmt: skip
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
