"""Peak memory of one training step with and without gradient caching (imagedex/training/dual_encoder/gradient_cache.py).

    python benchmarks/gradient_cache_memory.py                 # minutes and 11 GiB on two cores; a GPU when there is one
    python benchmarks/gradient_cache_memory.py --batch_size 16384 --skip_plain

Each row is a fresh process: forward and backward of one batch by a dual encoder that learns throughout (BERT of 4 layers x
256 on 16 tokens, ViT of 4 layers x 256 on 64 x 64 pixels in patches of 16, InfoNCE; 7.0 million parameters and no batch
norm). On the CPU the peak is the largest resident set of the process; on a GPU it is what torch had allocated.
"""

import argparse
import csv
import json
import os
import platform
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS, WIDTH, TOKENS, SIDE, PATCH = 4, 256, 16, 64, 16
COLUMNS = ("step", "batch_size", "chunk_size", "peak_gib", "before_gib", "seconds", "loss", "hardware", "threads", "torch",
           "transformers", "python")  # fmt: skip


def build_model():
    from imagedex.configuration.configuration_xmatching import XMatchingConfig
    from imagedex.modeling.modeling_xmatching import XMatchingModel

    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 4 * WIDTH,
    }
    config = XMatchingConfig(
        text_config={"model_type": "bert", "vocab_size": 1000, **sizes},
        vision_config={"model_type": "vit", "image_size": SIDE, "patch_size": PATCH, **sizes},
        text_pooling="mean", text_pooling_layers=1, vision_pooling="mean", text_head="linear", vision_head="linear",
        projection_dim=WIDTH, freeze_text_tower=False, freeze_vision_tower=False, loss_type="info_nce",
    )  # fmt: skip
    return XMatchingModel(config).train()


def peak_bytes(device) -> int:
    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(batch_size: int, chunk_size: int | None) -> dict:
    """One step in this very process; nothing else may run in it before."""
    import torch

    from imagedex.training.dual_encoder.gradient_cache import cached_step

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model().to(device)
    inputs = {
        "input_ids": torch.randint(3, 1000, (batch_size, TOKENS), device=device),
        "attention_mask": torch.ones(batch_size, TOKENS, dtype=torch.long, device=device),
        "pixel_values": torch.randn(batch_size, 3, SIDE, SIDE, device=device),
        "image_ids": torch.arange(batch_size, device=device),
    }
    before, started = peak_bytes(device), time.perf_counter()
    if chunk_size is None:
        loss = model(**inputs, return_loss=True).loss
        loss.backward()
    else:
        loss = cached_step(model, inputs, chunk_size)
    loss = loss.item()
    seconds = time.perf_counter() - started
    return {"peak_gib": peak_bytes(device) / 2**30, "before_gib": before / 2**30, "seconds": seconds, "loss": loss}


def hardware() -> str:
    """The GPU's name, or the processor's with the number of cores this process may use; as part of a file's name."""
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        info = Path("/proc/cpuinfo")
        models = re.findall(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else []
        name = f"cpu {cores} cores {models[0] if models else platform.processor() or platform.machine()}"
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)", "", name.lower())).strip("-")


def measure_apart(batch_size: int, chunk_size: int | None) -> dict:
    """`measure` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps([batch_size, chunk_size])], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"error: batch {batch_size}, chunk {chunk_size}: {done.stderr.strip()[-300:] or 'killed'}")
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=4096, help="rows of the large batch")
    parser.add_argument("--chunk_sizes", type=int, nargs="+", default=[128], help="rows in memory at once")
    parser.add_argument("--skip_plain", action="store_true", help="only gradient caching")
    parser.add_argument("--output_dir", default=str(ROOT / "benchmarks" / "results"), help="where the table goes")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # JSON [batch size, chunk size]: measure here and print
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(*json.loads(arguments.one))))
        return

    import torch
    import transformers

    # a quarter of the batch as well: the plain step grows with it, the cached one hardly does
    sizes = (arguments.batch_size // 4, arguments.batch_size)
    cases = [(size, None) for size in sizes if not arguments.skip_plain]
    cases += [(size, chunk) for chunk in arguments.chunk_sizes for size in sizes]
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    same = {"hardware": hardware(), "threads": torch.get_num_threads(), **versions}
    rows = []
    for size, chunk in cases:
        found = {name: round(value, 3) for name, value in measure_apart(size, chunk).items()}
        step = "plain" if chunk is None else "gradient cache"
        rows.append({"step": step, "batch_size": size, "chunk_size": chunk or size, **found, **same})
        print(*(f"{name} {rows[-1][name]}" for name in COLUMNS[:7]), sep=", ", flush=True)
    path = Path(arguments.output_dir) / f"gradient_cache_memory-{same['hardware']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
