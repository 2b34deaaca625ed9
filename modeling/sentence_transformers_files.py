"""What sentence-transformers (6 and later) needs to open a saved XMatchingModel as it is.

Sentences and pictures then come out as vectors of one space, the same as from XMatchingModel itself:

    model = SentenceTransformer(folder, trust_remote_code=True)
    model.encode(["two dogs play in the snow"]), model.encode([picture])
"""

import json
from pathlib import Path

# Through forward(), which takes whatever the tower's processor gives (SigLIP 2: masks of patches, too).
FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"}
    ],
    "sentence_bert_config.json": {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": {"method": "forward", "method_output_name": "text_embeds"},
            "image": {"method": "forward", "method_output_name": "image_embeds"},
        },
        "module_output_name": "sentence_embedding",
    },
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    },
}


def write_sentence_transformers_files(folder: Path | str) -> None:
    """Beside model and processor, which `save_pretrained` wrote."""
    for name, content in FILES.items():
        Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
