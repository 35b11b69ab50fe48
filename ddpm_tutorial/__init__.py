"""An annotated, executable tutorial on denoising diffusion (DDPM), and the tested package behind it."""

__version__ = "0.1.0"
