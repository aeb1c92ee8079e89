"""The proof that a bundle says what PyTorch says."""
