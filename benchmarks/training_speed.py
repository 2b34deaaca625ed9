"""Training by a recipe of ours and by the plain code that the libraries' own documentation leads to: samples a second and memory.

    python benchmarks/training_speed.py                        # towers of 6 x 384, a T5 of t5-small's size
    python benchmarks/training_speed.py --pictures 64 --epochs 2 --size tiny

Two pairs, each side a fresh process, in turn, `--repeat` times:

dual encoder  the recipe photos/xmatching_pretrained (frozen towers, read once) against transformers' VisionTextDualEncoderModel
              in a Trainer: the same towers, frozen, the same batch, epochs and pictures, read when they are asked for.
identifiers   run_dsi.py with a plain T5 and atomic identifiers against T5ForConditionalGeneration in a Seq2SeqTrainer that
              evaluates after every epoch by `generate` with `prefix_allowed_tokens_fn`, 10 beams. Both ask one sentence
              for three that they learn; ours asks them all once more at the end, for the figures' intervals.

Weights and pictures are drawn: the time is that of trained ones. Samples a second are captions trained in the time of the whole
command, imports, encoding and evaluation included; memory is the largest resident set of its process.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from compare_losses import ROOT, read, write
from encode_pictures import draw_pictures
from gradient_cache_memory import hardware

SIZES = {  # width, layers of the two towers; of T5: t5-small's
    "real": {"towers": (384, 6, 12), "t5": (512, 6, 8, 2048)},
    "tiny": {"towers": (64, 2, 2), "t5": (64, 2, 2, 128)},
}
CAPTIONS = 4  # of each picture; the last one is held out
WORDS = (
    "two",
    "red",
    "small",
    "dog",
    "cat",
    "man",
    "child",
    "ball",
    "boat",
    "street",
    "snow",
    "runs",
    "sits",
    "near",
    "under",
)
FIGURES = ("samples_a_second", "evaluation_share", "peak_gib")
COLUMNS = ("pair", "side", *FIGURES, "ratio", "least", "most", "repeats", "pictures", "epochs", "size", "hardware", "torch",
           "transformers")  # fmt: skip


def prepare(folder: Path, pictures: int, size: str) -> None:
    """Captioned pictures, a text tower, a vision tower and a T5, as a user has them on disk."""
    from transformers import (
        BertConfig,
        BertModel,
        T5Config,
        T5ForConditionalGeneration,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    from imagedex.training.tokenizer import train_tokenizer

    corpus = folder / "corpus"
    corpus.mkdir()
    generator = torch.Generator().manual_seed(0)
    with open(corpus / "metadata.jsonl", "w", encoding="utf-8") as file:
        for path in draw_pictures(corpus, pictures):
            drawn = torch.randint(len(WORDS), (CAPTIONS, 12), generator=generator).tolist()
            captions = [" ".join(WORDS[place] for place in row) for row in drawn]
            file.write(json.dumps({"file_name": path.name, "captions": captions}) + "\n")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 50, 300)
    torch.manual_seed(0)
    width, layers, heads = SIZES[size]["towers"]
    same = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    BertModel(BertConfig(vocab_size=len(tokenizer), pad_token_id=0, **same)).save_pretrained(folder / "text")
    ViTModel(ViTConfig(image_size=224, patch_size=16, **same)).save_pretrained(folder / "vision")
    ViTImageProcessor().save_pretrained(folder / "vision")
    width, layers, heads, inner = SIZES[size]["t5"]
    sizes = {"d_model": width, "d_kv": width // heads, "num_layers": layers, "num_heads": heads, "d_ff": inner}
    config = T5Config(vocab_size=32128, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, **sizes)
    T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    for part in ("text", "t5"):
        tokenizer.save_pretrained(folder / part)


def our_command(pair: str, folder: Path, epochs: int, output: Path) -> list:
    shared = [
        "--dataset_name", folder / "corpus", "--held_out_captions_per_image", 1, "--num_train_epochs", epochs,
        "--eval_strategy", "epoch", "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none",
        "--output_dir", output, "--do_train", "true", "--do_eval", "true",
    ]  # fmt: skip
    if pair == "dual encoder":
        return [
            sys.executable, ROOT / "run_xmatching.py", ROOT / "recipes/photos/xmatching_pretrained.yaml", *shared,
            "--head_start", "none",
            "--text_model_name_or_path", folder / "text", "--vision_model_name_or_path", folder / "vision",
            "--compare_with_baselines", "false", "--per_device_train_batch_size", 64, "--keep_dir", folder / output.name,
        ]  # fmt: skip
    return [
        sys.executable, ROOT / "run_dsi.py", "--model_type", "t5", "--text_model_name_or_path", folder / "t5", *shared,
        "--per_device_train_batch_size", 64, "--per_device_eval_batch_size", 64, "--num_beams", 10, "--max_memorised_samples", 0,
        "--learning_rate", 3e-4, "--identifier_rows", "random", "--caption_prompt", "",
    ]  # fmt: skip


def run(command: list, output: Path, samples: int) -> dict:
    """The figures of one process, which trains so many captions in all."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            errors.seek(0)
            raise SystemExit(f"{command[1]} failed: {errors.read().decode().strip().splitlines()[-1]}")
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    trained = next(entry for entry in reversed(log) if "train_runtime" in entry)
    evaluated = sum(entry.get("eval_runtime", 0) for entry in log[: log.index(trained)])
    return {
        "samples_a_second": samples / seconds,
        "evaluation_share": evaluated / (trained["train_runtime"] - evaluated),
        "peak_gib": used.ru_maxrss / 2**20,
    }


