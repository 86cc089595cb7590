"""kvpress: a key-value cache that keeps, attends to and stores only what matters."""
