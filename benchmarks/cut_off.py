"""Does it know when nothing matches? Right pictures that stay, and empty answers where the right picture was taken out.

    python benchmarks/cut_off.py --model runs/quickstart/xmatching --dataset_name shape_scenes

The captions that the model's training held out (`eval_queries.csv` in its folder) are asked. In each of twenty draws half of
their pictures calibrate the cut-off, and the captions of the others are asked twice: with their picture in the gallery (is it
kept?) and without it (is the answer empty?). Cut off are the model's confidence (`--keep`, the whole CSLS), its scores, and
plain cosines.
"""

import argparse
import csv
from pathlib import Path

import numpy as np
import torch
from gradient_cache_memory import hardware

from imagedex.encoding.dual_encoder import load_dual_encoder
from imagedex.encoding.vectors import encode_images, encode_texts
from imagedex.retrieval.gallery import read_gallery

DRAWS = 20


def judged(scores: torch.Tensor, targets: torch.Tensor, keep: float) -> tuple[float, float]:
    """(share of right pictures kept, share of empty answers without them). Args: scores (Q, N); targets (Q,)."""
    rows = torch.arange(len(targets))
    right, others = scores[rows, targets].numpy(), scores.clone()
    others[rows, targets] = -torch.inf
    best, generator, found = others.max(1).values.numpy(), np.random.default_rng(0), []
    pictures = np.unique(targets.numpy())
    for _ in range(DRAWS):
        calibrating = np.isin(targets.numpy(), generator.permutation(pictures)[: len(pictures) // 2])
        place = int((calibrating.sum() + 1) * (1 - keep) + 1e-9)
        least = np.sort(right[calibrating])[place - 1] if place else -np.inf
        found.append(((right[~calibrating] >= least).mean(), (best[~calibrating] < least).mean()))
    return tuple(np.mean(found, axis=0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of an XMatchingModel, as run_xmatching.py leaves it")
    parser.add_argument("--dataset_name", required=True)
    parser.add_argument("--keep", type=float, default=0.9)
    args = parser.parse_args()
    encoder, gallery = load_dual_encoder(args.model), read_gallery(dataset_name=args.dataset_name)
    pictures = encode_images(encoder.model, encoder.image_processor, gallery, progress=True)
    row_of = {image_id: row for row, image_id in enumerate(gallery["image_id"])}
    with open(Path(args.model, "eval_queries.csv"), encoding="utf-8", newline="") as file:
        asked = [(row["caption"], row_of[row["image"]]) for row in csv.DictReader(file)]
    captions = [caption for caption, _ in asked]
    texts = encode_texts(encoder.model, encoder.tokenizer, captions, text_kwargs=encoder.text_kwargs)
    targets, cosines = torch.tensor([row for _, row in asked]), texts @ pictures.T
    scores = cosines - encoder.bank.bias(pictures)
    first = (scores.argmax(1) == targets).float().mean().item()
    print(f"{len(asked)} captions, gallery of {len(pictures)}, Hits@1 {first:.3f}, {hardware()}\n")
    print(
        f"| cut off | right pictures kept (asked for {args.keep}) | empty answers, right picture taken out |\n|---|---|---|"
    )
    kinds = {"confidence": scores - encoder.bank.bias(texts)[:, None], "score": scores, "cosine": cosines}
    for name, values in kinds.items():
        kept, empty = judged(values, targets, args.keep)
        print(f"| {name} | {kept:.3f} | {empty:.3f} |")


if __name__ == "__main__":
    main()
