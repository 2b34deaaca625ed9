"""Arguments of the generative models' scripts, run_image_indexing.py and run_dsi.py, beside those every script has."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from transformers import Seq2SeqTrainingArguments

from imagedex.bounds import COUNT, MOST_BEAMS, RATE, SEED, SHARE, SOME_OR_NONE, Bounds
from imagedex.command_line import argument, read_config
from imagedex.errors import UserError
from imagedex.training.arguments import RunArguments


@dataclass
class T5Arguments:
    """The generative model. What is left out keeps the value of the model's config."""

    _argument_group_name = "generative model"
    _bounds = {
        "num_visual_tokens": Bounds(1, 10**5),
        "codebook_projection_dim": Bounds(1, 10**6),
        "commitment_cost": SOME_OR_NONE,
    }

    model_type: Literal["t5", "codebook_t5", "vision_grounded_t5"] | None = argument(
        "Which model, when --model_name_or_path does not tell."
    )
    text_model_name_or_path: str | None = argument("Pretrained T5 to start from, a folder or a Hub id.")
    t5_config: str | None = argument("T5 from scratch: a mapping with model_type t5 (JSON on the command line).")
    t5_start: Literal["random", "lexical"] = argument(
        "T5 from scratch: random weights, or a start that answers as a search for the words of the trained texts does, somewhat "
        "better than BM25, and learns from there (num_heads * d_kv must be d_model).",
        "random",
    )
    freeze_vision_tower: bool | None = argument(
        "Leave the vision tower as it is; by default a pretrained one, while one from scratch is trained."
    )
    num_visual_tokens: int | None = argument("codebook_t5: visual tokens of a picture, the last one end-of-sequence.")
    visual_token_selection: Literal["random", "even", "attention", "merge"] | None = argument(
        "codebook_t5: which patches become visual tokens: drawn at random, evenly spaced, most attended by the class "
        "token, or all with runs of the same word merged."
    )
    quantization: Literal["fixed", "learned"] | None = argument(
        "codebook_t5: nearest word embedding as it is, or between learned projections of both sides."
    )
    codebook_projection_dim: int | None = argument(
        "codebook_t5, learned: width of the space in which patches and words are compared."
    )
    commitment_cost: float | None = argument("codebook_t5, learned: weight of the commitment loss.")
    codebook_entropy_weight: float | None = argument(
        "codebook_t5, learned: weight of the penalty that keeps many words in use."
    )
    vision_projection: bool | None = argument(
        "vision_grounded_t5: a linear layer from the vision tower's width to T5's, needed where they differ."
    )
    vision_layer_norm: bool | None = argument("vision_grounded_t5: T5's layer norm on what the decoder attends to.")

    def __post_init__(self):
        self.t5_config = read_config("t5_config", self.t5_config)

    def config_fields(self) -> dict:
        """The fields of the picture models' configs that were given."""
        sources = ("model_type", "text_model_name_or_path", "t5_config", "t5_start")
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in sources}


@dataclass
class IdentifierArguments:
    """What names a picture or a document. A checkpoint that brings identifiers keeps them."""

    _argument_group_name = "identifiers"
    _bounds = {
        "identifier_seed": SEED,
        "identifier_branches": Bounds(2, 10**6),
        "identifier_leaf_size": COUNT,
        "identifier_levels": Bounds(1, 1000),
        "identifier_codes": Bounds(2, 10**6),
    }

    identifier_scheme: Literal["atomic", "naive", "semantic", "rq"] | None = argument(
        "atomic (one new token each), naive (a random number in digits), semantic (hierarchical k-means) or rq (residual "
        "quantisation); by default atomic, or what the checkpoint brings."
    )
    identifier_vectors_from: str | None = argument(
        "semantic and rq: folder of an XMatchingModel, trained on the same split, whose picture vectors are clustered."
    )
    identifier_vectors: Literal["auto", "text", "vision"] = argument(
        "semantic and rq without --identifier_vectors_from: the training captions or documents (latent semantic analysis), "
        "or the vision tower's mean state. auto: text where everything has some, otherwise a tower that was trained.",
        "auto",
    )
    identifier_rows: Literal["sentences", "random", "mean"] | None = argument(
        "Where the embeddings of new identifier tokens start beside pretrained words: sentences (from what T5 says when it reads "
        "the trained captions or documents), random (at the words' scale), or mean (transformers' own: around the words' mean, "
        "too near each other to learn from). By default sentences."
    )
    identifier_seed: int = argument("Seed of random numbers and of k-means.", 0)
    identifier_branches: int = argument("semantic: clusters of a level.", 10)
    identifier_leaf_size: int = argument("semantic: the most items of a cluster that is not divided further.", 100)
    identifier_levels: int = argument("rq: how many codes make an identifier.", 3)
    identifier_codes: int | None = argument("rq: codes of a level; by default chosen from the gallery's size.")

    def options(self) -> dict:
        """Keywords of `assign_identifiers`."""
        return {
            "seed": self.identifier_seed,
            "branches": self.identifier_branches,
            "leaf_size": self.identifier_leaf_size,
            "levels": self.identifier_levels,
            "codes": self.identifier_codes,
        }


