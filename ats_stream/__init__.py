"""Distributed streaming attention sampling for gigapixel images.

The parts are imported on their own, so that using one never loads the others:

* :mod:`ats_stream.sampling` -- the method (needs torch alone)
* :mod:`ats_stream.io` -- pyramids, slides, conversion, archive tables
* :mod:`ats_stream.workers` -- the stream of drawn patches and the trainer
* :mod:`ats_stream.report` -- pictures and pages
"""

__version__ = "0.1.0"
