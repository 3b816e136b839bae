"""Slide, picture and video files, read in place: one module per way of reading."""
