"""Teach a generative model the pictures themselves: picture -> identifier, the first step of VisionGroundedT5, or captioning.

    accelerate launch run_image_indexing.py recipes/photos/vision_grounded_t5_indexing.yaml --dataset_name ../my_photos \
        --output_dir runs/photos/vision_grounded_t5_indexing
    accelerate launch run_dsi.py recipes/photos/vision_grounded_t5_retrieval.yaml --dataset_name ../my_photos \
        --model_name_or_path runs/photos/vision_grounded_t5_indexing
    accelerate launch run_image_indexing.py --objective caption --model_type codebook_t5 --quantization learned \
        --text_model_name_or_path google-t5/t5-base --vision_model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name ../my_photos --held_out_captions_per_image 1 --do_train --do_eval --output_dir runs/captioning

A recipe comes first, flags override it. See --help for every argument, README.md for recipes and data.
"""

import logging

import imagedex.cli as cli
from imagedex.training import lifecycle, results
from imagedex.training.arguments import CorpusArguments, ModelArguments
from imagedex.training.dsi_arguments import (
    DSITrainingArguments,
    IdentifierArguments,
    ImageIndexingArguments,
    T5Arguments,
    TextArguments,
)
from imagedex.training.dsi_data import DSICollator, load_picture_splits
from imagedex.training.dsi_model import (
    brought_identifiers,
    build_model,
    build_processor,
    check_model,
    identify,
    image_processor_of,
    tokenizer_of,
)
from imagedex.training.dsi_rows import DSIRows
from imagedex.training.model_card import CardFacts, write_dsi_card
from imagedex.training.trainer_dsi import DSITrainer, StopWhenMemorised

logger = logging.getLogger(__name__)


def main(argv=None):
    groups = (
        ModelArguments, T5Arguments, IdentifierArguments, ImageIndexingArguments, CorpusArguments, DSITrainingArguments,
    )  # fmt: skip
    given = cli.parse_arguments(groups, __doc__, argv)
    model_args, t5_args, identifier_args, indexing_args, data_args, args = given
    lifecycle.setup_logging(args)
    indexing_args.check(args)
    captioning = indexing_args.objective == "caption"
    kind = check_model(model_args, t5_args, indexing=True)
    run = lifecycle.Run(args, *given[:-1])

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_picture_splits(data_args)
    if captioning and splits.evaluation is None:
        lifecycle.without_evaluation(args)

    # texts -> processor -> model -> identifiers
    processor = build_processor(
        model_args, t5_args, kind, data_args.image_size, splits.training_texts(), run.checkpoint
    )
    brought = brought_identifiers(run.checkpoint or model_args.model_name_or_path)
    model = build_model(model_args, t5_args, kind, processor)
    collator = DSICollator(tokenizer_of(processor), image_processor_of(processor))
    texts = TextArguments(clean_captions=indexing_args.clean_captions)
    rows = DSIRows(splits, model, collator, args, data_args, texts, None if captioning else brought)
    identifiers = None
    if not captioning:
        identifiers = identify(rows, identifier_args, model_args, t5_args, resumed=run.checkpoint is not None)

    # datasets.map -> batches
    train = evaluation = None
    with args.main_process_first(desc="preprocessing"):
        if captioning:
            train = rows.captioning(splits.train) if args.do_train else None
            evaluation = rows.captioning_evaluation() if splits.evaluation is not None else None
        else:
            train = rows.indexing("inputs2targets", indexing_args.index_held_out_images)[0] if args.do_train else None
            evaluation = rows.evaluation(False, True, indexing_args.index_held_out_images)

    trainer = DSITrainer(
        model=model,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=collator,
        processing_class=processor,
        identifiers=identifiers,
    )
    if indexing_args.stop_when_memorised:
        trainer.add_callback(StopWhenMemorised(indexing_args.stop_when_memorised))
    facts = CardFacts.of(splits, data_args)
    step = "captioning" if captioning else "indexing"
    trainer.write_card = lambda path: write_dsi_card(path, trainer, facts, splits, step)
    facts.metrics = run.carry_out(trainer)
    results.finish(trainer, splits, facts, results.DSI_MADE if identifiers else results.MADE)


if __name__ == "__main__":
    cli.run(main)
