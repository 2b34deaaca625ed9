r"""Teach a generative model the pictures themselves: picture -> identifier, the first step of VisionGroundedT5, or captioning.

    python run_image_indexing.py recipes/photos/vision_grounded_t5_indexing.yaml --dataset_name my_photos \
        --output_dir runs/photos/vision_grounded_t5_indexing
    python run_dsi.py recipes/photos/vision_grounded_t5_retrieval.yaml --dataset_name my_photos \
        --model_name_or_path runs/photos/vision_grounded_t5_indexing --output_dir runs/photos/vision_grounded_t5
    python run_image_indexing.py --objective caption --model_type codebook_t5 --quantization learned \
        --text_model_name_or_path google-t5/t5-base --vision_model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset_name my_photos --held_out_captions_per_image 1 --do_train --do_eval --output_dir runs/captioning

A recipe comes first: a file, or the name of one that comes with imagedex (`imagedex recipes` lists them). Flags override it. A
flag also removes the recipe's alternatives to it: --train_file removes dataset_name.
"""

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
    ImageIndexingArguments,
    T5Arguments,
    TextArguments,
)

ARGUMENTS = (
    ModelArguments, T5Arguments, IdentifierArguments, ImageIndexingArguments, CorpusArguments, DSITrainingArguments,
)  # fmt: skip


def main(argv=None, prog=None):
    given = command_line.parse_arguments(ARGUMENTS, __doc__, argv, prog)
    model_args, t5_args, identifier_args, indexing_args, data_args, args = given

    # what takes seconds to import comes after the arguments are known: --help and a mistake answer at once
    from imagedex.corpora.indexed import load_picture_splits
    from imagedex.training import logs, results, run
    from imagedex.training.cards import CardFacts, write_dsi_card
    from imagedex.training.generative.checks import check_model
    from imagedex.training.generative.model import build_parts
    from imagedex.training.generative.trainer import DSITrainer, StopWhenMemorised

    logs.setup_logging(args)
    data_args.require_corpus()
    indexing_args.check(args)
    captioning = indexing_args.objective == "caption"
    judged = not (args.do_train or captioning)
    kind = check_model(model_args, t5_args, data_args.image_size, indexing=True, needs_identifiers=judged)
    life = run.Run(args, *given[:-1])
    if life.finished:
        return results.say_again(life)

    # corpus -> splits
    with args.main_process_first(desc="reading the corpus"):
        splits = load_picture_splits(data_args)
    if captioning and splits.evaluation is None:
        run.without_evaluation(args)

    # texts -> processor -> model -> identifiers
    wanted = None if captioning else identifier_args
    texts = TextArguments(caption_prompt=indexing_args.caption_prompt)
    parts = build_parts(kind, splits, life.checkpoint, args, data_args, model_args, t5_args, texts, wanted)
    rows = parts.rows

    # datasets.map -> batches
    train = evaluation = None
    if captioning:
        train = rows.captioning(splits.train, indexing_args.clean_captions) if args.do_train else None
        if splits.evaluation is not None:
            evaluation = rows.captioning_evaluation(indexing_args.clean_captions)
    else:
        train = rows.indexing("inputs2targets", indexing_args.index_held_out_images)[0] if args.do_train else None
        evaluation = rows.evaluation(False, True, indexing_args.index_held_out_images)

    facts = CardFacts.of(splits, data_args)
    card = {"facts": facts, "nouns": splits.nouns, "step": "captioning" if captioning else "indexing"}
    trainer = DSITrainer.of(parts, args, train, evaluation, functools.partial(write_dsi_card, **card))
    if indexing_args.stop_when_memorised:
        trainer.add_callback(StopWhenMemorised(indexing_args.stop_when_memorised))
    facts.metrics = life.carry_out(trainer)
    results.finish(life, trainer, splits, facts, results.MADE if captioning else results.DSI_MADE)


if __name__ == "__main__":
    command_line.run(main)
