"""What transformers loads for `custom_generate`."""
