"""A small trained model and its adapters, with answers that can be checked exactly."""
