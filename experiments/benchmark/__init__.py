"""Speed against other libraries' networks: ``python -m experiments.benchmark`` (chapter 5)."""
