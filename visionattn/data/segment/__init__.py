"""Images with a class for each pixel: folder layouts and masks."""
