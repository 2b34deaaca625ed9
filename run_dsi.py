"""Train and evaluate a generative retriever: caption (or question) -> identifier.

    accelerate launch run_dsi.py recipes/quickstart/codebook_t5.yaml --output_dir runs/codebook_t5
    accelerate launch run_dsi.py recipes/photos/codebook_t5.yaml --dataset_name ../my_photos --identifier_scheme rq
    accelerate launch run_dsi.py recipes/photos/vision_grounded_t5_retrieval.yaml \
        --model_name_or_path runs/photos/vision_grounded_t5_indexing
    accelerate launch run_dsi.py recipes/nq10k/dsi.yaml --text_model_name_or_path google-t5/t5-base
    python run_dsi.py --model_name_or_path runs/codebook_t5 --dataset_name shape_scenes --held_out_captions_per_image 1 \
        --do_eval --output_dir runs/evaluation

A recipe comes first, flags override it. See --help for every argument, README.md for recipes and data.
"""

import logging

import imagedex.cli as cli
from imagedex.errors import UserError
from imagedex.training import lifecycle, results
from imagedex.training.arguments import CorpusArguments, ModelArguments
from imagedex.training.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.dsi_arguments import (
    DSITrainingArguments,
    IdentifierArguments,
    IndexingArguments,
    T5Arguments,
    TextArguments,
)
from imagedex.training.dsi_data import DSICollator, load_indexed_splits
from imagedex.training.dsi_model import (
    brought_identifiers,
    build_model,
    build_processor,
    check_model,
    identify,
    image_processor_of,
    tokenizer_of,
)
from imagedex.training.dsi_rows import DSIRows, indexing_ratio
from imagedex.training.model_card import CardFacts, write_dsi_card
from imagedex.training.trainer_dsi import DSITrainer

logger = logging.getLogger(__name__)


def main(argv=None):
    groups = (
        ModelArguments, T5Arguments, IdentifierArguments, TextArguments, IndexingArguments, CaptionAugmentationArguments,
        CorpusArguments, DSITrainingArguments,
    )  # fmt: skip
    given = cli.parse_arguments(groups, __doc__, argv)
    model_args, t5_args, identifier_args, text_args, indexing_args, augmentation, data_args, args = given
    lifecycle.setup_logging(args)
    kind = check_model(model_args, t5_args)
    run = lifecycle.Run(args, *given[:-1])

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_indexed_splits(data_args, text_args)
    if splits.documents and kind != "t5":
        raise UserError(
            f"--dataset_name {data_args.dataset_name} holds documents, and a {kind} indexes pictures; give a t5"
        )
    if splits.evaluation is None:
        lifecycle.without_evaluation(args)

    ratio = indexing_ratio(kind, indexing_args, splits.documents)

    # texts -> processor -> model -> identifiers
    processor = build_processor(
        model_args, t5_args, kind, data_args.image_size, splits.training_texts(), run.checkpoint
    )
    brought = brought_identifiers(run.checkpoint or model_args.model_name_or_path)
    model = build_model(model_args, t5_args, kind, processor)
    collator = DSICollator(tokenizer_of(processor), image_processor_of(processor))
    rows = DSIRows(splits, model, collator, args, data_args, text_args, brought)
    identifiers = identify(rows, identifier_args, model_args, t5_args, resumed=run.checkpoint is not None)

    # datasets.map -> batches
    train = evaluation = None
    with args.main_process_first(desc="preprocessing"):
        if args.do_train:
            train = rows.training(indexing_args, ratio, augmentation)
        if splits.evaluation is not None:
            recall = ratio != 0 or kind == "vision_grounded_t5"  # whose second step may forget the first
            evaluation = rows.evaluation(True, recall, indexing_args.index_held_out_images)

    trainer = DSITrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=processor,
        identifiers=identifiers,
    )
    facts = CardFacts.of(splits, data_args)
    mix = rows.training_mix(indexing_args, ratio)
    trainer.write_card = lambda path: write_dsi_card(path, trainer, facts, splits, "retrieval", mix)
    if args.do_eval and args.compare_with_baselines and args.process_index == 0:
        facts.baselines = results.baselines(splits, args.baseline_text_encoder, None)
    facts.metrics = run.carry_out(trainer)
    if args.do_predict:
        results.write_predictions(trainer, splits)
    results.finish(trainer, splits, facts, results.DSI_MADE)


if __name__ == "__main__":
    cli.run(main)
