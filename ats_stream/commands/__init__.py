"""The commands of the command line, each with ``add_arguments(parser)`` and ``run(arguments) -> result``."""
