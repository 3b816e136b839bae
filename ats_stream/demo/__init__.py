"""The demo: a real slide converted, large images of real digits learned from, a report written."""
