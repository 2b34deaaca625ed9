r"""From nothing to the first answer: a folder of photographs and two pretrained towers, no gallery yet.

    python benchmarks/first_answer.py --photos my_photos --model DIR       # a minute on two cores
    python benchmarks/first_answer.py --photos my_photos --text DIR --vision DIR

With `--text` and `--vision` the two towers are first joined by `run_xmatching.py photos/xmatching_pretrained` on the photographs'
captions, which is not counted. Counted: `imagedex index` over at most so many photographs, then `imagedex search`, each a process
of its own, started cold, in wall and processor seconds.
"""

import argparse
import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

from compare_losses import ROOT, write
from gradient_cache_memory import hardware
from startup import times

COLUMNS = ("photographs", "index_wall", "index_cpu", "search_wall", "search_cpu", "both_wall", "hardware", "torch",
           "transformers")  # fmt: skip


def join_towers(photos: Path, text: str, vision: str, out: Path) -> Path:
    recipe = ROOT / "recipes" / "photos" / "xmatching_pretrained.yaml"
    command = [sys.executable, ROOT / "run_xmatching.py", recipe, "--dataset_name", photos, "--text_model_name_or_path", text,
               "--vision_model_name_or_path", vision, "--num_train_epochs", 0, "--output_dir", out]  # fmt: skip
    subprocess.run([str(word) for word in command], check=True, stdout=sys.stderr)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--photographs", type=int, default=1000, help="at most so many; repeated if there are fewer")
    parser.add_argument("--model", help="a dual encoder")
    parser.add_argument("--text", help="or a text tower, with --vision")
    parser.add_argument("--vision")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from imagedex.gallery.scanning import files_below

    paths = [path for _, path in files_below(args.photos.resolve(), {})]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or join_towers(args.photos, args.text, args.vision, folder / "model")
        (folder / "photographs").mkdir()
        for number in range(args.photographs):  # a copy that ends otherwise is another picture, and encoded too
            path = Path(paths[number % len(paths)])
            target = folder / "photographs" / f"{number:05d}{path.suffix}"
            target.write_bytes(path.read_bytes() + b"\0" * (number // len(paths)))
        command, gallery = [sys.executable, "-m", "imagedex"], folder / "gallery"
        index = times([*command, "index", folder / "photographs", "--gallery", gallery, "--model", model])
        search = times([*command, "search", "two dogs", "--gallery", gallery])
    row = {"photographs": args.photographs, "both_wall": index[0] + search[0]}
    row |= dict(zip(COLUMNS[1:5], (*index, *search), strict=True))
    row = {name: round(value, 1) for name, value in row.items()} | {"hardware": hardware()}
    row |= {name: importlib.metadata.version(name) for name in COLUMNS[-2:]}
    print(row)
    path = args.results_dir / f"first_answer-{hardware()}.csv"
    write(path, COLUMNS, [row])
    print(path)


if __name__ == "__main__":
    main()
