"""The stages of ``make gpu-report``: a module each, and what they share in ``stage.py``."""