@dataclass
class TextArguments:
    """How texts are written before T5 reads them. What is left out is as the model was trained with, when it is a trained one."""

    _argument_group_name = "text"

    caption_prompt: str | None = argument("Written before a caption or question; for a new model 'question: '.")
    document_prompt: str = argument("Written before a document.", "document: ")
    clean_captions: bool | None = argument(
        'Captions and questions in lower case, with blanks for .!"()*#:;~ and other punctuation left; for a new model false.'
    )
    pseudo_queries_file: str | None = argument(
        "Text corpora: JSONL of document_id and question, written by a model, trained on beside the real questions."
    )

    def style(self) -> dict:
        """Of the processor; None: as the model was trained with."""
        return {"prompt": self.caption_prompt, "clean_text": self.clean_captions}


@dataclass
class TeacherArguments:
    """Who else says which items a training sentence fits; by default the labels alone."""

    _argument_group_name = "teacher"
    _bounds = {"teacher_weight": Bounds(0, above=True), "teacher_invented_share": SHARE}

    teacher_model_name_or_path: str | None = argument(
        "Folder or Hub id of a sentence encoder (all-MiniLM-L6-v2 and the like; an item is the mean of its trained texts' "
        "vectors), or of a dual encoder (CLIP, an XMatchingModel trained on the same split; an item is that mean and its "
        "picture's vector, added)."
    )
    teacher_weight: float = argument("Of the teacher's targets beside the labels.", 3.0)
    teacher_invented_share: float = argument(
        "Beside this share of the training sentences a batch gets one more, of words of two items' captions, which the teacher "
        "alone judges: the first token of the identifiers is taught. Batches grow by as much, in time and memory.",
        0.0,
    )


@dataclass
class DSITrainingArguments(RunArguments, Seq2SeqTrainingArguments):
    """What the generative models' training knows."""

    _bounds = {
        "embedding_learning_rate": RATE,
        "num_beams": Bounds(1, MOST_BEAMS),
        "max_memorised_samples": Bounds(-1),
        "generation_max_length": COUNT,
        "generation_num_beams": COUNT,
    }
    _measured = (*RunArguments._measured, "memorised")

    embedding_learning_rate: float | None = argument(
        "Learning rate of the word embeddings. A T5 with random weights starts them at length sqrt(d_model), so they need larger "
        "steps than its layers. By default learning_rate."
    )
    num_beams: int = argument("Beams of the search, and the longest ranking.", 10)
    max_memorised_samples: int = argument(
        "At each evaluation, ask for the identifiers of this many pictures or documents themselves, spaced evenly; 0: of none, "
        "-1: of all. eval_memorised is the share whose best beam is exactly their own identifier.",
        1000,
    )


@dataclass
class IndexingArguments:
    """How pictures or documents are brought to their identifiers while sentences are."""

    _argument_group_name = "indexing"
    _bounds = {"indexing_ratio": Bounds(0, 1000)}

    indexing_ratio: float | None = argument(
        "Rows picture -> identifier for each row caption -> identifier; 0: none. By default 1 for codebook_t5, 0 for the "
        "other models; of documents, each once an epoch."
    )
    indexing_strategy: Literal["inputs2targets", "targets2inputs", "bidirectional"] = argument(
        "Item -> identifier, identifier -> item (for a picture: its visual tokens), or both (DSI, section 3.1).",
        "inputs2targets",
    )
    index_held_out_images: bool = argument(
        "Pictures whose captions are all held out are indexed too; false: they have an identifier but are never shown.",
        True,
    )


@dataclass
class ImageIndexingArguments:
    """What run_image_indexing.py teaches."""

    _argument_group_name = "indexing"
    _bounds = {"stop_when_memorised": Bounds(0, 1, above=True)}

    objective: Literal["identifier", "caption"] = argument(
        "Picture -> identifier (step 1 of vision_grounded_t5), or picture -> caption (pretraining).", "identifier"
    )
    stop_when_memorised: float | None = argument(
        "Stop when this share of the pictures is brought to its own identifier, measured at each evaluation."
    )
    caption_prompt: str | None = argument(
        "Written before a caption where identifiers start from captions, as the second step will write it; kept with the model, "
        "by default 'question: '."
    )
    clean_captions: bool = argument(
        'Objective caption: in lower case, with blanks for .!"()*#:;~ and other punctuation left.', False
    )
    index_held_out_images: bool = argument(
        "Pictures whose captions are all held out are indexed too; false: they have an identifier but are never shown.",
        True,
    )

    def check(self, args: DSITrainingArguments) -> None:
        """Raises `UserError` for arguments that this script would not heed."""
        if args.do_predict or args.compare_with_baselines:
            flag = "do_predict" if args.do_predict else "compare_with_baselines"
            raise UserError(f"--{flag} needs a model that answers captions; see run_dsi.py")
        args._measured = ("loss", "memorised") if self.objective == "identifier" else ("loss",)
        if self.stop_when_memorised:
            if self.objective == "caption":
                raise UserError("--stop_when_memorised is for identifiers; with --objective caption leave it out")
            if args.eval_strategy == "no" or not args.max_memorised_samples:
                raise UserError(
                    "--stop_when_memorised needs evaluations: give --eval_strategy and --max_memorised_samples"
                )
