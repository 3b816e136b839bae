"""Writing pyramids: from slides, stores and arrays to OME-Zarr, planned, resumable, by many workers."""
