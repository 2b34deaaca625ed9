"""Arguments of run_retrieval.py."""

from dataclasses import dataclass
from typing import Literal

from imagedex.bounds import BATCH, COUNT, MOST_BEAMS, SOME_OR_NONE, WORKERS, Bounds
from imagedex.command_line import argument
from imagedex.retrieval.turns import TAB, Turns


@dataclass
class RetrievalArguments:
    """Which models, which pictures, which sentences."""

    _argument_group_name = "retrieval"
    _bounds = {
        "top_k": COUNT,
        "contact_sheet_queries": Bounds(0, 10**4),
        "batch_size": Bounds(1, BATCH),
        "num_workers": Bounds(0, WORKERS),
    }

    model_name_or_path: list[str] | None = argument(
        "A trained retriever, or any CLIP-like model: a folder or a Hub id. Several of them answer the same sentences and are "
        "compared in one table and on one contact sheet."
    )
    queries: str | None = argument("The sentences: .txt (one a line), .csv, .jsonl or .parquet.")
    query_column: str = argument("Column of the sentences (not for .txt).", "caption")
    turns: Literal["last", "each", "context"] | None = argument(
        "A line of queries is a dialogue, its turns separated by tabs: ask with the last one, with each (a ranking a turn), or "
        "with the whole context as one query."
    )
    turn_separator: str | None = argument(r"What separates turns: \t (the default), ' EOS ', ' __eou__ ', ...")
    last_turn_is_response: bool = argument(
        "The last turn of each dialogue is the response, which is not asked with.", False
    )
    image_dir: str | None = argument(
        "The gallery: every picture in this folder and below. With dataset_name: its pictures' root."
    )
    dataset_name: str | None = argument(
        "The gallery: the pictures of a corpus (Hub id, built-in name or folder); for a t5 also the documents of one."
    )
    gallery: str | None = argument(
        "The gallery: a folder that `imagedex index` keeps. Nothing is encoded where its vectors are the model's."
    )
    dataset_config_name: str | None = argument("Configuration of the dataset.")
    dataset_split: str = argument("Split of the dataset that is the gallery, or all of them.", "all")
    top_k: int = argument("Pictures to find for each sentence.", 10)
    output_dir: str | None = argument("Folder for rankings, figures, contact sheet and index.")
    output_format: Literal["jsonl", "parquet", "tsv"] = argument(
        "Form of the rankings; tsv has the file names only.", "jsonl"
    )
    contact_sheet_queries: int = argument(
        "Sentences on the contact sheet, evenly spaced over the file; 0 for no sheet.", 20
    )
    unreadable_images: Literal["error", "skip"] = argument(
        "A picture that cannot be read: stop, or leave it out and say so.", "error"
    )
    hub_bias: bool = argument(
        "Against hubs: an XMatchingModel that has kept a bank of its training captions ranks by cosines less a bias a picture; "
        "false: by cosines alone.",
        True,
    )
    trust_remote_code: bool = argument("Run the code that a model on the Hub brings with it.", False)
    batch_size: int = argument("Pictures encoded at once, and sentences for which identifiers are written at once.", 64)
    num_workers: int = argument("Processes that check, decode and resize pictures.", 0)
    device: str | None = argument("cpu, cuda, cuda:1, mps; by default the best there is.")

    def __post_init__(self):
        if isinstance(self.model_name_or_path, str):  # from a recipe
            self.model_name_or_path = [self.model_name_or_path]
        for name in ("model_name_or_path", "queries", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"--{name} is needed; --help lists the arguments")
        if not self.image_dir and not self.dataset_name and not self.gallery:
            raise ValueError(
                "no gallery: give a folder of pictures with --image_dir, a corpus with --dataset_name, or a gallery that "
                "imagedex index made with --gallery"
            )
        beside = [name for name in ("image_dir", "dataset_name") if getattr(self, name)]
        if self.gallery and beside:
            raise ValueError(f"--gallery and --{beside[0]}: give one or the other")
        if self.turns is None and (self.turn_separator is not None or self.last_turn_is_response):
            raise ValueError(
                "--turn_separator and --last_turn_is_response are for dialogues: say which turns with --turns"
            )
        if self.turn_separator == "":
            raise ValueError("--turn_separator is empty")

    @property
    def read_turns(self) -> Turns | None:
        separator = (self.turn_separator or TAB).replace(r"\t", TAB)
        return self.turns and Turns(self.turns, separator, self.last_turn_is_response)


@dataclass
class GenerativeArguments:
    """What concerns models that write identifiers: a t5, codebook_t5 or vision_grounded_t5."""

    _argument_group_name = "generative models"
    _bounds = {"num_beams": Bounds(1, MOST_BEAMS), "held_out_captions_per_image": SOME_OR_NONE}

    num_beams: int | None = argument("Beams of the search; by default 10, or top_k where that is more.")
    rerank_with: str | None = argument(
        "An XMatchingModel (or another dual encoder) that puts what the beams found in the order of its cosines."
    )
    add_new_images: bool = argument(
        "Pictures of the gallery that have no identifier get one, without training (not with naive identifiers).",
        False,
    )
    identifier_vectors_from: str | None = argument(
        "add_new_images: folder of the XMatchingModel whose vectors the identifiers were made from; with atomic identifiers any "
        "XMatchingModel, or left out: the model's own vision tower."
    )
    new_image_vectors: Literal["images", "captions"] = argument(
        "add_new_images with identifier_vectors_from: what a new picture's vector is made from: the picture, or the mean of "
        "its captions' vectors (of a dataset_name with captions; none that is held out or asked).",
        "images",
    )
    held_out_captions_per_image: int = argument(
        "new_image_vectors captions: so many captions of each picture were kept for evaluation and are not used; as in "
        "training.",
        0,
    )
    split_seed: int = argument("new_image_vectors captions: seed of what is held out; as in training.", 0)

    def __post_init__(self):
        if not self.add_new_images:
            for name, default in (("identifier_vectors_from", None), ("new_image_vectors", "images")):
                if getattr(self, name) != default:
                    raise ValueError(f"--{name} is for new pictures; give --add_new_images with it, or leave it out")
        if self.held_out_captions_per_image and self.new_image_vectors != "captions":
            raise ValueError("--held_out_captions_per_image: only with --new_image_vectors captions are captions read")

    def beams(self, top_k: int) -> int:
        return max(10, top_k) if self.num_beams is None else self.num_beams

    @property
    def held_out(self) -> tuple[int, int] | None:
        """For `read_gallery`: what must not be used of the gallery's captions, where they are used."""
        if self.new_image_vectors != "captions":
            return None
        return self.held_out_captions_per_image, self.split_seed

    @property
    def active(self) -> list[str]:
        """The arguments given that need a generative model."""
        return [name for name in ("num_beams", "rerank_with", "add_new_images") if getattr(self, name)]
