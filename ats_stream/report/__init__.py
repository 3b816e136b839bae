"""Pictures of predictions, line charts, and one self-contained HTML page that carries them.

Needs numpy, Pillow and jinja2 alone.
"""
