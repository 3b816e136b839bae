"""Convert slides to OME-Zarr pyramids as a Ray job.

ray job submit --working-dir . -- python jobs/preprocess.py SLIDE... --out DIR
"""

import sys

from ats_stream.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("preprocess"))