def read_rows(folder: Path) -> tuple[list[dict], list[dict]]:
    """(captions trained, captions asked): rows of path, number of the picture, caption."""
    rows = [json.loads(line) for line in (folder / "corpus/metadata.jsonl").read_text().splitlines()]
    flat = [
        {
            "path": str(folder / "corpus" / row["file_name"]),
            "picture": number,
            "caption": caption,
            "asked": place == CAPTIONS - 1,
        }
        for number, row in enumerate(rows)
        for place, caption in enumerate(row["captions"])
    ]
    return [row for row in flat if not row["asked"]], [row for row in flat if row["asked"]]


def plain_dual_encoder(folder: Path, epochs: int, output: Path) -> None:
    """As transformers' documentation of VisionTextDualEncoder trains it, with both towers frozen."""
    from datasets import Dataset
    from PIL import Image
    from transformers import AutoImageProcessor, AutoTokenizer, Trainer, TrainingArguments, VisionTextDualEncoderModel

    model = VisionTextDualEncoderModel.from_vision_text_pretrained(str(folder / "vision"), str(folder / "text"))
    for tower in (model.vision_model, model.text_model):
        tower.requires_grad_(False)
    processor, tokenizer = (
        AutoImageProcessor.from_pretrained(folder / "vision"),
        AutoTokenizer.from_pretrained(folder / "text"),
    )

    def read(rows):
        pictures = [Image.open(path).convert("RGB") for path in rows["path"]]
        tokens = tokenizer(rows["caption"], padding="max_length", max_length=16, truncation=True)
        return {**tokens, "pixel_values": processor(images=pictures, return_tensors="pt").pixel_values}

    def collate(rows):
        whole = {
            name: torch.stack([torch.as_tensor(row[name]) for row in rows])
            for name in ("input_ids", "attention_mask", "pixel_values")
        }
        return whole | {"return_loss": True}

    trained, asked = (Dataset.from_list(rows).with_transform(read) for rows in read_rows(folder))
    arguments = TrainingArguments(
        str(output), num_train_epochs=epochs, per_device_train_batch_size=64, per_device_eval_batch_size=64, learning_rate=1e-5,
        eval_strategy="epoch", save_strategy="no", disable_tqdm=True, report_to=[], remove_unused_columns=False,
    )  # fmt: skip
    finish(Trainer(model, arguments, collate, train_dataset=trained, eval_dataset=asked))


