"""The page and the JSON endpoint over a gallery: `imagedex serve`."""
