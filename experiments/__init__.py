"""Every measured table of the book: ``python -m experiments.NAME`` makes one, or several. ``python -m experiments``
(``make results``) runs all but those that also make networks which ship: ``emoji``, ``latents``, ``classifiers`` and
``gpu``."""
