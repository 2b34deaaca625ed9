"""An image processor said in a recipe: how pictures are resized, cropped and normalised for evaluation."""

from PIL import Image
from transformers import CLIPImageProcessorPil

from imagedex.cli import suggestion
from imagedex.errors import UserError

FIELDS = (
    "size", "crop_size", "resample", "image_mean", "image_std", "rescale_factor", "do_resize", "do_center_crop",
    "do_rescale", "do_normalize", "do_convert_rgb",
)  # fmt: skip
FILTERS = {name.lower(): int(filter) for name, filter in Image.Resampling.__members__.items()}


def build_image_processor(config: dict) -> CLIPImageProcessorPil:
    """Resize, centre crop, rescale to 0-1, normalise: the steps of `CLIPImageProcessor`, whose values fill what is left out.

    Args: config, its fields: `size` ({shortest_edge} or {height, width}), `crop_size` ({height, width}; left out, nothing
    is cropped), `resample` (Pillow's name or number of the filter), `image_mean`, `image_std` (three each), ...
    Raises `UserError` for an unknown field or a value that does not work.
    """
    where = "--image_processor_config"
    for name in config:
        if name not in FIELDS:
            raise UserError(f"{where}: an image processor has no {name!r}{suggestion(name, FIELDS)}")
    for name in ("image_mean", "image_std"):
        value = config.get(name, [0.5] * 3)
        if not (isinstance(value, list) and len(value) == 3 and all(isinstance(x, int | float) for x in value)):
            raise UserError(f"{where}: {name} is three numbers, one a colour channel, not {value!r}")
    config = {"do_center_crop": "crop_size" in config} | config
    if "resample" in config:
        given = config["resample"]
        config["resample"] = FILTERS.get(given, given)
        if config["resample"] not in FILTERS.values():
            raise UserError(f"{where}: resample is one of {', '.join(FILTERS)}, not {given!r}")
    try:
        processor = CLIPImageProcessorPil(**config)
        output_size(processor)  # what cannot work fails here, not at the first picture
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    return processor


def output_size(image_processor) -> tuple[int, int] | None:
    """(height, width) of what the processor gives; None when that depends on the picture. It is asked, not guessed."""
    wide, tall = (
        image_processor(images=[Image.new("RGB", size)], return_tensors="np")["pixel_values"][0].shape[-2:]
        for size in ((640, 320), (320, 640))
    )
    return (int(wide[0]), int(wide[1])) if wide == tall else None
