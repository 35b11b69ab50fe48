"""Every measured table of the book: ``python -m experiments.NAME`` writes one file of ``ddpm_tutorial/results``, and
``python -m experiments`` (``make results``) all of them."""
