"""The HTML report: what runs found, compared on one page."""
