"""What a reader is shown: a page in a single file, with nothing to fetch."""

from geomkd.report.pages import page

__all__ = ["page"]
