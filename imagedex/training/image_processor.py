"""An image processor said in a recipe: how pictures are resized, cropped and normalised for evaluation."""

from PIL import Image
from transformers import CLIPImageProcessorPil

from imagedex.bounds import check_pixels
from imagedex.command_line import suggestion
from imagedex.errors import UserError
from imagedex.modeling.picture_reading import read_pictures

LARGEST = 4096  # pixels a side; a batch of larger ones fits no machine

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
    for name in ("size", "crop_size"):
        check_sides(config.get(name), f"{where}: {name}")
    if "resample" in config:
        given = config["resample"]
        config["resample"] = FILTERS.get(given, given)
        if config["resample"] not in FILTERS.values():
            raise UserError(f"{where}: resample is one of {', '.join(FILTERS)}, not {given!r}")
    try:
        processor = CLIPImageProcessorPil(**config)
        check_pixels(processor, where)
        output_size(processor)  # what cannot work fails here, not at the first picture
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:300]}") from error
    return processor


def check_sides(size, where: str) -> None:
    """Raises `UserError` for a side, or one of several by name, that is larger than `LARGEST`."""
    for side in size.values() if isinstance(size, dict) else (size,):
        if isinstance(side, int | float) and side > LARGEST:
            raise UserError(f"{where} of {side:,} pixels: at most {LARGEST:,}")


def check_image_processor(name: str | None, config: dict | None) -> None:
    """Before anything is read: --image_processor_name or --image_processor_config, and what it says works."""
    if config:
        if name:
            raise UserError("give --image_processor_name or --image_processor_config, not both")
        build_image_processor(config)


def output_size(image_processor) -> tuple[int, int] | None:
    """(height, width) of what the processor gives; None when that depends on the picture, or is no picture but patches. It is
    asked, not guessed."""
    wide, tall = (
        read_pictures([Image.new("RGB", size)], image_processor)["pixel_values"][0] for size in ((640, 320), (320, 640))
    )
    return tuple(wide.shape[1:]) if wide.ndim == 3 and wide.shape == tall.shape else None
