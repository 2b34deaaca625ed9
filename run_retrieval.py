r"""Ask trained models for pictures: a gallery and a file of sentences in; rankings, figures and a contact sheet out.

    python run_retrieval.py --model_name_or_path runs/xmatching --image_dir my_photos \
        --queries sentences.txt --top_k 10 --output_dir runs/answers
    python run_retrieval.py --model_name_or_path openai/clip-vit-base-patch32 --dataset_name flickr8k \
        --queries captions.csv --output_dir runs/clip
    python run_retrieval.py --model_name_or_path runs/codebook_t5 --rerank_with runs/xmatching --dataset_name flickr8k \
        --queries captions.csv --output_dir runs/reranked
    python run_retrieval.py --model_name_or_path runs/xmatching runs/codebook_t5 --dataset_name flickr8k \
        --queries captions.csv --output_dir runs/compared
    python run_retrieval.py --model_name_or_path runs/xmatching --gallery my_gallery --queries sentences.txt \
        --output_dir runs/of_my_gallery

A model is an XMatchingModel, any dual encoder with get_text_features and get_image_features (CLIP, SigLIP), or one that
writes identifiers (T5, CodebookT5, VisionGroundedT5), which finds the pictures it has learned; with --add_new_images also
others, without training. Several models are compared in one table and on one contact sheet. Of a gallery that
`imagedex index` keeps (--gallery) nothing is encoded again.

The queries are .txt (one sentence a line; with --turns one dialogue), .csv, .jsonl or .parquet. When the file has a column
`image` with the right picture's image_id (its path relative to the gallery's folder), the figures are printed and written too.
Rankings are written as they are found: a million queries take no more memory than a thousand, and after a stop the same command
goes on.
"""

import logging

from imagedex import endings

if __name__ == "__main__":
    endings.leave_at_ctrl_c()  # the imports that follow take seconds

from imagedex import command_line, files
from imagedex.retrieval.arguments import GenerativeArguments, RetrievalArguments

logger = logging.getLogger(__name__)

ARGUMENTS = (RetrievalArguments, GenerativeArguments)


def main(argv=None, prog=None):
    args, generative = command_line.parse_arguments(ARGUMENTS, __doc__, argv, prog)

    # what takes seconds to import comes after the arguments are known: --help and a mistake answer at once
    from imagedex.checkpoints import choose_device
    from imagedex.evaluation.rankings import check_names
    from imagedex.retrieval import answering, comparison
    from imagedex.retrieval.gallery import read_gallery
    from imagedex.retrieval.kept_gallery import KeptGallery
    from imagedex.retrieval.opening import Opener, check_kinds
    from imagedex.retrieval.queries import check_targets, open_queries

    answering.setup_logging()

    # everything that can be wrong is found before anything is written
    arguments = answering.recorded(args, generative)
    output_dir = files.check_output_dir(args.output_dir, arguments, answering.RECORD)
    answering.check_apart(output_dir, args)
    device = choose_device(args.device)
    check_kinds(args.model_name_or_path, generative)  # before the gallery, which may take long to read
    labels = comparison.model_labels(args.model_name_or_path)
    queries = open_queries(args.queries, args.query_column, args.read_turns)
    kept = KeptGallery(args.gallery) if args.gallery else None
    corpus = args.image_dir, args.dataset_name, args.dataset_config_name, args.dataset_split, args.unreadable_images
    if kept is None:
        gallery = read_gallery(*corpus, args.num_workers or None, generative.held_out)
    else:
        gallery = kept.rows(generative.held_out)
    check_targets(queries, gallery["image_id"], args.queries)
    check_names(gallery["image_id"], args.output_format)
    opener, alone = Opener(args, generative, gallery, queries, device, output_dir, kept), len(labels) == 1
    folders = {label: output_dir if alone else output_dir / comparison.folder_of(label) for label in labels}
    opened = {label: opener.open(label, name, folders[label]) for label, name in labels.items()}
    models = {label: [source for source, _ in part.kept] for label, part in opened.items()}
    trained = comparison.possibly_trained_queries(models, queries, args.queries, args.dataset_name, gallery)
    if len(gallery) < args.top_k:
        logger.warning(
            "the gallery has %d pictures, so rankings have %d places, not %d", len(gallery), len(gallery), args.top_k
        )

    # each model answers; then all of them on one table and one sheet
    with answering.begun(output_dir, arguments):
        answers = [
            answering.answer(part, queries, args, folders[label], alone, trained.get(label))
            for label, part in opened.items()
        ]
        written = answering.finish(answers, args, queries, gallery, output_dir)
    by = "" if alone else f" by {len(answers)} models"
    noun = "pictures" if "image" in gallery.column_names else "documents"
    print(f"{len(queries)} queries answered{by} from {len(gallery)} {noun}: {', '.join(map(str, written))}")


if __name__ == "__main__":
    command_line.run(main)
