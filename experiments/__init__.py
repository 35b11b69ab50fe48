"""Every measured table of the book: ``python -m experiments.NAME`` writes one file of ``ddpm_tutorial/results``, and
``python -m experiments`` (``make results``) all but those whose networks are their own, ``emoji`` and ``latents``."""
