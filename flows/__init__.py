"""The pipeline: experiment files, cached stages, tracking, the frontier, the command line."""