def plain_identifiers(folder: Path, epochs: int, output: Path) -> None:
    """One new token a picture; evaluated by beams that `prefix_allowed_tokens_fn` keeps on the identifiers."""
    from datasets import Dataset
    from transformers import (
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        GenerationConfig,
        Seq2SeqTrainer,
        Seq2SeqTrainingArguments,
        T5ForConditionalGeneration,
    )

    class Constrained(Seq2SeqTrainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            return super().prediction_step(
                model, inputs, prediction_loss_only, ignore_keys, prefix_allowed_tokens_fn=allowed
            )

    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder / "t5"),
        T5ForConditionalGeneration.from_pretrained(folder / "t5"),
    )
    rows = read_rows(folder)
    first = model.config.vocab_size
    count = 1 + max(row["picture"] for row in rows[0])
    model.resize_token_embeddings(first + count, mean_resizing=False)

    def read(row):
        return {**tokenizer(row["caption"]), "labels": [first + row["picture"], 1]}

    trained, asked = (Dataset.from_list(part).map(read, remove_columns=list(part[0])) for part in rows)
    tokens = list(range(first, first + count))

    def allowed(row, written):
        return tokens if len(written) == 1 else [1]

    arguments = Seq2SeqTrainingArguments(
        str(output), num_train_epochs=epochs, per_device_train_batch_size=64, per_device_eval_batch_size=64, learning_rate=3e-4,
        eval_strategy="epoch", save_strategy="no", disable_tqdm=True, report_to=[], predict_with_generate=True,
        generation_config=GenerationConfig(
            num_beams=10, num_return_sequences=10, max_new_tokens=2, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1
        ),
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, model)
    # Without metrics to compute, a Seq2SeqTrainer leaves `generate` out and measures the loss alone.
    finish(
        Constrained(model, arguments, collator, train_dataset=trained, eval_dataset=asked, compute_metrics=hits_at_10)
    )


def hits_at_10(found) -> dict[str, float]:
    """Of tokens written by 10 beams a sentence, the start's token first, and of the right ones."""
    written = found.predictions.reshape(len(found.label_ids), 10, -1)[:, :, 1]
    return {"hits@10": float((written == found.label_ids[:, :1]).any(1).mean())}


def finish(trainer) -> None:
    trainer.train()
    trainer.save_model()
    trainer.save_state()


PLAIN = {"dual encoder": plain_dual_encoder, "identifiers": plain_identifiers}


def compare(pair: str, folder: Path, args) -> list[dict]:
    found = {"plain": [], "ours": []}
    for turn in range(args.repeat):
        for side in found:
            output = folder / f"{pair.replace(' ', '_')}-{side}-{turn}"
            command = our_command(pair, folder, args.epochs, output)
            if side == "plain":
                command = [sys.executable, __file__, "--one", json.dumps([pair, str(folder), args.epochs, str(output)])]
            found[side].append(run(command, output, args.pictures * (CAPTIONS - 1) * args.epochs))
            print(pair, side, {name: round(value, 3) for name, value in found[side][-1].items()}, flush=True)
    ratios = sorted(
        our["samples_a_second"] / plain["samples_a_second"]
        for our, plain in zip(found["ours"], found["plain"], strict=True)
    )
    rows = []
    for side, runs in found.items():
        row = {"pair": pair, "side": side} | {name: round(median(one[name] for one in runs), 3) for name in FIGURES}
        spread = {"ratio": round(median(ratios), 2), "least": round(ratios[0], 2), "most": round(ratios[-1], 2)}
        row |= spread if side == "ours" else {}
        row |= {
            "repeats": args.repeat,
            "pictures": args.pictures,
            "epochs": args.epochs,
            "size": args.size,
            "hardware": hardware(),
        }
        rows.append(row | {name: importlib.metadata.version(name) for name in COLUMNS[-2:]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", nargs="+", choices=PLAIN, default=list(PLAIN))
    parser.add_argument("--pictures", type=int, default=512, help="default: 512, with four captions each")
    parser.add_argument("--epochs", type=int, default=5, help="default: 5")
    parser.add_argument("--size", choices=SIZES, default="real", help="default: real: towers of 6 x 384, t5-small")
    parser.add_argument("--repeat", type=int, default=3, help="default: 3")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # JSON: train the plain side here
    args = parser.parse_args()
    if args.one:
        pair, folder, epochs, output = json.loads(args.one)
        PLAIN[pair](Path(folder), epochs, Path(output))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), args.pictures, args.size)
        rows = [row for pair in args.pair for row in compare(pair, Path(folder), args)]
    path = args.results_dir / f"training_speed-{hardware()}.csv"
    write(path, COLUMNS, [*(row for row in read(path) if row["pair"] not in args.pair), *rows])
    print(path)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
