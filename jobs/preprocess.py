"""Convert slides to OME-Zarr pyramids as a Ray job.

ray job submit --working-dir . -- python jobs/preprocess.py /data/slides --out /data/out --ray --workers 64

Paths are absolute and on storage that the cluster's nodes share, or URLs; the last line of output is JSON.
"""

import sys

from ats_stream.cli import run_job

if __name__ == "__main__":
    sys.exit(run_job("preprocess"))
