"""Every measured table of the book: ``python -m experiments.NAME`` writes its files of ``ddpm_tutorial/results``, and
``python -m experiments`` (``make results``) runs all but ``emoji``, ``latents``, ``classifiers`` and ``gpu``, whose
networks ship."""
