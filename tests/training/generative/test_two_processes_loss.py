"""Two ranks against one with models that write identifiers: the trainer's loss, each part of it, and every gradient.

The ranks have different numbers of rows, labels of different lengths and different pictures, as batches have. The ranks run this
file as a script, all cases in one launch; the tests compare what they wrote with one process that has all rows.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn import functional as F
from transformers import T5Config, T5ForConditionalGeneration

from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_codebook_t5 import CodebookT5
from imagedex.modeling.modeling_vision_grounded_t5 import VisionGroundedT5
from imagedex.training.generative.arguments import DSITrainingArguments
from imagedex.training.generative.data import DSICollator
from imagedex.training.generative.teacher import Teacher
from imagedex.training.generative.trainer import DSITrainer
from imagedex.training.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[3]
T5 = {"vocab_size": 60, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
VIT = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
       "image_size": 16, "patch_size": 4}  # fmt: skip
# Entropies of a part of the pictures have another mean than those of all; merged words are fewer, and other many, a picture.
LEARNED = {"num_visual_tokens": 6, "visual_token_selection": "merge", "quantization": "learned"}
LEARNED |= {"codebook_entropy_weight": 0.0, "num_codebook_words": 20}
MODELS = {
    "t5": (None, {}),
    "codebook_t5": (CodebookT5, LEARNED),
    "vision_grounded_t5": (VisionGroundedT5, {}),
}
# name -> (the first rank's rows, the second's): s sentences, i sentences that bring an invented one, p pictures, w sentences that
# have a picture to write
ROWS = {
    "sentences": ("sss", "s"),
    "pictures": ("ppp", "p"),
    "both": ("spp", "sssp"),
    "invented": ("iip", "sp"),
    "one has sentences, one pictures": ("sss", "pp"),
    "written pictures": ("swp", "sww"),
    "written pictures alone": ("ww", "ssp"),
}
ADDED = {
    "": {},
    "teacher": {"teacher": True},
    "smoothing": {"smoothing": 0.3},
    "both": {"teacher": True, "smoothing": 0.3},
}
CASES = [(model, rows, "") for model in MODELS for rows in ROWS if rows != "invented"]
CASES += [(model, rows, added) for model in MODELS for rows in ("sentences", "both") for added in ADDED if added]
CASES += [(model, "invented", added) for model in MODELS for added in ("teacher", "both")]
CASES += [("codebook_t5", rows, "both") for rows in ("one has sentences, one pictures", "written pictures")]
CASES = [(model, rows, added) for model, rows, added in CASES if model != "t5" or rows == "sentences"]
CASES = [(model, rows, added) for model, rows, added in CASES if model == "codebook_t5" or "written" not in rows]
IDENTIFIERS = Identifiers.from_sequences("naive", list("abcd"), [[5], [6, 7], [6, 8, 9], [6, 8, 10, 11, 12]], 1)


def tiny(kind):
    torch.manual_seed(0)
    if kind == "t5":
        return T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0))
    model_class, fields = MODELS[kind]
    return model_class.from_t5_vision_pretrained(t5_config=T5, vision_config=VIT, freeze_vision_tower=False, **fields)


def rows_of(kinds, seed):
    """Rows as the data sets give them, their identifiers of any length."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for kind in kinds:
        row = {} if kind == "w" else {"labels": IDENTIFIERS.labels("abcd"[torch.randint(4, (), generator=generator)])}
        if kind != "p":
            tokens = torch.randint(3, 60, (int(torch.randint(2, 6, (), generator=generator)),), generator=generator)
            row |= {"input_ids": tokens.tolist(), "attention_mask": [1] * len(tokens)}
        if kind in "si":
            row["sentence"] = "abcdef"[int(tokens[0]) % 6]
        if kind == "i":
            row["invented"] = row | {"labels": [-100], "sentence": "abcdef"[int(tokens[1]) % 6]}
        if kind not in "si":
            coarse = torch.randn(3, 2, 2, generator=generator)
            row["target_pixel_values" if kind == "w" else "pixel_values"] = F.interpolate(coarse[None], scale_factor=8)[
                0
            ]
        rows.append(row)
    return rows


def the_teacher():
    vectors = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(7)), dim=1)
    items = F.normalize(torch.randn(4, 4, generator=torch.Generator().manual_seed(8)), dim=1)
    return Teacher(
        lambda sentences: vectors[["abcdef".index(s) for s in sentences]], items, 0.4, IDENTIFIERS.padded(), 2.0
    )


def step(folder, kind, rows, teacher=False, smoothing=0.0):
    """(loss, gradients) of the trainer's own step over these rows."""
    options = {"output_dir": str(folder), "report_to": "none", "use_cpu": True, "label_smoothing_factor": smoothing}
    model, tokenizer = tiny(kind), train_tokenizer(["a b c d e f"], 40)
    args = DSITrainingArguments(**options, save_strategy="no", disable_tqdm=True)
    trainer = DSITrainer(
        model=model, args=args, data_collator=DSICollator(tokenizer), teacher=the_teacher() if teacher else None
    )
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(trainer.accelerator.prepare(model), trainer.data_collator(rows))
    return loss, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def work(folder):
    distributed.init_process_group("gloo")
    rank, found = distributed.get_rank(), {}
    for kind, rows, added in CASES:
        found[f"{kind} {rows} {added}"] = step(folder, kind, rows_of(ROWS[rows][rank], seed=rank), **ADDED[added])
    torch.save(found, Path(folder) / f"rank{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two ranks found: [rank][case]."""
    folder = tmp_path_factory.mktemp("ranks")
    config = ROOT / "accelerate_configs" / "cpu_two_processes.yaml"
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(config)]
    command += ["--num_cpu_threads_per_process", "1", __file__, str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize(("kind", "rows", "added"), CASES)
def test_loss_and_every_gradient(ranks, tmp_path, kind, rows, added):
    both = [row for rank, own in enumerate(ROWS[rows]) for row in rows_of(own, seed=rank)]
    loss, gradients = step(tmp_path, kind, both, **ADDED[added])
    found = [rank[f"{kind} {rows} {added}"] for rank in ranks]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, loss, atol=1e-5, rtol=1e-5)
    for _, there in found:
        assert gradients.keys() <= there.keys()
        for name, gradient in there.items():
            expected = gradients.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5, msg=name)


if __name__ == "__main__":
    work(sys.argv[1])
