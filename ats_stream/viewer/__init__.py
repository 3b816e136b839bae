"""A local web viewer: pyramids and slides read in place, with attention, drawn patches and masks on top."""
