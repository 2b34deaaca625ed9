r"""Train and evaluate a generative retriever: caption (or question) -> identifier.

    python run_dsi.py recipes/quickstart/codebook_t5.yaml --output_dir runs/codebook_t5
    python run_dsi.py recipes/photos/codebook_t5.yaml --dataset_name my_photos --identifier_scheme rq --output_dir runs/rq
    python run_dsi.py recipes/photos/vision_grounded_t5_retrieval.yaml --dataset_name my_photos \
        --model_name_or_path runs/photos/vision_grounded_t5_indexing --output_dir runs/photos/vision_grounded_t5
    python run_dsi.py recipes/nq10k/dsi.yaml --text_model_name_or_path google-t5/t5-base --output_dir runs/nq10k
    python run_dsi.py --model_name_or_path runs/codebook_t5 --dataset_name shape_scenes --held_out_captions_per_image 1 \
        --do_eval --output_dir runs/evaluation

A recipe comes first: a file, or the name of one that comes with imagedex (`imagedex recipes` lists them). Flags override it. A
flag also removes the recipe's alternatives to it: --train_file removes dataset_name.
"""

import dataclasses
import functools

from imagedex import endings

if __name__ == "__main__":
    endings.leave_at_ctrl_c()  # the imports that follow take seconds

from imagedex import command_line
from imagedex.corpora.arguments import CorpusArguments
from imagedex.training.arguments import ModelArguments
from imagedex.training.generative.arguments import (
    DSITrainingArguments,
    IdentifierArguments,
    IndexingArguments,
    T5Arguments,
    TeacherArguments,
    TextArguments,
)
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments

ARGUMENTS = (
    ModelArguments, T5Arguments, IdentifierArguments, TextArguments, IndexingArguments, CaptionAugmentationArguments,
    TeacherArguments, CorpusArguments, DSITrainingArguments,
)  # fmt: skip


def main(argv=None, prog=None):
    given = command_line.parse_arguments(ARGUMENTS, __doc__, argv, prog)
    model_args, t5_args, identifier_args, text_args, indexing_args, augmentation, teacher_args, data_args, args = given

    # what takes seconds to import comes after the arguments are known: --help and a mistake answer at once
    from imagedex.corpora.indexed import load_indexed_splits
    from imagedex.training import logs, results, run
    from imagedex.training.cards import CardFacts, write_dsi_card
    from imagedex.training.generative.checks import check_corpus, check_model
    from imagedex.training.generative.model import build_parts
    from imagedex.training.generative.rows import indexing_ratio
    from imagedex.training.generative.teacher import check_teacher, open_teacher
    from imagedex.training.generative.trainer import DSITrainer

    logs.setup_logging(args)
    data_args.require_corpus()
    kind = check_model(model_args, t5_args, data_args.image_size, needs_identifiers=not args.do_train)
    life = run.Run(args, *given[:-1])
    if life.finished:
        return results.say_again(life)

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_indexed_splits(data_args, text_args.pseudo_queries_file)
    check_corpus(kind, splits, data_args)
    check_teacher(teacher_args, splits, dataclasses.asdict(data_args))
    if splits.evaluation is None:
        run.without_evaluation(args)
    ratio = indexing_ratio(kind, indexing_args, splits.documents)

    # texts -> processor -> model -> identifiers
    parts = build_parts(kind, splits, life.checkpoint, args, data_args, model_args, t5_args, text_args, identifier_args)

    # datasets.map -> batches
    train = evaluation = teacher = None
    if args.do_train:
        teacher = open_teacher(teacher_args, splits, parts.identifiers, args)
        train = parts.rows.training(indexing_args, ratio, augmentation, teacher_args)
    if splits.evaluation is not None:
        recall = ratio != 0 or kind == "vision_grounded_t5"  # whose second step may forget the first
        evaluation = parts.rows.evaluation(True, recall, indexing_args.index_held_out_images)

    facts = CardFacts.of(splits, data_args)
    mix = parts.rows.training_mix(indexing_args, ratio)
    card = {"facts": facts, "nouns": splits.nouns, "step": "retrieval", "training_mix": mix}
    trainer = DSITrainer.of(parts, args, train, evaluation, functools.partial(write_dsi_card, **card), teacher)
    facts.baselines = results.measure_baselines(life, splits)
    facts.metrics = life.carry_out(trainer)
    if args.do_predict and not life.has("rankings.jsonl"):
        results.write_predictions(trainer, splits)
    results.finish(life, trainer, splits, facts, results.DSI_MADE)


if __name__ == "__main__":
    command_line.run(main)
