"""What a placeholder stands for: views of an image file, rows of a prompt, and how both look together."""
