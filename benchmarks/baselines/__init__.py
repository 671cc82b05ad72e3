"""What S-LoRA is compared with, on the same card and traces: each a command of its own."""
