"""Pure tensor maths of displacements: means, cosines, spectra, logits, and their intervals.

Tensors (or numpy arrays) in, frozen results out, float64 inside. No models, no files.
"""
