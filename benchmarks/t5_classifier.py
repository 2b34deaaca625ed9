"""What a generative retriever has to beat beside BM25: a T5 encoder trained from scratch, one class a picture.

    python benchmarks/t5_classifier.py --dataset_name my_photos

No identifiers, no decoder, no pictures: the mean of the encoder's states, one linear layer, cross entropy over the gallery.
The captions held out are those that every script here holds out with the same flags.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import T5Config, T5EncoderModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from imagedex.corpora.arguments import CorpusArguments  # noqa: E402
from imagedex.corpora.load import load_splits  # noqa: E402
from imagedex.corpora.splits import gallery_rows, training_captions  # noqa: E402
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_scores, summarize_ranks  # noqa: E402
from imagedex.training.tokenizer import train_tokenizer  # noqa: E402


class Classifier(torch.nn.Module):
    """Captions -> one logit a picture."""

    def __init__(self, config: T5Config, classes: int):
        super().__init__()
        self.encoder = T5EncoderModel(config)
        self.head = torch.nn.Linear(config.d_model, classes)

    def forward(self, input_ids, attention_mask):
        """(B, T) -> (B, classes)."""
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[:, :, None] / attention_mask.sum(1)[:, None, None]
        return self.head((states * weights).sum(1))


def captions_of(split, gallery) -> tuple[list[str], torch.Tensor]:
    """All captions of a split, and the row of each one's picture in the gallery."""
    names = [name for name, own in zip(split["image_id"], split["captions"], strict=True) for _ in own]
    return [caption for own in split["captions"] for caption in own], torch.from_numpy(gallery_rows(gallery, names))


def train(model, tokenizer, captions: list[str], targets: torch.Tensor, epochs: int, batch_size: int, rate: float):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    steps = epochs * (len(captions) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    bar = tqdm(total=steps, desc="Training", disable=None)
    for _ in range(epochs):
        for rows in torch.randperm(len(captions)).split(batch_size):
            if len(rows) < batch_size:
                break
            batch = tokenizer([captions[row] for row in rows], padding=True, return_tensors="pt")
            loss = torch.nn.functional.cross_entropy(model(**batch), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.update()


@torch.no_grad()
def figures(model, tokenizer, captions: list[str], targets: torch.Tensor) -> dict:
    model.eval()
    parts = [captions[start : start + 128] for start in range(0, len(captions), 128)]
    logits = torch.cat([model(**tokenizer(part, padding=True, return_tensors="pt")) for part in parts])
    return summarize_ranks(rank_from_scores(logits.double().numpy(), targets.numpy()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset_name", required=True, help="a folder of captioned photographs, or another corpus")
    parser.add_argument("--held_out_captions_per_image", type=int, default=1)
    parser.add_argument("--d_model", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = CorpusArguments(dataset_name=args.dataset_name, held_out_captions_per_image=args.held_out_captions_per_image)
    splits = load_splits(data)
    tokenizer = train_tokenizer(training_captions(splits), 4000)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.d_model, d_kv=args.d_model // 4, d_ff=2 * args.d_model, num_heads=4,
        num_layers=args.layers,
    )  # fmt: skip
    model = Classifier(config, len(splits.gallery))
    train(
        model, tokenizer, *captions_of(splits.train, splits.gallery), args.epochs, args.batch_size, args.learning_rate
    )
    print(json.dumps(figures(model, tokenizer, *captions_of(splits.evaluation, splits.gallery))))


if __name__ == "__main__":
    main()
