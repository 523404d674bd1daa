"""Adapters in the files of peft and adapters."""
