"""Layers of peft and adapters with another forward, which ``accelerate`` gives them."""
