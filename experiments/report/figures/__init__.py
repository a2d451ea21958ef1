"""Figures of pages: drawn once, put into the page as vectors whose colours follow the reader's."""
